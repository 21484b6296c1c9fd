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
	"os"
	"strings"
	"sync"
	"time"
)

// resolvConf is where the host says how it resolves names.
const resolvConf = "/etc/resolv.conf"

const (
	// dnsTimeout is how long the host's resolvers may take together.
	dnsTimeout = 10 * time.Second
	// dnsResend is when a question is asked again, for a datagram may be lost; every time the wait is twice as long. A resolver in a
	// container asks again after five seconds.
	dnsResend = time.Second
	// maxDNSConnections bounds the connections of containers that are served at once: each takes two descriptors of this process.
	maxDNSConnections = 128
)

// DNS is how names are resolved instead of the host's way. What is empty is as on the host.
type DNS struct {
	Nameservers, SearchDomains, Options []string
}

// Apply replaces in a resolv.conf what d says. A nil d changes nothing.
func (d *DNS) Apply(host []byte) []byte {
	if d == nil {
		return host
	}
	set := map[string][]string{"nameserver": d.Nameservers, "search": d.SearchDomains, "options": d.Options}
	var conf []byte
	for line := range strings.Lines(string(host)) {
		fields := strings.Fields(line)
		if len(fields) > 0 && (len(set[fields[0]]) > 0 || fields[0] == "domain" && len(d.SearchDomains) > 0) {
			continue
		}
		conf = append(conf, strings.TrimRight(line, "\n")+"\n"...)
	}
	for _, s := range d.Nameservers {
		conf = fmt.Appendf(conf, "nameserver %s\n", s)
	}
	for _, kind := range []string{"search", "options"} {
		if len(set[kind]) > 0 {
			conf = fmt.Appendf(conf, "%s %s\n", kind, strings.Join(set[kind], " "))
		}
	}
	return conf
}

// hostConf is the host's resolv.conf with what names replaces in it.
func hostConf(names *DNS) ([]byte, error) {
	host, err := os.ReadFile(resolvConf)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read the host's resolver configuration: %w", err)
	}
	return names.Apply(host), nil
}

// upstreams are the name servers that questions of containers go to, as the host has them now.
func upstreams(names *DNS, log *slog.Logger) []string {
	conf, err := hostConf(names)
	if err != nil {
		log.Warn("resolve a name for a container", "error", err)
	}
	_, servers, others := rewriteResolvConf(conf)
	if servers = append(servers, others...); len(servers) == 0 {
		servers = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})} // what libc assumes
	}
	return addrPorts(servers, 53)
}

// ResolvConf makes the resolv.conf of a container from the host's. Its first name server is the engine, at the gateway, which asks
// those of the host: also one on the host's loopback or with an IPv6 address, which a container cannot reach. Those that it can
// reach come after it, for hosts whose firewall keeps containers from the gateway. They are not the first, because NAT loses
// one of two questions that a resolver asks from one port at the same moment (libc, for A and AAAA), and programs then wait five seconds.
func (n *Network) ResolvConf() ([]byte, error) {
	host, err := hostConf(n.names)
	if err != nil {
		return nil, err
	}
	conf, servers, unreachable := rewriteResolvConf(host)
	if err := n.forwardDNS(); err != nil {
		if len(servers) > 0 {
			n.log.Debug("name server for containers", "err", err)
			return conf, nil
		}
		first := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if len(unreachable) > 0 {
			first = unreachable[0]
		}
		return nil, fmt.Errorf("the host resolves names at %s, which a container cannot reach, and forwarding there does not work: %w; use the host network", first, err)
	}
	return append(fmt.Appendf(nil, "nameserver %s\n", n.gateway), conf...), nil
}

// rewriteResolvConf leaves out the name servers that a container cannot reach and returns both kinds.
func rewriteResolvConf(host []byte) (conf []byte, servers, unreachable []netip.Addr) {
	for line := range strings.Lines(string(host)) {
		fields := strings.Fields(line)
		if len(fields) >= 2 && fields[0] == "nameserver" {
			a, err := netip.ParseAddr(fields[1])
			if err != nil {
				continue
			}
			if a = a.Unmap(); a.IsLoopback() || !a.Is4() || a.IsUnspecified() {
				unreachable = append(unreachable, a)
				continue
			}
			servers = append(servers, a)
		}
		if len(fields) == 0 || fields[0][0] == '#' || fields[0][0] == ';' {
			continue
		}
		conf = append(conf, strings.TrimRight(line, "\n")+"\n"...)
	}
	return conf, servers, unreachable
}

// hostNameservers returns the name servers in the host's resolv.conf.
func hostNameservers() []netip.Addr {
	b, err := os.ReadFile(resolvConf)
	if err != nil {
		return nil
	}
	_, servers, unreachable := rewriteResolvConf(b)
	return append(servers, unreachable...)
}

// forwardDNS starts the forwarder, at the gateway, if it does not run yet.
func (n *Network) forwardDNS() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dns != nil {
		return nil
	}
	if n.closed {
		return errors.New("container network: closed")
	}
	d, err := newDNSForwarder(netip.AddrPortFrom(n.gateway, dnsPort), n.subnet, func() []string { return upstreams(n.names, n.log) })
	if err != nil {
		return err
	}
	n.dns = d
	return nil
}

func addrPorts(addrs []netip.Addr, port uint16) []string {
	var out []string
	for _, a := range addrs {
		out = append(out, netip.AddrPortFrom(a, port).String())
	}
	return out
}

// dnsForwarder hands queries to the host's resolvers, in their order, and the answers back. It does not look into
// them.
type dnsForwarder struct {
	upstream func() []string
	// clients are those who are answered; everybody when it is not valid. The host takes packets for the gateway's address by every
	// interface: its neighbours are not to use it.
	clients netip.Prefix
	cancel  context.CancelFunc
	udp     *net.UDPConn
	tcp     net.Listener
	wg      sync.WaitGroup
}

func newDNSForwarder(listen netip.AddrPort, clients netip.Prefix, upstream func() []string) (*dnsForwarder, error) {
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(listen))
	if err != nil {
		return nil, err
	}
	// The same number for TCP: a resolver turns to it after a truncated answer.
	tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
	if err != nil {
		udp.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &dnsForwarder{upstream: upstream, clients: clients, cancel: cancel, udp: udp, tcp: tcp}
	d.wg.Go(func() { d.serveUDP(ctx) })
	d.wg.Go(func() { d.serveTCP(ctx) })
	return d, nil
}

func (d *dnsForwarder) close() {
	d.cancel()
	d.udp.Close()
	d.tcp.Close()
	d.wg.Wait()
}

// serves says whether questions from an address are answered. The host's own are, too: it sends them from the gateway's address.
func (d *dnsForwarder) serves(from netip.Addr) bool {
	return !d.clients.IsValid() || d.clients.Contains(from.Unmap())
}

func (d *dnsForwarder) serveUDP(ctx context.Context) {
	slots := make(chan struct{}, 256) // queries in flight
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := d.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			continue
		}
		if !d.serves(from.Addr()) {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			continue // overloaded: the client asks again
		}
		query := append([]byte(nil), buf[:n]...)
		d.wg.Go(func() {
			defer func() { <-slots }()
			if answer, err := d.exchangeUDP(ctx, query); err == nil {
				_, _ = d.udp.WriteToUDPAddrPort(answer, from)
			}
		})
	}
}

// exchangeUDP asks the resolvers one after the other until one answers.
func (d *dnsForwarder) exchangeUDP(ctx context.Context, query []byte) ([]byte, error) {
	servers := d.upstream()
	var lastErr error
	for _, server := range servers {
		answer, err := askUDP(ctx, server, query, dnsTimeout/time.Duration(len(servers)))
		if err == nil {
			return answer, nil
		}
		lastErr = err
	}
	return nil, lastErr
}

// askUDP asks one resolver, several times if it is silent. Its socket is its own: what arrives there is an answer to this question.
func askUDP(ctx context.Context, server string, query []byte, timeout time.Duration) ([]byte, error) {
	c, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, "udp", server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	end := time.Now().Add(timeout)
	buf := make([]byte, maxDatagram)
	for wait := dnsResend; ; wait *= 2 {
		if _, err := c.Write(query); err != nil {
			return nil, err
		}
		until := time.Now().Add(wait)
		if until.After(end) {
			until = end
		}
		_ = c.SetReadDeadline(until)
		n, err := c.Read(buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(end) {
			return nil, err
		}
	}
}

func (d *dnsForwarder) serveTCP(ctx context.Context) {
	slots := make(chan struct{}, maxDNSConnections)
	for {
		client, err := d.tcp.Accept()
		if err != nil {
			if ctx.Err() == nil && isTemporary(err) && pause(ctx, 10*time.Millisecond) {
				continue
			}
			return
		}
		if from, err := netip.ParseAddrPort(client.RemoteAddr().String()); err != nil || !d.serves(from.Addr()) {
			client.Close()
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			client.Close() // overloaded: the client asks again
			continue
		}
		d.wg.Go(func() {
			defer func() { <-slots }()
			d.forwardTCP(ctx, client)
		})
	}
}

func (d *dnsForwarder) forwardTCP(ctx context.Context, client net.Conn) {
	defer client.Close()
	for _, up := range d.upstream() {
		server, err := (&net.Dialer{Timeout: dnsTimeout}).DialContext(ctx, "tcp", up)
		if err != nil {
			continue
		}
		defer server.Close()
		stop := context.AfterFunc(ctx, func() {
			client.Close()
			server.Close()
		})
		defer stop()
		deadline := time.Now().Add(dnsTimeout)
		_ = client.SetDeadline(deadline)
		_ = server.SetDeadline(deadline)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = io.Copy(server, client)
			_ = server.(*net.TCPConn).CloseWrite()
		})
		_, _ = io.Copy(client, server)
		client.Close()
		wg.Wait()
		return
	}
}
