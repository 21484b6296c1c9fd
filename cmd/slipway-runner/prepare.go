// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"github.com/moby/sys/userns"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// preparer turns runtime specs into what libcontainer needs, and keeps what is the same for many containers.
type preparer struct {
	hierarchies []cgroupHierarchy
	planning    bool // the kernel can carry plans out
	inUserNS    bool // we are root of a user namespace only

	mu      sync.Mutex // guards filters
	filters map[string]*filter
}

// filter is a compiled seccomp profile, as the kernel has it in memory; nil in preparer.filters when it could not be compiled.
type filter struct {
	program []byte
	flags   uint
}

// maxFilters bounds how many profiles are remembered: an engine uses a handful, but capabilities change them.
const maxFilters = 64

func newPreparer() *preparer {
	p := &preparer{planning: kernelCan(), inUserNS: userns.RunningInUserNS(), filters: map[string]*filter{}}
	var err error
	if p.hierarchies, err = hostHierarchies(); err != nil {
		p.planning = false
	}
	return p
}

// prepare returns the configuration and the process of a container. profile is its seccomp profile as JSON. plan is the file for
// its first process, nil when that is to be libcontainer's own init.
func (pr *preparer) prepare(id string, spec *specs.Spec, profile []byte, standard bool) (_ *configs.Config, _ *libcontainer.Process, plan *os.File, err error) {
	process, err := newProcess(spec.Process)
	if err != nil {
		return nil, nil, nil, err
	}
	if plan, err = pr.plan(id, spec, profile, standard); err != nil {
		return nil, nil, nil, err
	}
	if plan != nil {
		process.Env = nil
		process.ExtraFiles = []*os.File{plan}
		spec = withoutPlanned(spec)
	} else if spec.Linux.Seccomp, err = decodeProfile(profile); err != nil {
		return nil, nil, nil, err
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: id, Spec: spec, RootlessCgroups: pr.inUserNS && spec.Linux.CgroupsPath == "",
	})
	if err != nil {
		if plan != nil {
			plan.Close()
		}
		return nil, nil, nil, err
	}
	if plan != nil {
		config.Devices = nil // the nodes; the device filter has its own list
	}
	return config, process, plan, nil
}

// plan returns the plan for a container as a file, nil when libcontainer's own init is to make it.
func (pr *preparer) plan(id string, spec *specs.Spec, profile []byte, standard bool) (*os.File, error) {
	if !pr.planning || standard {
		return nil, nil
	}
	filter := pr.filter(profile)
	if filter == nil && len(profile) > 0 {
		return nil, nil
	}
	p, err := newPlan(id, spec, filter, pr.hierarchies)
	if errors.Is(err, errNotPlanned) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if pr.inUserNS {
		p.inUserNamespace()
	}
	return p.file()
}

// withoutPlanned is a spec without what its plan takes care of: libcontainer writes and sends its configuration around
// several times.
func withoutPlanned(spec *specs.Spec) *specs.Spec {
	s, l := *spec, *spec.Linux
	s.Linux = &l
	s.Mounts, l.Seccomp, l.MaskedPaths, l.ReadonlyPaths, l.Sysctl = nil, nil, nil, nil, nil
	return &s
}

// filter returns a profile, given as JSON, compiled; nil when there is none or only libcontainer can compile it.
func (pr *preparer) filter(profile []byte) *filter {
	if len(profile) == 0 {
		return nil
	}
	pr.mu.Lock()
	defer pr.mu.Unlock()
	f, known := pr.filters[string(profile)]
	if known {
		return f
	}
	if decoded, err := decodeProfile(profile); err == nil {
		if program, flags, err := compileFilter(decoded); err == nil {
			size := len(program) * int(unsafe.Sizeof(unix.SockFilter{}))
			f = &filter{program: unsafe.Slice((*byte)(unsafe.Pointer(&program[0])), size), flags: flags}
		}
	}
	if len(pr.filters) >= maxFilters {
		clear(pr.filters)
	}
	pr.filters[string(profile)] = f
	return f
}

func decodeProfile(profile []byte) (*specs.LinuxSeccomp, error) {
	if len(profile) == 0 {
		return nil, nil
	}
	var decoded specs.LinuxSeccomp
	if err := json.Unmarshal(profile, &decoded); err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	return &decoded, nil
}
