// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// In a user namespace (an ordinary user's engine, or one in an unprivileged container) root is root of the namespace only. What
// a container cannot have there is refused by name when it was asked for, and done in another way when every container
// has it.

// userNamespace is what the executor's user namespace allows.
type userNamespace struct {
	// HighestUID and HighestGID are the last IDs that exist.
	HighestUID, HighestGID uint32
	// NoSetgroups says that a process cannot choose its supplementary groups: the namespace has one ID.
	NoSetgroups bool
	// NoCgroups says why there is no cgroup for a container; "" when there is. Controllers are the ones that a container's has.
	NoCgroups   string
	Controllers []string
	// HardLimits are the highest resource limits that can be given, by number.
	HardLimits map[int]uint64
}

// thisNamespace describes the user namespace of this process; nil for the host's own.
func thisNamespace(cgroupParent string) *userNamespace {
	if !userns.Inside() {
		return nil
	}
	n := &userNamespace{HardLimits: map[int]uint64{}}
	n.HighestUID, n.HighestGID = userns.Highest()
	setgroups, err := os.ReadFile("/proc/self/setgroups")
	n.NoSetgroups = err == nil && strings.TrimSpace(string(setgroups)) == "deny"
	n.Controllers, n.NoCgroups = delegated(cgroupParent)
	for number := range 16 {
		var limit unix.Rlimit
		if err := unix.Getrlimit(number, &limit); err == nil {
			n.HardLimits[number] = limit.Max
		}
	}
	return n
}

// delegated finds out whether this process may make cgroups, by making the one that all containers are in: then their
// controllers, otherwise why not.
func delegated(parent string) (controllers []string, reason string) {
	const remedy = "cgroups need version 2 and a part of the tree that belongs to the user, as systemd gives (systemctl --user, Delegate=yes)"
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, remedy + "; here it is version 1"
	}
	dirs := ownCgroupDirs()
	if len(dirs) == 0 {
		return nil, remedy
	}
	dir := filepath.Join(dirs[0], parent)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Sprintf("%s: %v", remedy, err)
	}
	defer os.Remove(dir)
	// Processes come from this one's cgroup, so it takes the right to write to what is above both.
	if err := unix.Access(filepath.Join(dirs[0], "cgroup.procs"), unix.W_OK); err != nil {
		return nil, fmt.Sprintf("%s: %s is not writable", remedy, dirs[0])
	}
	// What is there can be given to those below when the file that says so is ours.
	from := dir
	if unix.Access(filepath.Join(dirs[0], "cgroup.subtree_control"), unix.W_OK) == nil {
		from = dirs[0]
	}
	b, err := os.ReadFile(filepath.Join(from, "cgroup.controllers"))
	if err != nil {
		return nil, fmt.Sprintf("%s: %v", remedy, err)
	}
	return strings.Fields(string(b)), ""
}

// NoLimits says why containers cannot be given limits of memory, processors and processes; "" when they can.
func (r *Runc) NoLimits() string {
	if r.host.UserNamespace == nil {
		return ""
	}
	return r.host.UserNamespace.NoCgroups
}

// Controllers are the cgroup controllers that containers have limits by in a user namespace; nil where that is no question.
func (r *Runc) Controllers() []string {
	if r.host.UserNamespace == nil {
		return nil
	}
	return r.host.UserNamespace.Controllers
}

// adapt changes the spec of a container to what the namespace allows. A nil namespace allows everything.
func (n *userNamespace) adapt(spec *specs.Spec, s executor.Spec) error {
	if n == nil {
		return nil
	}
	if err := n.checkUser(spec.Process); err != nil {
		return err
	}
	if err := n.checkLimits(spec.Process.Rlimits); err != nil {
		return err
	}
	if err := n.checkResources(s.Resources, s.CgroupParent); err != nil {
		return err
	}
	if n.NoCgroups != "" {
		spec.Linux.CgroupsPath = ""
	}
	if r, ok := spec.Linux.Sysctl["net.ipv4.ping_group_range"]; ok && r != "" {
		spec.Linux.Sysctl["net.ipv4.ping_group_range"] = fmt.Sprintf("0 %d", min(n.HighestGID, 1<<31-1))
	}
	if n.HighestGID < ttyGroup {
		for i, m := range spec.Mounts {
			if m.Type == "devpts" {
				spec.Mounts[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return strings.HasPrefix(o, "gid=") })
			}
		}
	}
	if s.Network == executor.NetworkHost {
		showHostSys(spec)
	}
	return nil
}

// ttyGroup owns the terminals of a container, where it exists.
const ttyGroup = 5

// checkUser refuses a user that does not exist, and leaves groups as they are where they cannot be chosen.
func (n *userNamespace) checkUser(p *specs.Process) error {
	missing := func(kind string, id, highest uint32) error {
		return fmt.Errorf("%s %d does not exist here, the highest is %d (%s)", kind, id, highest, userns.Describe())
	}
	if p.User.UID > n.HighestUID {
		return missing("user", p.User.UID, n.HighestUID)
	}
	if p.User.GID > n.HighestGID {
		return missing("group", p.User.GID, n.HighestGID)
	}
	if n.NoSetgroups {
		p.User.AdditionalGids = nil // images name groups for root too, which steps rarely need
		return nil
	}
	for _, g := range p.User.AdditionalGids {
		if g > n.HighestGID {
			return missing("group", g, n.HighestGID)
		}
	}
	return nil
}

func (n *userNamespace) checkLimits(limits []specs.POSIXRlimit) error {
	for _, l := range limits {
		number, ok := wire.RlimitNumber(l.Type)
		if highest, known := n.HardLimits[number]; ok && known && l.Hard > highest {
			return fmt.Errorf("ulimit %s: the hard limit %d is above %d, which an ordinary user cannot raise",
				strings.ToLower(strings.TrimPrefix(l.Type, "RLIMIT_")), l.Hard, highest)
		}
	}
	return nil
}

// checkResources refuses limits that nobody would keep.
func (n *userNamespace) checkResources(r executor.Resources, parent string) error {
	for _, limit := range []struct {
		asked            bool
		name, controller string
	}{
		{r.MemoryBytes > 0 || r.MemorySwapBytes != 0, "memory limit", "memory"},
		{r.CPUShares != 0 || r.CPUPeriod != 0 || r.CPUQuota != 0, "cpu limit", "cpu"},
		{r.CpusetCpus != "" || r.CpusetMems != "", "choice of processors", "cpuset"},
		{r.PidsLimit > 0, "limit of processes", "pids"},
		{parent != "", "cgroup parent", ""},
	} {
		switch {
		case !limit.asked:
		case n.NoCgroups != "":
			return fmt.Errorf("a %s is not possible for an ordinary user here: %s", limit.name, n.NoCgroups)
		case limit.controller != "" && !slices.Contains(n.Controllers, limit.controller):
			return fmt.Errorf("a %s is not possible for an ordinary user here: the cgroup controller %q is not delegated, only %q are",
				limit.name, limit.controller, n.Controllers)
		}
	}
	return nil
}

// showHostSys gives a container the host's /sys, read-only: a sysfs shows a network namespace, and for the host's it can be
// mounted by root of the host only.
func showHostSys(spec *specs.Spec) {
	spec.Mounts = slices.DeleteFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/sys/fs/cgroup" && m.Type == "cgroup" })
	for i, m := range spec.Mounts {
		if m.Destination == "/sys" && m.Type == "sysfs" {
			spec.Mounts[i] = specs.Mount{
				Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", "ro", "rro"},
			}
		}
	}
}
