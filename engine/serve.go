// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// preface is how an HTTP/2 connection begins, which is what gRPC is; Docker's clients speak HTTP/1.1.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// sniffTimeout is how long a new connection may stay silent before it is closed. Clients speak first, but our own CLI
// opens its connection before it knows what to say.
const sniffTimeout = time.Minute

// goodbyeTimeout is how long clients have to take the last answers when the engine ends.
const goodbyeTimeout = 2 * time.Second

// server tells the two protocols of a connection apart and gives each to its server.
type server struct {
	grpc *grpc.Server
	http *http.Server
	log  *slog.Logger

	grpcConns, httpConns *queue
	work                 sync.WaitGroup

	mu     sync.Mutex // guards what follows
	open   map[net.Conn]bool
	closed bool
	idle   chan struct{} // receives when the last connection has gone
}

func newServer(g *grpc.Server, handler http.Handler, log *slog.Logger) *server {
	s := &server{
		grpc: g,
		http: &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)},
		log:  log, grpcConns: newQueue(), httpConns: newQueue(), open: map[net.Conn]bool{}, idle: make(chan struct{}, 1),
	}
	s.work.Go(func() { _ = s.grpc.Serve(s.grpcConns) })
	s.work.Go(func() { _ = s.http.Serve(s.httpConns) })
	return s
}

// handle takes over a connection.
func (s *server) handle(c net.Conn) {
	conn := &trackedConn{Conn: c, reader: bufio.NewReader(c)}
	conn.onClose = func() { s.forget(conn) }
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		c.Close()
		return
	}
	s.open[conn] = true
	s.mu.Unlock()
	s.work.Go(func() { s.dispatch(conn) })
}

func (s *server) dispatch(conn *trackedConn) {
	_ = conn.SetReadDeadline(time.Now().Add(sniffTimeout))
	isHTTP2, err := conn.beginsWith(preface)
	if err != nil {
		conn.Close() // it never said anything: a client that only looked whether somebody listens
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	target := s.httpConns
	if isHTTP2 {
		target = s.grpcConns
	}
	if !target.put(conn) {
		conn.Close()
	}
}

func (s *server) forget(c net.Conn) {
	s.mu.Lock()
	delete(s.open, c)
	last := len(s.open) == 0
	s.mu.Unlock()
	if last {
		select {
		case s.idle <- struct{}{}:
		default:
		}
	}
}

func (s *server) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// close ends all connections and returns when nothing is being served. Handlers must have been told to stop.
func (s *server) close() {
	s.mu.Lock()
	s.closed = true
	conns := make([]net.Conn, 0, len(s.open))
	for c := range s.open {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	s.grpcConns.Close()
	s.httpConns.Close()
	// The builds have been told to end: let their clients hear why.
	hurry := time.AfterFunc(goodbyeTimeout, s.grpc.Stop)
	s.grpc.GracefulStop()
	hurry.Stop()
	_ = s.http.Close()
	for _, c := range conns {
		c.Close()
	}
	s.work.Wait()
}

// trackedConn is a connection whose first bytes have been looked at.
type trackedConn struct {
	net.Conn
	reader  *bufio.Reader
	once    sync.Once
	onClose func()
}

// beginsWith reads as far as needed to tell whether the stream begins with text.
func (c *trackedConn) beginsWith(text string) (bool, error) {
	for n := 1; n <= len(text); n++ {
		got, err := c.reader.Peek(n)
		if err != nil {
			return false, err
		}
		if got[n-1] != text[n-1] {
			return false, nil
		}
	}
	return true, nil
}

func (c *trackedConn) Read(p []byte) (int, error) {
	if c.reader == nil {
		return c.Conn.Read(p)
	}
	n, err := c.reader.Read(p)
	if c.reader.Buffered() == 0 {
		c.reader = nil
	}
	return n, err
}

func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.onClose)
	return err
}

// CloseWrite ends one direction, which is how docker's clients end an attached standard input.
func (c *trackedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// SyscallConn lets the kernel be asked for the peer's credentials.
func (c *trackedConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// queue is a net.Listener of connections that were accepted elsewhere.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), done: make(chan struct{})} }

func (q *queue) put(c net.Conn) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.done:
		return false
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return &net.UnixAddr{Name: "slipway", Net: "unix"} }

// socketPair returns the two ends of a connection inside this process. They are real sockets, so that peer
// credentials work as for any other client.
func socketPair() (client, server net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to the engine: %w", err)
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "slipway")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			if i == 1 {
				conns[0].Close()
			} else {
				unix.Close(fds[1])
			}
			return nil, nil, fmt.Errorf("connect to the engine: %w", err)
		}
	}
	return conns[0], conns[1], nil
}

// Serve accepts connections until ctx ends, and returns its cause; or until there has been no connection, build or container for idle
// (0: never), and returns nil. The listener is closed and its socket removed.
func (e *Engine) Serve(ctx context.Context, listener *net.UnixListener, idle time.Duration) error {
	listener.SetUnlinkOnClose(true)
	accepted := make(chan error, 1)
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				accepted <- err
				return
			}
			e.server.handle(c)
		}
	}()
	err := e.waitForEnd(ctx, listener, idle, accepted)
	listener.Close()
	return err
}

func (e *Engine) waitForEnd(ctx context.Context, listener *net.UnixListener, idle time.Duration, accepted <-chan error) error {
	var expired <-chan time.Time
	if idle > 0 {
		ticker := time.NewTicker(max(idle/10, time.Millisecond))
		defer ticker.Stop()
		expired = ticker.C
	}
	lastBusy := time.Now()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-accepted:
			return fmt.Errorf("accept connections: %w", err)
		case <-e.server.idle:
			lastBusy = time.Now()
		case <-expired:
			if e.busy() {
				lastBusy = time.Now()
			}
			if time.Since(lastBusy) < idle {
				continue
			}
			// From here on nobody finds us any more: the next command starts a new engine. Whoever has connected in the
			// meantime is still served.
			expired = nil
			_ = os.Remove(listener.Addr().String())
			listener.SetUnlinkOnClose(false)
			if err := e.drain(ctx, listener, accepted); err != nil {
				return err
			}
			return nil
		}
	}
}

// drain serves the connections that came in before the socket was removed to their end.
func (e *Engine) drain(ctx context.Context, listener *net.UnixListener, accepted <-chan error) error {
	const settle = 50 * time.Millisecond // for what is in the kernel's queue
	_ = listener.SetDeadline(time.Now().Add(settle))
	select {
	case <-accepted:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for e.busy() {
		select {
		case <-e.server.idle:
		case <-time.After(time.Second): // containers end without a connection
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
