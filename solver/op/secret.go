// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver"
)

func (d *Deps) tempDir() string {
	if d.TempDir == "" {
		return os.TempDir()
	}
	return d.TempDir
}

// removeStale removes what steps leave in dir when the process is killed: a tmpfs with secrets above all. dir
// belongs to this process alone.
func removeStale(dir string) {
	above, _ := filepath.Glob(filepath.Join(dir, "ca-*"))
	for _, name := range above { // nothing is ever mounted there
		os.RemoveAll(name)
	}
	for _, pattern := range []string{"secrets-*", "pin-*", "ssh-*", "archive-*", frontendPattern} {
		names, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, name := range names {
			if err := unmount(name); err != nil && !errors.Is(err, unix.EINVAL) {
				continue // still mounted: what is behind it is not ours to remove
			}
			switch pattern {
			case "ssh-*":
				os.Remove(filepath.Join(name, "agent"))
			case frontendPattern:
				os.Remove(filepath.Join(name, frontendDefinition))
			}
			os.Remove(name)
		}
	}
}

func unmount(p string) error {
	if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: p, Err: err}
	}
	return nil
}

// secret asks the client for a secret; ok is false for an optional one that it does not have.
func (s *step) secret(ctx context.Context, id string, optional bool) (value []byte, ok bool, err error) {
	err = solver.ErrNotFound
	if s.env.Session != nil {
		value, err = s.env.Session.Secret(ctx, id)
	}
	switch {
	case err == nil:
		s.hide(id, value)
		return value, true, nil
	case !errors.Is(err, solver.ErrNotFound):
		return nil, false, fmt.Errorf("secret %s: %w", id, err)
	case optional:
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("secret %s: not found: the client gave none of that name (--secret id=%s,…)", id, id)
}

// secretMount puts a secret into a file in memory.
func (s *step) secretMount(ctx context.Context, o *pb.SecretOpt) (executor.Mount, bool, error) {
	value, ok, err := s.secret(ctx, o.ID, o.Optional)
	if err != nil || !ok {
		return executor.Mount{}, false, err
	}
	if err := s.secretDir(); err != nil {
		return executor.Mount{}, false, err
	}
	p := filepath.Join(s.secrets, randomID())
	if err := os.WriteFile(p, value, 0o600); err != nil {
		return executor.Mount{}, false, err
	}
	if err := os.Chown(p, int(o.Uid), int(o.Gid)); err != nil {
		return executor.Mount{}, false, err
	}
	if err := os.Chmod(p, os.FileMode(o.Mode&0o777)); err != nil {
		return executor.Mount{}, false, err
	}
	return executor.Mount{Kind: executor.MountBind, Source: p, Readonly: true}, true, nil
}

// secretDir mounts the tmpfs for the step's secrets.
func (s *step) secretDir() error {
	if s.secrets != "" {
		return nil
	}
	dir := filepath.Join(s.op.deps.tempDir(), "secrets-"+randomID())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s.later(func() error { return os.Remove(dir) })
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	err := unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=0711,noswap")
	if errors.Is(err, unix.EINVAL) { // before Linux 6.4
		err = unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=0711")
	}
	if err != nil {
		return &os.PathError{Op: "mount tmpfs", Path: dir, Err: err}
	}
	s.later(func() error { return unmount(dir) })
	s.secrets = dir
	return nil
}

// sshMount is a socket that leads to the client's agent. It is one of our own, for its owner and mode: what the
// session gives may be the agent's.
func (s *step) sshMount(ctx context.Context, o *pb.SSHOpt) (executor.Mount, bool, error) {
	err := solver.ErrNotFound
	var agent string
	release := func() {}
	id := o.ID
	if id == "" {
		id = "default"
	}
	if s.env.Session != nil {
		agent, release, err = s.env.Session.SSHAgent(ctx, id)
	}
	switch {
	case errors.Is(err, solver.ErrNotFound) && o.Optional:
		return executor.Mount{}, false, nil
	case errors.Is(err, solver.ErrNotFound):
		return executor.Mount{}, false, fmt.Errorf("ssh agent %q: not found: the client forwards none of that name (--ssh %s)", id, id)
	case err != nil:
		return executor.Mount{}, false, fmt.Errorf("ssh agent %q: %w", id, err)
	}
	s.later(func() error { release(); return nil })
	dir := filepath.Join(s.op.deps.tempDir(), "ssh-"+randomID())
	if err := os.Mkdir(dir, 0o711); err != nil {
		return executor.Mount{}, false, err
	}
	s.later(func() error { return os.Remove(dir) })
	// A socket's name may have 107 bytes only, which the path of a state directory soon exceeds.
	d, err := os.Open(dir)
	if err != nil {
		return executor.Mount{}, false, err
	}
	s.later(d.Close)
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/agent", d.Fd()))
	if err != nil {
		return executor.Mount{}, false, err
	}
	p := filepath.Join(dir, "agent")
	proxy := &socketProxy{listener: l, to: agent, conns: map[net.Conn]bool{}}
	proxy.wg.Go(proxy.serve)
	s.later(proxy.close)
	if err := os.Chown(p, int(o.Uid), int(o.Gid)); err != nil {
		return executor.Mount{}, false, err
	}
	if err := os.Chmod(p, os.FileMode(o.Mode&0o777)); err != nil {
		return executor.Mount{}, false, err
	}
	return executor.Mount{Kind: executor.MountBind, Source: p}, true, nil
}

// socketProxy connects every client of a unix socket to another unix socket.
type socketProxy struct {
	listener net.Listener
	to       string
	wg       sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

func (p *socketProxy) serve() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.wg.Go(func() { p.connect(c) })
	}
}

func (p *socketProxy) connect(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("unix", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	if !p.add(c, up) {
		return
	}
	defer p.remove(c, up)
	var wg sync.WaitGroup
	for _, pair := range [][2]net.Conn{{c, up}, {up, c}} {
		wg.Go(func() {
			_, _ = io.Copy(pair[0], pair[1])
			if w, ok := pair[0].(*net.UnixConn); ok {
				_ = w.CloseWrite()
			}
		})
	}
	wg.Wait()
}

func (p *socketProxy) add(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		p.conns[c] = true
	}
	return !p.closed
}

func (p *socketProxy) remove(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		delete(p.conns, c)
	}
}

// close ends all connections and waits for the goroutines.
func (p *socketProxy) close() error {
	err := p.listener.Close()
	p.mu.Lock()
	p.closed = true
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
	return err
}
