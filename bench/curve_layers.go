// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
)

var layersCurve = &curve{
	name:  "layers",
	about: "An image of so many layers: a container that runs \"true\" in it, and a RUN true on top of it.",
	unit:  "layers",
	sizes: []int{1, 10, 50, 120, 400},
	series: func(ctx context.Context, b *bench, s *slipway, n int) ([]*contestant, error) {
		dir := filepath.Join(b.dir, "context")
		image := smallImage + repeat(n-1, func(i int) string { return fmt.Sprintf("COPY Dockerfile /d/%d\n", i) })
		err := b.writeInput(dir, map[string]string{
			"busybox": "", "Dockerfile": image, "step/Dockerfile": "FROM bench\nRUN [\"/bin/busybox\", \"true\"]\n",
		})
		if err != nil {
			return nil, err
		}
		opened, err := s.open(ctx, b.stateDir(s.name()), 0)
		if err != nil {
			return nil, err
		}
		o := opened.(*slipwayBuilds)
		run := &contestant{
			name: "run true", daemons: o.daemons, close: o.close,
			run: func(_ context.Context, c *calls) error {
				return c.do(o.command("run", "--rm", "--network", "none", "bench", "/bin/busybox", "true"))
			},
		}
		if err := runQuietly(ctx, o.build(build{dir: dir, tag: "bench"})); err != nil {
			return []*contestant{run}, err
		}
		step := &contestant{
			name: "RUN true", daemons: o.daemons,
			run: func(_ context.Context, c *calls) error {
				return c.do(o.build(build{dir: filepath.Join(dir, "step"), tag: "step", noCache: true}))
			},
		}
		return []*contestant{step, run}, nil
	},
}
