// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package network gives containers a network of their own: a bridge with a private subnet, a namespace with an
// address for each container, NAT to wherever the host can go, and published ports.
//
// Namespaces are anonymous: only file descriptors of this process and the processes inside keep them, so nothing of
// them survives the engine. The bridge and the nftables table carry a name made from the engine's state directory;
// New removes what an engine that was killed left under that name, and engines with different state directories
// share nothing. IPv4 forwarding is switched on for the host and stays on, as other container engines do it; IPv6
// forwarding where the host has IPv6 and goes on having it (ipv6.go).
//
// Published ports are served by a proxy in this process, so that they work on every address of the host including
// loopback; containers therefore see connections come from the gateway.
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
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

const (
	bridgePrefix = "slw"
	// forwardFile switches routing between interfaces on.
	forwardFile = "/proc/sys/net/ipv4/ip_forward"
	// lockFile is held while an engine looks for a free subnet, so that two that start together do not pick one.
	lockFile = "/run/slipway-network.lock"
	// defaultPoolSize is how many namespaces are kept ready: making one takes milliseconds, taking one none.
	defaultPoolSize = 4
	defaultMTU      = 1500
)

// Options say how to make a network.
type Options struct {
	// Root is the engine's state directory; the names on the host are made from it.
	Root string
	// PoolSize is how many namespaces are kept for the next containers at most; 0 means 4.
	PoolSize int
	// DNS says how containers resolve names; nil is the host's way.
	DNS *DNS
	// Log gets what goes wrong in the background; nil means slog.Default.
	Log *slog.Logger
}

// Network is a bridge with NAT. Its methods may be called concurrently.
type Network struct {
	log      *slog.Logger
	root     string
	id       string       // short hash of the root, part of every name
	bridge   atomic.Int64 // the bridge's interface index
	healing  sync.Mutex   // held while looking after the bridge and the tables; guards watch
	watch    *watch       // tells whether to look; nil once it is closed
	subnet   netip.Prefix
	gateway  netip.Addr
	subnet6  netip.Prefix // not valid when containers have no IPv6
	mtu      int
	poolSize int
	names    *DNS
	wg       sync.WaitGroup // background work: filling the pool, deleting namespaces

	mu      sync.Mutex // guards what follows
	inUse   map[netip.Addr]struct{}
	last    netip.Addr // the address handed out last
	ready   []*Namespace
	filling int
	closed  bool
	dns     *dnsForwarder
}

// New makes the bridge, its address and the NAT table. An error says what the host does not allow; the host's own
// network is then the way to run containers.
func New(opts Options) (*Network, error) {
	sum := sha256.Sum256([]byte(opts.Root))
	n := &Network{
		log:      opts.Log,
		root:     opts.Root,
		id:       hex.EncodeToString(sum[:4]),
		poolSize: opts.PoolSize,
		names:    opts.DNS,
		inUse:    map[netip.Addr]struct{}{},
	}
	if n.log == nil {
		n.log = slog.Default()
	}
	if n.poolSize == 0 {
		n.poolSize = defaultPoolSize
	}
	unlock, err := lockHost()
	if err != nil {
		return nil, fmt.Errorf("container network: %w", err)
	}
	defer unlock()
	if err := n.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("container network: %w", err), n.tearDown())
	}
	if n.watch, err = newWatch(); err != nil {
		return nil, errors.Join(fmt.Errorf("container network: %w", err), n.tearDown())
	}
	n.watch.again = true // what was changed before it began, nobody has told
	return n, nil
}

// lockHost waits for the lock that engines of this host hold while they set up a network.
func lockHost() (unlock func(), err error) {
	f, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", lockFile, err)
	}
	return func() { f.Close() }, nil
}

func (n *Network) setUp() error {
	if err := n.tearDown(); err != nil {
		return fmt.Errorf("remove what an earlier run left: %w", err)
	}
	taken, err := takenPrefixes()
	if err != nil {
		return err
	}
	if n.subnet, err = chooseSubnet(taken, n.id); err != nil {
		return err
	}
	n.gateway = n.subnet.Addr().Next()
	n.last = n.gateway
	n.mtu = hostMTU()

	uplink, err := ipv6Uplink()
	if err == nil {
		n.subnet6, err = chooseIPv6(n.root)
	}
	if err != nil {
		n.withoutIPv6(err)
	}
	if err := n.addBridge(); err != nil {
		return err
	}
	if n.subnet6.IsValid() {
		if err := n.setUpIPv6(uplink); err != nil {
			n.withoutIPv6(err)
		}
	}
	if err := addTable(n.tableName(), n.bridgeName(), n.subnet); err != nil {
		return fmt.Errorf("NAT table %s: %w", n.tableName(), err)
	}
	if b, err := os.ReadFile(forwardFile); err == nil && strings.TrimSpace(string(b)) == "1" {
		return nil
	}
	if err := os.WriteFile(forwardFile, []byte("1\n"), 0); err != nil {
		return fmt.Errorf("switch on IPv4 forwarding: %w", err)
	}
	return nil
}

// addBridge makes the bridge with the gateway's address.
func (n *Network) addBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.bridgeName()
	attrs.MTU = n.mtu
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge %s: %w", attrs.Name, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(n.gateway, n.subnet.Bits()))}
	if err := netlink.AddrAdd(bridge, addr); err != nil {
		return fmt.Errorf("give bridge %s address %s: %w", attrs.Name, n.gateway, err)
	}
	if err := bridgeSettings(attrs.Name, n.subnet6.IsValid()); err != nil {
		return err
	}
	if n.subnet6.IsValid() {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(n.gateway6(), n.subnet6.Bits())), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(bridge, addr); err != nil {
			n.withoutIPv6(fmt.Errorf("give bridge %s address %s: %w", attrs.Name, n.gateway6(), err))
		}
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("bring up bridge %s: %w", attrs.Name, err)
	}
	n.bridge.Store(int64(bridge.Index))
	return nil
}

// setUpIPv6 connects the bridge's IPv6 to the outside.
func (n *Network) setUpIPv6(uplink string) error {
	if err := enableIPv6(n.bridgeName(), uplink); err != nil {
		return fmt.Errorf("switch on IPv6 forwarding: %w", err)
	}
	if err := addTable(n.tableName(), n.bridgeName(), n.subnet6); err != nil {
		return fmt.Errorf("IPv6 NAT table %s: %w", n.tableName(), err)
	}
	return nil
}

// withoutIPv6 notes that containers have none, for that reason.
func (n *Network) withoutIPv6(reason error) {
	n.subnet6 = netip.Prefix{}
	level := slog.LevelWarn
	if errors.Is(reason, errNoIPv6) {
		level = slog.LevelDebug
	}
	n.log.Log(context.Background(), level, "containers have no IPv6", "err", reason)
}

// gateway6 is the host's IPv6 address on the bridge.
func (n *Network) gateway6() netip.Addr { return n.subnet6.Addr().Next() }

// address6 is the IPv6 address of the container with that IPv4 address.
func (n *Network) address6(ip netip.Addr) netip.Addr {
	a, a4 := n.subnet6.Addr().As16(), ip.As4()
	copy(a[12:], a4[:])
	return netip.AddrFrom16(a)
}

// heal puts back what somebody else took away: firewalls flush all tables when they are reloaded, and network managers
// or people delete links that they do not know. Containers that run get their connection back.
func (n *Network) heal() (err error) {
	n.healing.Lock()
	defer n.healing.Unlock()
	if n.watch == nil || !n.watch.changed(n.bridgeName(), int(n.bridge.Load())) {
		return nil
	}
	defer func() {
		if err != nil {
			n.watch.again = true
		}
	}()
	_, err = netlink.LinkByIndex(int(n.bridge.Load()))
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) {
		n.log.Warn("the bridge was deleted by somebody else, making it again", "bridge", n.bridgeName())
		if err := n.addBridge(); err != nil {
			return err
		}
		links, err := dump(netlink.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, n.linkPrefix()) {
				if err := netlink.LinkSetMasterByIndex(l, int(n.bridge.Load())); err != nil {
					n.log.Warn("connect container to the bridge again", "link", l.Attrs().Name, "err", err)
				}
			}
		}
	} else if err != nil {
		return fmt.Errorf("look for bridge %s: %w", n.bridgeName(), err)
	}
	for _, subnet := range []netip.Prefix{n.subnet, n.subnet6} {
		if !subnet.IsValid() {
			continue
		}
		there, err := hasTable(n.tableName(), subnet.Addr().Is6())
		if err != nil {
			return fmt.Errorf("look for table %s: %w", n.tableName(), err)
		}
		if there {
			continue
		}
		n.log.Warn("a NAT table was deleted by somebody else, making it again", "table", n.tableName(), "subnet", subnet)
		if err := addTable(n.tableName(), n.bridgeName(), subnet); err != nil {
			return err
		}
	}
	return nil
}

// tearDown removes everything that carries our name, cables that are on no bridge any more too: the kernel deletes
// those with their namespaces, but when it likes. What is not there is no error.
func (n *Network) tearDown() error {
	err := errors.Join(deleteTable(n.tableName(), false), deleteTable(n.tableName(), true))
	links, errList := dump(netlink.LinkList)
	if errList != nil {
		err = errors.Join(err, fmt.Errorf("list links: %w", errList))
	}
	for _, l := range links {
		if name := l.Attrs().Name; name == n.bridgeName() || strings.HasPrefix(name, n.linkPrefix()) {
			err = errors.Join(err, deleteLink(l))
		}
	}
	return err
}

// dump asks the kernel for a list until it was not changed while it was being read.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for range 100 {
		items, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return items, err
		}
	}
	return list()
}

// deleteLink deletes a link; one that vanished meanwhile (with its namespace) is no error.
func deleteLink(l netlink.Link) error {
	err := netlink.LinkDel(l)
	if err == nil || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("delete link %s: %w", l.Attrs().Name, err)
}

// Close removes all namespaces, the bridge and the table. Containers must have ended.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	ready := n.ready
	n.ready = nil
	dns := n.dns
	n.mu.Unlock()
	if dns != nil {
		dns.close()
	}
	for _, ns := range ready {
		ns.closeFile()
	}
	n.wg.Wait()
	n.healing.Lock()
	n.watch.close()
	n.watch = nil
	n.healing.Unlock()
	return n.tearDown()
}

// Gateway is the host's address on the bridge.
func (n *Network) Gateway() netip.Addr { return n.gateway }

// Host is the address by which containers reach this host: the gateway's (an ordinary user's network has another).
func (n *Network) Host() netip.Addr { return n.gateway }

// Publish listens on the host's ports and forwards to the container at ip; see the function Publish.
func (n *Network) Publish(ip netip.Addr, ports []executor.Port) (*Published, error) {
	return Publish(ip, ports)
}

// Subnet is the network that containers have their addresses from.
func (n *Network) Subnet() netip.Prefix { return n.subnet }

// Subnet6 is the network that they have their IPv6 addresses from; not valid when they have none.
func (n *Network) Subnet6() netip.Prefix { return n.subnet6 }

// Bridge is the name of the bridge interface.
func (n *Network) Bridge() string { return n.bridgeName() }

func (n *Network) bridgeName() string { return bridgePrefix + n.id }
func (n *Network) tableName() string  { return "slipway_" + n.id }

// linkPrefix begins the names of the host's ends of containers' cables.
func (n *Network) linkPrefix() string { return "slv" + n.id[:6] + "." }

// takenPrefixes returns the networks that the host routes or has addresses in, default routes left out.
func takenPrefixes() ([]netip.Prefix, error) {
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var taken []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		if a, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok && ones > 0 {
			taken = append(taken, netip.PrefixFrom(a, ones))
		}
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		ones, _ := a.Mask.Size()
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			taken = append(taken, netip.PrefixFrom(ip, ones).Masked())
		}
	}
	for _, s := range hostNameservers() { // reached by a route that says less than their network
		if s.Is4() {
			taken = append(taken, netip.PrefixFrom(s, 32))
		}
	}
	return taken, nil
}

// subnetBits is the size of an engine's subnet: a thousand containers at once.
const subnetBits = 22

// chooseSubnet returns a private /22 that overlaps nothing taken. Where to begin depends on id, so that an engine
// usually gets the same subnet again and two engines usually do not compete.
func chooseSubnet(taken []netip.Prefix, id string) (netip.Prefix, error) {
	const blocks = 8 * 64 // of 1,024 addresses, in 10.88.0.0/13
	var start int
	fmt.Sscanf(id[:4], "%x", &start)
	for i := range blocks {
		b := (start + i) % blocks
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(88 + b/64), byte(b % 64 * 4), 0}), subnetBits)
		free := true
		for _, t := range taken {
			if t.Overlaps(p) {
				free = false
				break
			}
		}
		if free {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("no free subnet in 10.88.0.0/13: the host routes all of it")
}

// hostMTU returns the MTU of the interface with the default route: containers must not send larger packets.
func hostMTU() int {
	routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return defaultMTU
	}
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones != 0 {
				continue
			}
		}
		l, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue
		}
		mtu := l.Attrs().MTU
		if r.MTU > 0 && r.MTU < mtu {
			mtu = r.MTU
		}
		if mtu > 0 {
			return mtu
		}
	}
	return defaultMTU
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Acquire returns a namespace with an address, from the pool if one is ready. Release it when nothing runs in it.
func (n *Network) Acquire(ctx context.Context) (*Namespace, error) {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil, errors.New("container network: closed")
	}
	var ns *Namespace
	if last := len(n.ready) - 1; last >= 0 {
		ns = n.ready[last]
		n.ready = n.ready[:last]
	}
	n.fillLocked()
	n.mu.Unlock()
	err := n.heal()
	if err == nil && ns == nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if ns, err = n.newNamespace(); err != nil { // perhaps there is no bridge just now
			if healErr := n.heal(); healErr != nil {
				return nil, fmt.Errorf("container network: %w", errors.Join(err, healErr))
			}
			ns, err = n.newNamespace()
		}
	}
	if err != nil {
		if ns != nil {
			n.Release(ns, false)
		}
		return nil, fmt.Errorf("container network: %w", err)
	}
	return ns, nil
}

// Release gives a namespace back. reusable says that nothing in it can have changed its configuration (no process
// in it was privileged to); then it may serve again. It does not block.
func (n *Network) Release(ns *Namespace, reusable bool) {
	n.mu.Lock()
	if reusable && !n.closed && len(n.ready) < n.poolSize {
		n.ready = append(n.ready, ns)
		n.mu.Unlock()
		return
	}
	if !n.closed {
		n.wg.Go(func() { n.destroy(ns) })
		n.mu.Unlock()
		return
	}
	n.mu.Unlock()
	n.destroy(ns)
}

// fillLocked starts making a namespace when none is ready. Not before: those in use come back, and steps that run one
// after the other would have one made and one deleted for each. n.mu is held.
func (n *Network) fillLocked() {
	if n.closed || n.filling > 0 || len(n.ready) > 0 {
		return
	}
	n.filling++
	n.wg.Go(func() { // not after Close has begun to wait: n.mu is held
		ns, err := n.newNamespace()
		n.mu.Lock()
		n.filling--
		if err == nil && !n.closed && len(n.ready) < n.poolSize {
			n.ready = append(n.ready, ns)
			ns = nil
		}
		n.mu.Unlock()
		if err != nil {
			n.log.Warn("prepare a network namespace", "err", err)
		} else if ns != nil {
			n.destroy(ns)
		}
	})
}
