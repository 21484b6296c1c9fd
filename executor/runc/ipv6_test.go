// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// remote is another host: a network namespace at the end of a cable, with a web server that says who asks.
type remote struct {
	t       *testing.T
	do      chan func()
	address string // of the server
}

// newRemote makes one with the addresses fd99:…::2 there and fd99:…::1 here.
func newRemote(t *testing.T, subnet netip.Prefix) *remote {
	t.Helper()
	r := &remote{t: t, do: make(chan func())}
	name := fmt.Sprintf("slt%d", os.Getpid()%100000)
	type made struct {
		fd  int
		err error
	}
	started := make(chan made)
	go func() { // a thread in the namespace
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			started <- made{err: err}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		started <- made{fd, err}
		for fn := range r.do {
			fn()
		}
	}()
	ns := <-started
	if ns.err != nil {
		t.Fatal(ns.err)
	}
	defer unix.Close(ns.fd)
	t.Cleanup(func() { close(r.do) })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: "there", PeerNamespace: netlink.NsFd(ns.fd)}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	// Packets from there may go on: as they may from the interface with the default route.
	if os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/force_forwarding", []byte("1"), 0) != nil {
		if b, _ := os.ReadFile("/proc/sys/net/ipv6/conf/all/forwarding"); strings.TrimSpace(string(b)) != "1" {
			t.Skip("this kernel cannot forward IPv6 for single interfaces: SKIPPED")
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	here := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP("fd99:517:e5::1"), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
	must(netlink.AddrAdd(link, here))
	must(netlink.LinkSetUp(link))
	r.in(func() {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		must(err)
		defer h.Close()
		there, err := h.LinkByName("there")
		must(err)
		must(h.AddrAdd(there, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP("fd99:517:e5::2"), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}))
		must(h.LinkSetUp(there))
		// It knows the way to the containers: that it cannot use it is to be seen.
		must(h.RouteAdd(&netlink.Route{LinkIndex: there.Attrs().Index, Gw: net.ParseIP("fd99:517:e5::1"), Dst: &net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), 128)}}))
		l, err := net.Listen("tcp6", "[fd99:517:e5::2]:0")
		must(err)
		t.Cleanup(func() { l.Close() })
		r.address = l.Addr().String()
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { fmt.Fprintln(w, "you are", req.RemoteAddr) }))
	})
	return r
}

// in calls fn on a thread in the namespace.
func (r *remote) in(fn func()) {
	r.t.Helper()
	done := make(chan struct{})
	r.do <- func() { defer close(done); fn() }
	<-done
}

// TestIPv6: containers have IPv6 where the host has it: among each other, to the host, and by NAT to others, who cannot begin a
// conversation with them.
func TestIPv6(t *testing.T) {
	n := newNetwork(t)
	subnet := n.Subnet6()
	if !subnet.IsValid() {
		t.Skip("this host has no IPv6 to give to containers: SKIPPED")
	}
	r := newExecutor(t, runc.Options{Network: n})
	rootfs := runctest.Rootfs(t)
	runctest.Inside(t, rootfs)
	other := newRemote(t, subnet)
	gateway := subnet.Addr().Next().String()
	host, err := net.Listen("tcp6", net.JoinHostPort(gateway, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go http.Serve(host, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { io.WriteString(w, "from the host\n") }))

	os.WriteFile(filepath.Join(rootfs, "index.html"), []byte("page\n"), 0o644)
	s := spec(rootfs, "")
	s.ID, s.Network = "server", executor.NetworkBridge
	s.Args = []string{"sh", "-c", "ip -6 addr show dev eth0 scope global; echo ready; httpd -f -p [::]:80 -h /"}
	s.Ports = []executor.Port{{HostIP: "::1", ContainerPort: 80}, {ContainerPort: 80}}
	out := newWaitFor("ready\n")
	p, err := r.Start(t.Context(), s, executor.IO{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Signal(unix.SIGKILL); p.Wait() }()
	out.wait(t)
	_, after, _ := strings.Cut(out.String(), "inet6 ")
	address, _, _ := strings.Cut(after, "/")
	if a, err := netip.ParseAddr(address); err != nil || !subnet.Contains(a) {
		t.Fatalf("address %q is not in %v: %q", address, subnet, out.String())
	}
	for _, where := range []string{
		net.JoinHostPort("::1", strconv.Itoa(int(p.Ports()[0].HostPort))), net.JoinHostPort("::1", strconv.Itoa(int(p.Ports()[1].HostPort))),
		net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Ports()[1].HostPort))), net.JoinHostPort(address, "80"),
	} {
		if body := getUntilReady(t, "http://"+where+"/index.html"); body != "page\n" {
			t.Errorf("%s: %q", where, body)
		}
	}

	s2 := spec(rootfs, fmt.Sprintf("inside get http://%s/; inside get http://[%s]/index.html; inside get http://%s/; grep $(hostname) /etc/hosts", host.Addr(), address, other.address))
	s2.Network = executor.NetworkBridge
	res := run(t, r, s2)
	if !strings.HasPrefix(res.stdout, "from the host\npage\nyou are [fd99:517:e5::1]:") || strings.Count(res.stdout, "\t") != 2 {
		t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
	}

	var conn net.Conn
	other.in(func() { conn, err = net.DialTimeout("tcp6", net.JoinHostPort(address, "80"), 700*time.Millisecond) })
	if err == nil {
		conn.Close()
		t.Error("a stranger can connect to a container")
	}
}

// TestEscapeByAdvertisement: a container tells the host that it is a router. The host must not believe it (CVE-2020-13401).
func TestEscapeByAdvertisement(t *testing.T) {
	n := newNetwork(t)
	r := newExecutor(t, runc.Options{Network: n})
	rootfs := runctest.Rootfs(t)
	runctest.Inside(t, rootfs)
	s := spec(rootfs, "inside attack advertise")
	s.Network = executor.NetworkBridge
	setting := func(key string) string { return filepath.Join("/proc/sys/net/ipv6/conf", n.Bridge(), key) }
	believed := func(wait time.Duration) bool {
		t.Helper()
		if res := run(t, r, s); !strings.Contains(res.stdout, "DONE") {
			t.Fatalf("nothing was sent: %q %q", res.stdout, res.stderr)
		}
		bridge, err := netlink.LinkByName(n.Bridge())
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
			addrs, err := netlink.AddrList(bridge, netlink.FAMILY_V6)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range addrs {
				if strings.HasPrefix(a.IP.String(), "2001:db8:bad:") {
					return true
				}
			}
			if time.Now().After(end) {
				return false
			}
		}
	}
	if believed(300 * time.Millisecond) {
		t.Error("the host has an address that a container has told it of")
	}
	for key, value := range map[string]string{"disable_ipv6": "0", "accept_ra": "1", "autoconf": "1"} {
		if err := os.WriteFile(setting(key), []byte(value), 0); err != nil {
			t.Skipf("no IPv6 in this kernel (%v): SKIPPED", err)
		}
	}
	if b, _ := os.ReadFile(setting("forwarding")); strings.TrimSpace(string(b)) == "0" && !believed(5*time.Second) {
		t.Error("the host does not believe it without protection either: the attack is none")
	}
}
