// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// newProcess turns the process of a runtime spec into libcontainer's.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		NoNewPrivileges: &p.NoNewPrivileges,
		Init:            true,
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	for _, l := range p.Rlimits {
		number, ok := wire.RlimitNumber(l.Type)
		if !ok {
			return nil, fmt.Errorf("unknown resource limit %q", l.Type)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: number, Hard: l.Hard, Soft: l.Soft})
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	return lp, nil
}

// readUsage fills in what the container's cgroup tells at its end: peak memory with its page cache, CPU time and whether the
// kernel killed something for lack of memory. A file that is not there leaves its value at zero.
func readUsage(paths map[string]string, ev *wire.Event) {
	if unified, ok := paths[""]; ok && len(paths) == 1 {
		ev.PeakMemoryBytes = readNumber(filepath.Join(unified, "memory.peak"))
		ev.CPUNanos = readKey(filepath.Join(unified, "cpu.stat"), "usage_usec") * 1000
		ev.OOMKilled = readKey(filepath.Join(unified, "memory.events"), "oom_kill") > 0
		ev.ReadBytes, ev.WrittenBytes = diskBytes(readText(filepath.Join(unified, "io.stat")))
		return
	}
	if dir := paths["memory"]; dir != "" {
		ev.PeakMemoryBytes = readNumber(filepath.Join(dir, "memory.max_usage_in_bytes"))
		ev.OOMKilled = readKey(filepath.Join(dir, "memory.oom_control"), "oom_kill") > 0
	}
	if dir := paths["blkio"]; dir != "" {
		ev.ReadBytes, ev.WrittenBytes = diskBytes(readText(filepath.Join(dir, "blkio.throttle.io_service_bytes")))
	}
	if dir := paths["cpuacct"]; dir != "" {
		ev.CPUNanos = readNumber(filepath.Join(dir, "cpuacct.usage"))
	}
}

// diskBytes adds up what a cgroup has read from and written to all disks: lines like "8:0 rbytes=1 wbytes=2 rios=…" on cgroup v2,
// "8:0 Read 1" and "8:0 Write 2" on v1.
func diskBytes(text string) (read, written int64) {
	add := func(to *int64, value string) {
		n, _ := strconv.ParseInt(value, 10, 64)
		*to += n
	}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[1] == "Read" {
			add(&read, f[2])
		}
		if len(f) == 3 && f[1] == "Write" {
			add(&written, f[2])
		}
		for _, field := range f {
			if v, ok := strings.CutPrefix(field, "rbytes="); ok {
				add(&read, v)
			}
			if v, ok := strings.CutPrefix(field, "wbytes="); ok {
				add(&written, v)
			}
		}
	}
	return read, written
}

func readText(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func readNumber(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// readKey reads one value of a file of "key value" lines.
func readKey(path, key string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			n, _ := strconv.ParseInt(v, 10, 64)
			return n
		}
	}
	return 0
}
