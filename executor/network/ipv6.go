// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Containers have IPv6 when the host has it: an address of a private prefix (a ULA, made from the engine's state directory) and
// NAT to wherever the host can go. On a host without an IPv6 default route, or one where forwarding cannot be had without
// harm, they have none, and programs in them do not see any.

// ipv6Settings is where the kernel keeps the settings of interfaces.
const ipv6Settings = "/proc/sys/net/ipv6/conf"

// errNoIPv6 is a host that has no IPv6 to give.
var errNoIPv6 = errors.New("the host has no IPv6 default route")

// chooseIPv6 returns the prefix for the containers of the engine with that root.
func chooseIPv6(root string) (netip.Prefix, error) {
	sum := sha256.Sum256([]byte("slipway " + root))
	address := [16]byte{0: 0xfd}
	copy(address[1:8], sum[:]) // RFC 4193: 40 random bits, and the subnet's 16
	p := netip.PrefixFrom(netip.AddrFrom16(address), 64)
	routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return p, fmt.Errorf("list IPv6 routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		if a, ok := netip.AddrFromSlice(r.Dst.IP.To16()); ok && ones > 0 && netip.PrefixFrom(a, ones).Overlaps(p) {
			return p, fmt.Errorf("the host routes %s already", p)
		}
	}
	return p, nil
}

// ipv6Uplink is the name of the interface with the host's IPv6 default route.
func ipv6Uplink() (string, error) {
	routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return "", fmt.Errorf("list IPv6 routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 {
				continue
			}
		}
		if len(r.Gw) == 0 || r.Type != unix.RTN_UNICAST {
			continue
		}
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
			return l.Attrs().Name, nil
		}
	}
	return "", errNoIPv6
}

// enableIPv6 switches forwarding on between the bridge and the uplink. A host that forwards by the old switch, the one for all
// interfaces, takes no router advertisements any more: where it lives by them, that is refused.
func enableIPv6(bridge, uplink string) error {
	setting := func(name, key string) string { return filepath.Join(ipv6Settings, name, key) }
	if readSetting(setting("all", "forwarding")) == "1" {
		return nil
	}
	const alone = "force_forwarding" // since Linux 6.17: for packets that come in by this interface, and nothing else
	if readSetting(setting(bridge, alone)) != "" {
		for _, name := range []string{bridge, uplink} {
			if err := os.WriteFile(setting(name, alone), []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	}
	if readSetting(setting(uplink, "accept_ra")) == "1" {
		return fmt.Errorf("%[1]s lives by router advertisements, which it would ignore if it forwarded packets: set net.ipv6.conf.%[1]s.accept_ra=2 and net.ipv6.conf.all.forwarding=1", uplink)
	}
	return os.WriteFile(setting("all", "forwarding"), []byte("1"), 0)
}

func readSetting(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

// bridgeSettings are written before a bridge is brought up. Containers can send any packet to it: the host must learn no routes,
// addresses or redirects from them.
func bridgeSettings(bridge string, ipv6 bool) error {
	disabled := "1"
	if ipv6 {
		disabled = "0"
	}
	for _, s := range []struct{ path, value string }{
		{filepath.Join(ipv6Settings, bridge, "accept_ra"), "0"},
		{filepath.Join(ipv6Settings, bridge, "autoconf"), "0"},
		{filepath.Join(ipv6Settings, bridge, "accept_redirects"), "0"},
		{filepath.Join(ipv6Settings, bridge, "disable_ipv6"), disabled},
		{filepath.Join("/proc/sys/net/ipv4/conf", bridge, "accept_redirects"), "0"},
	} {
		if err := os.WriteFile(s.path, []byte(s.value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s: %w", s.path, err)
		}
	}
	return nil
}
