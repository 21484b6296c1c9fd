// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// concurrentSteps is how many steps each of the builds has.
const concurrentSteps = 10

var (
	concurrent2 = concurrent(2)
	concurrent8 = concurrent(8)
)

// concurrent is n clients that build different things on one engine at the same time.
func concurrent(n int) *scenario {
	return &scenario{
		name:       fmt.Sprintf("concurrent-%d", n),
		about:      fmt.Sprintf("%d clients at the same time, each with a build of its own of %d RUN steps, without the cache, on one daemon.", n, concurrentSteps),
		floorAbout: fmt.Sprintf("%d times clone with namespaces and execve of a small static program, in as many threads as there are clients", n*concurrentSteps),
		group:      "concurrent",
		steps:      n * concurrentSteps,
		prepare: func(_ context.Context, b *bench) error {
			for i := range n {
				err := b.writeInput(b.concurrentDir(i), map[string]string{
					"busybox": "",
					"Dockerfile": smallImage + repeat(concurrentSteps, func(k int) string {
						return fmt.Sprintf("RUN [\"/bin/busybox\", \"test\", \"%d-%d\"]\n", i, k)
					}),
				})
				if err != nil {
					return err
				}
			}
			return nil
		},
		floor: func(context.Context, *bench) error {
			var group errgroup.Group
			for range n {
				group.Go(func() error { return cloneFloor(concurrentSteps) })
			}
			return group.Wait()
		},
		contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
			bp, ok := p.(builder)
			if !ok {
				return nil, nil
			}
			o, end, _, err := b.opened(ctx, bp, 0)
			if err != nil {
				return nil, err
			}
			return &contestant{
				name: p.name(), daemons: o.daemons, close: end,
				run: func(_ context.Context, c *calls) error {
					var group errgroup.Group
					for i := range n {
						group.Go(func() error {
							return c.do(o.build(build{dir: b.concurrentDir(i), tag: fmt.Sprint("bench-", i), noCache: true}))
						})
					}
					return group.Wait()
				},
			}, nil
		},
	}
}

func (b *bench) concurrentDir(i int) string {
	return filepath.Join(b.dir, fmt.Sprint("client-", i))
}
