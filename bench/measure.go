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
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bench has the scratch directory and what scenarios share.
type bench struct {
	options
	work  string // scratch
	peers []peer // slipway first
	moved int    // things moved away so far

	big      string // the tree of 50,000 files, once it is made
	goLayout string // the base image of the Go service, once it is made
	mixed    string // the directory of mixed content, once it is made
	changes  int    // of the mixed content so far
	registry string // host of the registry of the scenario that is measured now
	pulled   *servedImage
	dir      string // input of the scenario that is measured now
	states   int    // state directories made so far
}

// sample is one measured run.
type sample struct {
	Wall time.Duration `json:"wall_ns"`
	// CPU is the processor time of all processes: those that the run started, and what daemons used until they settled.
	CPU time.Duration `json:"cpu_ns"`
	// Written is what they sent to disks, in bytes.
	Written int64 `json:"written_bytes"`
	// Wire is what went to and from the registries of the bench, in bytes.
	Wire int64 `json:"wire_bytes,omitempty"`
}

// measured is what is known of a contestant in the end.
type measured struct {
	Name    string   `json:"name"`
	Version string   `json:"version"`
	Samples []sample `json:"samples"`
	// Slow says that the runs took longer than -slow together, so that there are fewer samples, and no peak of memory.
	Slow bool `json:"slow,omitempty"`
	// WarmUp is how long the warm-up took of a peer that is left out for that, so that there are no samples; else 0.
	WarmUp time.Duration `json:"warm_up_ns,omitempty"`
	spent  time.Duration
	// PeakMemory is the largest sum of the memory of all processes (PSS: shared pages count once), in bytes, sampled in one
	// more run that was not timed.
	PeakMemory int64 `json:"peak_memory_bytes"`
	// Output is the size of the file that was made, in bytes; 0 when there is none.
	Output int64 `json:"output_bytes,omitempty"`
	// Note is what else was counted, a sentence.
	Note string `json:"note,omitempty"`
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
	if err := cmd.Start(); err != nil {
		return err
	}
	c.mu.Lock()
	if c.pids == nil {
		c.pids = map[int]bool{}
	}
	c.pids[cmd.Process.Pid] = true
	c.mu.Unlock()
	forget := context.AfterFunc(c.ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	err := cmd.Wait()
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

// measure runs a scenario with everybody.
func (b *bench) measure(ctx context.Context, s *scenario) (_ *result, err error) {
	b.dir = filepath.Join(b.work, s.name)
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return nil, err
	}
	if s.prepare != nil {
		if err := s.prepare(ctx, b); err != nil {
			return nil, fmt.Errorf("make the input: %w", err)
		}
	}
	unix.Sync() // the writing of the input is not part of anybody's run
	r := &result{scenario: s, load: loadAverage()}
	var all []*contestant
	defer func() {
		for i, c := range all {
			if c.close != nil {
				err = errors.Join(err, c.close())
			}
			if c.note != nil && err == nil {
				r.Contestants[i].Note = c.note()
			}
		}
		err = errors.Join(err, b.moveAway(b.dir))
	}()
	enter := func(c *contestant, version string) {
		all = append(all, c)
		r.Contestants = append(r.Contestants, &measured{Name: c.name, Version: version})
	}
	for i, p := range b.peers {
		c, err := s.contestant(ctx, b, p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name(), err)
		}
		if c == nil {
			continue
		}
		enter(c, p.version())
		if i == 0 && b.plant > 0 && s.planted != nil {
			c, err := s.planted(ctx, b, p)
			if err != nil {
				return nil, fmt.Errorf("%s, planted: %w", p.name(), err)
			}
			c.name = fmt.Sprintf("%s + %s a step", p.name(), b.plant)
			r.planted = c.name
			enter(c, p.version())
		}
	}
	if s.floor != nil {
		enter(&contestant{name: floorName, run: func(ctx context.Context, _ *calls) error { return s.floor(ctx, b) }}, "")
	}
	// Round -1 warms up; the last one is for the memory. Who begins changes from round to round.
	for n := -1; n <= b.runs; n++ {
		if s.round != nil {
			if err := s.round(b, n); err != nil {
				return nil, fmt.Errorf("change the input: %w", err)
			}
		}
		for k := range all {
			i := (k + n + 1) % len(all)
			c, m := all[i], r.Contestants[i]
			if n == b.runs && c.name == floorName || n > 0 && m.Slow || m.WarmUp > 0 {
				continue
			}
			sample, peak, err := b.once(ctx, c, n == b.runs)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", c.name, n, err)
			}
			if c.output != "" {
				info, err := os.Stat(c.output)
				if err != nil {
					return nil, err
				}
				m.Output = info.Size()
			}
			switch {
			case n < 0 && sample.Wall > b.slow && i > 0 && c.name != "buildkit" && c.name != floorName:
				m.WarmUp = sample.Wall
			case n == b.runs:
				m.PeakMemory = peak
			case n >= 0:
				m.spent += sample.Wall
				m.Slow = i > 0 && m.spent > b.slow
				m.Samples = append(m.Samples, sample)
			}
		}
	}
	r.loadAfter = loadAverage()
	if len(b.profiles) > 0 {
		if err := b.profile(ctx, s, all[0]); err != nil {
			return nil, fmt.Errorf("profile: %w", err)
		}
	}
	return r, nil
}

// once is one run of one contestant.
func (b *bench) once(ctx context.Context, c *contestant, watch bool) (s sample, peak int64, err error) {
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
	if watch {
		stop = watchMemory(func() []int {
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
	time.Sleep(b.settle)
	after := usageOf(c.daemons())
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

// moveAway puts a directory aside, to be deleted at the very end: a mass delete would slow down whatever is measured after it.
func (b *bench) moveAway(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	old := filepath.Join(b.work, "old")
	if err := os.MkdirAll(old, 0o700); err != nil {
		return err
	}
	b.moved++
	if err := os.Rename(dir, filepath.Join(old, fmt.Sprint(b.moved))); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(old, &fs); err != nil {
		return err
	}
	if int64(fs.Bavail)*fs.Bsize < keepFree { // a slow disk is better than a full one
		return removeAll(old)
	}
	return nil
}

// keepFree is how much of the disk stays free, in bytes: what was moved away is deleted before.
const keepFree = 25 << 30

// removeAll deletes the scratch directory, which must have no mounts in it any more: nothing outside of it may be deleted.
func removeAll(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if bytes.Contains(mounts, []byte(" "+dir+"/")) {
		return fmt.Errorf("%s is left: something in it is still mounted", dir)
	}
	return os.RemoveAll(dir)
}
