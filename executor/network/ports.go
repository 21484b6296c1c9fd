// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

const (
	// dialTimeout bounds how long a client waits for a container that does not answer.
	dialTimeout = 10 * time.Second
	// udpIdle is how long a UDP client's replies are still awaited.
	udpIdle = 90 * time.Second
	// maxUDPClients bounds the sockets that strangers can make us open.
	maxUDPClients = 1024
	maxDatagram   = 64 << 10
)

// Published is a set of ports of the host that lead to one container.
type Published struct {
	// Ports are the ports that were asked for, host ports filled in.
	Ports []executor.Port

	dial   dialFunc
	cancel context.CancelFunc
	closer []io.Closer
	wg     sync.WaitGroup
}

// dialFunc connects to a container.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// Publish listens on the host's ports and forwards to the container at ip. An error names the port; nothing listens
// then.
func Publish(ip netip.Addr, ports []executor.Port) (*Published, error) {
	return publish(ip, ports, (&net.Dialer{Timeout: dialTimeout}).DialContext)
}

func publish(ip netip.Addr, ports []executor.Port, dial dialFunc) (*Published, error) {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Published{cancel: cancel, dial: dial}
	p.Ports = make([]executor.Port, len(ports))
	for _, i := range byChoice(ports) {
		bound, err := p.listenFirst(ctx, ip, ports[i])
		if err != nil {
			p.Close()
			return nil, publishError(ports[i], err)
		}
		p.Ports[i] = bound
	}
	return p, nil
}

// byChoice is the order in which ports are taken: first those that have no other choice.
func byChoice(ports []executor.Port) []int {
	choices := func(i int) int {
		switch p := ports[i]; {
		case p.HostPort == 0:
			return 1 << 16
		case p.HostPortEnd != 0:
			return int(p.HostPortEnd-p.HostPort) + 1
		}
		return 1
	}
	order := make([]int, len(ports))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(choices(a), choices(b)) })
	return order
}

// listenFirst listens on the first port of a range that nobody else has.
func (p *Published) listenFirst(ctx context.Context, ip netip.Addr, port executor.Port) (executor.Port, error) {
	try := port
	try.HostPortEnd = 0
	for {
		bound, err := p.listen(ctx, ip, try)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) || try.HostPort >= port.HostPortEnd {
			return bound, err
		}
		try.HostPort++
	}
}

func publishError(p executor.Port, err error) error {
	where := net.JoinHostPort(p.HostIP, strconv.Itoa(int(p.HostPort)))
	if p.HostPortEnd != 0 {
		where += "-" + strconv.Itoa(int(p.HostPortEnd))
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE) && p.HostPortEnd != 0:
		return fmt.Errorf("publish port %s/%s: all ports of the range are in use on this host", where, protocol(p))
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("publish port %s/%s: the port is already in use on this host", where, protocol(p))
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("publish port %s/%s: %s is not an address of this host", where, protocol(p), p.HostIP)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("publish port %s/%s: ordinary users may not listen on it (as root, sysctl net.ipv4.ip_unprivileged_port_start=%d lets them)", where, protocol(p), p.HostPort)
	}
	return fmt.Errorf("publish port %s/%s: %w", where, protocol(p), err)
}

func protocol(p executor.Port) string {
	if p.Protocol == "" {
		return "tcp"
	}
	return p.Protocol
}

func (p *Published) listen(ctx context.Context, ip netip.Addr, port executor.Port) (executor.Port, error) {
	hostAddr := net.JoinHostPort(port.HostIP, strconv.Itoa(int(port.HostPort)))
	family := "" // an address that is not specified means both to Go, whichever it is
	if addr, err := netip.ParseAddr(port.HostIP); err == nil {
		family = "6"
		if addr.Is4() {
			family = "4"
		}
	}
	target := netip.AddrPortFrom(ip, port.ContainerPort)
	switch protocol(port) {
	case "tcp":
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp"+family, hostAddr)
		if err != nil {
			return port, err
		}
		p.closer = append(p.closer, l)
		p.wg.Go(func() { p.serveTCP(ctx, l, target) })
		port.HostPort = uint16(l.Addr().(*net.TCPAddr).Port)
	case "udp":
		c, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp"+family, hostAddr)
		if err != nil {
			return port, err
		}
		p.closer = append(p.closer, c)
		udp := c.(*net.UDPConn)
		p.wg.Go(func() { p.serveUDP(ctx, udp, target) })
		port.HostPort = uint16(udp.LocalAddr().(*net.UDPAddr).Port)
	default:
		return port, fmt.Errorf("protocol %q is not supported", port.Protocol)
	}
	port.Protocol = protocol(port)
	return port, nil
}

// Close stops listening and cuts all connections.
func (p *Published) Close() {
	p.cancel()
	for _, c := range p.closer {
		c.Close()
	}
	p.wg.Wait()
}

func (p *Published) serveTCP(ctx context.Context, l net.Listener, target netip.AddrPort) {
	for {
		client, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && isTemporary(err) {
				if !pause(ctx, 10*time.Millisecond) {
					return
				}
				continue
			}
			return
		}
		p.wg.Go(func() { p.forwardTCP(ctx, client.(*net.TCPConn), target) })
	}
}

// isTemporary says whether accepting may work again: out of files or memory, or a client that left too early.
func isTemporary(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) ||
		errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ECONNABORTED)
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (p *Published) forwardTCP(ctx context.Context, client *net.TCPConn, target netip.AddrPort) {
	defer client.Close()
	c, err := p.dial(ctx, "tcp4", target.String())
	if err != nil {
		_ = client.SetLinger(0) // the client sees a reset, not an orderly end
		return
	}
	server := c.(*net.TCPConn)
	defer server.Close()
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		server.Close()
	})
	defer stop()
	var wg sync.WaitGroup
	copyHalf := func(dst, src *net.TCPConn) {
		_, _ = io.Copy(dst, src)
		_ = dst.CloseWrite()
		_ = src.CloseRead()
	}
	wg.Go(func() { copyHalf(server, client) })
	copyHalf(client, server)
	wg.Wait()
}

// serveUDP gives each client a socket of its own towards the container, so that replies find their way back.
func (p *Published) serveUDP(ctx context.Context, l *net.UDPConn, target netip.AddrPort) {
	var mu sync.Mutex // guards clients
	clients := map[netip.AddrPort]*net.UDPConn{}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range clients {
			c.Close()
		}
	}()
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := l.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				continue // an earlier reply was refused
			}
			return
		}
		mu.Lock()
		c := clients[from]
		full := len(clients) >= maxUDPClients
		mu.Unlock()
		if c == nil {
			if full {
				continue
			}
			conn, err := p.dial(ctx, "udp4", target.String())
			if err != nil {
				continue
			}
			c = conn.(*net.UDPConn)
			mu.Lock()
			clients[from] = c
			mu.Unlock()
			p.wg.Go(func() {
				returnUDP(l, c, from)
				mu.Lock()
				delete(clients, from)
				mu.Unlock()
				c.Close()
			})
		}
		_ = c.SetReadDeadline(time.Now().Add(udpIdle))
		_, _ = c.Write(buf[:n])
	}
}

// returnUDP carries replies back until the client has been quiet for a while.
func returnUDP(l, c *net.UDPConn, client netip.AddrPort) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := c.Read(buf)
		if err != nil {
			if errors.Is(err, unix.ECONNREFUSED) {
				continue // nothing listens in the container yet
			}
			return
		}
		_ = c.SetReadDeadline(time.Now().Add(udpIdle))
		if _, err := l.WriteToUDPAddrPort(buf[:n], client); err != nil {
			return
		}
	}
}
