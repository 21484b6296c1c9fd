// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
)

var stepsCurve = &curve{
	name:  "steps",
	about: "A Dockerfile of so many RUN true, one after the other: without the cache, and again with all of it.",
	unit:  "steps",
	sizes: []int{10, 30, 100, 400},
	series: func(ctx context.Context, b *bench, s *slipway, n int) ([]*contestant, error) {
		return builtTwice(ctx, b, s, smallImage+repeat(n, func(int) string { return "RUN [\"/bin/busybox\", \"true\"]\n" }))
	},
}

var stagesCurve = &curve{
	name:  "stages",
	about: "So many stages that each write a file, and one that takes it from each: without the cache, and again with all of it.",
	unit:  "stages",
	sizes: []int{1, 4, 16, 64},
	series: func(ctx context.Context, b *bench, s *slipway, n int) ([]*contestant, error) {
		stage := func(i int) string {
			return fmt.Sprintf("FROM base AS s%d\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo %d >/out%d\"]\n", i, i, i)
		}
		last := "FROM base\n" + repeat(n, func(i int) string { return fmt.Sprintf("COPY --from=s%d /out%d /\n", i, i) })
		return builtTwice(ctx, b, s, "FROM scratch AS base\nCOPY busybox /bin/busybox\n"+repeat(n, stage)+last)
	},
}

// builtTwice are the lines of a Dockerfile that is built without the cache and with it.
func builtTwice(ctx context.Context, b *bench, s *slipway, dockerfile string) ([]*contestant, error) {
	dir := filepath.Join(b.dir, "context")
	if err := b.writeInput(dir, map[string]string{"busybox": "", "Dockerfile": dockerfile}); err != nil {
		return nil, err
	}
	o, err := s.open(ctx, b.stateDir(s.name()), 0)
	if err != nil {
		return nil, err
	}
	line := func(name string, one build) *contestant {
		return &contestant{
			name: name, daemons: o.daemons,
			run: func(_ context.Context, c *calls) error { return c.do(o.build(one)) },
		}
	}
	run := line("without cache", build{dir: dir, tag: "bench", noCache: true})
	again := line("cached", build{dir: dir, tag: "bench"})
	again.close = o.close // both have the daemon; it is closed once
	return []*contestant{run, again}, nil
}
