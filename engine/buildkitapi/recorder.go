// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/solver"
)

// recorder keeps the events of a build for its history, in BuildKit's form: each StatusResponse with its length in front, as
// 4 bytes little-endian. It hands them on to those who watch. What is long goes to a temporary file.
type recorder struct {
	events *events

	mu     sync.Mutex // guards what follows
	memory bytes.Buffer
	file   *os.File
	out    *bufio.Writer // to file
	err    error         // the first one; nothing is kept then
	logs   map[digest.Digest]int64
	counts
}

// counts are what a build's record says of its steps.
type counts struct {
	seen                               map[digest.Digest]*struct{ cached, completed bool }
	total, cached, completed, warnings int
}

const recordInMemory = 256 << 10

var _ solver.Writer = (*recorder)(nil)

func newRecorder(e *events) *recorder {
	return &recorder{events: e, logs: map[digest.Digest]int64{}, counts: counts{seen: map[digest.Digest]*struct{ cached, completed bool }{}}}
}

// Write implements solver.Writer.
func (r *recorder) Write(s *bkclient.SolveStatus) {
	r.events.Write(s)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.add(s)
}

// add keeps s. mu is held.
func (r *recorder) add(s *bkclient.SolveStatus) {
	r.counts.add(s)
	for _, l := range s.Logs {
		r.logs[l.Vertex] += int64(len(l.Data))
	}
	if r.err != nil {
		return
	}
	if r.file == nil && r.memory.Len() > recordInMemory {
		if r.file, r.err = os.CreateTemp("", "slipway-status-"); r.err != nil {
			return
		}
		os.Remove(r.file.Name()) // it lives as long as it is open
		r.out = bufio.NewWriterSize(r.file, 64<<10)
		if _, r.err = r.memory.WriteTo(r.out); r.err != nil {
			return
		}
	}
	if r.out != nil {
		r.err = writeStatus(r.out, s)
	} else {
		r.err = writeStatus(&r.memory, s)
	}
}

func (c *counts) add(s *bkclient.SolveStatus) {
	c.warnings += len(s.Warnings)
	for _, v := range s.Vertexes {
		state := c.seen[v.Digest]
		if state == nil {
			state = &struct{ cached, completed bool }{}
			c.seen[v.Digest] = state
			c.total++
		}
		if v.Cached && !state.cached {
			state.cached = true
			c.cached++
		}
		if v.Completed != nil && !state.completed {
			state.completed = true
			c.completed++
		}
	}
}

func writeStatus(w io.Writer, s *bkclient.SolveStatus) error {
	for _, m := range s.Marshal() {
		data, err := m.MarshalVT()
		if err != nil {
			return err
		}
		var size [4]byte
		binary.LittleEndian.PutUint32(size[:], uint32(len(data)))
		if _, err := w.Write(size[:]); err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
	}
	return nil
}

// maxStatus bounds one message of a status stream that is read, in bytes.
const maxStatus = 64 << 20

// readStatus calls fn for each message of a status stream.
func readStatus(r io.Reader, fn func(*controlapi.StatusResponse) error) error {
	br := bufio.NewReader(r)
	for {
		var size [4]byte
		if _, err := io.ReadFull(br, size[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the events of a build: %w", err)
		}
		n := binary.LittleEndian.Uint32(size[:])
		if n > maxStatus {
			return fmt.Errorf("read the events of a build: a message of %d bytes", n)
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(br, data); err != nil {
			return fmt.Errorf("read the events of a build: %w", err)
		}
		m := &controlapi.StatusResponse{}
		if err := m.UnmarshalVT(data); err != nil {
			return fmt.Errorf("read the events of a build: %w", err)
		}
		if err := fn(m); err != nil {
			return err
		}
	}
}

// logChunk is how much of a stored log is one event.
const logChunk = 32 << 10

// writeTo writes the whole stream. Where less was shown of a step's output than it wrote, because a client was too slow or
// the step was already running for another build, the stored log takes its place: stored has the size of each and open
// opens it. What is written goes through redact.
func (r *recorder) writeTo(w io.Writer, stored map[digest.Digest]int64, open func(digest.Digest) (io.ReadCloser, error), redact func(string) string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return fmt.Errorf("keep the events of the build: %w", r.err)
	}
	var all io.Reader = bytes.NewReader(r.memory.Bytes())
	if r.file != nil {
		if err := r.out.Flush(); err != nil {
			return err
		}
		if _, err := r.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		all = r.file
	}
	clipped := map[digest.Digest]bool{}
	for v, size := range stored {
		if size != r.logs[v] {
			clipped[v] = true
		}
	}
	out := bufio.NewWriterSize(w, 64<<10)
	err := readStatus(all, func(m *controlapi.StatusResponse) error {
		s := bkclient.NewSolveStatus(m)
		logs := s.Logs
		s.Logs = nil
		for _, l := range logs {
			if !clipped[l.Vertex] {
				s.Logs = append(s.Logs, l)
			}
		}
		for _, v := range s.Vertexes {
			if v.Completed == nil || !clipped[v.Digest] {
				continue
			}
			delete(clipped, v.Digest)
			if err := writeLog(out, v, open, redact); err != nil {
				return err
			}
		}
		redactStatus(s, redact)
		return writeStatus(out, s)
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

func writeLog(w io.Writer, v *bkclient.Vertex, open func(digest.Digest) (io.ReadCloser, error), redact func(string) string) error {
	log, err := open(v.Digest)
	if err != nil {
		return err
	}
	defer log.Close()
	buf := make([]byte, logChunk)
	for {
		n, err := io.ReadFull(log, buf)
		if n > 0 {
			l := &bkclient.VertexLog{Vertex: v.Digest, Stream: 1, Data: []byte(redact(string(buf[:n]))), Timestamp: *v.Completed}
			if err := writeStatus(w, &bkclient.SolveStatus{Logs: []*bkclient.VertexLog{l}}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// end closes what vertices were left open.
func (r *recorder) end() {
	last := r.events.end()
	r.mu.Lock()
	defer r.mu.Unlock()
	if last != nil {
		r.add(last)
	}
}

// close frees the temporary file.
func (r *recorder) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		r.file.Close()
	}
	r.err = os.ErrClosed
}
