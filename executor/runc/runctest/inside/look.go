// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/runctest/seen"
)

func look() (*seen.Seen, error) {
	s := &seen.Seen{
		PID: os.Getpid(), PPID: os.Getppid(), Args: os.Args, Env: os.Environ(),
		Caps: map[string]uint64{}, Rlimits: map[int][2]uint64{}, Namespaces: map[string]string{}, FDs: map[int]string{},
		Dev: map[string]seen.Node{}, Limits: map[string]string{}, Sysctls: map[string]string{},
	}
	s.Session, _ = unix.Getsid(0)
	if err := lookStatus(s); err != nil {
		return nil, err
	}
	var err error
	if s.Cwd, err = unix.Getwd(); err != nil {
		return nil, err
	}
	if s.Hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	s.OOMScoreAdj, _ = strconv.Atoi(read("/proc/self/oom_score_adj"))
	if raw, _, errno := unix.RawSyscall(unix.SYS_GETPRIORITY, 0, 0, 0); errno == 0 {
		s.Nice = 20 - int(raw)
	}
	policy, _, _ := unix.RawSyscall(unix.SYS_SCHED_GETSCHEDULER, 0, 0, 0)
	s.Scheduler = int(policy)
	personality, _, _ := unix.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
	s.Personality = int(personality)
	slack, _, _ := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_GET_TIMERSLACK, 0, 0)
	s.TimerSlack = int(slack)
	var death int32
	_ = unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&death)), 0, 0, 0)
	s.DeathSignal = int(death)
	for n := range 16 {
		var l unix.Rlimit
		if unix.Prlimit(0, n, nil, &l) == nil {
			s.Rlimits[n] = [2]uint64{l.Cur, l.Max}
		}
	}
	if err := lookMounts(s); err != nil {
		return nil, err
	}
	for _, ns := range []string{"mnt", "pid", "ipc", "uts", "net", "cgroup", "user"} {
		s.Namespaces[ns], _ = os.Readlink("/proc/self/ns/" + ns)
	}
	lookFDs(s)
	err = filepath.WalkDir("/dev", func(p string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil {
			link, _ := os.Readlink(p)
			s.Dev[p] = seen.Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev), Link: link}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, p := range []string{
		"memory/memory.limit_in_bytes", "memory/memory.memsw.limit_in_bytes", "pids/pids.max", "cpu/cpu.shares", "cpu/cpu.cfs_quota_us",
		"cpu/cpu.cfs_period_us", "cpuset/cpuset.cpus", "cpuset/cpuset.mems", "devices/devices.list",
		"memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight", "cpuset.cpus", "cpuset.mems",
	} {
		if text := read("/sys/fs/cgroup/" + p); text != "" {
			s.Limits[filepath.Base(p)] = text
		}
	}
	for _, p := range []string{"net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range", "kernel/hostname"} {
		s.Sysctls[p] = read("/proc/sys/" + p)
	}
	if lo, err := net.InterfaceByName("lo"); err == nil {
		s.Loopback = lo.Flags&net.FlagUp != 0
	}
	return s, nil
}

func read(p string) string {
	b, _ := os.ReadFile(p)
	return strings.TrimSpace(string(b))
}

func lookStatus(s *seen.Seen) error {
	for line := range strings.Lines(read("/proc/self/status")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		f := strings.Fields(value)
		hex := func() uint64 { n, _ := strconv.ParseUint(f[0], 16, 64); return n }
		numbers := func() (out []uint32) {
			for _, v := range f {
				n, _ := strconv.ParseUint(v, 10, 32)
				out = append(out, uint32(n))
			}
			return out
		}
		switch key {
		case "Uid":
			copy(s.UID[:], numbers())
		case "Gid":
			copy(s.GID[:], numbers())
		case "Groups":
			s.Groups = numbers()
		case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			s.Caps[key] = hex()
		case "NoNewPrivs":
			s.NoNewPrivileges = f[0] == "1"
		case "Seccomp":
			s.Seccomp, _ = strconv.Atoi(f[0])
		case "Seccomp_filters":
			s.Filters, _ = strconv.Atoi(f[0])
		case "SigBlk":
			s.SigBlocked = hex()
		case "SigIgn":
			s.SigIgnored = hex()
		case "Umask":
			n, _ := strconv.ParseUint(f[0], 8, 32)
			s.Umask = uint32(n)
		}
	}
	if len(s.Caps) != 5 {
		return fmt.Errorf("/proc/self/status names %d sets of capabilities", len(s.Caps))
	}
	return nil
}

func lookMounts(s *seen.Seen) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		m := seen.Mount{
			Root: f[3], Target: f[4], Options: strings.Split(f[5], ","), FS: g[0], Source: g[1], FSOptions: strings.Split(g[2], ","),
			Shared: strings.Contains(before, " shared:"),
		}
		var st unix.Stat_t
		if unix.Stat(m.Target, &st) == nil {
			m.Mode = st.Mode & 0o7777
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			p := m.Target + "/slipway-look"
			if os.Mkdir(p, 0o755) == nil {
				m.Writable = true
				os.Remove(p)
			}
			entries, err := os.ReadDir(m.Target)
			m.Empty = err == nil && len(entries) == 0
		} else {
			if fd, err := unix.Open(m.Target, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
				m.Writable = true
				unix.Close(fd)
			}
			text, err := os.ReadFile(m.Target)
			m.Empty = err == nil && len(text) == 0
		}
		s.Mounts = append(s.Mounts, m)
	}
	return nil
}

func lookFDs(s *seen.Seen) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		link, linkErr := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || linkErr != nil || strings.HasPrefix(link, "anon_inode:[event") || strings.Contains(link, "/proc/") || strings.HasPrefix(link, "/sys/fs/cgroup/") { // the Go runtime's, and this list
			continue
		}
		s.FDs[n] = link
	}
}
