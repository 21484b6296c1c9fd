// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor"
)

// EngineName is the name of everything on the host that belongs to the executor with that state directory.
var EngineName = engineName

// RunnerPID is the process of the running runner, 0 when there is none.
func RunnerPID(r *Runc) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.runner == nil {
		return 0
	}
	return r.runner.pid
}

// RunnerFile is the runner's executable.
func RunnerFile(t interface{ Fatal(...any) }, r *Runc) string {
	path, err := runnerPath(r.opts.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// RuntimeSpec is the runtime spec of a container of r, but for its network namespace and generated files.
func RuntimeSpec(r *Runc, s executor.Spec) (*specs.Spec, error) { return runtimeSpec(s, r.host) }
