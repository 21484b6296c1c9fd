// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
)

// podman runs containers without a daemon. Its images are buildah's: both use the same store.
type podman struct {
	path, what string
}

func (p *podman) name() string    { return "podman" }
func (p *podman) version() string { return p.what }
func (p *podman) help() *exec.Cmd { return exec.Command(p.path, "--help") }

func (p *podman) find(ctx context.Context) bool {
	var err error
	if p.path, err = exec.LookPath("podman"); err != nil {
		return false
	}
	line, ok := firstLine(ctx, "podman", "--version")
	if _, err := fmt.Sscanf(line, "podman version %s", &p.what); err != nil {
		return false
	}
	return ok
}

// ready implements runner.
func (p *podman) ready(ctx context.Context, b *bench, dir string) (func() *exec.Cmd, func() []int, func() error, error) {
	command := func(args ...string) *exec.Cmd {
		return exec.Command(p.path, append([]string{
			"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs",
		}, args...)...)
	}
	end := func() error { return unmountBelow(dir) }
	if err := runQuietly(ctx, command("build", "--network", "host", "--pull=never", "-t", "bench", filepath.Join(b.dir, "image"))); err != nil {
		return nil, nil, nil, err
	}
	call := func() *exec.Cmd {
		return command("run", "--rm", "--network", "none", "--pull=never", "bench", "/bin/busybox", "true")
	}
	return call, func() []int { return nil }, end, nil
}

// docker is an engine that runs already, with whatever it has in its store; only its containers are compared.
type docker struct {
	path, what string
}

func (d *docker) name() string    { return "docker" }
func (d *docker) version() string { return d.what }
func (d *docker) help() *exec.Cmd { return exec.Command(d.path, "--help") }

// find wants an engine besides the client.
func (d *docker) find(ctx context.Context) bool {
	var err error
	if d.path, err = exec.LookPath("docker"); err != nil {
		return false
	}
	var ok bool
	d.what, ok = firstLine(ctx, "docker", "version", "--format", "{{.Server.Version}}")
	return ok && d.what != ""
}

// ready implements runner.
func (d *docker) ready(ctx context.Context, b *bench, _ string) (func() *exec.Cmd, func() []int, func() error, error) {
	const tag = "slipway-bench"
	if err := runQuietly(ctx, exec.Command(d.path, "build", "-q", "-t", tag, filepath.Join(b.dir, "image"))); err != nil {
		return nil, nil, nil, err
	}
	call := func() *exec.Cmd {
		return exec.Command(d.path, "run", "--rm", "--network", "none", tag, "/bin/busybox", "true")
	}
	return call, func() []int { return nil }, func() error { return exec.Command(d.path, "rmi", "-f", tag).Run() }, nil
}
