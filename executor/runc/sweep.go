// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer/system"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// A runner that is killed leaves containers behind, and an engine and a runner that are killed together leave them
// to the next engine. libcontainer's state says which cgroups they had; what is in them is killed, then they go.

// sweepTimeout bounds the wait for killed processes to be gone.
const sweepTimeout = 5 * time.Second

// sweepContainer removes what is left of one container, whose state is in dir.
func sweepContainer(dir string, cgroups bool) error {
	var state struct {
		CgroupPaths map[string]string `json:"cgroup_paths"`
		initProcess
	}
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("state of container %s: %w", filepath.Base(dir), err)
	}
	var errs error
	if !cgroups { // the state then names those that the container was in, which were not made for it
		state.kill()
		return os.RemoveAll(dir)
	}
	for _, cgroup := range state.CgroupPaths {
		errs = errors.Join(errs, removeCgroup(cgroup))
	}
	if errs != nil {
		return errs
	}
	return os.RemoveAll(dir)
}

// initProcess is the first process of a container, as libcontainer's state names it.
type initProcess struct {
	PID     int    `json:"init_process_pid"`
	Started uint64 `json:"init_process_start"`
}

// kill kills the process if it is still that one, and thereby everything in its PID namespace.
func (p initProcess) kill() {
	if p.PID <= 1 {
		return
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	stat, err := system.Stat(p.PID)
	if err != nil || stat.StartTime != p.Started {
		return
	}
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
}

// sweepCgroups removes the engine's cgroup directories that begin below this process's own, in every hierarchy: it
// finds containers that were killed before their state was written.
func sweepCgroups(parent string) error {
	var errs error
	for _, dir := range ownCgroupDirs() {
		errs = errors.Join(errs, removeCgroup(filepath.Join(dir, parent)))
	}
	return errs
}

// removeCgroup kills everything in a cgroup directory and below, and removes it.
func removeCgroup(dir string) error {
	if !strings.Contains(dir, "/"+wire.CgroupPrefix) {
		return fmt.Errorf("%s is not a cgroup of ours", dir)
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	deadline := time.Now().Add(sweepTimeout)
	for {
		pids := cgroupPids(dir)
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return &os.PathError{Op: "rmdir", Path: dir, Err: err}
		}
		time.Sleep(5 * time.Millisecond) // the kernel says nothing when a cgroup becomes empty (v1)
	}
}

func cgroupPids(dir string) []int {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ownCgroupDirs returns the directories below which a relative cgroup path of ours begins, one a hierarchy.
func ownCgroupDirs() []string {
	const mountPoint = "/sys/fs/cgroup"
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	var fs unix.Statfs_t
	unified := unix.Statfs(mountPoint, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
	return cgroupDirs(mountPoint, unified, string(b))
}

// cgroupDirs is ownCgroupDirs for a process whose /proc/PID/cgroup is text. unified says that cgroup v2 alone is mounted at
// mountPoint: there libcontainer begins beside our own cgroup, because a cgroup with processes can have no children. Otherwise the
// hierarchies of v1 are directories there, and v2, on a hybrid host, is one of them.
func cgroupDirs(mountPoint string, unified bool, text string) []string {
	var dirs []string
	for line := range strings.Lines(text) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		controllers, own := f[1], f[2]
		switch {
		case unified && controllers == "":
			dirs = append(dirs, filepath.Join(mountPoint, filepath.Dir(own)))
		case unified:
		case controllers == "":
			dirs = append(dirs, filepath.Join(mountPoint, "unified", own))
		default:
			dirs = append(dirs, filepath.Join(mountPoint, strings.TrimPrefix(controllers, "name="), own))
		}
	}
	return dirs
}
