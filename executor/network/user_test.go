// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/seed-68981b69/slipway/executor"
)

// inside calls fn on a thread in the namespace, which ends with it.
func inside[T any](t *testing.T, ns *Namespace, fn func() (T, error)) (T, error) {
	t.Helper()
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: err}
			return
		}
		v, err := fn()
		done <- result{v, err}
	}()
	r := <-done
	return r.value, r.err
}

func dialInside(t *testing.T, ns *Namespace, network, address string) (net.Conn, error) {
	t.Helper()
	return inside(t, ns, func() (net.Conn, error) { return net.DialTimeout(network, address, 5*time.Second) })
}

// hostAddress is one by which others than this host itself reach it.
func hostAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no IPv4 address but loopback: SKIPPED")
	return ""
}

// echo serves TCP and UDP at address: everything comes back.
func echo(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp4", net.JoinHostPort(address, "0"))
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
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	echoUDP(t, l.Addr().String())
	return l.Addr().String()
}

func echoUDP(t *testing.T, address string) {
	t.Helper()
	p, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Skipf("listen at %s: %v: SKIPPED", address, err)
	}
	t.Cleanup(func() { p.Close() })
	go func() {
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = p.WriteTo(buf[:n], from)
		}
	}()
}

func newUser(t *testing.T, dns *DNS) (*User, *Namespace) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root: SKIPPED")
	}
	u, err := NewUser(Options{Root: t.TempDir(), DNS: dns})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	ns, err := u.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Release(ns, false) })
	return u, ns
}

func TestUserTCP(t *testing.T) {
	_, ns := newUser(t, nil)
	c, err := dialInside(t, ns, "tcp4", echo(t, hostAddress(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// Much more than buffers hold, both ways at once; then one direction ends before the other.
	sent := sha256.New()
	go func() {
		_, _ = io.Copy(io.MultiWriter(c, sent), io.LimitReader(rand.Reader, 16<<20))
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if err != nil || n != 16<<20 {
		t.Fatalf("%d bytes came back: %v", n, err)
	}
	if !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
		t.Error("other bytes came back")
	}
}

func TestUserUDP(t *testing.T) {
	_, ns := newUser(t, nil)
	c, err := dialInside(t, ns, "udp4", echo(t, hostAddress(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, size := range []int{1, 1400, 9000} {
		exchange(t, c, bytes.Repeat([]byte{byte(size)}, size))
	}
}

// exchange sends a datagram, again if it is lost, and wants it back.
func exchange(t *testing.T, c net.Conn, data []byte) {
	t.Helper()
	buf := make([]byte, maxDatagram)
	for range 5 {
		if _, err := c.Write(data); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, err := c.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil || !bytes.Equal(buf[:n], data) {
			t.Fatalf("%d bytes: got %d back: %v", len(data), n, err)
		}
		return
	}
	t.Fatalf("%d bytes never came back", len(data))
}

// The router answers questions for names and nothing else; the host's resolver may be on its loopback.
func TestUserNames(t *testing.T) {
	const resolver = "127.83.76.87"
	echoUDP(t, resolver+":53")
	u, ns := newUser(t, &DNS{Nameservers: []string{resolver}, SearchDomains: []string{"a.test"}})
	conf, err := u.ResolvConf()
	if err != nil {
		t.Fatal(err)
	}
	if text := string(conf); !strings.HasPrefix(text, "nameserver "+u.Gateway().String()+"\n") || !strings.Contains(text, "search a.test\n") || strings.Contains(text, resolver) {
		t.Errorf("resolv.conf:\n%s", text)
	}
	c, err := dialInside(t, ns, "udp4", u.Gateway().String()+":53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	exchange(t, c, []byte("what is the address of a.test"))
	if c, err := dialInside(t, ns, "tcp4", u.Gateway().String()+":80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("port 80 of the router: %v %v, want refused", c, err)
	}
}

func TestUserRefused(t *testing.T) {
	_, ns := newUser(t, nil)
	l, err := net.Listen("tcp4", net.JoinHostPort(hostAddress(t), "0"))
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	if _, err := dialInside(t, ns, "tcp4", closed); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port that nobody listens on: %v, want refused", err)
	}
}

// What a container may send anywhere, by a raw socket too.
func TestRouterTargets(t *testing.T) {
	r := &router{address: netip.MustParseAddr("10.88.0.1"), subnet: netip.MustParsePrefix("10.88.0.0/22")}
	for to, want := range map[string][2]bool{ // dns, ok
		"192.0.2.1:80":       {false, true},
		"10.99.0.1:80":       {false, true},
		"10.88.0.1:53":       {true, true},
		"10.88.0.1:80":       {true, false},
		"10.88.0.7:80":       {false, false},
		"127.0.0.1:80":       {false, false},
		"127.1.2.3:53":       {false, false},
		"0.0.0.0:80":         {false, false},
		"0.1.2.3:80":         {false, false},
		"224.0.0.251:5353":   {false, false},
		"255.255.255.255:67": {false, false},
	} {
		a := netip.MustParseAddrPort(to)
		_, dns, ok := r.target(stack.TransportEndpointID{LocalAddress: tcpip.AddrFrom4(a.Addr().As4()), LocalPort: a.Port()})
		if ok != want[1] || ok && dns != want[0] {
			t.Errorf("%s: dns %v, ok %v", to, dns, ok)
		}
	}
}

func TestUserPublish(t *testing.T) {
	u, ns := newUser(t, nil)
	l, err := inside(t, ns, func() (net.Listener, error) { return net.Listen("tcp4", ns.IP().String()+":0") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "ahoy")
			c.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	p, err := u.Publish(ns.IP(), []executor.Port{{HostIP: "127.0.0.1", ContainerPort: uint16(number)}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 3 {
		c, err := net.Dial("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Ports[0].HostPort))))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "ahoy" {
			t.Errorf("%q %v", b, err)
		}
		c.Close()
	}
}

// Two containers reach each other; a namespace that came back clean is used again; what is cancelled gets none.
func TestUserNamespaces(t *testing.T) {
	u, a := newUser(t, nil)
	b, err := u.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a.IP() == b.IP() {
		t.Fatalf("both have %s", a.IP())
	}
	l, err := inside(t, b, func() (net.Listener, error) { return net.Listen("tcp4", b.IP().String()+":0") })
	if err != nil {
		t.Fatal(err)
	}
	c, err := dialInside(t, a, "tcp4", l.Addr().String())
	if err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	l.Close()
	u.Release(b, true)
	again, err := u.Acquire(t.Context())
	if err != nil || again != b {
		t.Errorf("got %v, %v instead of the one given back", again, err)
	}
	u.Release(again, false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.Acquire(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("acquire when cancelled: %v", err)
	}
}
