// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// buildah has no daemon. It uses overlay and the host's network, and keeps layers in between only when the cache is measured,
// which is the faster way for each.
type buildah struct {
	path, what string
}

func (a *buildah) name() string    { return "buildah" }
func (a *buildah) version() string { return a.what }
func (a *buildah) help() *exec.Cmd { return exec.Command(a.path, "--help") }

func (a *buildah) find(ctx context.Context) bool {
	var err error
	if a.path, err = exec.LookPath("buildah"); err != nil {
		return false
	}
	var ok bool
	a.what, ok = firstLine(ctx, "buildah", "--version")
	if _, err := fmt.Sscanf(a.what, "buildah version %s", &a.what); err != nil {
		return false
	}
	return ok
}

func (a *buildah) open(_ context.Context, dir string, jobs int) (builds, error) {
	o := &buildahBuilds{buildah: a, dir: dir, jobs: max(jobs, 1)}
	for _, sub := range []string{"root", "run", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// buildahBuilds is a state directory.
type buildahBuilds struct {
	*buildah
	dir  string
	jobs int
}

func (o *buildahBuilds) build(b build) *exec.Cmd {
	args := []string{
		"--root", filepath.Join(o.dir, "root"), "--runroot", filepath.Join(o.dir, "run"), "--storage-driver", "overlay",
		"bud", "--network", "host", "--pull-never", "--jobs", fmt.Sprint(o.jobs), "-t", b.tag,
	}
	if b.noCache {
		args = append(args, "--no-cache")
	} else {
		args = append(args, "--layers")
	}
	cmd := exec.Command(o.path, append(args, b.dir)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(o.dir, "tmp"))
	return cmd
}

func (o *buildahBuilds) daemons() []int { return nil }
func (o *buildahBuilds) close() error {
	// The store mounts itself on itself.
	return unmountBelow(o.dir)
}
