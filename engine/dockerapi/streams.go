// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"

	"github.com/moby/moby/api/pkg/stdcopy"
)

// streams connects a container's process with the clients that are attached to it. Clients may attach before the process
// starts; they are let go when it has ended. What is written while nobody is attached is lost. A client that does not
// read holds the process up, as a full pipe does, so nothing is lost and nothing piles up.
type streams struct {
	tty       bool
	openStdin bool
	once      bool // the end of the first client's input is the end of the process's

	mu      sync.Mutex // guards what follows
	clients []*client
	stdinR  *io.PipeReader
	stdinW  *io.PipeWriter
}

// client is one attached connection.
type client struct {
	conn           net.Conn
	stdout, stderr bool

	mu     sync.Mutex // one frame at a time
	framed bool
	buf    []byte
}

func newStreams(tty, openStdin, once bool) *streams {
	s := &streams{tty: tty, openStdin: openStdin, once: once}
	if openStdin {
		s.stdinR, s.stdinW = io.Pipe()
	}
	return s
}

// stdin is what the process reads, nil when it has no input.
func (s *streams) stdin() io.Reader {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdinR == nil {
		return nil // not a typed nil
	}
	return s.stdinR
}

// attach adds a connection. begin writes whatever comes before the streams; nothing else is written until it has returned.
// With stdin, what arrives on in goes to the process.
func (s *streams) attach(conn net.Conn, in io.Reader, stdin, stdout, stderr bool, begin func() error) error {
	c := &client{conn: conn, stdout: stdout, stderr: stderr, framed: !s.tty}
	c.mu.Lock()
	s.mu.Lock()
	s.clients = append(s.clients, c)
	pipe := s.stdinW
	s.mu.Unlock()
	err := begin()
	c.mu.Unlock()
	if err != nil {
		s.drop(c)
		return err
	}
	if !stdin || pipe == nil {
		return nil
	}
	go func() {
		_, err := io.Copy(pipe, in)
		// A terminal's input has no end: the process is told by the terminal.
		if err == nil && s.once && !s.tty {
			pipe.Close()
		}
	}()
	return nil
}

// writer is where the process's output goes: stream 1 or 2.
func (s *streams) writer(stream stdcopy.StdType) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		s.mu.Lock()
		clients := slices.Clone(s.clients)
		s.mu.Unlock()
		for _, c := range clients {
			if stream == stdcopy.Stdout && !c.stdout || stream == stdcopy.Stderr && !c.stderr {
				continue
			}
			if err := c.write(stream, p); err != nil {
				s.drop(c)
			}
		}
		return len(p), nil
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// write sends p, with docker's frame header unless the stream is raw.
func (c *client) write(stream stdcopy.StdType, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.framed {
		_, err := c.conn.Write(p)
		return err
	}
	// Header and bytes in one write: a reader that comes byte by byte costs a system call each.
	c.buf = append(c.buf[:0], byte(stream), 0, 0, 0)
	c.buf = binary.BigEndian.AppendUint32(c.buf, uint32(len(p)))
	c.buf = append(c.buf, p...)
	_, err := c.conn.Write(c.buf)
	return err
}

func (s *streams) drop(c *client) {
	s.mu.Lock()
	s.clients = slices.DeleteFunc(s.clients, func(o *client) bool { return o == c })
	s.mu.Unlock()
	c.conn.Close()
}

// finish lets all clients go and prepares for the next process.
func (s *streams) finish() {
	s.mu.Lock()
	clients := s.clients
	s.clients = nil
	if s.stdinR != nil {
		s.stdinR.CloseWithError(io.ErrClosedPipe)
		s.stdinR, s.stdinW = io.Pipe()
	}
	s.mu.Unlock()
	for _, c := range clients {
		c.conn.Close()
	}
}
