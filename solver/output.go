// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"iter"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// replayBytes is how much of a log a build sees that joins work already going on.
	replayBytes = 256 << 10
	// logTailLines and logTailBytes bound VertexError.Log.
	logTailLines = 50
	logTailBytes = 16 << 10
	// logInMemory is how long a log grows before it goes to a temporary file. Most stay below.
	logInMemory = 256 << 10
)

// output is the Progress of one piece of work. It shows everything in every build that waits for it, to those that
// join later from the beginning, and keeps the whole log.
type output struct {
	mu        sync.Mutex // guards what follows
	listeners []*listener
	recent    []chunk // the end of the log, at most replayBytes
	recentLen int
	logged    int  // bytes of the whole log
	cut       bool // recent is not the whole log
	statuses  []client.VertexStatus
	warnings  []string
	log       spool
}

// listener is one vertex of one build that the output is shown for.
type listener struct {
	display *display
	vertex  *Vertex
	users   int // evaluations of that build that wait; nothing is shown while there are none
	// logged and warned are how much of the log, in bytes, and how many warnings had been shown when the last of them left.
	logged, warned int
}

type chunk struct {
	stream int
	data   []byte
}

// Log implements Progress.
func (o *output) Log(stream int, data []byte) {
	if len(data) == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	data = bytes.Clone(data)
	o.log.write(data)
	o.recent = append(o.recent, chunk{stream, data})
	o.recentLen += len(data)
	o.logged += len(data)
	for len(o.recent) > 1 && o.recentLen > replayBytes {
		o.recentLen -= len(o.recent[0].data)
		o.recent[0] = chunk{}
		o.recent = o.recent[1:]
		o.cut = true
	}
	for l := range o.waiting() {
		l.display.log(l.vertex, stream, data)
	}
}

// Status implements Progress.
func (o *output) Status(id string, current, total int64, done bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.IndexFunc(o.statuses, func(s client.VertexStatus) bool { return s.ID == id })
	if i < 0 {
		now := time.Now()
		o.statuses = append(o.statuses, client.VertexStatus{ID: id, Started: &now})
		i = len(o.statuses) - 1
	}
	st := &o.statuses[i]
	st.Current, st.Total, st.Completed = current, total, nil
	if done {
		now := time.Now()
		st.Completed = &now
	}
	for l := range o.waiting() {
		l.display.status(l.vertex, *st)
	}
}

// Warn implements Progress.
func (o *output) Warn(short string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.warnings = append(o.warnings, short)
	for l := range o.waiting() {
		l.display.warn(l.vertex, short)
	}
}

// waiting are the listeners that are to see what comes now. mu is held.
func (o *output) waiting() iter.Seq[*listener] {
	return func(yield func(*listener) bool) {
		for _, l := range o.listeners {
			if l.users > 0 && !yield(l) {
				return
			}
		}
	}
}

// join shows the output in d for v from now on, after what it has missed.
func (o *output) join(d *display, v *Vertex) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := o.find(d, v)
	if i < 0 {
		i = len(o.listeners)
		o.listeners = append(o.listeners, &listener{display: d, vertex: v})
	}
	l := o.listeners[i]
	if l.users++; l.users > 1 {
		return
	}
	for _, st := range o.statuses {
		d.status(v, st)
	}
	for _, w := range o.warnings[l.warned:] {
		d.warn(v, w)
	}
	if o.cut && l.logged == 0 {
		d.log(v, 2, []byte("[slipway: this step was already running for another build; its earlier output is in the stored log]\n"))
	}
	end := o.logged - o.recentLen
	for _, c := range o.recent {
		end += len(c.data)
		if missed := end - l.logged; missed > 0 {
			d.log(v, c.stream, c.data[max(len(c.data)-missed, 0):])
		}
	}
}

// leave ends what join began.
func (o *output) leave(d *display, v *Vertex) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if i := o.find(d, v); i >= 0 {
		l := o.listeners[i]
		if l.users--; l.users == 0 {
			l.logged, l.warned = o.logged, len(o.warnings)
		}
	}
}

func (o *output) find(d *display, v *Vertex) int {
	return slices.IndexFunc(o.listeners, func(l *listener) bool { return l.display == d && l.vertex == v })
}

// tail returns the last lines of the log.
func (o *output) tail() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	var b []byte
	for _, c := range o.recent {
		b = append(b, c.data...)
	}
	return lastLines(b, logTailLines, logTailBytes)
}

// lastLines returns at most n lines and about most bytes from the end of b, beginning with a whole line where possible.
func lastLines(b []byte, n, most int) []byte {
	from := len(b)
	for lines := 0; lines < n && from > 0; lines++ {
		next := bytes.LastIndexByte(b[:from-1], '\n') + 1
		if len(b)-next > most {
			if lines == 0 {
				from = len(b) - most
			}
			break
		}
		from = next
	}
	return b[from:]
}

// store writes the whole log to logs and returns its digest, "" when there is none.
func (o *output) store(ctx context.Context, logs Logs) (digest.Digest, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if logs == nil || o.log.size == 0 {
		return "", nil
	}
	return o.log.store(ctx, logs)
}

// discard frees the log's temporary file.
func (o *output) discard() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.log.discard()
}

// spool keeps a log, in memory while it is small and in a temporary file then.
type spool struct {
	memory bytes.Buffer
	file   *os.File
	hash   hash.Hash
	size   int64
	err    error // the first error; later writes do nothing
}

func (s *spool) write(b []byte) {
	if s.err != nil {
		return
	}
	if s.hash == nil {
		s.hash = sha256.New()
	}
	s.hash.Write(b)
	s.size += int64(len(b))
	if s.file == nil && s.memory.Len()+len(b) <= logInMemory {
		s.memory.Write(b)
		return
	}
	if s.file == nil {
		if s.file, s.err = os.CreateTemp("", "slipway-log-"); s.err != nil {
			return
		}
		os.Remove(s.file.Name()) // it lives as long as it is open, and no crash leaves it behind
		if _, s.err = s.file.Write(s.memory.Bytes()); s.err != nil {
			return
		}
		s.memory = bytes.Buffer{}
	}
	_, s.err = s.file.Write(b)
}

func (s *spool) store(ctx context.Context, logs Logs) (digest.Digest, error) {
	if s.err != nil {
		return "", fmt.Errorf("keep the log: %w", s.err)
	}
	var r io.Reader = &s.memory
	if s.file != nil {
		if _, err := s.file.Seek(0, io.SeekStart); err != nil {
			return "", fmt.Errorf("read the log back: %w", err)
		}
		r = s.file
	}
	d := digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(s.hash.Sum(nil)))
	if err := logs.Put(ctx, r, ocispec.Descriptor{MediaType: "text/plain", Digest: d, Size: s.size}); err != nil {
		return "", fmt.Errorf("store the log: %w", err)
	}
	return d, nil
}

func (s *spool) discard() {
	if s.file != nil {
		s.file.Close()
	}
	*s = spool{err: os.ErrClosed}
}

// vertexProgress shows what is said about a vertex outside of any work that could be shared.
type vertexProgress struct {
	display *display
	vertex  *Vertex
}

func (p vertexProgress) Log(stream int, data []byte) {
	p.display.log(p.vertex, stream, bytes.Clone(data))
}

func (p vertexProgress) Status(id string, current, total int64, done bool) {
	now := time.Now()
	st := client.VertexStatus{ID: id, Current: current, Total: total, Started: &now}
	if done {
		st.Completed = &now
	}
	p.display.status(p.vertex, st)
}

func (p vertexProgress) Warn(short string) { p.display.warn(p.vertex, short) }
