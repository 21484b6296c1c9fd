// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// buildkit is buildctl with a buildkitd of its own: OCI worker with runc, overlayfs, the host's network.
type buildkit struct {
	ctl, d, what string
}

func (k *buildkit) name() string    { return "buildkit" }
func (k *buildkit) version() string { return k.what }
func (k *buildkit) help() *exec.Cmd { return exec.Command(k.ctl, "--help") }

func (k *buildkit) find(ctx context.Context) bool {
	var err error
	if k.d, err = exec.LookPath("buildkitd"); err != nil {
		return false
	}
	if k.ctl, err = exec.LookPath("buildctl"); err != nil {
		return false
	}
	_, err = exec.LookPath("runc")
	line, ok := firstLine(ctx, "buildkitd", "--version")
	if f := strings.Fields(line); len(f) >= 3 {
		k.what = f[2]
	}
	return ok && err == nil
}

func (k *buildkit) open(ctx context.Context, dir string, jobs int) (builds, error) {
	o := &buildkitBuilds{buildkit: k, socket: filepath.Join(dir, "s")}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	args := []string{
		"--addr", "unix://" + o.socket, "--root", filepath.Join(dir, "root"), "--config", "/dev/null", "--otel-socket-path", filepath.Join(dir, "otel"),
		"--containerd-worker=false", "--oci-worker=true", "--oci-worker-binary", "runc", "--oci-worker-snapshotter", "overlayfs", "--oci-worker-net", "host",
	}
	if jobs > 0 {
		args = append(args, "--oci-max-parallelism", fmt.Sprint(jobs))
	}
	var err error
	o.daemon, err = startDaemon(ctx, filepath.Join(dir, "log"), o.socket, k.d, args...)
	return o, err
}

// buildkitBuilds is a running daemon.
type buildkitBuilds struct {
	*buildkit
	socket string
	daemon *daemon
}

func (k *buildkit) archives() {}

func (o *buildkitBuilds) build(b build) *exec.Cmd {
	args := []string{
		"--addr", "unix://" + o.socket, "build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + b.dir, "--local", "dockerfile=" + b.dir,
	}
	switch {
	case b.output != "":
		args = append(args, "--output", b.output)
	case b.tag != "":
		args = append(args, "--output", "type=image,name="+b.tag)
	}
	if b.target != "" {
		args = append(args, "--opt", "target="+b.target)
	}
	if b.noCache {
		args = append(args, "--no-cache")
	}
	if b.base != "" {
		args = append(args, "--oci-layout", "base="+b.base, "--opt", "context:base=oci-layout://base@"+layoutDigest(b.base))
	}
	if b.cacheFrom != "" {
		args = append(args, "--import-cache", b.cacheFrom)
	}
	if b.cacheTo != "" {
		args = append(args, "--export-cache", b.cacheTo)
	}
	return exec.Command(o.ctl, args...)
}

func (o *buildkitBuilds) du() *exec.Cmd {
	return exec.Command(o.ctl, "--addr", "unix://"+o.socket, "du")
}

func (o *buildkitBuilds) prune() *exec.Cmd {
	return exec.Command(o.ctl, "--addr", "unix://"+o.socket, "prune", "--all")
}

func (o *buildkitBuilds) daemons() []int { return []int{o.daemon.pid()} }
func (o *buildkitBuilds) close() error   { return o.daemon.stop() }
