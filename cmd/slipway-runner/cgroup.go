// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// On cgroup v1 a container costs a directory to make, to join and to remove in each hierarchy, a dozen of them. It gets its own in those
// that limit, count or keep apart; in the others all containers of the engine share one directory, which has nobody else in it and nothing
// below it: a container sees as little of its host there as in a directory of its own.

// ownControllers are those in whose hierarchies each container has a directory; cpuset too when it is limited to some processors.
var ownControllers = []string{"devices", "memory", "cpu", "cpuacct", "pids", "blkio"}

// sharedCgroup is the name of the directory that containers share, below the engine's. No container has that name: it begins with a dot.
const sharedCgroup = ".shared"

// cgroupTrees finds where the cgroups of containers begin on cgroup v1.
type cgroupTrees struct {
	mu   sync.Mutex
	text []byte            // /proc/self/cgroup when dirs was made
	dirs map[string]string // this process's own directories by controller
}

// own returns this process's own directories by controller.
func (t *cgroupTrees) own() (map[string]string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dirs != nil && bytes.Equal(text, t.text) {
		return t.dirs, nil
	}
	dirs := map[string]string{}
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for name := range strings.SplitSeq(f[1], ",") {
			if name == "" && !cgroups.IsCgroup2HybridMode() {
				continue // cgroup v2, which is not mounted
			}
			dir, err := cgroups.GetOwnCgroupPath(name)
			if cgroups.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			dirs[name] = dir
		}
	}
	if dirs["devices"] == "" {
		return nil, errors.New("the controller of devices is not mounted, which decides about what a container may open")
	}
	t.text, t.dirs = text, dirs
	return dirs, nil
}

// cgroup returns the manager of a container's own cgroups.
func (pr *preparer) cgroup(id string, spec *specs.Spec) (cgroups.Manager, error) {
	config, err := specconv.CreateCgroupConfig(pr.options(id, spec), specconv.AllowedDevices)
	if err != nil {
		return nil, err
	}
	if config.Rootless || cgroups.IsCgroup2UnifiedMode() {
		return manager.New(config)
	}
	own, err := pr.trees.own()
	if err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for name, dir := range own {
		if hasOwn(name, spec) {
			paths[name] = filepath.Join(dir, config.Path)
		}
	}
	return manager.NewWithPaths(config, paths)
}

// hasOwn says whether a container has a directory of its own for a controller.
func hasOwn(controller string, spec *specs.Spec) bool {
	if controller == "cpuset" {
		r := spec.Linux.Resources
		return r != nil && r.CPU != nil && (r.CPU.Cpus != "" || r.CPU.Mems != "")
	}
	return slices.Contains(ownControllers, controller)
}

// joinShared puts a process into the directories that the containers of its engine share.
func (pr *preparer) joinShared(spec *specs.Spec, pid int) error {
	if pr.options("", spec).RootlessCgroups || cgroups.IsCgroup2UnifiedMode() {
		return nil
	}
	own, err := pr.trees.own()
	if err != nil {
		return err
	}
	engine, _, _ := strings.Cut(strings.TrimPrefix(spec.Linux.CgroupsPath, "/"), "/")
	for name, dir := range own {
		if hasOwn(name, spec) {
			continue
		}
		dir = filepath.Join(dir, engine, sharedCgroup)
		err := cgroups.WriteCgroupProc(dir, pid)
		if errors.Is(err, os.ErrNotExist) { // the first one
			var m *fs.Manager
			if m, err = fs.NewManager(&cgroups.Cgroup{Resources: &cgroups.Resources{}}, map[string]string{name: dir}); err == nil {
				err = m.Apply(pid)
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	return nil
}
