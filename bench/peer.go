// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// peer is a program that does what slipway does, or a part of it.
type peer interface {
	name() string
	// find says whether the program is here, and remembers its version.
	find(ctx context.Context) bool
	version() string
	// help is the least that its command line can do.
	help() *exec.Cmd
}

// builder is a peer that builds images.
type builder interface {
	peer
	// open makes an empty state in dir, and starts a daemon on it if the peer has one.
	open(ctx context.Context, dir string, jobs int) (builds, error)
}

// builds is an open state of a builder.
type builds interface {
	// build is one whole call of the client; the result is an image of that name in the local store.
	build(b build) *exec.Cmd
	daemons() []int
	close() error
}

// runner is a peer that runs containers.
type runner interface {
	peer
	// ready makes an image with /bin/busybox, and returns the call that runs its "true", without a network.
	ready(ctx context.Context, b *bench, dir string) (call func() *exec.Cmd, daemons func() []int, close func() error, err error)
}

// build is one build of the Dockerfile in dir. Without a tag and an output it only fills the cache.
type build struct {
	dir, tag string
	noCache  bool
	// base is the directory of an OCI layout with the image that the Dockerfile calls "base"; "" when it has none. Only an archiver knows it.
	base string
	// target is a stage; "" is the last one.
	target string
	// output is what is made instead of an image in the local store, in the words that slipway and BuildKit share: "type=oci,…". Only an
	// archiver knows it.
	output string
	// cacheFrom and cacheTo are shared caches, in the words that slipway and BuildKit share. Only an archiver knows them.
	cacheFrom, cacheTo string
}

// archiver is a builder that can make archives, and build from them.
type archiver interface {
	builder
	archives()
}

// keeper is an open state that can say and delete what it keeps.
type keeper interface {
	builds
	du() *exec.Cmd
	prune() *exec.Cmd
}

// allPeers are all there are. Slipway is always there and first.
func allPeers(o options) []peer {
	peers := []peer{&slipway{label: "slipway", what: "this tree", path: o.slipway, debug: len(o.profiles) > 0}}
	if o.against != "" {
		peers = append(peers, &slipway{label: "against", what: o.against, path: o.against})
	}
	return append(peers, &buildkit{}, &buildah{}, &runcPeer{}, &podman{}, &docker{})
}

func peerNames() []string {
	var out []string
	for _, p := range allPeers(options{})[1:] {
		out = append(out, p.name())
	}
	return out
}

// findPeers looks for those that were asked for.
func (b *bench) findPeers(ctx context.Context) error {
	found := len(b.options.peers) > 0 && b.options.peers[0] == "found"
	for i, p := range allPeers(b.options) {
		wanted := i == 0 || p.name() == "against" || slices.Contains(b.options.peers, p.name())
		if !wanted && !found {
			continue
		}
		if p.find(ctx) {
			b.peers = append(b.peers, p)
		} else if wanted {
			return fmt.Errorf("%s is not on PATH", p.name())
		}
	}
	return nil
}

// firstLine runs a program that prints its version.
func firstLine(ctx context.Context, program string, args ...string) (string, bool) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", false
	}
	out, err := exec.CommandContext(ctx, path, args...).Output()
	if err != nil {
		return "", false
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, true
}

// daemon is a process that serves a socket.
type daemon struct {
	cmd  *exec.Cmd
	log  *os.File
	done chan error
}

// startDaemon starts a program and waits until its socket accepts.
func startDaemon(ctx context.Context, log, socket string, program string, args ...string) (*daemon, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	d := &daemon{cmd: exec.Command(program, args...), log: f, done: make(chan error, 1)}
	d.cmd.Stdout, d.cmd.Stderr = f, f
	if err := d.cmd.Start(); err != nil {
		_ = f.Close()
		return nil, err
	}
	go func() { d.done <- d.cmd.Wait() }()
	limit := time.Now().Add(30 * time.Second)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return d, conn.Close()
		}
		select {
		case err := <-d.done:
			_ = f.Close()
			return nil, fmt.Errorf("%s has ended: %w: see %s", program, err, log)
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), d.stop())
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(limit) {
			return nil, errors.Join(fmt.Errorf("%s does not answer: see %s", program, log), d.stop())
		}
	}
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

// stop ends the process and waits for it.
func (d *daemon) stop() error {
	defer d.log.Close()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-time.After(30 * time.Second):
		_ = d.cmd.Process.Kill()
		<-d.done
		return fmt.Errorf("%s did not end when it was asked to", d.cmd.Path)
	}
}

// runQuietly runs a program outside of any timing.
func runQuietly(ctx context.Context, cmd *exec.Cmd) error {
	c := calls{ctx: ctx}
	return c.do(cmd)
}

// busybox is a static program that every image and floor is made of.
func busybox() (string, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return "", errors.New("busybox is not installed (Debian: apt-get install busybox-static)")
	}
	return filepath.EvalSymlinks(path)
}
