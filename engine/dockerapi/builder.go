// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"
)

// Builder is BuildKit's API, which docker's clients reach through this one: "docker build" and buildx's driver "docker" turn two connections
// into HTTP/2, one on which they call the engine and one on which the engine calls them.
type Builder interface {
	// ServeGRPC takes over a connection on which the client calls BuildKit's services.
	ServeGRPC(conn net.Conn)
	// ServeSession takes over the connection of a request on which the client offers its session, and returns when it has ended.
	ServeSession(ctx context.Context, w http.ResponseWriter, r *http.Request) error
}

// grpc is POST /grpc.
func (s *Server) grpc(r *request) error {
	if proto := r.Header.Get("Upgrade"); proto != "h2c" {
		return invalid("upgrade to %q: want h2c", proto)
	}
	conn, buffered, err := http.NewResponseController(r.w).Hijack()
	if err != nil {
		return fmt.Errorf("take over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"); err != nil {
		conn.Close() // the client has gone
		return nil
	}
	s.Builder.ServeGRPC(&upgradedConn{Conn: conn, reader: buffered.Reader})
	return nil
}

// session is POST /session.
func (s *Server) session(r *request) error {
	return s.Builder.ServeSession(r.Context(), r.w, r.Request)
}

// upgradedConn is a connection of which an HTTP server has perhaps read more than its request.
type upgradedConn struct {
	net.Conn
	reader *bufio.Reader
}

func (c *upgradedConn) Read(p []byte) (int, error) {
	if c.reader.Buffered() > 0 {
		return c.reader.Read(p)
	}
	return c.Conn.Read(p)
}

// SyscallConn lets the kernel be asked for the peer's credentials.
func (c *upgradedConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, fmt.Errorf("credentials of a %T: not a socket", c.Conn)
}
