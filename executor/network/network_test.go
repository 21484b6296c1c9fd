// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestDNS(t *testing.T) {
	const host = "# by hand\nnameserver 10.0.0.1\nnameserver 10.0.0.2\ndomain old.test\nsearch old.test\noptions ndots:5\nsortlist 10.0.0.0\n"
	for _, tc := range []struct {
		dns  *DNS
		want string
	}{
		{nil, host},
		{&DNS{}, host},
		{&DNS{Nameservers: []string{"192.0.2.1", "192.0.2.2"}}, "# by hand\ndomain old.test\nsearch old.test\noptions ndots:5\nsortlist 10.0.0.0\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n"},
		{&DNS{SearchDomains: []string{"a.test", "b.test"}, Options: []string{"edns0"}}, "# by hand\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nsortlist 10.0.0.0\nsearch a.test b.test\noptions edns0\n"},
	} {
		if got := string(tc.dns.Apply([]byte(host))); got != tc.want {
			t.Errorf("%+v:\ngot  %q\nwant %q", tc.dns, got, tc.want)
		}
	}
}

func TestChooseSubnet(t *testing.T) {
	for _, tc := range []struct {
		taken []netip.Prefix
		id    string
		want  string
	}{
		{nil, "00000000", "10.88.0.0/22"},
		{nil, "00410000", "10.89.4.0/22"},
		{prefixes("10.88.0.0/16"), "00000000", "10.89.0.0/22"},                 // podman's
		{prefixes("10.88.0.0/22", "10.88.4.9/32"), "00000000", "10.88.8.0/22"}, // a name server in the next block
		{prefixes("10.88.0.0/14", "10.92.0.0/15"), "00000000", "10.94.0.0/22"}, // most of the range
		{prefixes("192.168.0.0/16", "172.17.0.0/16"), "01ff0000", "10.95.252.0/22"},
		{prefixes("10.95.252.0/24"), "01ff0000", "10.88.0.0/22"}, // round to the beginning
	} {
		got, err := chooseSubnet(tc.taken, tc.id)
		if err != nil || got.String() != tc.want {
			t.Errorf("chooseSubnet(%v, %s) = %v, %v; want %s", tc.taken, tc.id, got, err, tc.want)
		}
	}
	if _, err := chooseSubnet(prefixes("10.0.0.0/8"), "00000000"); err == nil {
		t.Error("everything taken: no error")
	}
}

func TestRewriteResolvConf(t *testing.T) {
	for _, tc := range []struct {
		in, want             string
		servers, unreachable int
	}{
		{"nameserver 10.0.0.1\nsearch a b\noptions ndots:2\n", "nameserver 10.0.0.1\nsearch a b\noptions ndots:2\n", 1, 0},
		{"# systemd\nnameserver 127.0.0.53\noptions edns0\nsearch lan", "options edns0\nsearch lan\n", 0, 1},
		{"nameserver 127.0.0.1\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver 8.8.8.8\n", "nameserver 8.8.8.8\n", 1, 3},
		{"nameserver nonsense\nnameserver\n;x\n", "nameserver\n", 0, 0},
		{"", "", 0, 0},
	} {
		conf, servers, unreachable := rewriteResolvConf([]byte(tc.in))
		if string(conf) != tc.want || len(servers) != tc.servers || len(unreachable) != tc.unreachable {
			t.Errorf("rewriteResolvConf(%q) = %q, %v, %v", tc.in, conf, servers, unreachable)
		}
	}
}

// echoServer answers each datagram and each connection with what it got.
func echoServer(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c) // answers only after the other side has ended its half
				c.Write(b)
			}()
		}
	}()
	u, err := net.ListenPacket("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	go func() {
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			u.WriteTo(buf[:n], from)
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func TestPublish(t *testing.T) {
	target := echoServer(t)
	loopback := netip.MustParseAddr("127.0.0.1")
	p, err := Publish(loopback, []executor.Port{
		{HostIP: "127.0.0.1", ContainerPort: target}, {HostIP: "127.0.0.1", ContainerPort: target, Protocol: "udp"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	addr := func(i int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Ports[i].HostPort))) }

	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c, err := net.Dial("tcp", addr(0))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			want := bytes.Repeat([]byte{byte(i)}, 300_000)
			go func() {
				c.Write(want)
				c.(*net.TCPConn).CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
				t.Errorf("tcp: got %d bytes, %v", len(got), err)
			}
		})
		wg.Go(func() {
			c, err := net.Dial("udp", addr(1))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			want := strconv.Itoa(i)
			c.Write([]byte(want))
			buf := make([]byte, 100)
			if n, err := c.Read(buf); err != nil || string(buf[:n]) != want {
				t.Errorf("udp: got %q, %v; want %q", buf[:n], err, want)
			}
		})
	}
	wg.Wait()

	// Connections that are open do not keep Close from ending.
	c, err := net.Dial("tcp", addr(0))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection is still open after Close")
	}
}

// TestPublishRange asks for ranges of ports, of which others have some.
func TestPublishRange(t *testing.T) {
	loopback := netip.MustParseAddr("127.0.0.1")
	target := echoServer(t)
	// Three neighbours below what the kernel gives away, of which somebody takes the first. Another process may be as unlucky as to want
	// them at the same moment.
	var first uint16
	var l net.Listener
	free := func(port uint16) bool {
		l, err := net.Listen("tcp4", netip.AddrPortFrom(loopback, port).String())
		if err == nil {
			l.Close()
		}
		return err == nil
	}
	for l == nil {
		first = 10000 + uint16(rand.IntN(20000))
		var err error
		if l, err = net.Listen("tcp4", netip.AddrPortFrom(loopback, first).String()); err != nil {
			l = nil
		} else if !free(first+1) || !free(first+2) {
			l.Close()
			l = nil
		}
	}
	defer l.Close()
	// The range comes first and gets what the other one, which has no choice, leaves.
	p, err := Publish(loopback, []executor.Port{
		{HostIP: "127.0.0.1", HostPort: first, HostPortEnd: first + 2, ContainerPort: target}, {HostIP: "127.0.0.1", HostPort: first + 1, ContainerPort: target},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Ports[0].HostPort != first+2 || p.Ports[0].HostPortEnd != 0 || p.Ports[1].HostPort != first+1 {
		t.Errorf("from %d: %+v", first, p.Ports)
	}
	want := fmt.Sprintf("publish port 127.0.0.1:%d-%d/tcp: all ports of the range are in use", first, first+2)
	got, err := Publish(loopback, []executor.Port{{HostIP: "127.0.0.1", HostPort: first, HostPortEnd: first + 2, ContainerPort: target}})
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, %v; want %q", got, err, want)
	}
}

// TestPublishFamilies: 0.0.0.0 is IPv4 alone, :: IPv6 alone, and they can be given to different containers.
func TestPublishFamilies(t *testing.T) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skipf("needs IPv6 (%v): SKIPPED", err)
	} else {
		l.Close()
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	target := echoServer(t)
	for _, protocol := range []string{"tcp", "udp"} {
		four, err := Publish(loopback, []executor.Port{{HostIP: "0.0.0.0", ContainerPort: target, Protocol: protocol}})
		if err != nil {
			t.Fatal(err)
		}
		defer four.Close()
		// Somebody else may have that port of the other family: one that both have is found soon.
		six, err := Publish(loopback, []executor.Port{{HostIP: "::", HostPort: four.Ports[0].HostPort, ContainerPort: target, Protocol: protocol}})
		if errors.Is(err, unix.EADDRINUSE) {
			t.Skipf("%v: SKIPPED", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer six.Close()
	}
}

func TestPublishRefuses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	used := uint16(l.Addr().(*net.TCPAddr).Port)
	free := executor.Port{HostIP: "127.0.0.1", ContainerPort: 80}
	for want, p := range map[string]executor.Port{
		"/tcp: the port is already in use on this host": {HostIP: "127.0.0.1", HostPort: used, ContainerPort: 80},
		"192.0.2.77 is not an address of this host":     {HostIP: "192.0.2.77", HostPort: used, ContainerPort: 80},
		`protocol "sctp" is not supported`:              {HostIP: "127.0.0.1", ContainerPort: 80, Protocol: "sctp"},
	} {
		got, err := Publish(netip.MustParseAddr("127.0.0.1"), []executor.Port{free, p})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Publish(%+v) = %v, %v; want an error with %q", p, got, err, want)
		}
	}
}

// newTestForwarder starts a forwarder on loopback. The port that the kernel gives for UDP may be taken for TCP: then it is asked for another.
func newTestForwarder(t *testing.T, clients netip.Prefix, upstream ...string) *dnsForwarder {
	t.Helper()
	for try := 1; ; try++ {
		d, err := newDNSForwarder(netip.MustParseAddrPort("127.0.0.1:0"), clients, func() []string { return upstream })
		if err == nil {
			t.Cleanup(d.close)
			return d
		}
		if !errors.Is(err, unix.EADDRINUSE) || try == 100 {
			t.Fatal(err)
		}
	}
}

func TestDNSForwarder(t *testing.T) {
	upstream := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(echoServer(t))))
	d := newTestForwarder(t, netip.Prefix{}, "127.0.0.1:1", upstream)
	for _, network := range []string{"udp", "tcp"} {
		c, err := net.Dial(network, d.udp.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write([]byte("query"))
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.CloseWrite()
		}
		buf := make([]byte, 100)
		if n, err := c.Read(buf); err != nil || string(buf[:n]) != "query" {
			t.Errorf("%s: %q, %v", network, buf[:n], err)
		}
	}
}

// TestDNSForwarderIsBounded: a container that opens connection after connection takes nobody else's descriptors, and those that there are go on.
func TestDNSForwarderIsBounded(t *testing.T) {
	upstream := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(echoServer(t))))
	d := newTestForwarder(t, netip.Prefix{}, upstream)
	var conns []net.Conn
	for range maxDNSConnections + 1 {
		c, err := net.Dial("tcp", d.tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	if n, err := conns[maxDNSConnections].Read(make([]byte, 1)); err == nil {
		t.Errorf("one connection too many gets %d bytes", n)
	}
	first := conns[0].(*net.TCPConn)
	first.Write([]byte("query"))
	first.CloseWrite()
	buf := make([]byte, 100)
	if n, err := first.Read(buf); err != nil || string(buf[:n]) != "query" {
		t.Errorf("the first connection: %q, %v", buf[:n], err)
	}
}

// TestDNSForwarderServes: neighbours of the host are not answered.
func TestDNSForwarderServes(t *testing.T) {
	upstream := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(echoServer(t))))
	d := newTestForwarder(t, netip.MustParsePrefix("127.0.5.0/24"), upstream)
	for from, want := range map[string]bool{"127.0.5.9": true, "127.0.6.9": false} {
		for _, network := range []string{"udp4", "tcp4"} {
			dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
			if network == "tcp4" {
				dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
			}
			c, err := dialer.Dial(network, d.udp.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if !want {
				c.SetDeadline(time.Now().Add(200 * time.Millisecond))
			}
			c.Write([]byte("query"))
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.CloseWrite()
			}
			n, err := c.Read(make([]byte, 100))
			if got := err == nil && n == 5; got != want {
				t.Errorf("%s from %s: answered %v, want %v (%v)", network, from, got, want, err)
			}
		}
	}
}

// TestDNSForwarderAsksAgain: a question that is lost on the way to the resolver is asked again before a container would.
func TestDNSForwarderAsksAgain(t *testing.T) {
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var asked atomic.Int64
	go func() {
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			if asked.Add(1) > 1 { // the first is lost
				u.WriteTo(buf[:n], from)
			}
		}
	}()
	d := &dnsForwarder{upstream: func() []string { return []string{u.LocalAddr().String()} }}
	start := time.Now()
	answer, err := d.exchangeUDP(t.Context(), []byte("query"))
	if err != nil || string(answer) != "query" || asked.Load() != 2 || time.Since(start) > 4*time.Second {
		t.Errorf("answer %q, %v after %v; asked %d times", answer, err, time.Since(start), asked.Load())
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root: SKIPPED")
	}
}

func TestNetworkLifetime(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	n, err := New(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	other, err := New(Options{Root: root + "-other"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if n.Subnet().Overlaps(other.Subnet()) || n.Bridge() == other.Bridge() {
		t.Errorf("two engines share %v %v, %v %v", n.Subnet(), n.Bridge(), other.Subnet(), other.Bridge())
	}

	seen := map[netip.Addr]bool{}
	var all []*Namespace
	for range 5 {
		ns, err := n.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if seen[ns.IP()] || !n.Subnet().Contains(ns.IP()) || ns.IP() == n.Gateway() {
			t.Errorf("address %v: seen before %v, subnet %v", ns.IP(), seen[ns.IP()], n.Subnet())
		}
		seen[ns.IP()] = true
		all = append(all, ns)
	}
	// Processes in two namespaces reach each other and the gateway.
	if out, err := exec.Command("nsenter", "--net="+all[0].Path(), "ping", "-c1", "-W5", all[1].IP().String()).CombinedOutput(); err != nil {
		if _, noPing := exec.LookPath("ping"); noPing == nil {
			t.Errorf("ping between containers: %v\n%s", err, out)
		}
	}
	// What somebody else deletes is made again, and the cables are plugged in.
	l, err := netlink.LinkByName(n.Bridge())
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(l); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(deleteTable(n.tableName(), false), deleteTable(n.tableName(), true)); err != nil {
		t.Fatal(err)
	}
	ns, err := n.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, ns)
	if l, err = netlink.LinkByName(n.Bridge()); err != nil {
		t.Fatal(err)
	}
	for _, ns := range all {
		cable, err := netlink.LinkByName(ns.link)
		if err != nil || cable.Attrs().MasterIndex != l.Attrs().Index {
			t.Errorf("%s is not on the bridge again: %v", ns.link, err)
		}
	}
	if there, err := hasTable(n.tableName(), false); !there {
		t.Errorf("the table was not made again: %v", err)
	}

	// So is a table that goes right after, alone.
	if err := deleteTable(n.tableName(), false); err != nil {
		t.Fatal(err)
	}
	if ns, err = n.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	all = append(all, ns)
	if there, err := hasTable(n.tableName(), false); !there {
		t.Errorf("the table was not made again: %v", err)
	}

	for i, ns := range all {
		n.Release(ns, i%2 == 0)
	}

	// An engine that is killed leaves the bridge; the next one of this root takes it away.
	n2, err := New(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if err := n2.Close(); err != nil {
		t.Error(err)
	}
	if _, err := netlink.LinkByName(n.Bridge()); err == nil {
		t.Errorf("bridge %s is still there", n.Bridge())
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	n.Release(all[0], false) // late, but harmless
	if _, err := n.Acquire(t.Context()); err == nil {
		t.Error("Acquire after Close: no error")
	}
	links, err := dump(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "slv"+n.id[:6]) || strings.HasPrefix(l.Attrs().Name, "slv"+other.id[:6]) {
			t.Errorf("link %s is left", l.Attrs().Name)
		}
	}
}

// A namespace from the pool costs nothing; this is the price of one that has to be made.
func BenchmarkNamespace(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	n, err := New(Options{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	for b.Loop() {
		ns, err := n.newNamespace()
		if err != nil {
			b.Fatal(err)
		}
		n.Release(ns, false)
	}
}
