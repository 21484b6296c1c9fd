// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/runc/libcontainer"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// server runs the containers of one engine.
type server struct {
	conn     *net.UnixConn
	preparer *preparer
	wg       sync.WaitGroup // one for each container

	mu         sync.Mutex // guards containers, joined, parents and closing
	containers map[string]*container
	joined     map[string]*libcontainer.Process // processes that have joined a container, by ID
	parents    map[string]struct{}              // cgroup directories above our containers, to be removed at the end
	closing    bool
}

// container is one container between its request and its last event.
type container struct {
	id string

	mu     sync.Mutex // guards lc, killed and that joins begins to wait
	lc     *libcontainer.Container
	killed bool           // asked for before the process was there
	joins  sync.WaitGroup // processes that have joined
}

func newServer(conn *net.UnixConn) *server {
	return &server{conn: conn, preparer: newPreparer(), containers: map[string]*container{}, joined: map[string]*libcontainer.Process{}, parents: map[string]struct{}{}}
}

// serve handles requests until the engine's end closes or ctx ends, then kills and removes everything.
func (s *server) serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.conn.CloseRead() })
	defer stop()
	var err error
	for {
		var req wire.Request
		var files []*os.File
		files, err = wire.Receive(s.conn, &req)
		if err != nil {
			break
		}
		s.handle(req, files)
	}
	s.mu.Lock()
	s.closing = true
	for _, c := range s.containers {
		go c.kill()
	}
	s.mu.Unlock()
	s.wg.Wait()
	s.removeParents()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (s *server) handle(req wire.Request, files []*os.File) {
	if req.Op == wire.OpStart {
		c := &container{id: req.ID}
		s.mu.Lock()
		_, exists := s.containers[req.ID]
		if !exists {
			s.containers[req.ID] = c
			s.wg.Add(1)
		}
		s.mu.Unlock()
		if exists {
			closeAll(files)
			s.send(wire.Event{Kind: wire.Failed, ID: req.ID, Class: wire.Other, Message: "a container of this name is running"})
			return
		}
		go func() {
			defer s.wg.Done()
			ev := s.run(c, req, files)
			s.mu.Lock()
			delete(s.containers, req.ID)
			s.mu.Unlock()
			s.send(ev)
		}()
		return
	}
	if req.Op == wire.OpJoin {
		s.handleJoin(req, files)
		return
	}
	closeAll(files)
	s.mu.Lock()
	c, p := s.containers[req.ID], s.joined[req.ID]
	s.mu.Unlock()
	if p != nil {
		sig := syscall.Signal(req.Signal)
		if req.Op == wire.OpKill {
			sig = unix.SIGKILL
		}
		_ = p.Signal(sig)
		return
	}
	if c == nil {
		return // it has ended meanwhile: the event is on its way
	}
	switch req.Op {
	case wire.OpKill:
		go c.kill()
	case wire.OpSignal:
		c.signal(syscall.Signal(req.Signal))
	}
}

// send drops what cannot be delivered: the engine has gone, and serve notices by itself.
func (s *server) send(ev wire.Event) { _ = wire.Send(s.conn, ev) }

// run takes one container from its request to its last event, which it returns.
func (s *server) run(c *container, req wire.Request, files []*os.File) wire.Event {
	failed := func(class wire.Class, err error) wire.Event {
		closeAll(files)
		return wire.Event{Kind: wire.Failed, ID: req.ID, Class: class, Message: err.Error()}
	}
	wantFiles := 4
	if req.Terminal {
		wantFiles = 2
	}
	if len(files) != wantFiles {
		return failed(wire.Other, fmt.Errorf("start: got %d files, want %d", len(files), wantFiles))
	}
	spec, profile, err := readSpec(files[0])
	if err != nil {
		return failed(wire.Other, err)
	}
	config, p, plan, err := s.preparer.prepare(req.ID, spec, profile, req.StandardInit)
	if err != nil {
		return failed(wire.Other, err)
	}
	if plan != nil {
		files = append(files, plan)
	}
	lc, err := libcontainer.Create(req.StateDir, req.ID, config)
	if err != nil {
		return failed(wire.Other, err)
	}
	if req.Terminal {
		p.ConsoleSocket = files[1]
	} else {
		p.Stdin, p.Stdout, p.Stderr = files[1], files[2], files[3]
	}
	err = lc.Run(p)
	closeAll(files) // the container has its own; an end kept here would keep the pipes open
	files = nil
	if err != nil {
		err = errors.Join(err, lc.Destroy())
		class, err := classify(err)
		return failed(class, err)
	}
	pid, _ := p.Pid()
	c.started(lc) // first: whoever hears of the start may join at once
	s.send(wire.Event{Kind: wire.Started, ID: req.ID, PID: pid})
	paths := s.cgroupPaths(lc)
	memory := watchMemory(paths)

	state, err := p.Wait()
	ev := wire.Event{Kind: wire.Exited, ID: req.ID, Code: 255}
	if state != nil {
		ev.Code = exitCode(state)
	} else if err != nil {
		ev.Message = err.Error()
	}
	readUsage(paths, &ev)
	ev.PeakMemoryBytes = memory.end(ev.PeakMemoryBytes)
	c.ended()
	c.joins.Wait()
	if err := lc.Destroy(); err != nil {
		ev.Message = fmt.Sprintf("remove container: %v", err)
	}
	return ev
}

// readSpec reads what comes with an OpStart: the spec, and its seccomp profile as JSON.
func readSpec(f *os.File) (_ *specs.Spec, profile []byte, err error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		return nil, nil, fmt.Errorf("read runtime spec: %w", err)
	}
	text, profile, _ := bytes.Cut(b, []byte("\n"))
	var spec specs.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return nil, nil, fmt.Errorf("runtime spec: %w", err)
	}
	if spec.Process == nil || spec.Linux == nil {
		return nil, nil, errors.New("runtime spec: no process or no linux section")
	}
	return &spec, profile, nil
}

func exitCode(state *os.ProcessState) int {
	ws := state.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// classify finds out whether the user's command was at fault. libcontainer's init reports as text, so text is what
// there is to look at; the words are Go's own (os/exec) and the kernel's. A process that joins reports without the first words.
func classify(err error) (wire.Class, error) {
	text := strings.TrimPrefix(err.Error(), "unable to start container process: ")
	const duringInit = "error during container init: "
	during := false
	if _, after, ok := strings.Cut(text, duringInit); ok {
		text, during = after, true
	}
	text, _, _ = strings.Cut(text, "\n")
	switch {
	case strings.HasPrefix(text, "exec: "):
		if strings.Contains(text, "executable file not found") || strings.Contains(text, "no such file or directory") {
			return wire.NotFound, errors.New(text)
		}
		return wire.NotExecutable, errors.New(text)
	case strings.HasPrefix(text, "chdir to cwd"):
		text = strings.Replace(text, "chdir to cwd (", "working directory (", 1)
		text = strings.Replace(text, " set in config.json failed", "", 1)
		return wire.NotExecutable, errors.New(text)
	case during:
		return wire.Other, errors.New(text)
	}
	return wire.Other, err
}

// started makes the container reachable for signals; a kill that came too early is done now.
func (c *container) started(lc *libcontainer.Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lc = lc
	if c.killed {
		_ = lc.Signal(unix.SIGKILL)
	}
}

// ended forgets the process: its number may soon belong to somebody else.
func (c *container) ended() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lc = nil
}

// kill kills the first process; the kernel then kills everything else in its PID namespace.
func (c *container) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killed = true
	if c.lc != nil {
		_ = c.lc.Signal(unix.SIGKILL)
	}
}

func (c *container) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lc != nil {
		_ = c.lc.Signal(sig)
	}
}

// cgroupPaths returns the container's cgroup directories by controller ("" on cgroup v2) and remembers those above
// them that were made for us.
func (s *server) cgroupPaths(lc *libcontainer.Container) map[string]string {
	state, err := lc.State()
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range state.CgroupPaths {
		for dir := filepath.Dir(p); ; dir = filepath.Dir(dir) {
			if strings.HasPrefix(filepath.Base(dir), wire.CgroupPrefix) {
				s.parents[dir] = struct{}{}
				break
			}
			if dir == "/" || dir == "." {
				break
			}
			if !strings.Contains(dir, "/"+wire.CgroupPrefix) {
				break
			}
			s.parents[dir] = struct{}{}
		}
	}
	return state.CgroupPaths
}

// removeParents removes the cgroup directories above our containers, deepest first. One that is in use stays.
func (s *server) removeParents() {
	for removed := true; removed; {
		removed = false
		for dir := range s.parents {
			if err := unix.Rmdir(dir); err == nil {
				delete(s.parents, dir)
				removed = true
			}
		}
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
