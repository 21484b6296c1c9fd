// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

var _ executor.Joiner = (*process)(nil)

// Join implements executor.Joiner.
func (p *process) Join(ctx context.Context, s executor.ProcessSpec, stdio executor.IO) (executor.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if p.joinable == nil {
		return nil, fmt.Errorf("container %s takes no further processes: it was not started to be joined", p.id)
	}
	spec, err := p.joinedProcess(s)
	if err != nil {
		return nil, err
	}
	joined := &process{r: p.r, run: p.run, id: fmt.Sprintf("%s/%d", p.id, p.joins.Add(1)), done: make(chan struct{})}
	if err := joined.join(ctx, p.id, spec, stdio); err != nil {
		joined.release()
		if start, ok := errors.AsType[*executor.StartError](err); ok {
			return nil, start
		}
		return nil, fmt.Errorf("start process in container %s: %w", p.id, err)
	}
	return joined, nil
}

// joinedProcess is s with what the container's first process has.
func (p *process) joinedProcess(s executor.ProcessSpec) (*specs.Process, error) {
	first := *p.joinable
	first.ID, first.Args, first.Env, first.Cwd = p.id, s.Args, s.Env, s.Cwd
	if err := check(first); err != nil {
		return nil, err
	}
	limits, err := rlimits(s.Ulimits)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(first.Privileged, first.CapAdd, first.CapDrop, p.r.host.Capabilities)
	if err != nil {
		return nil, err
	}
	set := &specs.LinuxCapabilities{Bounding: caps}
	if s.User.UID == 0 {
		set.Effective, set.Permitted = caps, caps
	}
	return &specs.Process{
		Terminal:        s.Terminal,
		User:            specs.User{UID: s.User.UID, GID: s.User.GID, AdditionalGids: additionalGroups(s.User)},
		Args:            s.Args,
		Env:             s.Env,
		Cwd:             path.Join("/", s.Cwd),
		Capabilities:    set,
		Rlimits:         limits,
		NoNewPrivileges: first.NoNewPrivileges,
	}, nil
}

// join hands the process to the runner and waits until it runs.
func (p *process) join(ctx context.Context, container string, spec *specs.Process, stdio executor.IO) error {
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	file, err := wire.MemFile("process", b)
	if err != nil {
		return err
	}
	defer file.Close()
	if p.io, err = newStdio(spec.Terminal, stdio); err != nil {
		return err
	}
	defer p.io.closeTheirs()
	p.r.mu.Lock()
	if p.r.closed {
		p.r.mu.Unlock()
		return errors.New("executor is closed")
	}
	p.r.wg.Add(1)
	p.r.mu.Unlock()
	events, err := p.run.start(wire.Request{Op: wire.OpJoin, ID: p.id, Container: container, Terminal: spec.Terminal},
		append([]*os.File{file}, p.io.theirs...)...)
	if err != nil {
		p.r.wg.Done()
		return err
	}
	stopWatching := context.AfterFunc(ctx, func() { _ = p.run.tell(wire.Request{Op: wire.OpKill, ID: p.id}) })
	p.io.closeTheirs()

	ev, ok := <-events
	if !ok || ev.Kind != wire.Started {
		stopWatching()
		defer p.r.wg.Done()
		switch {
		case !ok:
			return p.run.err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case ev.Class == wire.Ended:
			return fmt.Errorf("%s: %w", strings.TrimSuffix(ev.Message, "."), os.ErrProcessDone)
		}
		return startError(ev)
	}
	if ctx.Err() != nil { // it ended while there was nothing to kill yet
		_ = p.run.tell(wire.Request{Op: wire.OpKill, ID: p.id})
	}
	return p.follow(events, stopWatching)
}
