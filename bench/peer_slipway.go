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

// slipway is what is measured: its own daemon, its own command line, default options.
type slipway struct {
	label string
	path  string
	what  string
	debug bool // daemons serve profiles, at debugSocket
	jobs  bool // its daemon has --jobs

	debugSocket string // of the daemon that was started last
}

func (s *slipway) name() string    { return s.label }
func (s *slipway) version() string { return s.what }
func (s *slipway) help() *exec.Cmd { return exec.Command(s.path, "--help") }

func (s *slipway) find(ctx context.Context) bool {
	out, err := exec.CommandContext(ctx, s.path, "daemon", "--help").Output()
	s.jobs = strings.Contains(string(out), "--jobs")
	return err == nil
}

func (s *slipway) open(ctx context.Context, dir string, jobs int) (builds, error) {
	o := &slipwayBuilds{slipway: s, root: filepath.Join(dir, "root"), socket: filepath.Join(dir, "s")}
	args := []string{"daemon", "--root", o.root, "--addr", "unix://" + o.socket}
	if jobs > 0 && s.jobs {
		args = append(args, "--jobs", fmt.Sprint(jobs))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if s.debug {
		s.debugSocket = filepath.Join(dir, "debug")
		args = append(args, "--debugaddr", "unix://"+s.debugSocket)
	}
	var err error
	o.daemon, err = startDaemon(ctx, filepath.Join(dir, "log"), o.socket, s.path, args...)
	return o, err
}

// ready implements runner.
func (s *slipway) ready(ctx context.Context, b *bench, dir string) (func() *exec.Cmd, func() []int, func() error, error) {
	o, err := s.open(ctx, dir, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	so := o.(*slipwayBuilds)
	if err := runQuietly(ctx, o.build(build{dir: filepath.Join(b.dir, "image"), tag: "bench"})); err != nil {
		return nil, nil, nil, err
	}
	call := func() *exec.Cmd {
		return so.command("run", "--rm", "--network", "none", "bench", "/bin/busybox", "true")
	}
	return call, o.daemons, o.close, nil
}

// slipwayBuilds is a running daemon.
type slipwayBuilds struct {
	*slipway
	root, socket string
	daemon       *daemon
}

func (o *slipwayBuilds) command(args ...string) *exec.Cmd {
	return exec.Command(o.path, append([]string{"--host", "unix://" + o.socket}, args...)...)
}

func (s *slipway) archives() {}

func (o *slipwayBuilds) build(b build) *exec.Cmd {
	args := []string{"build", "--progress", "plain"}
	switch {
	case b.output != "":
		args = append(args, "-o", b.output)
	case b.tag != "":
		args = append(args, "-t", b.tag)
	default:
		args = append(args, "-o", "type=cacheonly")
	}
	if b.target != "" {
		args = append(args, "--target", b.target)
	}
	if b.noCache {
		args = append(args, "--no-cache")
	}
	if b.base != "" {
		args = append(args, "--build-context", "base=oci-layout://"+b.base)
	}
	if b.cacheFrom != "" {
		args = append(args, "--cache-from", b.cacheFrom)
	}
	if b.cacheTo != "" {
		args = append(args, "--cache-to", b.cacheTo)
	}
	return o.command(append(args, b.dir)...)
}

func (o *slipwayBuilds) du() *exec.Cmd    { return o.command("cache", "du") }
func (o *slipwayBuilds) prune() *exec.Cmd { return o.command("cache", "prune", "--all") }

func (o *slipwayBuilds) daemons() []int { return []int{o.daemon.pid()} }
func (o *slipwayBuilds) close() error   { return o.daemon.stop() }
