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
	"github.com/opencontainers/runc/libcontainer/exeseal"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// preparer turns runtime specs into what starts containers, and keeps what is the same for many of them.
type preparer struct {
	hierarchies []cgroupHierarchy
	planning    bool // the kernel can carry plans out
	inUserNS    bool // we are root of a user namespace only
	trees       cgroupTrees

	mu      sync.Mutex // guards filters and sealed
	filters map[string]*filter
	sealed  *os.File // this program, so that nobody can write to it through a process that runs it
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

// plan returns the plan for a container, nil when it is to be made by libcontainer. profile is its seccomp profile as JSON.
func (pr *preparer) plan(id string, spec *specs.Spec, profile []byte, standard bool) (*plan, error) {
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
	if err == nil && pr.inUserNS {
		p.inUserNamespace()
	}
	return p, err
}

// options are how libcontainer is told about a container.
func (pr *preparer) options(id string, spec *specs.Spec) *specconv.CreateOpts {
	return &specconv.CreateOpts{CgroupName: id, Spec: spec, RootlessCgroups: pr.inUserNS && spec.Linux.CgroupsPath == ""}
}

// standard returns the configuration and the process of a container that libcontainer makes.
func (pr *preparer) standard(id string, spec *specs.Spec, profile []byte) (*configs.Config, *libcontainer.Process, error) {
	var err error
	if spec.Linux.Seccomp, err = decodeProfile(profile); err != nil {
		return nil, nil, err
	}
	process, err := newProcess(spec.Process)
	if err != nil {
		return nil, nil, err
	}
	config, err := specconv.CreateLibcontainerConfig(pr.options(id, spec))
	return config, process, err
}

// executable returns this program in a form that no container can write to, whatever it does with /proc/PID/exe
// (CVE-2019-5736). dir is a directory that is not above or below this program.
func (pr *preparer) executable(dir string) (*os.File, error) {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	if pr.sealed == nil {
		var err error
		if pr.sealed, err = exeseal.CloneSelfExe(dir); err != nil {
			return nil, fmt.Errorf("seal the runner: %w", err)
		}
	}
	return pr.sealed, nil
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
