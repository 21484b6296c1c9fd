// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/seed-68981b69/slipway/executor"
)

const loopbackHosts = `127.0.0.1	localhost
::1	localhost ip6-localhost ip6-loopback
fe00::0	ip6-localnet
ff00::0	ip6-mcastprefix
ff02::1	ip6-allnodes
ff02::2	ip6-allrouters
`

// hostsFile makes /etc/hosts. ip and ip6 are the container's own addresses if it has some, gateway the host as seen from it;
// hostFile is the host's own /etc/hosts, which a container in the host's network shares unless it is to have its own.
func hostsFile(s executor.Spec, hostname string, ip, ip6, gateway netip.Addr, hostFile []byte) ([]byte, error) {
	var b strings.Builder
	if s.Network == executor.NetworkHost && !s.OwnHosts && len(hostFile) > 0 {
		b.Write(hostFile)
		if hostFile[len(hostFile)-1] != '\n' {
			b.WriteByte('\n')
		}
	} else {
		b.WriteString(loopbackHosts)
	}
	for _, h := range s.ExtraHosts {
		addr := h.IP
		if addr == executor.HostGateway {
			if !gateway.IsValid() {
				return nil, fmt.Errorf("extra host %s: there is no host to reach with network %q", h.Host, s.Network)
			}
			addr = gateway.String()
		}
		if _, err := netip.ParseAddr(addr); err != nil {
			return nil, fmt.Errorf("extra host %s: %q is not an IP address", h.Host, addr)
		}
		if h.Host == "" || strings.ContainsAny(h.Host, " \t\n#") {
			return nil, fmt.Errorf("extra host %q: not a host name", h.Host)
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, h.Host)
	}
	switch {
	case ip.IsValid():
		fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		if ip6.IsValid() {
			fmt.Fprintf(&b, "%s\t%s\n", ip6, hostname)
		}
	case s.Network == executor.NetworkNone, s.OwnHosts:
		fmt.Fprintf(&b, "127.0.0.1\t%s\n", hostname)
	}
	return []byte(b.String()), nil
}

// writeFiles writes the generated files of a container into dir and returns where they belong. A nil resolvConf
// leaves the image's own in place.
func writeFiles(dir, hostname string, hosts, resolvConf []byte) ([]generatedFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var files []generatedFile
	for _, f := range []struct {
		target  string
		content []byte
	}{
		{"/etc/resolv.conf", resolvConf},
		{"/etc/hostname", []byte(hostname + "\n")},
		{"/etc/hosts", hosts},
	} {
		if f.content == nil {
			continue
		}
		path := filepath.Join(dir, filepath.Base(f.target))
		if err := os.WriteFile(path, f.content, 0o644); err != nil {
			return nil, err
		}
		if err := os.Chmod(path, 0o644); err != nil { // whatever our umask is
			return nil, err
		}
		files = append(files, generatedFile{Source: path, Target: f.target})
	}
	return files, nil
}
