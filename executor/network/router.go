// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/link/nested"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	routerNIC = 1
	// maxConnecting bounds connections that containers are making, maxSessions those that they have, UDP's included: each costs the
	// engine two descriptors at most.
	maxConnecting = 1024
	maxSessions   = 4096
	dnsPort       = 53
)

// routerMAC is the hardware address of the router: locally administered, of nobody.
var routerMAC = tcpip.LinkAddress([]byte{0x02, 0x42, 0, 0, 0, 1})

// router is a TCP/IP stack that takes all packets which containers send to elsewhere. For each connection it makes one of its
// own, as this process. To its own address it answers on one port: questions for names, which it passes to the host's resolvers.
type router struct {
	log      *slog.Logger
	stack    *stack.Stack
	address  netip.Addr
	subnet   netip.Prefix
	upstream func() []string

	ctx    context.Context // ends with the router
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex // guards sessions and closed
	sessions int        // TCP's and UDP's
	closed   bool
}

// newRouter makes a router of the frames of fd, a packet socket that it takes over.
func newRouter(fd int, address netip.Addr, subnet netip.Prefix, mtu uint32, upstream func() []string, log *slog.Logger) (*router, error) {
	link, err := fdbased.New(&fdbased.Options{
		FDs: []int{fd}, MTU: mtu, EthernetHeader: true, Address: routerMAC, PacketDispatchMode: fdbased.RecvMMsg,
		RXChecksumOffload: true, // between local interfaces the kernel leaves them out
	})
	if err != nil {
		return nil, fmt.Errorf("router: %w", err)
	}
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	r := &router{log: log, stack: s, address: address, subnet: subnet, upstream: upstream}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if err := r.configure(newSieve(link, address)); err != nil {
		r.close()
		return nil, fmt.Errorf("router: %w", err)
	}
	return r, nil
}

// sieve is a link without what the stack must not see, as it takes the packets for every address: frames for others, which a
// bridge sends everywhere until it knows where they live, questions where other addresses than the router's live, which it would claim, and echo requests to
// them, which it would answer, so that a host that does not exist would seem to be there.
type sieve struct {
	nested.Endpoint
	router tcpip.Address
}

func newSieve(link stack.LinkEndpoint, router netip.Addr) *sieve {
	e := &sieve{router: tcpip.AddrFrom4(router.As4())}
	e.Init(link, e)
	return e
}

// DeliverNetworkPacket implements stack.NetworkDispatcher.
func (e *sieve) DeliverNetworkPacket(protocol tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	frame := header.Ethernet(pkt.LinkHeader().Slice())
	if len(frame) < header.EthernetMinimumSize {
		return
	}
	if to := frame.DestinationAddress(); to != routerMAC && to != header.EthernetBroadcastAddress {
		return
	}
	switch protocol {
	case ipv4.ProtocolNumber:
		b, ok := pkt.Data().PullUp(header.IPv4MinimumSize)
		if ip := header.IPv4(b); ok && ip.Protocol() == uint8(header.ICMPv4ProtocolNumber) && ip.DestinationAddress() != e.router {
			return
		}
	case arp.ProtocolNumber:
		b, ok := pkt.Data().PullUp(header.ARPSize)
		if ok && tcpip.AddrFrom4Slice(header.ARP(b).ProtocolAddressTarget()) != e.router {
			return
		}
	}
	e.Endpoint.DeliverNetworkPacket(protocol, pkt)
}

func (r *router) configure(link stack.LinkEndpoint) error {
	s := r.stack
	// Before there is an interface: packets come from then on.
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, 0, maxConnecting, r.takeTCP).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s, r.takeUDP).HandlePacket)
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: routerNIC}})
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	address := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(r.address.As4()), PrefixLen: r.subnet.Bits()},
	}
	for _, do := range []func() tcpip.Error{
		func() tcpip.Error { return s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack) },
		func() tcpip.Error { return s.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate) },
		func() tcpip.Error { return s.CreateNIC(routerNIC, link) },
		func() tcpip.Error { return s.AddProtocolAddress(routerNIC, address, stack.AddressProperties{}) },
		// Every address is answered for, in its name.
		func() tcpip.Error { return s.SetSpoofing(routerNIC, true) },
		func() tcpip.Error { return s.SetPromiscuousMode(routerNIC, true) },
	} {
		if err := do(); err != nil {
			return errors.New(err.String())
		}
	}
	return nil
}

func (r *router) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.stack.Destroy()
	r.work.Wait()
}

// begin counts one more session, unless there are too many or the router has ended. The function ends it.
func (r *router) begin() (end func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.sessions >= maxSessions {
		return nil, false
	}
	r.sessions++
	r.work.Add(1)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.sessions--
		r.work.Done()
	}, true
}

// target is where a packet goes; ok is false for what no container may reach by us: this host's loopback, which it can only mean
// by mistake or with bad intent, and what is no address of one machine.
func (r *router) target(id stack.TransportEndpointID) (to netip.AddrPort, dns, ok bool) {
	a, ok := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	if !ok {
		return to, false, false
	}
	to = netip.AddrPortFrom(a, id.LocalPort)
	switch {
	case a == r.address:
		return to, true, id.LocalPort == dnsPort
	case r.subnet.Contains(a), a.IsLoopback(), a.IsUnspecified(), a.IsMulticast(), a.As4() == [4]byte{255, 255, 255, 255}, a.As4()[0] == 0, a.As4()[0] == 127:
		return to, false, false
	}
	return to, false, true
}

// takeTCP connects to where a container wants to, and only then accepts its connection: what is refused there is refused here.
// The stack calls it in a goroutine of its own.
func (r *router) takeTCP(req *tcp.ForwarderRequest) {
	to, dns, ok := r.target(req.ID())
	if !ok {
		req.Complete(true)
		return
	}
	end, ok := r.begin()
	if !ok {
		req.Complete(true)
		return
	}
	defer end()
	var server net.Conn
	if !dns {
		var err error
		if server, err = (&net.Dialer{Timeout: dialTimeout}).DialContext(r.ctx, "tcp4", to.String()); err != nil {
			r.log.Debug("connection of a container", "to", to, "error", err)
			req.Complete(true)
			return
		}
		defer server.Close()
	}
	var wq waiter.Queue
	ep, terr := req.CreateEndpoint(&wq)
	req.Complete(terr != nil)
	if terr != nil {
		return
	}
	ep.SocketOptions().SetKeepAlive(true)
	client := gonet.NewTCPConn(&wq, ep)
	if dns {
		(&dnsForwarder{upstream: r.upstream}).forwardTCP(r.ctx, client)
		return
	}
	relay(r.ctx, client, server.(*net.TCPConn))
}

// halfConn is a connection whose directions end one by one.
type halfConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// relay copies both ways until both have ended, or ctx.
func relay(ctx context.Context, a, b halfConn) {
	stop := context.AfterFunc(ctx, func() {
		a.Close()
		b.Close()
	})
	defer stop()
	defer a.Close()
	defer b.Close()
	var wg sync.WaitGroup
	copyHalf := func(dst, src halfConn) {
		_, _ = io.Copy(dst, src)
		_ = dst.CloseWrite()
		_ = src.CloseRead()
	}
	wg.Go(func() { copyHalf(a, b) })
	copyHalf(b, a)
	wg.Wait()
}

// takeUDP begins a session: what a container sends from one port to one address, and the answers. The stack waits for it.
func (r *router) takeUDP(req *udp.ForwarderRequest) {
	to, dns, ok := r.target(req.ID())
	if !ok {
		return
	}
	end, ok := r.begin()
	if !ok {
		return
	}
	var wq waiter.Queue
	ep, terr := req.CreateEndpoint(&wq)
	if terr != nil {
		end()
		return
	}
	client := gonet.NewUDPConn(&wq, ep)
	go func() {
		defer end()
		defer client.Close()
		if dns {
			r.answer(client)
			return
		}
		r.relayUDP(client, to)
	}()
}

// answer passes questions for names on, one after the other: a resolver uses another port for each.
func (r *router) answer(client net.Conn) {
	resolver := &dnsForwarder{upstream: r.upstream}
	stop := context.AfterFunc(r.ctx, func() { client.Close() })
	defer stop()
	buf := make([]byte, maxDatagram)
	for {
		_ = client.SetReadDeadline(time.Now().Add(dnsTimeout))
		n, err := client.Read(buf)
		if err != nil {
			return
		}
		if answer, err := resolver.exchangeUDP(r.ctx, buf[:n]); err == nil {
			_, _ = client.Write(answer)
		} else {
			r.log.Debug("question of a container for a name", "error", err)
		}
	}
}

// relayUDP carries datagrams both ways until there has been none for long.
func (r *router) relayUDP(client net.Conn, to netip.AddrPort) {
	server, err := (&net.Dialer{}).DialContext(r.ctx, "udp4", to.String())
	if err != nil {
		return
	}
	end := func() {
		client.Close()
		server.Close()
	}
	defer end()
	defer context.AfterFunc(r.ctx, end)()
	quiet := time.AfterFunc(udpIdle, end)
	defer quiet.Stop()
	r.work.Go(func() { // not after close has begun to wait: this goroutine is counted too
		defer end()
		copyDatagrams(client, server, quiet)
	})
	copyDatagrams(server, client, quiet)
}

// copyDatagrams copies until one of the two is closed, and puts the end off with every datagram.
func copyDatagrams(dst, src net.Conn, quiet *time.Timer) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := src.Read(buf)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue // nobody listens there yet
		}
		if err != nil {
			return
		}
		quiet.Reset(udpIdle)
		if _, err := dst.Write(buf[:n]); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return
		}
	}
}
