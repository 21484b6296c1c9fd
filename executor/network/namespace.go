// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/userns"
)

// containerInterface is what the interface is called inside a namespace.
const containerInterface = "eth0"

// Namespace is a network namespace with one interface on the bridge. It lives as long as its file is open or a
// process is in it.
type Namespace struct {
	ip   netip.Addr
	ip6  netip.Addr // not valid when there is none
	link string     // the host's end of the cable

	mu   sync.Mutex // guards file
	file *os.File
}

// IP is the container's address.
func (ns *Namespace) IP() netip.Addr { return ns.ip }

// IP6 is the container's IPv6 address, not valid when it has none.
func (ns *Namespace) IP6() netip.Addr { return ns.ip6 }

// Path is a path by which another process of the same user can enter the namespace while it is held here.
func (ns *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.file.Fd())
}

func (ns *Namespace) closeFile() {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.file != nil {
		ns.file.Close()
		ns.file = nil
	}
}

// newNamespace makes a namespace, its cable to the bridge, its address and its routes.
func (n *Network) newNamespace() (_ *Namespace, err error) {
	ip, index, err := n.takeAddress()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			n.freeAddress(ip)
		}
	}()
	file, h, err := openNamespace()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	ns := &Namespace{ip: ip, link: n.linkPrefix() + strconv.FormatInt(int64(index), 16), file: file}
	defer func() {
		if err != nil {
			n.unplug(ns)
		}
	}()

	attrs := netlink.NewLinkAttrs()
	attrs.Name = ns.link
	attrs.MTU = n.mtu
	attrs.MasterIndex = int(n.bridge.Load())
	attrs.Flags = net.FlagUp
	a4 := ip.As4()
	veth := &netlink.Veth{
		LinkAttrs:     attrs,
		PeerName:      containerInterface,
		PeerMTU:       uint32(n.mtu),
		PeerNamespace: netlink.NsFd(int(file.Fd())),
		// A fixed relation between address and hardware address: neighbours that remember an address from an
		// earlier container are still right.
		PeerHardwareAddr: net.HardwareAddr{0x02, 0x42, a4[0], a4[1], a4[2], a4[3]},
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add link %s: %w", ns.link, err)
	}
	inside, err := h.LinkByName(containerInterface)
	if err != nil {
		return nil, fmt.Errorf("find %s in the namespace: %w", containerInterface, err)
	}
	if err := h.AddrAdd(inside, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ip, n.subnet.Bits()))}); err != nil {
		return nil, fmt.Errorf("give address %s: %w", ip, err)
	}
	if err := h.LinkSetUp(inside); err != nil {
		return nil, fmt.Errorf("bring up %s: %w", containerInterface, err)
	}
	route := &netlink.Route{LinkIndex: inside.Attrs().Index, Gw: n.gateway.AsSlice()}
	if err := h.RouteAdd(route); err != nil {
		return nil, fmt.Errorf("add default route: %w", err)
	}
	if n.subnet6.IsValid() {
		if err := n.addIPv6(h, inside, ns); err != nil {
			return nil, err
		}
	}
	return ns, nil
}

// addIPv6 gives a namespace its IPv6 address and route.
func (n *Network) addIPv6(h *netlink.Handle, inside netlink.Link, ns *Namespace) error {
	err := inNamespace(ns.file, func() error {
		return os.WriteFile(filepath.Join(ipv6Settings, containerInterface, "disable_ipv6"), []byte("0"), 0)
	})
	if err != nil {
		return fmt.Errorf("switch on IPv6 in the namespace: %w", err)
	}
	ip := n.address6(ns.ip)
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ip, n.subnet6.Bits())), Flags: unix.IFA_F_NODAD}
	if err := h.AddrAdd(inside, addr); err != nil {
		return fmt.Errorf("give address %s: %w", ip, err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: inside.Attrs().Index, Gw: n.gateway6().AsSlice()}); err != nil {
		return fmt.Errorf("add IPv6 default route: %w", err)
	}
	ns.ip6 = ip
	return nil
}

// namespaceSysctls are written inside a new namespace. A process of any user may listen on low ports and send pings,
// as under docker; without a routed IPv6 address, programs must not believe that there is one (addIPv6 switches it on). What
// other containers advertise is not believed.
var namespaceSysctls = []struct{ path, value string }{
	{"/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"},
	{"/proc/sys/net/ipv4/ping_group_range", pingGroups()},
	{"/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"},
	{"/proc/sys/net/ipv6/conf/default/accept_ra", "0"},
}

// pingGroups are all groups that there are: the kernel refuses a range with others in it.
func pingGroups() string {
	_, highest := userns.Highest()
	return fmt.Sprintf("0 %d", min(highest, 1<<31-1))
}

// inNamespace calls fn on a thread in the namespace of a file.
func inNamespace(file *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with this goroutine
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}

// openNamespace makes an anonymous namespace with loopback up and returns its file and a netlink handle into it.
func openNamespace() (*os.File, *netlink.Handle, error) {
	type result struct {
		file   *os.File
		handle *netlink.Handle
		err    error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		origin, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- result{err: err}
			return
		}
		defer origin.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- result{err: fmt.Errorf("unshare network namespace: %w", err)}
			return
		}
		r := result{}
		r.file, r.handle, r.err = configureThisNamespace()
		if err := unix.Setns(int(origin.Fd()), unix.CLONE_NEWNET); err == nil {
			runtime.UnlockOSThread()
		} // otherwise the thread ends with this goroutine: nothing else may run in the wrong namespace
		done <- r
	}()
	r := <-done
	return r.file, r.handle, r.err
}

// configureThisNamespace works on the namespace of the calling thread.
func configureThisNamespace() (*os.File, *netlink.Handle, error) {
	for _, s := range namespaceSysctls {
		if err := os.WriteFile(s.path, []byte(s.value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, fmt.Errorf("set %s: %w", s.path, err)
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("netlink: %w", err)
	}
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		h.Close()
		return nil, nil, fmt.Errorf("bring up loopback: %w", err)
	}
	file, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		h.Close()
		return nil, nil, err
	}
	return file, h, nil
}

// destroy deletes a namespace for good. It takes long (the kernel waits for other processors): run it off the path.
func (n *Network) destroy(ns *Namespace) {
	n.unplug(ns)
	n.freeAddress(ns.ip)
}

func (n *Network) unplug(ns *Namespace) {
	ns.closeFile()
	l, err := netlink.LinkByName(ns.link)
	if err != nil {
		return
	}
	if err := deleteLink(l); err != nil {
		n.log.Warn("delete network namespace", "err", err)
	}
}

// takeAddress returns a free address and its number in the subnet, going round so that an address is not used again
// at once.
func (n *Network) takeAddress() (netip.Addr, int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for a := n.last.Next(); a != n.last; a = a.Next() {
		if !n.subnet.Contains(a) || !n.subnet.Contains(a.Next()) { // the last one is the broadcast address
			a = n.gateway
			if a == n.last {
				break
			}
			continue
		}
		if _, used := n.inUse[a]; used {
			continue
		}
		n.inUse[a] = struct{}{}
		n.last = a
		first, this := n.subnet.Addr().As4(), a.As4()
		return a, int(this[2]-first[2])<<8 | int(this[3]), nil
	}
	return netip.Addr{}, 0, fmt.Errorf("no free address in %s", n.subnet)
}

func (n *Network) freeAddress(a netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.inUse, a)
}
