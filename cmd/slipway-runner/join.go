// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/runc/libcontainer"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// handleJoin starts a further process in a container that runs.
func (s *server) handleJoin(req wire.Request, files []*os.File) {
	s.mu.Lock()
	c := s.containers[req.Container]
	s.mu.Unlock()
	var lc *libcontainer.Container
	if c != nil {
		lc = c.join()
	}
	if lc == nil {
		closeAll(files)
		s.send(wire.Event{Kind: wire.Failed, ID: req.ID, Class: wire.Ended, Message: "the container has ended"})
		return
	}
	go func() {
		defer c.joins.Done()
		s.send(s.runJoined(lc, req, files))
	}()
}

// join returns the container and counts the process that is about to join it, or returns nil when its first process has ended
// or has not begun.
func (c *container) join() *libcontainer.Container {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lc == nil || c.killed {
		return nil
	}
	c.joins.Add(1)
	return c.lc
}

// runJoined takes one such process from its request to its last event, which it returns.
func (s *server) runJoined(lc *libcontainer.Container, req wire.Request, files []*os.File) wire.Event {
	failed := func(class wire.Class, err error) wire.Event {
		closeAll(files)
		return wire.Event{Kind: wire.Failed, ID: req.ID, Class: class, Message: err.Error()}
	}
	wantFiles := 4
	if req.Terminal {
		wantFiles = 2
	}
	if len(files) != wantFiles {
		return failed(wire.Other, fmt.Errorf("join: got %d files, want %d", len(files), wantFiles))
	}
	// A container that was made by a plan has a configuration without its seccomp profile: nothing may join it.
	if config := lc.Config(); len(config.Mounts) == 0 {
		return failed(wire.Other, errors.New("the container was not started to be joined"))
	}
	b, err := io.ReadAll(io.NewSectionReader(files[0], 0, 1<<30))
	if err != nil {
		return failed(wire.Other, fmt.Errorf("read process: %w", err))
	}
	var spec specs.Process
	if err := json.Unmarshal(b, &spec); err != nil {
		return failed(wire.Other, fmt.Errorf("process: %w", err))
	}
	p, err := newProcess(&spec)
	if err != nil {
		return failed(wire.Other, err)
	}
	p.Init = false
	if req.Terminal {
		p.ConsoleSocket = files[1]
	} else {
		p.Stdin, p.Stdout, p.Stderr = files[1], files[2], files[3]
	}
	err = lc.Run(p)
	closeAll(files)
	files = nil
	if err != nil {
		class, err := classify(err)
		return failed(class, err)
	}
	s.mu.Lock()
	s.joined[req.ID] = p
	s.mu.Unlock()
	pid, _ := p.Pid()
	s.send(wire.Event{Kind: wire.Started, ID: req.ID, PID: pid})

	state, err := p.Wait()
	s.mu.Lock()
	delete(s.joined, req.ID)
	s.mu.Unlock()
	ev := wire.Event{Kind: wire.Exited, ID: req.ID, Code: 255}
	if state != nil {
		ev.Code = exitCode(state)
	} else if err != nil {
		ev.Message = err.Error()
	}
	return ev
}
