// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// inUserNamespace changes a plan to what root of a user namespace may do: no device node can be made there, so those of
// /dev are the host's, bound one by one, and cannot be used for more than the host lets the user.
func (p *plan) inUserNamespace() {
	p.BindDevices = true
	setgroups, err := os.ReadFile("/proc/self/setgroups")
	p.KeepGroups = err == nil && strings.TrimSpace(string(setgroups)) == "deny"
	at := slices.IndexFunc(p.Mounts, func(m planMount) bool { return isDev(&m) }) + 1
	var nodes []planMount
	for _, d := range devices {
		nodes = append(nodes, planMount{
			Target: "/dev/" + d.name, Source: "/dev/" + d.name, Bind: true, Private: true, Attr: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC,
		})
	}
	p.Mounts = slices.Insert(p.Mounts, at, nodes...)
}
