// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
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

// Listener is where an engine is reached.
type Listener struct {
	net.Listener
	// TLS must be set for TCP: clients prove who they are by their certificates.
	TLS *tls.Config
	// Borrowed says that the socket's file is somebody else's, who may use it again (systemd).
	Borrowed bool
}

// errPlainTCP keeps an engine, which runs what it is told as root, from being open to whoever reaches it.
var errPlainTCP = errors.New("TCP is only served with TLS and client certificates")

// check refuses what must not be served.
func (l Listener) check() error {
	if l.Addr().Network() == "unix" {
		return nil
	}
	if l.TLS == nil || l.TLS.ClientAuth != tls.RequireAndVerifyClientCert || l.TLS.ClientCAs == nil {
		return fmt.Errorf("listen at %s: %w", l.Addr(), errPlainTCP)
	}
	return nil
}

// ServerTLS is the configuration for a Listener on TCP: clients need a certificate of the authority in the PEM file ca.
func ServerTLS(certFile, keyFile, ca string) (*tls.Config, error) {
	if certFile == "" || keyFile == "" || ca == "" {
		return nil, fmt.Errorf("%w: a server certificate, its key and the authority of the clients are needed", errPlainTCP)
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("server certificate %s with key %s: %w", certFile, keyFile, err)
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("authority of the clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("authority of the clients: no PEM certificate in %s", ca)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS12,
	}, nil
}

// Serve accepts connections until ctx ends, and returns its cause; or until there has been no connection, build or container for idle
// (0: never), and returns nil. The listeners are closed and their sockets removed.
func (e *Engine) Serve(ctx context.Context, idle time.Duration, listeners ...Listener) error {
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for _, l := range listeners {
		if err := l.check(); err != nil {
			return err
		}
		if u, ok := l.Listener.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(!l.Borrowed)
		}
	}
	accepted := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { accepted <- e.accept(l) }()
	}
	return e.waitForEnd(ctx, listeners, idle, accepted)
}

// accept hands connections on until the listener is closed.
func (e *Engine) accept(l Listener) error {
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		switch {
		case err == nil:
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.ENOBUFS):
			// It passes when others have gone; until then there is no use in trying all the time.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			e.log.Warn("accept connections", "at", l.Addr(), "error", err, "again in", pause)
			time.Sleep(pause)
			continue
		default:
			return fmt.Errorf("accept connections at %s: %w", l.Addr(), err)
		}
		pause = 0
		if l.TLS != nil && l.Addr().Network() != "unix" {
			c = tls.Server(c, l.TLS)
		}
		e.server.handle(c)
	}
}

func (e *Engine) waitForEnd(ctx context.Context, listeners []Listener, idle time.Duration, accepted <-chan error) error {
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
			return err
		case <-e.server.idle:
			lastBusy = time.Now()
		case <-expired:
			if e.busy() {
				lastBusy = time.Now()
			}
			if time.Since(lastBusy) < idle {
				continue
			}
			return e.drain(ctx, listeners, accepted)
		}
	}
}

// drain makes the engine unreachable and serves the connections that have come in before to their end. From here on the next
// command starts a new engine.
func (e *Engine) drain(ctx context.Context, listeners []Listener, accepted <-chan error) error {
	const settle = 50 * time.Millisecond // for what is in the kernel's queue
	for _, l := range listeners {
		if u, ok := l.Listener.(*net.UnixListener); ok && !l.Borrowed {
			_ = os.Remove(u.Addr().String())
			u.SetUnlinkOnClose(false)
		}
		if d, ok := l.Listener.(interface{ SetDeadline(time.Time) error }); ok {
			_ = d.SetDeadline(time.Now().Add(settle))
		}
	}
	for range listeners {
		select {
		case <-accepted:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
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
