// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bench has the scratch directory and what scenarios share.
type bench struct {
	options
	top   string // scratch
	work  string // the inputs that scenarios share, on a disk of their own
	peers []peer // slipway first
	moved int    // things moved away so far

	diskSays string // what the page says of disks

	adopts bool // what programs leave behind are our children

	place   *disk             // where b.dir is
	group   string            // of the scenarios that are measured now; "" for none
	shared  map[string]*state // what peers of the group have open; nil without a group
	leftOut map[string]string // peers that cannot go on in the group, and why

	big      string // the tree of 50,000 files, once it is made
	goLayout string // the base image of the Go service, once it is made
	mixed    string // the directory of mixed content, once it is made
	registry string // host of the registry of the scenario that is measured now
	pulled   *servedImage
	dir      string // input and states of the scenario that is measured now
	states   int    // state directories made so far
}

// calls are the programs that a run starts, one after the other or at the same time.
type calls struct {
	ctx  context.Context // when it ends, so do they
	mu   sync.Mutex      // guards pids and cpu
	pids map[int]bool    // of those that run now
	cpu  time.Duration
}

// do runs a program to its end. What it printed is in the error, if there is one.
func (c *calls) do(cmd *exec.Cmd) error {
	var out bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &out
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what it starts ends with it
	cmd.WaitDelay = killAfter                             // a process that it left behind may hold its output open
	if err := cmd.Start(); err != nil {
		return err
	}
	c.mu.Lock()
	if c.pids == nil {
		c.pids = map[int]bool{}
	}
	c.pids[cmd.Process.Pid] = true
	c.mu.Unlock()
	waited := make(chan struct{})
	forget := context.AfterFunc(c.ctx, func() { endGroup(cmd.Process.Pid, waited) })
	err := cmd.Wait()
	close(waited)
	forget()
	c.mu.Lock()
	delete(c.pids, cmd.Process.Pid)
	if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		c.cpu += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, tail(out.Bytes()))
	}
	return nil
}

// killAfter is how long a program has that was asked to end.
const killAfter = 3 * time.Second

// endGroup asks a group of processes to end, and kills it when its first one, which somebody else waits for, does not.
func endGroup(pid int, waited <-chan struct{}) {
	_ = syscall.Kill(-pid, syscall.SIGTERM)
	select {
	case <-waited:
	case <-time.After(killAfter):
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	}
}

func (c *calls) running() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.pids))
}

func tail(b []byte) []byte {
	const most = 4 << 10
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return b
}

// measure runs a scenario with everybody. It fails when slipway or the floor does; a peer that fails is left out.
func (b *bench) measure(ctx context.Context, s *scenario) (_ *result, err error) {
	begin := time.Now()
	if err := b.enter(ctx, s.name, s.group); err != nil {
		return nil, err
	}
	t := &turns{bench: b, result: &result{scenario: s}}
	defer func() {
		err = errors.Join(err, t.close(err == nil))
		if err != nil || b.group == "" {
			err = errors.Join(err, b.leave())
		}
		t.Took = time.Since(begin)
	}()
	if s.prepare != nil {
		if err := s.prepare(ctx, b); err != nil {
			return nil, fmt.Errorf("make the input: %w", err)
		}
	}
	unix.Sync() // the writing of the input is not part of anybody's run
	t.load = loadAverage()
	if err := t.prepare(ctx); err != nil {
		return nil, err
	}
	runs := b.runs
	if s.runs > 0 {
		runs = min(runs, s.runs)
	}
	// The last round is for the memory. Who begins changes from round to round.
	for n := warmUpRound; n <= runs; n++ {
		if !slices.ContainsFunc(t.Contestants, func(m *measured) bool { return m.wants(n, runs) }) {
			continue
		}
		if s.round != nil {
			if err := s.round(b, n); err != nil {
				return nil, fmt.Errorf("change the input: %w", err)
			}
		}
		for k := range t.all {
			if i := (k + n + 1) % len(t.all); t.Contestants[i].wants(n, runs) {
				if err := t.turn(ctx, i, n, runs); err != nil {
					return nil, err
				}
			}
		}
	}
	t.loadAfter = loadAverage()
	if len(b.profiles) > 0 {
		if err := b.profile(ctx, s, t.all[0]); err != nil {
			return nil, fmt.Errorf("profile: %w", err)
		}
	}
	return t.result, nil
}

// turns is a scenario while it is measured.
type turns struct {
	*bench
	*result
	all []*contestant // as result.Contestants; one that is left out is closed and has no run
}

func (t *turns) enter(c *contestant, m *measured) {
	t.all = append(t.all, c)
	t.Contestants = append(t.Contestants, m)
}

// prepare makes everybody ready.
func (t *turns) prepare(ctx context.Context) error {
	for i, p := range t.peers {
		_, ours := p.(*slipway)
		m := &measured{Name: p.name(), Version: p.version(), patience: patienceOf(p.name(), ours, t.scenario.patience), slow: t.slow, ours: ours}
		if why := t.leftOut[m.Name]; why != "" {
			m.LeftOut = why
			t.enter(&contestant{name: m.Name}, m)
			continue
		}
		c, err := t.patiently(ctx, m, func(ctx context.Context) (*contestant, error) { return t.scenario.contestant(ctx, t.bench, p) })
		if err == nil && c == nil {
			continue
		}
		if err != nil {
			c = &contestant{name: m.Name}
		}
		t.enter(c, m)
		if err != nil {
			if err := t.fails(ctx, len(t.all)-1, fmt.Errorf("%s: %w", m.Name, err)); err != nil {
				return err
			}
		}
		if i == 0 && t.plant > 0 && t.scenario.planted != nil {
			c, err := t.scenario.planted(ctx, t.bench, p)
			if err != nil {
				return fmt.Errorf("%s, planted: %w", p.name(), err)
			}
			c.name = fmt.Sprintf("%s + %s a step", p.name(), t.plant)
			t.planted = c.name
			t.enter(c, &measured{Name: c.name, Version: p.version(), ours: true})
		}
	}
	if floor := t.scenario.floor; floor != nil {
		t.enter(&contestant{name: floorName, run: func(ctx context.Context, _ *calls) error { return floor(ctx, t.bench) }}, &measured{Name: floorName, ours: true})
	}
	return nil
}

// patiently does something for a contestant, for as long as it may take.
func (t *turns) patiently(ctx context.Context, m *measured, do func(context.Context) (*contestant, error)) (*contestant, error) {
	if m.ours {
		return do(ctx)
	}
	limited, cancel := context.WithTimeoutCause(ctx, m.patience-m.readying, errImpatient)
	defer cancel()
	begin := time.Now()
	c, err := do(limited)
	m.readying += time.Since(begin)
	if err != nil && ctx.Err() == nil && limited.Err() != nil {
		err = fmt.Errorf("%w %s", errImpatient, m.patience)
	}
	return c, err
}

// fails is what happens when a contestant cannot go on: a peer is left out, for the group too, and for slipway and the floor it is the end.
func (t *turns) fails(ctx context.Context, i int, err error) error {
	c, m := t.all[i], t.Contestants[i]
	if m.ours || ctx.Err() != nil {
		return err
	}
	m.LeftOut = strings.ReplaceAll(reason(err), t.top, "…")
	m.Samples, m.PeakMemory = nil, 0
	fmt.Fprintf(os.Stderr, "bench: %s: %s is left out: %v\n", t.scenario.name, m.Name, err)
	t.all[i] = &contestant{name: c.name}
	var closed error
	if c.close != nil {
		closed = c.close()
	}
	if t.group != "" {
		if o := t.unshare(m.Name); o != nil {
			closed = errors.Join(closed, o.close())
		}
		t.leftOut[m.Name] = m.LeftOut
	}
	if closed != nil { // its own mess; the disk goes anyway
		fmt.Fprintf(os.Stderr, "bench: %s: end %s: %v\n", t.scenario.name, m.Name, closed)
	}
	return nil
}

// turn is one run of one contestant.
func (t *turns) turn(ctx context.Context, i, n, runs int) error {
	c, m := t.all[i], t.Contestants[i]
	if n > warmUpRound {
		m.readying = 0 // each later turn has all the patience
	}
	var s sample
	var peak int64
	_, err := t.patiently(ctx, m, func(ctx context.Context) (_ *contestant, err error) {
		s, peak, err = t.once(ctx, c, m.watches(n, runs))
		return nil, err
	})
	if err == nil && c.output != "" {
		var info os.FileInfo
		if info, err = os.Stat(c.output); err == nil {
			m.Output = info.Size()
		}
	}
	if err != nil {
		return t.fails(ctx, i, fmt.Errorf("%s, round %d: %w", c.name, n, err))
	}
	s.Round = n
	m.add(s, peak, n, runs)
	return nil
}

// close ends everybody.
func (t *turns) close(ok bool) (err error) {
	for i, c := range t.all {
		if c.close != nil {
			err = errors.Join(err, c.close())
		}
		if c.note != nil && ok && err == nil {
			t.Contestants[i].Note = c.note()
		}
		if c.numbers != nil && ok && err == nil {
			t.Contestants[i].Numbers = c.numbers()
		}
	}
	return err
}

// once is one run of one contestant. Memory is looked at in the given intervals; 0 is not at all.
func (b *bench) once(ctx context.Context, c *contestant, watch time.Duration) (s sample, peak int64, err error) {
	if c.before != nil {
		if err := c.before(ctx); err != nil {
			return s, 0, err
		}
	}
	var daemons []int
	if c.daemons != nil {
		daemons = c.daemons()
	}
	before := usageOf(daemons)
	own, wire := ownUsage(), onWire.Load()
	started := calls{ctx: ctx}
	stop := func() int64 { return 0 }
	if watch > 0 {
		stop = watchMemory(watch, func() []int {
			pids := started.running()
			if c.daemons != nil {
				pids = append(pids, c.daemons()...)
			}
			return pids
		})
	}
	begin := time.Now()
	err = c.run(ctx, &started)
	s.Wall = time.Since(begin)
	peak = stop()
	if err != nil {
		return s, 0, err
	}
	if c.daemons == nil {
		// The floor works in this process and in children of it.
		now := ownUsage()
		s.CPU = now.cpu - own.cpu
		s.Written = now.written - own.written
		s.Wire = onWire.Load() - wire
		return s, peak, errOf(c.after, ctx)
	}
	daemons = c.daemons()
	if len(daemons) > 0 {
		time.Sleep(b.settle)
	}
	after := usageOf(daemons)
	s.CPU = started.cpu + after.cpu - before.cpu
	s.Written = after.written - before.written + written("self") - own.written
	s.Wire = onWire.Load() - wire
	return s, peak, errOf(c.after, ctx)
}

func errOf(f func(context.Context) error, ctx context.Context) error {
	if f == nil {
		return nil
	}
	return f(ctx)
}
