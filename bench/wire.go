// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"net"
	"sync/atomic"
)

// onWire is how many bytes the registries of the bench have received and sent so far. Contestants take turns, so what is counted during a run
// is that run's. Nothing else that is measured goes over a network: clients and daemons talk over unix sockets.
var onWire atomic.Int64

// listenCounted listens on loopback; what goes over its connections counts.
func listenCounted() (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	return countedListener{l}, err
}

type countedListener struct{ net.Listener }

func (l countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok {
		return countedConn{tcp}, nil
	}
	return c, err
}

type countedConn struct{ *net.TCPConn }

func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	onWire.Add(int64(n))
	return n, err
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	onWire.Add(int64(n))
	return n, err
}

// ReadFrom leaves files to the kernel (sendfile), as without the counting.
func (c countedConn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.TCPConn.ReadFrom(r)
	onWire.Add(n)
	return n, err
}

// WriteTo must not hide what Read counts.
func (c countedConn) WriteTo(w io.Writer) (int64, error) {
	n, err := c.TCPConn.WriteTo(w)
	onWire.Add(n)
	return n, err
}
