// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// resolver answers every question for an IPv4 address with 192.0.2.99, at an address of the loopback that containers cannot
// reach.
func resolver(t *testing.T) string {
	t.Helper()
	const address = "127.0.0.97"
	l, err := net.ListenPacket("udp4", address+":53")
	if errors.Is(err, unix.EADDRINUSE) {
		t.Skipf("something listens on port 53 of %s: SKIPPED", address)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := l.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response = true
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
					Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 99}},
				}}
			}
			if b, err := m.Pack(); err == nil {
				l.WriteTo(b, from)
			}
		}
	}()
	return address
}

// TestNames: a container asks the engine for names, which asks the host's resolver, wherever that is.
func TestNames(t *testing.T) {
	runctest.Runner(t)
	address := resolver(t)
	n, err := network.New(network.Options{Root: t.TempDir(), DNS: &network.DNS{Nameservers: []string{address}, SearchDomains: []string{"lan"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	r := newExecutor(t, runc.Options{Network: n})
	rootfs := runctest.Rootfs(t)
	s := spec(rootfs, "cat /etc/resolv.conf; for i in 1 2 3 4 5 6 7 8; do nslookup name$i.test | grep 192.0.2.99 & done; wait")
	s.Network = executor.NetworkBridge
	res := run(t, r, s)
	if !strings.HasPrefix(res.stdout, "nameserver "+n.Gateway().String()+"\n") || strings.Contains(res.stdout, address) || !strings.Contains(res.stdout, "search lan\n") {
		t.Errorf("resolv.conf: %q", res.stdout)
	}
	if got := strings.Count(res.stdout, "192.0.2.99"); got != 8 {
		t.Errorf("%d of 8 names were found: %q %q", got, res.stdout, res.stderr)
	}

	// Of resolvers that a container can reach, the engine is the first still.
	n2 := newNetwork(t)
	r2 := newExecutor(t, runc.Options{Network: n2})
	s.Args = []string{"/bin/sh", "-c", "cat /etc/resolv.conf"}
	if res := run(t, r2, s); !strings.HasPrefix(res.stdout, "nameserver "+n2.Gateway().String()+"\n") {
		t.Errorf("resolv.conf: %q", res.stdout)
	}
}
