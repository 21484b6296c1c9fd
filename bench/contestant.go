// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
)

// building makes a builder ready that keeps its state between runs: each run is one build of dir.
func building(b build, jobs int) func(context.Context, *bench, peer) (*contestant, error) {
	return func(ctx context.Context, bn *bench, p peer) (*contestant, error) {
		bp, ok := p.(builder)
		if !ok {
			return nil, nil
		}
		one := b
		one.dir = filepath.Join(bn.dir, b.dir)
		if filepath.IsAbs(b.dir) {
			one.dir = b.dir
		}
		o, err := bp.open(ctx, bn.stateDir(p.name()), jobs)
		if err != nil {
			return nil, err
		}
		return &contestant{
			name:    p.name(),
			run:     func(_ context.Context, c *calls) error { return c.do(o.build(one)) },
			daemons: o.daemons,
			close:   o.close,
		}, nil
	}
}

// stateDir is a new directory for a peer's state.
func (b *bench) stateDir(name string) string {
	b.states++
	return filepath.Join(b.dir, name+"-"+string(rune('a'+b.states%26)))
}

// coldBuilding makes a builder ready that begins every run with an empty state, whose daemon runs already.
func coldBuilding(dir func(*bench) string) func(context.Context, *bench, peer) (*contestant, error) {
	return coldBuildingOf(func(b *bench) build { return build{dir: dir(b), tag: "bench"} })
}

// coldBuildingOf is that for any build.
func coldBuildingOf(one func(*bench) build) func(context.Context, *bench, peer) (*contestant, error) {
	return func(_ context.Context, bn *bench, p peer) (*contestant, error) {
		bp, ok := p.(builder)
		if !ok {
			return nil, nil
		}
		state := bn.stateDir(p.name())
		var o builds
		end := func() error {
			if o == nil {
				return nil
			}
			err := o.close()
			o = nil
			return errors.Join(err, bn.moveAway(state))
		}
		return &contestant{
			name: p.name(),
			before: func(ctx context.Context) error {
				opened, err := bp.open(ctx, state, 0)
				if err == nil { // else what it returns is no builder
					o = opened
				}
				return err
			},
			run: func(_ context.Context, c *calls) error {
				return c.do(o.build(one(bn)))
			},
			after: func(context.Context) error { return end() },
			daemons: func() []int {
				if o == nil {
					return nil
				}
				return o.daemons()
			},
			close: end,
		}, nil
	}
}

// smallImage is a Dockerfile that needs no base image: busybox on nothing.
const smallImage = "FROM scratch\nCOPY busybox /bin/busybox\n"

// repeat is a line n times; %d in it is the number.
func repeat(n int, line func(i int) string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(line(i))
	}
	return b.String()
}
