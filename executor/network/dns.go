// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// resolvConf is where the host says how it resolves names.
const resolvConf = "/etc/resolv.conf"

// dnsTimeout is how long the host's resolver may take.
const dnsTimeout = 10 * time.Second

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

// ResolvConf makes the resolv.conf of a container from the host's. In a namespace of its own a container can reach
// neither a resolver on the host's loopback nor, here, one with an IPv6 address; those are left out, and when none is
// left the engine forwards queries that come to the gateway to the host's resolver.
func (n *Network) ResolvConf() ([]byte, error) {
	host, err := os.ReadFile(resolvConf)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read the host's resolver configuration: %w", err)
	}
	conf, servers, unreachable := rewriteResolvConf(n.names.Apply(host))
	if len(servers) > 0 {
		return conf, nil
	}
	if len(unreachable) == 0 {
		unreachable = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})} // what libc assumes
	}
	gateway, err := n.forwardDNS(unreachable)
	if err != nil {
		return nil, fmt.Errorf("the host resolves names at %s, which a container cannot reach, and forwarding there does not work: %w; use the host network", unreachable[0], err)
	}
	return append(fmt.Appendf(nil, "nameserver %s\n", gateway), conf...), nil
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

// forwardDNS starts the forwarder if it does not run yet and returns the address it listens on.
func (n *Network) forwardDNS(upstream []netip.Addr) (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dns == nil {
		d, err := newDNSForwarder(netip.AddrPortFrom(n.gateway, 53), addrPorts(upstream, 53))
		if err != nil {
			return netip.Addr{}, err
		}
		n.dns = d
	}
	return n.gateway, nil
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
	upstream []string
	cancel   context.CancelFunc
	udp      *net.UDPConn
	tcp      net.Listener
	wg       sync.WaitGroup
}

func newDNSForwarder(listen netip.AddrPort, upstream []string) (*dnsForwarder, error) {
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
	d := &dnsForwarder{upstream: upstream, cancel: cancel, udp: udp, tcp: tcp}
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

func (d *dnsForwarder) exchangeUDP(ctx context.Context, query []byte) ([]byte, error) {
	var lastErr error
	for _, up := range d.upstream {
		answer, err := func() ([]byte, error) {
			c, err := (&net.Dialer{Timeout: dnsTimeout}).DialContext(ctx, "udp", up)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			_ = c.SetDeadline(time.Now().Add(dnsTimeout / time.Duration(len(d.upstream))))
			if _, err := c.Write(query); err != nil {
				return nil, err
			}
			buf := make([]byte, maxDatagram)
			n, err := c.Read(buf)
			return buf[:n], err
		}()
		if err == nil {
			return answer, nil
		}
		lastErr = err
	}
	return nil, lastErr
}

func (d *dnsForwarder) serveTCP(ctx context.Context) {
	for {
		client, err := d.tcp.Accept()
		if err != nil {
			if ctx.Err() == nil && isTemporary(err) && pause(ctx, 10*time.Millisecond) {
				continue
			}
			return
		}
		d.wg.Go(func() { d.forwardTCP(ctx, client) })
	}
}

func (d *dnsForwarder) forwardTCP(ctx context.Context, client net.Conn) {
	defer client.Close()
	for _, up := range d.upstream {
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
