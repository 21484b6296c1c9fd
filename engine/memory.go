// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxMemory is Options.MaxMemory with its default: a fifth of the machine's memory is left to the engine, to containers and
// to the page cache.
func (o Options) maxMemory() int64 {
	if o.MaxMemory > 0 {
		return o.MaxMemory
	}
	total, err := MachineMemory()
	if err != nil {
		return 0 // then memory is not looked at; jobs still are
	}
	return total / 5 * 4
}

// MachineMemory returns how much memory, in bytes, this process and its children can have: the machine's, or the limit of
// the memory cgroup it is in or of one above, if that is less.
func MachineMemory() (int64, error) { return machineMemory("/") }

// machineMemory is MachineMemory with the files of another root directory.
func machineMemory(root string) (int64, error) {
	meminfo, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0, fmt.Errorf("find out how much memory there is: %w", err)
	}
	total := int64(0)
	for line := range strings.Lines(string(meminfo)) {
		if value, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("find out how much memory there is: %w", err)
			}
			total = kib << 10
		}
	}
	if total == 0 {
		return 0, fmt.Errorf("find out how much memory there is: no MemTotal in %s", filepath.Join(root, "proc/meminfo"))
	}
	return min(total, cgroupLimit(root)), nil
}

// cgroupLimit returns the smallest memory limit of the process's cgroup and those above it, of version 1 or 2.
func cgroupLimit(root string) int64 {
	limit := int64(math.MaxInt64)
	cgroups, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(cgroups)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		base, file := "", ""
		switch {
		case fields[1] == "": // version 2, alone or beside version 1
			base, file = filepath.Join(root, "sys/fs/cgroup"), "memory.max"
		case strings.Contains(","+fields[1]+",", ",memory,"):
			base, file = filepath.Join(root, "sys/fs/cgroup/memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		// In a container the path may be that of the host, of which only the last directory, or nothing, is to be seen.
		for path := filepath.Clean("/" + fields[2]); ; path = filepath.Dir(path) {
			if b, err := os.ReadFile(filepath.Join(base, path, file)); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && n > 0 { // not "max"
					limit = min(limit, n)
				}
			}
			if path == "/" {
				break
			}
		}
	}
	return limit
}
