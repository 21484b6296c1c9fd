// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"os"
	"runtime/pprof"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/record"
)

// bench has the scratch directory and what was measured so far.
type bench struct {
	dir  string
	seed uint64

	samples map[string]*samples // by row
	moved   int                 // things moved away so far

	// Inputs that the rounds of a group share.
	context *world
	index   *indexInputs
	stack   *stack
	records *record.Store

	profile     string // file for a CPU profile; "" for none
	profileFile *os.File
}

// samples are the measurements of one row.
type samples struct {
	ours, floor       []time.Duration
	oursCPU, floorCPU []time.Duration // of all threads, user and kernel
	skipped           string          // why there are none
}

func (b *bench) of(row string) *samples {
	s := b.samples[row]
	if s == nil {
		s = &samples{}
		b.samples[row] = s
	}
	return s
}

// ours times our own work for a row.
func (b *bench) ours(row string, work func() error) error {
	if err := b.startProfile(); err != nil {
		return err
	}
	took, cpu, err := timed(work)
	s := b.of(row)
	s.ours, s.oursCPU = append(s.ours, took), append(s.oursCPU, cpu)
	return err
}

// floor times the floor's work for a row.
func (b *bench) floor(row string, work func() error) error {
	took, cpu, err := timed(work)
	s := b.of(row)
	s.floor, s.floorCPU = append(s.floor, took), append(s.floorCPU, cpu)
	return err
}

// timed says how long work takes, by the clock and in processor time, which says more on a machine that others use as well.
func timed(work func() error) (took, cpu time.Duration, err error) {
	before, start := processorTime(), time.Now()
	err = work()
	return time.Since(start), processorTime() - before, err
}

func processorTime() time.Duration {
	var r unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// startProfile begins the CPU profile with the first timed work, so that the making of inputs is not in it.
func (b *bench) startProfile() (err error) {
	if b.profile == "" || b.profileFile != nil {
		return nil
	}
	if b.profileFile, err = os.Create(b.profile); err != nil {
		return err
	}
	return pprof.StartCPUProfile(b.profileFile)
}

func (b *bench) stopProfile() error {
	if b.profileFile == nil {
		return nil
	}
	pprof.StopCPUProfile()
	return b.profileFile.Close()
}

// moveAway takes a directory or file out of the way by rename; it is deleted when everything has been measured.
func (b *bench) moveAway(path string) error {
	b.moved++
	return os.Rename(path, b.path("old", strconv.Itoa(b.moved)))
}

// syncDisk writes what is dirty, so that nobody's fsync pays for it later.
func (b *bench) syncDisk() error {
	f, err := os.Open(b.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// closeAll closes and joins the errors.
func closeAll(errs error, closers ...io.Closer) error {
	for _, c := range closers {
		errs = errors.Join(errs, c.Close())
	}
	return errs
}
