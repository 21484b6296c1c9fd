// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// building makes a builder ready that keeps its state between runs, and in a group: each run is one build of dir.
func building(b build, jobs int) func(context.Context, *bench, peer) (*contestant, error) {
	return buildingPrimed(b, jobs, nil)
}

// rebuilding is that where the cache has the build, or what it was before a change, already in the warm-up.
func rebuilding(b build) func(context.Context, *bench, peer) (*contestant, error) {
	return buildingPrimed(b, 0, &b)
}

// buildingPrimed is building where something is built before the warm-up.
func buildingPrimed(b build, jobs int, first *build) func(context.Context, *bench, peer) (*contestant, error) {
	return func(ctx context.Context, bn *bench, p peer) (*contestant, error) {
		bp, ok := p.(builder)
		if !ok {
			return nil, nil
		}
		one := bn.placed(b)
		o, end, empty, err := bn.opened(ctx, bp, jobs)
		if err != nil {
			return nil, err
		}
		if first != nil && empty {
			if err := runQuietly(ctx, o.build(bn.placed(*first))); err != nil {
				return nil, errors.Join(err, end())
			}
		}
		return &contestant{
			name:    p.name(),
			run:     func(_ context.Context, c *calls) error { return c.do(o.build(one)) },
			daemons: o.daemons,
			close:   end,
		}, nil
	}
}

// placed is a build whose directory is below the scenario's, unless it is absolute.
func (b *bench) placed(one build) build {
	if !filepath.IsAbs(one.dir) {
		one.dir = filepath.Join(b.dir, one.dir)
	}
	return one
}

// stateDir is a new directory for a peer's state.
func (b *bench) stateDir(name string) string {
	b.states++
	return filepath.Join(b.dir, fmt.Sprintf("%s-%d", name, b.states))
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
