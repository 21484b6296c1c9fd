// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// capabilityNames are the kernel's capabilities in the order of their numbers.
var capabilityNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// defaultCapabilities are what docker gives to a container.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// heldCapabilities returns the capabilities that this process may give away.
func heldCapabilities() ([]string, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		hex, ok := strings.CutPrefix(line, "CapPrm:")
		if !ok {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil, err
		}
		var held []string
		for i, name := range capabilityNames {
			if mask&(1<<i) != 0 {
				held = append(held, name)
			}
		}
		return held, nil
	}
	return nil, fmt.Errorf("/proc/self/status has no CapPrm line")
}

// capabilities applies additions and removals to the default set as docker does: ALL adds or removes everything, and
// a name that is in both lists is added when ALL is dropped and dropped otherwise. The result is in kernel order.
func capabilities(privileged bool, add, drop, held []string) ([]string, error) {
	if privileged {
		return held, nil
	}
	add, err := normalizeCapabilities(add)
	if err != nil {
		return nil, err
	}
	if drop, err = normalizeCapabilities(drop); err != nil {
		return nil, err
	}
	dropAll := slices.Contains(drop, "ALL")
	addAll := slices.Contains(add, "ALL")
	var set []string
	for _, name := range capabilityNames {
		canHold := slices.Contains(held, name)
		in := slices.Contains(defaultCapabilities, name) && !dropAll
		if addAll && canHold {
			in = true
		}
		if slices.Contains(drop, name) {
			in = false
		}
		if slices.Contains(add, name) && (dropAll || !slices.Contains(drop, name)) {
			if !canHold {
				return nil, fmt.Errorf("capability %s cannot be added: slipway does not have it itself", name)
			}
			in = true
		}
		if in && canHold {
			set = append(set, name)
		}
	}
	return set, nil
}

func normalizeCapabilities(names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		n := strings.ToUpper(name)
		if n != "ALL" {
			if !strings.HasPrefix(n, "CAP_") {
				n = "CAP_" + n
			}
			if !slices.Contains(capabilityNames, n) {
				return nil, fmt.Errorf("unknown capability %q", name)
			}
		}
		out = append(out, n)
	}
	return out, nil
}
