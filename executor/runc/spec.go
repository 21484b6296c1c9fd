// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

const (
	defaultShmSize = 64 << 20
	// initTarget is where the small init is visible: in /dev, which is not part of the root file system.
	initTarget = "/dev/init"
)

// host is what runtimeSpec has to know about the machine and about this container beyond its Spec.
type host struct {
	// Capabilities are those that can be given away.
	Capabilities []string
	// CgroupNamespace says that the kernel has them.
	CgroupNamespace bool
	// CgroupParent is the cgroup above all containers of this engine, relative to the engine's own.
	CgroupParent string
	// NetworkNamespace is the path of the namespace to join with NetworkBridge.
	NetworkNamespace string
	// Files are generated files by their target in the container.
	Files []generatedFile
	// Runner is the runner's binary, which has the small init in it.
	Runner string
	// Devices are the host's device nodes, for privileged containers.
	Devices []specs.LinuxDevice
	// UserNamespace says what is not allowed here; nil is nothing.
	UserNamespace *userNamespace
	// Seccomp makes the profile for a container that is not privileged.
	Seccomp func(*specs.Spec) (*specs.LinuxSeccomp, error)
}

// generatedFile is a file that is made for one container and mounted over its target.
type generatedFile struct{ Source, Target string }

var validID = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
})

// maskedPaths and readonlyPaths hide what docker hides.
var maskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
	"/sys/firmware",
}

var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

// runtimeSpec turns a Spec into an OCI runtime spec. It is pure: what the machine says comes in as h.
func runtimeSpec(s executor.Spec, h host) (*specs.Spec, error) {
	if err := check(s); err != nil {
		return nil, err
	}
	caps, err := capabilities(s.Privileged, s.CapAdd, s.CapDrop, h.Capabilities)
	if err != nil {
		return nil, err
	}
	rlimits, err := rlimits(s.Ulimits)
	if err != nil {
		return nil, err
	}
	cgroup, err := cgroupPath(h.CgroupParent, s.CgroupParent, s.ID)
	if err != nil {
		return nil, err
	}
	args := s.Args
	if s.Init {
		args = append([]string{initTarget, "reap"}, args...)
	}
	set := &specs.LinuxCapabilities{Bounding: caps}
	if s.User.UID == 0 { // what execve would do for anybody else is to take them away
		set.Effective, set.Permitted = caps, caps
	}
	cwd := s.Cwd
	if cwd == "" {
		cwd = "/"
	}
	spec := &specs.Spec{
		Version:  specs.Version,
		Root:     &specs.Root{Path: s.Rootfs, Readonly: s.ReadonlyRootfs},
		Hostname: s.Hostname,
		Mounts:   mounts(s, h),
		Process: &specs.Process{
			Terminal: s.Terminal,
			User: specs.User{
				UID: s.User.UID, GID: s.User.GID, AdditionalGids: additionalGroups(s.User),
			},
			Args:            args,
			Env:             s.Env,
			Cwd:             path.Clean(cwd),
			Capabilities:    set,
			Rlimits:         rlimits,
			NoNewPrivileges: s.NoNewPrivileges,
		},
		Linux: &specs.Linux{
			CgroupsPath:       cgroup,
			Namespaces:        namespaces(s, h),
			Resources:         resources(s),
			RootfsPropagation: "rslave",
		},
	}
	if s.Terminal && s.Rows > 0 && s.Cols > 0 {
		spec.Process.ConsoleSize = &specs.Box{Height: uint(s.Rows), Width: uint(s.Cols)}
	}
	if s.Network == executor.NetworkNone {
		spec.Linux.Sysctl = map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "0",
			"net.ipv4.ping_group_range":           "0 2147483647",
		}
	}
	if err := h.UserNamespace.adapt(spec, s); err != nil {
		return nil, err
	}
	if s.Privileged {
		spec.Linux.Devices = h.Devices
	} else {
		spec.Linux.MaskedPaths = maskedPaths
		spec.Linux.ReadonlyPaths = readonlyPaths
	}
	if spec.Linux.Seccomp, err = seccompOf(s, h, spec); err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	return spec, nil
}

// seccompOf is the profile of a container, whose capabilities are in spec; nil when it has none.
func seccompOf(s executor.Spec, h host, spec *specs.Spec) (*specs.LinuxSeccomp, error) {
	switch {
	case s.SeccompUnconfined:
		return nil, nil
	case s.SeccompProfile != "":
		return ownSeccomp(s.SeccompProfile, spec)
	case s.Privileged || h.Seccomp == nil:
		return nil, nil
	}
	return h.Seccomp(spec)
}

// check refuses what has no meaning.
func check(s executor.Spec) error {
	switch {
	case !validID().MatchString(s.ID):
		return fmt.Errorf("container ID %q: want letters, digits, '.', '_' and '-', at most 128", s.ID)
	case !filepath.IsAbs(s.Rootfs):
		return fmt.Errorf("root file system %q is not an absolute path", s.Rootfs)
	case len(s.Args) == 0 || s.Args[0] == "":
		return &executor.StartError{Code: 127, Err: errors.New("no command to run")}
	case s.Cwd != "" && !path.IsAbs(s.Cwd):
		return fmt.Errorf("working directory %q is not an absolute path", s.Cwd)
	case len(s.Hostname) > 64:
		return fmt.Errorf("host name %q is longer than 64 characters", s.Hostname)
	}
	switch s.Network {
	case executor.NetworkBridge:
	case executor.NetworkHost, executor.NetworkNone:
		if len(s.Ports) > 0 {
			return fmt.Errorf("ports can only be published with the bridge network, not with %q", s.Network)
		}
	default:
		return fmt.Errorf("network mode %q is not supported yet", s.Network)
	}
	for _, text := range s.Args {
		if strings.IndexByte(text, 0) >= 0 {
			return fmt.Errorf("argument %q contains a zero byte", text)
		}
	}
	for _, e := range s.Env { // values are not shown: they may be secrets
		name, _, ok := strings.Cut(e, "=")
		switch {
		case strings.IndexByte(e, 0) >= 0:
			return fmt.Errorf("environment variable %q contains a zero byte", name)
		case !ok || name == "":
			return errors.New("an environment variable has no name: want NAME=value")
		}
	}
	for _, m := range s.Mounts {
		switch {
		case !path.IsAbs(m.Target) || path.Clean(m.Target) == "/":
			return fmt.Errorf("mount target %q: want an absolute path other than /", m.Target)
		case m.Kind == executor.MountBind && !filepath.IsAbs(m.Source):
			return fmt.Errorf("mount source %q is not an absolute path", m.Source)
		case m.Kind != executor.MountBind && m.Kind != executor.MountTmpfs:
			return fmt.Errorf("mount of kind %q is not supported yet", m.Kind)
		}
	}
	return nil
}

func namespaces(s executor.Spec, h host) []specs.LinuxNamespace {
	ns := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
	}
	if h.CgroupNamespace {
		ns = append(ns, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	switch s.Network {
	case executor.NetworkBridge:
		ns = append(ns, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: h.NetworkNamespace})
	case executor.NetworkNone:
		ns = append(ns, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	}
	return ns
}

// mounts are the kernel's file systems, the generated files, then the Spec's mounts in their order. A mount of the
// Spec over a target of ours takes its place.
func mounts(s executor.Spec, h host) []specs.Mount {
	shm := s.ShmSize
	if shm == 0 {
		shm = defaultShmSize
	}
	sysMode := "ro"
	if s.Privileged {
		sysMode = "rw"
	}
	list := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", sysMode}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{sysMode, "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}},
	}
	if s.Init {
		list = append(list, specs.Mount{
			Destination: initTarget, Type: "bind", Source: h.Runner, Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev"},
		})
	}
	for _, f := range h.Files {
		list = append(list, specs.Mount{Destination: f.Target, Type: "bind", Source: f.Source, Options: []string{"bind", "rprivate"}})
	}
	list = slices.DeleteFunc(list, func(ours specs.Mount) bool {
		return slices.ContainsFunc(s.Mounts, func(m executor.Mount) bool { return path.Clean(m.Target) == ours.Destination })
	})
	for _, m := range s.Mounts {
		list = append(list, mount(m))
	}
	return list
}

func mount(m executor.Mount) specs.Mount {
	out := specs.Mount{Destination: path.Clean(m.Target), Source: m.Source, Type: string(m.Kind)}
	switch m.Kind {
	case executor.MountTmpfs:
		mode := m.Mode
		if mode == 0 {
			mode = 0o1777
		}
		out.Source = "tmpfs"
		out.Options = []string{"nosuid", "nodev", fmt.Sprintf("mode=%o", mode)}
		if m.SizeBytes > 0 {
			out.Options = append(out.Options, "size="+strconv.FormatInt(m.SizeBytes, 10))
		}
	case executor.MountBind:
		out.Options = []string{"bind", "rprivate"}
		if m.Recursive {
			out.Options[0] = "rbind"
		}
	}
	if m.NoExec {
		out.Options = append(out.Options, "noexec")
	}
	if m.Readonly {
		out.Options = append(out.Options, "ro")
		if m.Recursive {
			out.Options = append(out.Options, "rro")
		}
	}
	return out
}

func additionalGroups(u executor.User) []uint32 {
	groups := []uint32{u.GID} // as docker: the primary group is in the list too
	for _, g := range u.AdditionalGroups {
		if !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	return groups
}

func rlimits(limits []executor.Ulimit) ([]specs.POSIXRlimit, error) {
	var out []specs.POSIXRlimit
	for _, l := range limits {
		name := "RLIMIT_" + strings.ToUpper(l.Name)
		if _, ok := wire.RlimitNumber(name); !ok {
			return nil, fmt.Errorf("unknown ulimit %q", l.Name)
		}
		if l.Soft > l.Hard {
			return nil, fmt.Errorf("ulimit %s: the soft limit %d is above the hard limit %d", l.Name, l.Soft, l.Hard)
		}
		out = append(out, specs.POSIXRlimit{Type: name, Soft: l.Soft, Hard: l.Hard})
	}
	return out, nil
}

// cgroupPath puts a container's cgroup below the engine's: nothing that a caller names leads out of it.
func cgroupPath(engine, parent, id string) (string, error) {
	inner := strings.TrimPrefix(path.Clean("/"+parent), "/")
	if strings.HasSuffix(parent, ".slice") {
		return "", fmt.Errorf("cgroup parent %q: systemd slices are not supported yet", parent)
	}
	return path.Join(engine, inner, id), nil
}

func resources(s executor.Spec) *specs.LinuxResources {
	r := &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: s.Privileged, Access: "rwm"}}}
	in := s.Resources
	if in.MemoryBytes > 0 || in.MemorySwapBytes != 0 {
		r.Memory = &specs.LinuxMemory{}
		if in.MemoryBytes > 0 {
			r.Memory.Limit = &in.MemoryBytes
		}
		if in.MemorySwapBytes != 0 {
			r.Memory.Swap = &in.MemorySwapBytes
		}
	}
	if in.CPUShares != 0 || in.CPUPeriod != 0 || in.CPUQuota != 0 || in.CpusetCpus != "" || in.CpusetMems != "" {
		r.CPU = &specs.LinuxCPU{Cpus: in.CpusetCpus, Mems: in.CpusetMems}
		if in.CPUShares != 0 {
			r.CPU.Shares = &in.CPUShares
		}
		if in.CPUPeriod != 0 {
			r.CPU.Period = &in.CPUPeriod
		}
		if in.CPUQuota != 0 {
			r.CPU.Quota = &in.CPUQuota
		}
	}
	if in.PidsLimit != 0 {
		r.Pids = &specs.LinuxPids{Limit: &in.PidsLimit}
	}
	return r
}

// seccompProfiles are docker's default profiles by the capabilities that they are for. The zero value is ready.
type seccompProfiles struct {
	mu     sync.Mutex
	byCaps map[string]*specs.LinuxSeccomp
	json   map[*specs.LinuxSeccomp][]byte
}

// maxProfiles bounds how many profiles are kept: there are as many as sets of capabilities that somebody asks for.
const maxProfiles = 64

// native returns docker's default profile for this machine's own architecture only, not to be changed. Programs of the older
// architectures that the processor also runs (32-bit, x32) are thereby refused; compiling the filter for them too
// costs four times as much.
func (p *seccompProfiles) native(spec *specs.Spec) (*specs.LinuxSeccomp, error) {
	key := ""
	if c := spec.Process.Capabilities; c != nil {
		key = strings.Join(c.Bounding, " ")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if profile := p.byCaps[key]; profile != nil {
		return profile, nil
	}
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, err
	}
	if len(profile.Architectures) > 1 {
		profile.Architectures = profile.Architectures[:1] // the native one comes first
	}
	if p.byCaps == nil || len(p.byCaps) >= maxProfiles {
		p.byCaps, p.json = map[string]*specs.LinuxSeccomp{}, map[*specs.LinuxSeccomp][]byte{}
	}
	p.byCaps[key] = profile
	return profile, nil
}

// ownSeccomp reads a profile in docker's JSON, and takes of its rules those whose conditions hold: this architecture, the kernel and
// the container's capabilities.
func ownSeccomp(text string, spec *specs.Spec) (*specs.LinuxSeccomp, error) {
	var written seccomp.Seccomp
	if err := json.Unmarshal([]byte(text), &written); err != nil {
		return nil, fmt.Errorf("not a profile as docker has them: %w", err)
	}
	if slices.Contains(written.Syscalls, nil) {
		return nil, errors.New("not a profile as docker has them: an entry of syscalls is null")
	}
	profile, err := seccomp.LoadProfile(text, spec)
	if err != nil || profile == nil {
		return nil, err
	}
	notifies := func(c specs.LinuxSyscall) bool { return c.Action == specs.ActNotify }
	switch {
	case profile.ListenerPath != "" || profile.ListenerMetadata != "":
		return nil, errors.New("listenerPath and listenerMetadata are not supported: nobody is asked about system calls")
	case profile.DefaultAction == specs.ActNotify || slices.ContainsFunc(profile.Syscalls, notifies):
		return nil, fmt.Errorf("%s is not supported: nobody is asked about system calls", specs.ActNotify)
	}
	return profile, nil
}

// encode returns a spec as the runner wants it (wire.OpStart).
func (p *seccompProfiles) encode(spec *specs.Spec) ([]byte, error) {
	profile, err := p.encodeProfile(spec.Linux.Seccomp)
	if err != nil {
		return nil, err
	}
	s, l := *spec, *spec.Linux
	s.Linux, l.Seccomp = &l, nil
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return slices.Concat(b, []byte("\n"), profile), nil
}

func (p *seccompProfiles) encodeProfile(profile *specs.LinuxSeccomp) ([]byte, error) {
	if profile == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if b := p.json[profile]; b != nil {
		return b, nil
	}
	b, err := json.Marshal(profile)
	if err != nil {
		return nil, err
	}
	if p.json != nil && slices.Contains(slices.Collect(maps.Values(p.byCaps)), profile) { // ours, which never change
		p.json[profile] = b
	}
	return b, nil
}

// skippedDevices are entries of /dev that a container gets in a form of its own.
var skippedDevices = []string{"pts", "shm", "fd", "mqueue", "console", "core", "stdin", "stdout", "stderr", "ptmx", "init"}

// hostDevices returns the host's device nodes.
func hostDevices() ([]specs.LinuxDevice, error) {
	var devices []specs.LinuxDevice
	err := filepath.WalkDir("/dev", func(p string, d os.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
				return nil
			}
			return err
		}
		if filepath.Dir(p) == "/dev" && slices.Contains(skippedDevices, d.Name()) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type()&os.ModeDevice == 0 {
			return nil
		}
		if dev, ok := deviceNode(p); ok {
			devices = append(devices, dev)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return devices, nil
}
