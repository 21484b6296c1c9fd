// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"slices"
	"time"
)

// scenario is one thing to compare.
type scenario struct {
	name string
	// about says what is measured; it is printed above the table.
	about string
	// floorAbout says what the floor does.
	floorAbout string
	// group is of scenarios that follow each other and share a disk and what their peers have open and built; "" is none.
	group string
	// runs is how many runs are enough; 0 is as many as were asked for.
	runs int
	// patience is how long BuildKit may take instead of buildkitPatience; 0 is that.
	patience time.Duration
	// goal is how many times faster than BuildKit DESIGN.md wants us; 0 is no such goal.
	goal float64
	// ideal is a time, in seconds, that nothing can be faster than by the scenario's nature; 0 is none.
	ideal float64
	// goals are what else is wanted of slipway.
	goals []goal
	// steps is how many steps one run has; times are shown for one step, too, when there are several.
	steps int
	// prepare makes the input. What it returns is the state of the scenario for the other functions.
	prepare func(ctx context.Context, b *bench) error
	// round changes the input before each round; nil is nothing. All that are compared see the same change.
	round func(b *bench, n int) error
	// floor does the floor's work; nil is no floor.
	floor func(ctx context.Context, b *bench) error
	// contestant makes a peer ready; nil, nil when the peer cannot do this at all.
	contestant func(ctx context.Context, b *bench, p peer) (*contestant, error)
	// planted makes slipway ready with steps that take b.plant longer; nil when there are no steps.
	planted func(ctx context.Context, b *bench, p peer) (*contestant, error)
}

// cannotError is why a scenario is left out on this machine.
type cannotError struct{ why string }

func (e *cannotError) Error() string { return e.why }

// contestant is one program in one scenario.
type contestant struct {
	name string
	// before makes the next run possible; not timed. May be nil.
	before func(ctx context.Context) error
	// run is what is timed. It starts programs through c.
	run func(ctx context.Context, c *calls) error
	// after ends what run has left; not timed. May be nil.
	after func(ctx context.Context) error
	// output is the file that run makes, whose size is told; "" for none.
	output string
	// daemons are the processes that work for run besides those that it starts and waits for.
	daemons func() []int
	// close ends it.
	close func() error
	// note is a sentence for below the table, asked for when it is closed; nil is none.
	note func() string
	// numbers are what else was counted, for goals, asked for when it is closed; nil is none.
	numbers func() map[string]float64
}

// scenarios are all there are, in the order of the page.
var scenarios = []*scenario{
	noopSmall, noop50k, contextOneChange, contextCold, chain60, chain60Cached, wide8, fanout8, copyFrom, concurrent2, concurrent8,
	exportPlain, exportGzip, exportAgain, push1GB, exportZstd, pushPipelined, pullGzip, pullZstd,
	goCold, goChange, goMounts, remoteNoop, remoteChange, remoteNode, smallFiles, aptInstall, runTrue, runBridge, cliStart, daemonStart, du, idle, prune,
}

func names() []string {
	var out []string
	for _, s := range scenarios {
		out = append(out, s.name)
	}
	return out
}

func find(name string) *scenario {
	return scenarios[slices.IndexFunc(scenarios, func(s *scenario) bool { return s.name == name })]
}
