// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

// The names of the interfaces in the hub.
const (
	hubBridge = "hub"
	hubPort   = "port" // the bridge's end of the cable to the user-mode router
	hubTap    = "router"
)

// User is a network for containers that takes no rights on the host: that of an ordinary user's engine. Its containers
// are connected by a bridge in a network namespace of its own, the hub, in which the user namespace is privileged. What leaves it
// goes to a router in this process (router.go): a TCP/IP stack that ends the connections of containers and makes
// them again as sockets of this process. So containers reach what this process reaches; TCP, UDP and DNS over IPv4, nothing else.
// The router sees the frames by a packet socket in the hub: no access to /dev/net/tun is needed.
//
// Everything lives in namespaces that end with this process. Its methods may be called concurrently.
type User struct {
	log      *slog.Logger
	subnet   netip.Prefix
	gateway  netip.Addr // the router's
	poolSize int
	names    *DNS
	hub      *os.File
	handle   *netlink.Handle // into the hub
	bridge   int             // the bridge's interface index
	router   *router

	mu     sync.Mutex // guards what follows
	inUse  map[netip.Addr]bool
	last   netip.Addr
	ready  []*Namespace
	closed bool
	work   sync.WaitGroup
}

// userMTU is large: the wires are memory, and each packet costs the same.
const userMTU = 16 << 10

// NewUser makes a user-mode network. This process must be root of a user namespace.
func NewUser(opts Options) (*User, error) {
	u := &User{log: opts.Log, poolSize: opts.PoolSize, names: opts.DNS, inUse: map[netip.Addr]bool{}}
	if u.log == nil {
		u.log = slog.Default()
	}
	if u.poolSize == 0 {
		u.poolSize = defaultPoolSize
	}
	if err := u.setUp(opts.Root); err != nil {
		return nil, errors.Join(fmt.Errorf("user-mode network: %w", err), u.Close())
	}
	return u, nil
}

func (u *User) setUp(root string) error {
	taken, err := takenPrefixes()
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(root))
	if u.subnet, err = chooseSubnet(taken, hex.EncodeToString(sum[:4])); err != nil {
		return err
	}
	u.gateway = u.subnet.Addr().Next()
	own := u.gateway.Next() // the bridge's: published ports come from there
	u.last = own
	if u.hub, u.handle, err = openNamespace(); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = hubBridge, userMTU
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := u.handle.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	u.bridge = bridge.Index
	if err := u.handle.AddrAdd(bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own, u.subnet.Bits()))}); err != nil {
		return fmt.Errorf("give the bridge address %s: %w", own, err)
	}
	attrs = netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = hubPort, userMTU, u.bridge, net.FlagUp
	if err := u.handle.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: hubTap, PeerMTU: userMTU}); err != nil {
		return fmt.Errorf("add link to the router: %w", err)
	}
	tap, err := u.handle.LinkByName(hubTap)
	if err != nil {
		return fmt.Errorf("find link to the router: %w", err)
	}
	if err := errors.Join(u.handle.LinkSetUp(bridge), u.handle.LinkSetUp(tap)); err != nil {
		return fmt.Errorf("bring up links: %w", err)
	}
	fd, err := u.packetSocket(tap.Attrs().Index)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	u.router, err = newRouter(fd, u.gateway, u.subnet, userMTU, u.upstream, u.log)
	return err
}

// packetSocket opens a socket for all frames of an interface in the hub.
func (u *User) packetSocket(index int) (int, error) {
	fd := -1
	err := u.inHub(func() error {
		const protocol = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
		var err error
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol); err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index}); err != nil {
			unix.Close(fd)
			return os.NewSyscallError("bind", err)
		}
		return nil
	})
	return fd, err
}

// inHub calls fn on a thread that is in the hub. Sockets that fn makes belong there for good.
func (u *User) inHub(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: there is no way back into the host's namespace, so the thread ends with this goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(u.hub.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- os.NewSyscallError("setns", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// Gateway is the address of the router, as containers see it.
func (u *User) Gateway() netip.Addr { return u.gateway }

// Host is the address by which containers reach this host: its own towards the outside, for the router's is nobody's and gives no way to
// what listens on the loopback alone. Not valid when the host has no way out.
func (u *User) Host() netip.Addr {
	// A datagram socket that is connected has been routed, and has sent nothing. The address is of those for documentation.
	c, err := net.Dial("udp4", "192.0.2.1:9")
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
}

// ResolvConf makes the resolv.conf of a container: the router is its name server, and asks the host's.
func (u *User) ResolvConf() ([]byte, error) {
	host, err := hostConf(u.names)
	if err != nil {
		return nil, err
	}
	conf := fmt.Appendf(nil, "nameserver %s\n", u.gateway)
	for line := range strings.Lines(string(host)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] != "nameserver" && fields[0][0] != '#' && fields[0][0] != ';' {
			conf = append(conf, strings.TrimRight(line, "\n")+"\n"...)
		}
	}
	return conf, nil
}

// upstream are the name servers that the router asks.
func (u *User) upstream() []string { return upstreams(u.names, u.log) }

// Acquire returns a namespace with an address, from the pool if one is ready. Release it when nothing runs in it.
func (u *User) Acquire(ctx context.Context) (*Namespace, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return nil, errors.New("user-mode network: closed")
	}
	if last := len(u.ready) - 1; last >= 0 {
		ns := u.ready[last]
		u.ready = u.ready[:last]
		u.mu.Unlock()
		return ns, nil
	}
	u.mu.Unlock()
	ns, err := u.newNamespace()
	if err != nil {
		return nil, fmt.Errorf("user-mode network: %w", err)
	}
	return ns, nil
}

// Release gives a namespace back. reusable says that nothing in it can have changed its configuration. It does not block.
func (u *User) Release(ns *Namespace, reusable bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if reusable && !u.closed && len(u.ready) < u.poolSize {
		u.ready = append(u.ready, ns)
		return
	}
	if u.closed {
		ns.closeFile()
		return
	}
	u.work.Go(func() { u.destroy(ns) })
}

func (u *User) destroy(ns *Namespace) {
	ns.closeFile()
	if l, err := u.handle.LinkByName(ns.link); err == nil {
		_ = u.handle.LinkDel(l) // it may have gone with the namespace
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.inUse, ns.ip)
}

// newNamespace makes a namespace with a cable to the hub's bridge, an address and a route to the router.
func (u *User) newNamespace() (_ *Namespace, err error) {
	ip, err := u.takeAddress()
	if err != nil {
		return nil, err
	}
	file, h, err := openNamespace()
	if err != nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.inUse, ip)
		return nil, err
	}
	defer h.Close()
	a4 := ip.As4()
	ns := &Namespace{ip: ip, link: "c" + strconv.Itoa(int(a4[2])<<8|int(a4[3])), file: file}
	defer func() {
		if err != nil {
			u.destroy(ns)
		}
	}()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = ns.link, userMTU, u.bridge, net.FlagUp
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: containerInterface, PeerMTU: userMTU, PeerNamespace: netlink.NsFd(int(file.Fd())),
		PeerHardwareAddr: net.HardwareAddr{0x02, 0x42, a4[0], a4[1], a4[2], a4[3]},
	}
	if err := u.handle.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add link: %w", err)
	}
	inside, err := h.LinkByName(containerInterface)
	if err != nil {
		return nil, fmt.Errorf("find %s in the namespace: %w", containerInterface, err)
	}
	if err := h.AddrAdd(inside, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ip, u.subnet.Bits()))}); err != nil {
		return nil, fmt.Errorf("give address %s: %w", ip, err)
	}
	if err := h.LinkSetUp(inside); err != nil {
		return nil, fmt.Errorf("bring up %s: %w", containerInterface, err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: inside.Attrs().Index, Gw: u.gateway.AsSlice()}); err != nil {
		return nil, fmt.Errorf("add default route: %w", err)
	}
	return ns, nil
}

// takeAddress returns a free address, going round so that one is not used again at once.
func (u *User) takeAddress() (netip.Addr, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	first := u.gateway.Next().Next()
	a := u.last
	for range 1 << (32 - u.subnet.Bits()) {
		if a = a.Next(); !u.subnet.Contains(a.Next()) { // the last one is the broadcast address
			a = first
		}
		if !u.inUse[a] {
			u.inUse[a] = true
			u.last = a
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no free address in %s", u.subnet)
}

// Publish listens on the host's ports and forwards to the container at ip.
func (u *User) Publish(ip netip.Addr, ports []executor.Port) (*Published, error) {
	return publish(ip, ports, func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = u.inHub(func() error {
			var err error
			c, err = (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
			return err
		})
		return c, err
	})
}

// Close ends the router and lets go of all namespaces. Containers must have ended.
func (u *User) Close() error {
	u.mu.Lock()
	u.closed = true
	ready := u.ready
	u.ready = nil
	u.mu.Unlock()
	for _, ns := range ready {
		ns.closeFile()
	}
	u.work.Wait()
	if u.router != nil {
		u.router.close()
		u.router = nil
	}
	if u.handle != nil {
		u.handle.Close()
		u.handle = nil
	}
	if u.hub != nil {
		u.hub.Close()
	}
	return nil
}
