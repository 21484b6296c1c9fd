// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
	"github.com/seed-68981b69/slipway/executor/runc/runctest/seen"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// TestConformance runs a program in containers that says what it sees, and compares that with the runtime spec of the
// container, the way of the runtime-tools of the OCI: with our init and with libcontainer's.
func TestConformance(t *testing.T) {
	runctest.Runner(t)
	ours, standard := newExecutor(t, runc.Options{}), newExecutor(t, runc.Options{StandardInit: true})
	rootfs := runctest.Rootfs(t)
	runctest.Inside(t, rootfs)
	if err := os.Mkdir(filepath.Join(rootfs, "work"), 0o777); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*executor.Spec){
		"step": func(*executor.Spec) {},
		"user": func(s *executor.Spec) {
			s.User = executor.User{UID: 1234, GID: 567, AdditionalGroups: []uint32{89, 65537}}
			s.Cwd = "/work"
			s.NoNewPrivileges = true
		},
		"limits": func(s *executor.Spec) {
			s.Ulimits = []executor.Ulimit{{Name: "core", Soft: 0, Hard: 4096}, {Name: "nproc", Soft: 500, Hard: 600}, {Name: "stack", Soft: 1 << 20, Hard: 1 << 22}}
			s.Resources = executor.Resources{
				MemoryBytes: 128 << 20, CPUShares: 321, CPUPeriod: 50000, CPUQuota: 40000, CpusetCpus: "0", CpusetMems: "0", PidsLimit: 77,
			}
			s.ShmSize = 3 << 20
		},
		"capabilities": func(s *executor.Spec) {
			s.CapAdd, s.CapDrop = []string{"SYS_PTRACE", "NET_ADMIN"}, []string{"MKNOD", "CHOWN"}
		},
		"none":       func(s *executor.Spec) { s.CapDrop = []string{"ALL"} },
		"privileged": func(s *executor.Spec) { s.Privileged = true },
		"read-only":  func(s *executor.Spec) { s.ReadonlyRootfs = true },
		"environment": func(s *executor.Spec) {
			s.Env = []string{"A=1", "B=", "PATH=/bin", "HOME=/x", "A=2"}
			s.Hostname = "named"
		},
		"mounts": func(s *executor.Spec) {
			s.Mounts = []executor.Mount{
				{Kind: executor.MountBind, Source: outside, Target: "/m/bind"},
				{Kind: executor.MountBind, Source: outside, Target: "/m/ro", Readonly: true},
				{Kind: executor.MountBind, Source: outside, Target: "/m/rro", Readonly: true, Recursive: true},
				{Kind: executor.MountBind, Source: filepath.Join(outside, "file"), Target: "/m/file", Readonly: true},
				{Kind: executor.MountBind, Source: outside, Target: "/m/noexec", NoExec: true},
				{Kind: executor.MountTmpfs, Target: "/m/tmpfs"},
				{Kind: executor.MountTmpfs, Target: "/m/sized", SizeBytes: 1 << 20, Mode: 0o710, NoExec: true},
				{Kind: executor.MountTmpfs, Target: "/m/sealed", Readonly: true},
			}
		},
		"host network": func(s *executor.Spec) { s.Network = executor.NetworkHost },
	} {
		for initName, r := range map[string]*runc.Runc{"our init": ours, "libcontainer's init": standard} {
			t.Run(name+", "+initName, func(t *testing.T) {
				s := spec(rootfs, "")
				s.Args = []string{"/bin/inside", "look"}
				s.Hostname = "box"
				change(&s)
				res := run(t, r, s)
				var got seen.Seen
				if err := json.Unmarshal([]byte(res.stdout), &got); err != nil {
					t.Fatalf("%v: %s", err, res.stderr)
				}
				want, err := runc.RuntimeSpec(r, s)
				if err != nil {
					t.Fatal(err)
				}
				c := conformance{t, want, &got, s}
				c.process()
				c.rlimits()
				c.namespaces()
				c.mounts()
				c.paths()
				c.devices()
				c.limits()
			})
		}
	}
}

// conformance compares one container with its spec.
type conformance struct {
	t    *testing.T
	spec *specs.Spec
	got  *seen.Seen
	asks executor.Spec
}

func (c *conformance) equal(what string, want, got any) {
	c.t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		c.t.Errorf("%s (-spec +seen):\n%s", what, d)
	}
}

func (c *conformance) process() {
	p, got := c.spec.Process, c.got
	c.equal("process and its parent", [2]int{1, 0}, [2]int{got.PID, got.PPID})
	all := func(id uint32) [4]uint32 { return [4]uint32{id, id, id, id} }
	c.equal("user", all(p.User.UID), got.UID)
	c.equal("group", all(p.User.GID), got.GID)
	c.equal("groups", slices.Sorted(slices.Values(p.User.AdditionalGids)), slices.Sorted(slices.Values(got.Groups)))
	mask := func(names []string) (m uint64) {
		for _, known := range capability.ListKnown() {
			if slices.Contains(names, "CAP_"+strings.ToUpper(known.String())) {
				m |= 1 << known
			}
		}
		if bits.OnesCount64(m) != len(names) {
			c.t.Errorf("unknown capabilities among %v", names)
		}
		return m
	}
	caps := p.Capabilities
	c.equal("capabilities", map[string]uint64{
		"CapBnd": mask(caps.Bounding), "CapEff": mask(caps.Effective), "CapPrm": mask(caps.Permitted), "CapInh": mask(caps.Inheritable), "CapAmb": mask(caps.Ambient),
	}, got.Caps)
	c.equal("no new privileges", p.NoNewPrivileges, got.NoNewPrivileges)
	mode, filters := 0, 0
	if c.spec.Linux.Seccomp != nil {
		mode, filters = 2, 1
	}
	c.equal("seccomp mode and filters", [2]int{mode, filters}, [2]int{got.Seccomp, got.Filters})
	// Signals 32 and 33 belong to the C library, and whoever has started the tests may have ignored them (make does): nobody can ask for more.
	const reserved = 1<<31 | 1<<32
	c.equal("signals blocked and ignored", [2]uint64{}, [2]uint64{got.SigBlocked, got.SigIgnored &^ reserved})
	c.equal("umask", uint32(0o022), got.Umask)
	priority, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	c.equal("nice, scheduler, personality, parent's death signal", [4]int{20 - priority}, [4]int{got.Nice, got.Scheduler, got.Personality, got.DeathSignal})
	c.equal("timer slack", 50_000, got.TimerSlack) // the kernel's, not the runner's
	own, _ := os.ReadFile("/proc/self/oom_score_adj")
	c.equal("OOM score adjustment", strings.TrimSpace(string(own)), strconv.Itoa(got.OOMScoreAdj))
	c.equal("arguments", p.Args, got.Args)
	c.equal("working directory", p.Cwd, got.Cwd)
	c.equal("host name", c.spec.Hostname, got.Hostname)
	env := map[string]string{"HOME": "/"} // where the container's accounts name no other
	for _, kv := range p.Env {
		name, value, _ := strings.Cut(kv, "=")
		env[name] = value
	}
	gotEnv := map[string]string{}
	for _, kv := range got.Env {
		name, value, _ := strings.Cut(kv, "=")
		if _, twice := gotEnv[name]; twice {
			c.t.Errorf("%s is there twice", name)
		}
		gotEnv[name] = value
	}
	if c.asks.User.UID == 0 && !slices.ContainsFunc(p.Env, func(v string) bool { return strings.HasPrefix(v, "HOME=") }) {
		env["HOME"] = gotEnv["HOME"] // "/root" or "/", by the init
	}
	c.equal("environment", env, gotEnv)
	fds := map[int]bool{}
	for fd := range got.FDs {
		fds[fd] = true
	}
	c.equal("open descriptors", map[int]bool{0: true, 1: true, 2: true}, fds)
}

func (c *conformance) rlimits() {
	for _, l := range c.spec.Process.Rlimits {
		n, ok := wire.RlimitNumber(l.Type)
		if !ok {
			c.t.Errorf("unknown limit %s", l.Type)
		}
		c.equal(l.Type, [2]uint64{l.Soft, l.Hard}, c.got.Rlimits[n])
	}
}

func (c *conformance) namespaces() {
	kinds := map[specs.LinuxNamespaceType]string{
		specs.PIDNamespace: "pid", specs.MountNamespace: "mnt", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.NetworkNamespace: "net",
		specs.CgroupNamespace: "cgroup", specs.UserNamespace: "user",
	}
	for kind, name := range kinds {
		own, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			c.t.Fatal(err)
		}
		want := slices.ContainsFunc(c.spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
		if is := c.got.Namespaces[name] != own; is != want {
			c.t.Errorf("namespace %s: one of its own: %v, want %v", name, is, want)
		}
	}
	if !c.got.Loopback {
		c.t.Error("the loopback interface is down")
	}
	for key, value := range c.spec.Linux.Sysctl {
		got, asked := c.got.Sysctls[strings.ReplaceAll(key, ".", "/")]
		if !asked {
			c.t.Errorf("the program does not look at %s", key)
		}
		c.equal("sysctl "+key, strings.Fields(value), strings.Fields(got))
	}
}

// at is the mount that is seen at a path: the last one.
func (c *conformance) at(target string) *seen.Mount {
	for i := range slices.Backward(c.got.Mounts) {
		if c.got.Mounts[i].Target == target {
			return &c.got.Mounts[i]
		}
	}
	return nil
}

func (c *conformance) mounts() {
	if root := c.at("/"); root == nil || root.Writable == c.spec.Root.Readonly && c.asks.User.UID == 0 {
		c.t.Errorf("root: %+v", root)
	}
	for _, m := range c.spec.Mounts {
		got := c.at(m.Destination)
		if got == nil {
			c.t.Errorf("mount %s is not there", m.Destination)
			continue
		}
		if got.Shared {
			c.t.Errorf("mount %s propagates to others", m.Destination)
		}
		fs := m.Type
		switch {
		case m.Type == "cgroup" && c.at("/sys/fs/cgroup/memory") != nil:
			fs = "tmpfs" // of directories for the hierarchies
		case m.Type == "cgroup":
			fs = "cgroup2"
		}
		if m.Type == "bind" {
			if !strings.HasSuffix(m.Source, got.Root) {
				c.t.Errorf("mount %s is of %s, not of %s", m.Destination, got.Root, m.Source)
			}
		} else {
			c.equal("file system at "+m.Destination, fs, got.FS)
		}
		for _, o := range m.Options {
			name, value, _ := strings.Cut(o, "=")
			switch name {
			case "bind", "rbind", "rprivate", "rw", "newinstance", "strictatime":
			case "ro", "rro":
				if m.Type != "cgroup" && (!slices.Contains(got.Options, "ro") || got.Writable) {
					c.t.Errorf("mount %s is not read-only: %v", m.Destination, got.Options)
				}
			case "nosuid", "nodev", "noexec":
				if !slices.Contains(got.Options, name) {
					c.t.Errorf("mount %s: no %s among %v", m.Destination, name, got.Options)
				}
			case "mode":
				if m.Type == "devpts" {
					continue // of the nodes in it
				}
				if mode, _ := strconv.ParseUint(value, 8, 32); uint32(mode) != got.Mode {
					c.t.Errorf("mount %s: mode %o, want %s", m.Destination, got.Mode, value)
				}
			case "size":
				want, kilo := strings.CutSuffix(value, "k")
				n, _ := strconv.ParseInt(want, 10, 64)
				if !kilo {
					n /= 1024
				}
				if !slices.Contains(got.FSOptions, fmt.Sprintf("size=%dk", n)) {
					c.t.Errorf("mount %s: no size of %s among %v", m.Destination, value, got.FSOptions)
				}
			case "ptmxmode", "gid":
				if !slices.ContainsFunc(got.FSOptions, func(has string) bool {
					n, v, _ := strings.Cut(has, "=")
					return n == name && strings.TrimLeft(v, "0") == strings.TrimLeft(value, "0")
				}) {
					c.t.Errorf("mount %s: no %s among %v", m.Destination, o, got.FSOptions)
				}
			default:
				c.t.Errorf("mount %s: the test does not know option %s", m.Destination, o)
			}
		}
		if !slices.Contains(m.Options, "ro") && !slices.Contains(m.Options, "noexec") && c.asks.User.UID == 0 && !got.Writable && m.Type != "devpts" {
			c.t.Errorf("mount %s cannot be written to", m.Destination)
		}
	}
}

// paths are those that are masked or read-only.
func (c *conformance) paths() {
	masked := 0
	for _, p := range c.spec.Linux.MaskedPaths {
		m := c.at(p)
		if m == nil {
			continue // this kernel has no such file
		}
		masked++
		if !m.Empty || m.Writable && m.FS != "tmpfs" && !slices.Contains(m.Options, "nosuid") {
			c.t.Errorf("%s is not masked: %+v", p, m)
		}
	}
	readonly := 0
	for _, p := range c.spec.Linux.ReadonlyPaths {
		m := c.at(p)
		if m == nil {
			continue
		}
		readonly++
		if m.Writable || !slices.Contains(m.Options, "ro") {
			c.t.Errorf("%s is not read-only: %+v", p, m)
		}
	}
	if len(c.spec.Linux.MaskedPaths) > 0 && (masked < 4 || readonly < 4) {
		c.t.Errorf("%d masked and %d read-only paths were found", masked, readonly)
	}
	if len(c.spec.Linux.MaskedPaths) == 0 && c.at("/proc/sys") != nil {
		c.t.Error("/proc/sys is covered")
	}
}

// devices are those that the runtime spec has for every container, and those that it names.
func (c *conformance) devices() {
	want := map[string][2]uint32{
		"/dev/null": {1, 3}, "/dev/zero": {1, 5}, "/dev/full": {1, 7}, "/dev/random": {1, 8}, "/dev/urandom": {1, 9}, "/dev/tty": {5, 0},
	}
	for path, number := range want {
		got := c.got.Dev[path]
		if got.Mode != unix.S_IFCHR|0o666 || [2]uint32{got.Major, got.Minor} != number || got.UID != 0 || got.GID != 0 {
			c.t.Errorf("%s: %+v, want %v", path, got, number)
		}
	}
	for path, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
	} {
		c.equal(path, target, c.got.Dev[path].Link)
	}
	for _, d := range c.spec.Linux.Devices {
		got := c.got.Dev[d.Path]
		if [2]uint32{got.Major, got.Minor} != [2]uint32{uint32(d.Major), uint32(d.Minor)} {
			c.t.Errorf("%s: %+v, want %d:%d", d.Path, got, d.Major, d.Minor)
		}
	}
	if !c.asks.Privileged {
		for path, node := range c.got.Dev {
			if kind := node.Mode & unix.S_IFMT; kind == unix.S_IFBLK || kind == unix.S_IFCHR && want[path] == [2]uint32{} && path != "/dev/pts/ptmx" {
				c.t.Errorf("%s: a device that is not in the spec", path)
			}
		}
	}
}

// limits are those of the cgroup, in the words of either version.
func (c *conformance) limits() {
	r := c.spec.Linux.Resources
	check := func(want any, names ...string) {
		c.t.Helper()
		for _, name := range names {
			if got, ok := c.got.Limits[name]; ok {
				c.equal(name, fmt.Sprint(want), got)
				return
			}
		}
		c.t.Errorf("none of %v is visible", names)
	}
	if m := r.Memory; m != nil && m.Limit != nil {
		check(*m.Limit, "memory.limit_in_bytes", "memory.max")
	}
	if p := r.Pids; p != nil {
		check(*p.Limit, "pids.max")
	}
	if cpu := r.CPU; cpu != nil {
		check(cpu.Cpus, "cpuset.cpus")
		check(cpu.Mems, "cpuset.mems")
		if _, v2 := c.got.Limits["cpu.max"]; v2 {
			check(fmt.Sprintf("%d %d", *cpu.Quota, *cpu.Period), "cpu.max")
		} else {
			check(*cpu.Shares, "cpu.shares")
			check(*cpu.Quota, "cpu.cfs_quota_us")
			check(*cpu.Period, "cpu.cfs_period_us")
		}
	}
	if list, v1 := c.got.Limits["devices.list"]; v1 && c.asks.Privileged != (list == "a *:* rwm") {
		c.t.Errorf("device filter: %q", list)
	}
}
