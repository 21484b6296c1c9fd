// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// process is one container: an executor.Process once it has started.
type process struct {
	r   *Runc
	run *runner
	id  string

	// Set up before the start, given back after the end.
	ns         *network.Namespace
	nsReusable bool
	published  *network.Published
	filesDir   string
	rootfs     string
	points     *mountPoints
	io         *stdio
	released   sync.Once

	// joinable is the container's Spec when further processes may join it.
	joinable *executor.Spec
	joins    atomic.Int64 // that were asked for

	done chan struct{} // closed when everything is over; exit and err are set then
	exit executor.Exit
	err  error
}

// finish is called once, with the container's last event, or without one when the runner has gone.
func (p *process) finish(ev wire.Event, ok bool) {
	p.exit.Ended = time.Now()
	if !ok {
		if p.rootfs != "" { // it is a container, not a process that has joined one
			p.sweep()
		}
		p.err = p.run.err
	} else {
		p.exit.Code = ev.Code
		p.exit.OOMKilled = ev.OOMKilled
		p.exit.PeakMemoryBytes = ev.PeakMemoryBytes
		p.exit.CPUTime = time.Duration(ev.CPUNanos)
		if ev.Message != "" {
			p.r.log.Warn("container ended with a problem", "container", p.id, "err", ev.Message)
		}
	}
	p.io.finish()
	if p.exit.Code == initFailed {
		if code, failed := p.io.execFailure(); failed {
			p.exit.Code = code
		}
	}
	p.release()
	close(p.done)
}

// sweep removes the container after its runner died.
func (p *process) sweep() {
	if err := sweepContainer(filepath.Join(p.r.containersDir(), p.id), p.r.NoLimits() == ""); err != nil {
		p.r.log.Warn("remove container of a runner that ended", "container", p.id, "err", err)
	}
}

// release gives back everything that was set up around the container. The container is not there (any more).
func (p *process) release() {
	p.released.Do(func() {
		if p.io != nil {
			p.io.close()
		}
		if p.published != nil {
			p.published.Close()
		}
		if p.ns != nil {
			p.r.opts.Network.Release(p.ns, p.nsReusable)
		}
		if p.points != nil {
			p.r.roots.release(p.rootfs)
		}
		if p.filesDir != "" {
			if err := os.RemoveAll(p.filesDir); err != nil {
				p.r.log.Warn("remove generated files", "container", p.id, "err", err)
			}
		}
	})
}

// Wait returns when nothing of the container is left.
func (p *process) Wait() (executor.Exit, error) {
	<-p.done
	return p.exit, p.err
}

// Signal sends a signal to the container's first process. Process 1 of a container ignores signals that it has no
// handler for, SIGKILL and SIGSTOP excepted.
func (p *process) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return os.ErrProcessDone
	default:
	}
	if sig == syscall.SIGKILL {
		return p.run.tell(wire.Request{Op: wire.OpKill, ID: p.id})
	}
	return p.run.tell(wire.Request{Op: wire.OpSignal, ID: p.id, Signal: int(sig)})
}

// Resize sets the size of the terminal.
func (p *process) Resize(rows, cols uint16) error {
	select {
	case <-p.done:
		return os.ErrProcessDone
	default:
	}
	if err := p.io.resize(rows, cols); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return os.ErrProcessDone
		}
		return fmt.Errorf("resize terminal of container %s: %w", p.id, err)
	}
	return nil
}

// Ports are the published ports, host ports filled in.
func (p *process) Ports() []executor.Port {
	if p.published == nil {
		return nil
	}
	return p.published.Ports
}

// IP is the container's address on the bridge.
func (p *process) IP() string {
	if p.ns == nil {
		return ""
	}
	return p.ns.IP().String()
}
