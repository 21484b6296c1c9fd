// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// planFD is where the first process of a container finds its plan: libcontainer puts extra files before its own.
const planFD = 3

// plan is what the first process of a container does before it becomes the user's, decided in advance by the runner so
// that the process only has to carry it out (setup.go). It covers what build steps and ordinary containers need; for
// everything else newPlan says errNotPlanned and libcontainer's own init does the work.
type plan struct {
	Rootfs   string
	Readonly bool
	Hostname string
	Keyring  string
	Mounts   []planMount
	// Loopback says that the network namespace is new, and its loopback interface down.
	Loopback bool
	Sysctls  [][2]string // path below /proc/sys, value
	Masked   []string
	// ReadonlyPaths and Masked are absolute paths in the container; what is not there is left out.
	ReadonlyPaths []string
	// SyncEarly says that nothing the runner does to the process can hinder its own setting up.
	SyncEarly bool

	Args     []string
	Env      []string
	Cwd      string
	UID, GID int
	Groups   []uint32
	// BindDevices says that the nodes of /dev are the host's, bound: in a user namespace none can be made. They are then
	// among Mounts. KeepGroups says that the namespace does not let anybody choose groups.
	BindDevices, KeepGroups bool
	Caps                    capSets
	NoNewPrivileges         bool
	// Filter is the seccomp program as the kernel has it in memory, none when it is empty.
	Filter      []byte
	FilterFlags uint
}

// capSets are capabilities as bit masks.
type capSets struct{ Bounding, Effective, Permitted, Inheritable uint64 }

// planMount is one mount: a new file system of type FS, a bind of Source, or (FS "cgroup") a directory with a mount for
// each of Hierarchies.
type planMount struct {
	Target      string
	FS          string      `json:",omitempty"`
	Source      string      `json:",omitempty"`
	Bind        bool        `json:",omitempty"`
	Recursive   bool        `json:",omitempty"`
	Params      [][2]string `json:",omitempty"` // a flag when the value is ""
	Attr        uint64      `json:",omitempty"` // MOUNT_ATTR_*
	ReadonlyAll bool        `json:",omitempty"` // read-only with what is mounted below
	// ReadonlyLater makes it read-only after all mounts, for mount points that have yet to be made in it.
	ReadonlyLater bool              `json:",omitempty"`
	Private       bool              `json:",omitempty"`
	Hierarchies   []cgroupHierarchy `json:",omitempty"`
}

// cgroupHierarchy is one hierarchy of cgroup v1: the directory it is known by and its mount options.
type cgroupHierarchy struct{ Name, Data string }

// errNotPlanned is wrapped by errors that say what a plan does not cover.
var errNotPlanned = errors.New("needs libcontainer's init")

func notPlanned(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errNotPlanned, fmt.Sprintf(format, args...))
}

// newPlan plans the container of a spec, whose seccomp profile is filter (nil for none). It refuses what it does not know rather than leaving it out.
func newPlan(id string, spec *specs.Spec, filter *filter, hierarchies []cgroupHierarchy) (*plan, error) {
	p, l := spec.Process, spec.Linux
	switch {
	case p.Terminal:
		return nil, notPlanned("a terminal")
	case len(l.UIDMappings) > 0 || len(l.GIDMappings) > 0:
		return nil, notPlanned("a user namespace")
	case len(l.Devices) > 0:
		return nil, notPlanned("devices")
	case spec.Hooks != nil, l.IntelRdt != nil, l.Personality != nil, l.MountLabel != "", l.MemoryPolicy != nil, len(l.TimeOffsets) > 0,
		len(l.NetDevices) > 0, spec.Domainname != "":
		return nil, notPlanned("hooks, labels or other rare settings")
	case p.ApparmorProfile != "", p.SelinuxLabel != "", p.Scheduler != nil, p.IOPriority != nil, p.ExecCPUAffinity != nil, p.User.Umask != nil:
		return nil, notPlanned("labels or scheduling of the process")
	case l.RootfsPropagation != "rslave":
		return nil, notPlanned("propagation %q", l.RootfsPropagation)
	case l.Seccomp != nil:
		return nil, errors.New("the seccomp profile is not where it belongs")
	}
	out := &plan{
		Rootfs: spec.Root.Path, Readonly: spec.Root.Readonly, Hostname: spec.Hostname, Keyring: "_ses." + id,
		Masked: l.MaskedPaths, ReadonlyPaths: l.ReadonlyPaths, SyncEarly: len(p.Rlimits) == 0,
		Args: p.Args, Cwd: p.Cwd, UID: int(p.User.UID), GID: int(p.User.GID), Groups: p.User.AdditionalGids,
		NoNewPrivileges: p.NoNewPrivileges,
	}
	want := map[specs.LinuxNamespaceType]bool{specs.PIDNamespace: true, specs.MountNamespace: true, specs.IPCNamespace: true, specs.UTSNamespace: true, specs.CgroupNamespace: true}
	for _, ns := range l.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			out.Loopback = ns.Path == ""
			continue
		}
		if !want[ns.Type] || ns.Path != "" {
			return nil, notPlanned("namespace %s", ns.Type)
		}
		delete(want, ns.Type)
	}
	if len(want) > 0 {
		return nil, notPlanned("a container without all its namespaces")
	}
	for _, key := range slices.Sorted(mapKeys(l.Sysctl)) {
		out.Sysctls = append(out.Sysctls, [2]string{strings.ReplaceAll(key, ".", "/"), l.Sysctl[key]})
	}
	for _, m := range spec.Mounts {
		pm, err := newPlanMount(m, hierarchies)
		if err != nil {
			return nil, err
		}
		out.Mounts = append(out.Mounts, pm)
	}
	for _, needed := range []string{"/proc", "/dev"} {
		if !slices.ContainsFunc(out.Mounts, func(m planMount) bool { return m.Target == needed && !m.Bind }) {
			return nil, notPlanned("%s is not the container's own", needed)
		}
	}
	var err error
	if out.Env, err = environment(p.Env); err != nil {
		return nil, err
	}
	if out.Caps, err = capabilitySets(p.Capabilities); err != nil {
		return nil, err
	}
	if filter != nil {
		out.Filter, out.FilterFlags = filter.program, filter.flags
	}
	return out, nil
}

func mapKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// mountAttrs are the mount options that are attributes of the mount rather than of its file system.
var mountAttrs = map[string]uint64{
	"nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
	"strictatime": unix.MOUNT_ATTR_STRICTATIME, "ro": unix.MOUNT_ATTR_RDONLY,
}

// mountParams are the options that the file systems know.
var mountParams = map[string][]string{
	"proc": nil, "sysfs": nil, "mqueue": nil, "cgroup": nil,
	"tmpfs": {"mode", "size"}, "devpts": {"newinstance", "ptmxmode", "mode", "gid"},
}

func newPlanMount(m specs.Mount, hierarchies []cgroupHierarchy) (planMount, error) {
	pm := planMount{Target: m.Destination, FS: m.Type, Source: m.Source}
	if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 {
		return pm, notPlanned("mount %s: mapped owners", m.Destination)
	}
	params, known := mountParams[m.Type]
	if m.Type == "bind" {
		pm.FS, pm.Bind, known = "", true, true
	}
	if !known {
		return pm, notPlanned("mount %s: type %q", m.Destination, m.Type)
	}
	for _, o := range m.Options {
		name, value, _ := strings.Cut(o, "=")
		attr, isAttr := mountAttrs[o]
		switch {
		case isAttr:
			pm.Attr |= attr
		case o == "rw":
		case pm.Bind && o == "bind":
		case pm.Bind && o == "rbind":
			pm.Recursive = true
		case pm.Bind && o == "rprivate":
			pm.Private = true
		case pm.Bind && o == "rro":
			pm.ReadonlyAll = true
		case slices.Contains(params, name):
			pm.Params = append(pm.Params, [2]string{name, value})
		default:
			return pm, notPlanned("mount %s: option %q", m.Destination, o)
		}
	}
	if m.Type == "tmpfs" && pm.Attr&unix.MOUNT_ATTR_RDONLY != 0 {
		pm.Attr &^= unix.MOUNT_ATTR_RDONLY
		pm.ReadonlyLater = true
	}
	if m.Type == "sysfs" && pm.Attr&unix.MOUNT_ATTR_RDONLY != 0 {
		pm.Params = append(pm.Params, [2]string{"ro", ""}) // the file system itself too
	}
	if m.Type == "cgroup" {
		pm.Hierarchies = hierarchies
	}
	return pm, nil
}

// environment is the environment without repetitions: of several values of one variable the last counts. An empty HOME
// is none: it is looked up in the container.
func environment(env []string) ([]string, error) {
	seen := map[string]bool{}
	var out []string
	for _, kv := range slices.Backward(env) {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || name == "" || strings.IndexByte(kv, 0) >= 0 {
			return nil, fmt.Errorf("invalid environment variable %q", name) // its value may be a secret
		}
		if seen[name] || name == "HOME" && value == "" {
			continue
		}
		seen[name] = true
		out = append(out, kv)
	}
	slices.Reverse(out)
	return out, nil
}

func capabilitySets(c *specs.LinuxCapabilities) (capSets, error) {
	var sets capSets
	if c == nil {
		return sets, notPlanned("no capabilities named")
	}
	if len(c.Ambient) > 0 {
		return sets, notPlanned("ambient capabilities")
	}
	for _, s := range []struct {
		names []string
		mask  *uint64
	}{{c.Bounding, &sets.Bounding}, {c.Effective, &sets.Effective}, {c.Permitted, &sets.Permitted}, {c.Inheritable, &sets.Inheritable}} {
		for _, name := range s.names {
			bit, ok := capabilityBits[name]
			if !ok {
				return sets, notPlanned("capability %s", name)
			}
			*s.mask |= 1 << bit
		}
	}
	return sets, nil
}

var capabilityBits = func() map[string]uint {
	bits := map[string]uint{}
	for _, c := range capability.ListKnown() {
		bits["CAP_"+strings.ToUpper(c.String())] = uint(c)
	}
	return bits
}()

// hostHierarchies are the cgroup v1 hierarchies of this host as a container gets to see them; on a host with
// cgroup v2 alone there are none.
func hostHierarchies() ([]cgroupHierarchy, error) {
	if cgroups.IsCgroup2UnifiedMode() {
		return nil, nil
	}
	mounts, err := cgroups.GetCgroupMounts(false)
	if err != nil {
		return nil, err
	}
	var out []cgroupHierarchy
	for _, m := range mounts {
		h := cgroupHierarchy{Name: filepath.Base(m.Mountpoint)}
		h.Data = h.Name
		if h.Name == "systemd" {
			h.Data = cgroups.CgroupNamePrefix + h.Name
		}
		out = append(out, h)
	}
	return out, nil
}

// kernelCan says whether this kernel has the mount calls that plans are carried out with (Linux 5.12).
func kernelCan() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return !errors.Is(err, unix.ENOSYS)
}

// file returns the plan as an anonymous file, for the container's first process.
func (p *plan) file() (*os.File, error) {
	b, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	return wire.MemFile("plan", b)
}

// planned says whether this process, the first of a container, has a plan: libcontainer's own files then begin behind it.
func planned() bool {
	return os.Getenv("_LIBCONTAINER_INITPIPE") == strconv.Itoa(planFD+1) && os.Getenv("_LIBCONTAINER_CONSOLE") == ""
}
