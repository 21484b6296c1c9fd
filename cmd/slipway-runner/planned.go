// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/system"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// A container that has a plan is started here and not by libcontainer, whose way through three processes, a bootstrap
// message, its configuration in JSON, a state file that is written twice and a FIFO costs twice what the container itself does. The
// process is made in its namespaces at once and waits. When it is in its cgroup and has its limits the runner says go; the
// process then makes the container (setup.go) and says exec as its last word.

// What the runner and the first process of a container say to each other on their socket.
const (
	sayGo    = "go"    // the runner: you are in your cgroup
	sayExec  = "exec"  // the process: the container stands
	sayError = "error" // the process: what follows is why it does not
)

// plannedContainer is a container that was started from a plan.
type plannedContainer struct {
	process  *os.Process
	cgroup   cgroups.Manager
	stateDir string
}

// namespaceFlags are the namespaces that a process with a plan is made in. It gives itself that of cgroups, when it is in its cgroup.
const namespaceFlags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// startPlanned starts a container from its plan. After an error nothing of it is left.
func (s *server) startPlanned(req wire.Request, spec *specs.Spec, p *plan, stdio []*os.File) (_ *plannedContainer, err error) {
	exe, err := s.preparer.executable(req.StateDir)
	if err != nil {
		return nil, err
	}
	manager, err := s.preparer.cgroup(req.ID, spec)
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	planFile, err := p.file()
	if err != nil {
		return nil, err
	}
	defer planFile.Close()
	ours, theirs, err := syncPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	defer theirs.Close()
	files := append(append([]*os.File{}, stdio...), planFile, theirs)
	flags := uintptr(namespaceFlags)
	switch {
	case p.NewNetwork:
		flags |= unix.CLONE_NEWNET
	case p.Network != "":
		ns, err := os.Open(p.Network)
		if err != nil {
			return nil, fmt.Errorf("network namespace: %w", err)
		}
		defer ns.Close()
		files = append(files, ns)
	}
	c := &plannedContainer{cgroup: manager, stateDir: filepath.Join(req.StateDir, req.ID)}
	if err := os.MkdirAll(c.stateDir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(c.explain(err), c.destroy())
		}
	}()
	c.process, err = os.StartProcess("/proc/self/fd/"+strconv.Itoa(int(exe.Fd())), []string{"slipway-runner", "container"}, &os.ProcAttr{
		Dir: "/",
		// For the Go runtime alone: the command gets the environment of the plan. One processor, no collection.
		Env:   []string{"GOMAXPROCS=1", "GOGC=off"},
		Files: files,
		Sys:   &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	theirs.Close()
	defer func() {
		if err != nil {
			_ = c.process.Kill()
			_, _ = c.process.Wait()
		}
	}()
	if err := manager.Apply(c.process.Pid); err != nil && !errors.Is(err, cgroups.ErrRootless) {
		return nil, fmt.Errorf("join cgroup: %w", err)
	}
	if err := s.preparer.joinShared(spec, c.process.Pid); err != nil {
		return nil, fmt.Errorf("join cgroup: %w", err)
	}
	if err := c.writeState(); err != nil {
		return nil, err
	}
	config, err := manager.GetCgroups()
	if err != nil {
		return nil, err
	}
	if err := manager.Set(config.Resources); err != nil {
		return nil, fmt.Errorf("set limits: %w", err)
	}
	if _, err := ours.WriteString(sayGo); err != nil {
		return nil, fmt.Errorf("the container's first process has gone: %w", err)
	}
	return c, hearExec(ours)
}

// hearExec waits until the first process has made the container.
func hearExec(sock *os.File) error {
	b, err := io.ReadAll(sock)
	if err != nil {
		return fmt.Errorf("the container's first process: %w", err)
	}
	text := string(b)
	if text == sayExec {
		return nil
	}
	if len(text) > len(sayError) && text[:len(sayError)] == sayError {
		return errors.New(duringInit + text[len(sayError):])
	}
	return errors.New(duringInit + "it ended without a word")
}

// explain finds out whether the kernel killed the first process for lack of memory.
func (c *plannedContainer) explain(err error) error {
	if n, oomErr := c.cgroup.OOMKillCount(); oomErr == nil && n > 0 {
		return fmt.Errorf("%w (the kernel killed it for lack of memory: the limit is too low)", err)
	}
	return err
}

// writeState notes, as libcontainer does, what the engine has to kill and remove should this runner be killed.
func (c *plannedContainer) writeState() error {
	stat, err := system.Stat(c.process.Pid)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	b, err := json.Marshal(wire.State{CgroupPaths: c.cgroup.GetPaths(), PID: c.process.Pid, Started: stat.StartTime})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.stateDir, wire.StateFile), b, 0o600)
}

func (c *plannedContainer) Signal(sig os.Signal) error { return c.process.Signal(sig) }

func (c *plannedContainer) pid() int { return c.process.Pid }

// wait waits until the first process, and with it everything in its PID namespace, has ended.
func (c *plannedContainer) wait() (*os.ProcessState, error) { return c.process.Wait() }

func (c *plannedContainer) cgroupPaths() map[string]string { return c.cgroup.GetPaths() }

// destroy removes the cgroups and the state of a container that has ended.
func (c *plannedContainer) destroy() error {
	return errors.Join(c.cgroup.Destroy(), os.RemoveAll(c.stateDir))
}

// syncPair makes the socket between the runner and a first process: each message is read whole.
func syncPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	_ = unix.SetNonblock(fds[0], true) // so that waiting for it takes no thread
	return os.NewFile(uintptr(fds[0]), "sync"), os.NewFile(uintptr(fds[1]), "sync"), nil
}
