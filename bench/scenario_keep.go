// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"
)

// keptSteps is how many steps are in the caches that du and prune look at, made by keptBuilds builds.
const (
	keptSteps  = 1000
	keptBuilds = 10
	keptGroup  = "kept"
)

var du = &scenario{
	name:       "du",
	about:      fmt.Sprintf("du of a cache of %d COPY steps.", keptSteps),
	floorAbout: "one start of a small static program",
	steps:      keptSteps,
	group:      keptGroup,
	prepare:    prepareKept,
	floor:      execFloor,
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		o, _, end, err := b.kept(ctx, p)
		if o == nil || err != nil {
			return nil, err
		}
		return &contestant{
			name: p.name(), daemons: o.daemons, close: end,
			run: func(_ context.Context, c *calls) error { return c.do(o.du()) },
		}, nil
	},
}

var prune = &scenario{
	name:    "prune",
	group:   keptGroup, // the last of it: it closes what the others have open
	about:   fmt.Sprintf("A cache of %d COPY steps is deleted, by one call of the command line. Every run has its own copy of that cache.", keptSteps),
	goal:    20,
	steps:   keptSteps,
	prepare: prepareKept,
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		o, filled, end, err := b.kept(ctx, p)
		if o == nil || err != nil {
			return nil, err
		}
		if shared := b.unshare(p.name()); shared != nil {
			end = shared.close
		}
		if err := end(); err != nil {
			return nil, err
		}
		o = nil
		state := b.stateDir(p.name() + "-copy")
		end = func() error {
			if o == nil {
				return nil
			}
			err := o.close()
			o = nil
			return errors.Join(err, b.moveAway(state))
		}
		return &contestant{
			name: p.name(), close: end,
			before: func(ctx context.Context) error {
				if err := runQuietly(ctx, exec.Command("cp", "-a", filled, state)); err != nil {
					return err
				}
				opened, err := p.(builder).open(ctx, state, 0)
				if err == nil {
					o = opened.(keeper)
				}
				return err
			},
			run:   func(_ context.Context, c *calls) error { return c.do(o.prune()) },
			after: func(context.Context) error { return end() },
			daemons: func() []int {
				if o == nil {
					return nil
				}
				return o.daemons()
			},
		}, nil
	},
}

// idleWait is how long daemons have to settle before their memory counts.
const idleWait = 6 * time.Second

// idle is about its column of memory.
var idle = &scenario{
	name:    "idle",
	about:   fmt.Sprintf("The memory of the daemon when nothing has happened for a while, after builds of %d steps: only the peak of the memory means something, the time is a wait.", keptSteps),
	group:   keptGroup,
	runs:    1,
	goals:   []goal{memoryOfBuildkit(0.5)},
	prepare: prepareKept,
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		o, _, end, err := b.kept(ctx, p)
		if o == nil || err != nil {
			return nil, err
		}
		last := time.Now() // nothing happens after that
		return &contestant{
			name: p.name(), daemons: o.daemons, close: end,
			before: func(context.Context) error {
				time.Sleep(time.Until(last.Add(idleWait)))
				return nil
			},
			run: func(context.Context, *calls) error {
				time.Sleep(200 * time.Millisecond)
				return nil
			},
		}, nil
	},
}

func prepareKept(_ context.Context, b *bench) error {
	for i := range keptBuilds {
		err := b.writeInput(b.keptDir(i), map[string]string{
			"file": fmt.Sprintln(i),
			"Dockerfile": "FROM scratch\n" + repeat(keptSteps/keptBuilds, func(k int) string {
				return fmt.Sprintf("COPY file /%d/%d\n", i, k)
			}),
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) keptDir(i int) string { return filepath.Join(b.dir, fmt.Sprint("build-", i)) }

// kept is a peer's state with the steps in it, its directory, and what ends it; nil when the peer has none that can be asked.
func (b *bench) kept(ctx context.Context, p peer) (o keeper, dir string, end func() error, err error) {
	bp, ok := p.(builder)
	if !ok {
		return nil, "", nil, nil
	}
	opened, end, first, err := b.opened(ctx, bp, 0)
	if err != nil {
		return nil, "", nil, err
	}
	o, ok = opened.builds.(keeper)
	if !ok {
		return nil, "", nil, end()
	}
	for i := 0; i < keptBuilds && first; i++ {
		if err := runQuietly(ctx, o.build(build{dir: b.keptDir(i)})); err != nil {
			return nil, "", nil, errors.Join(err, end())
		}
	}
	return o, opened.dir, end, nil
}
