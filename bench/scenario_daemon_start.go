// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"path/filepath"
)

var daemonStart = &scenario{
	name:       "daemon-start",
	about:      "From nothing to a built image: the daemon is started on an empty store, and the first build, COPY of one file, is sent as soon as its socket accepts. Builders without a daemon just build.",
	floorAbout: "two starts of a small static program",
	goal:       5,
	prepare: func(_ context.Context, b *bench) error {
		return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{"busybox": "", "Dockerfile": smallImage})
	},
	floor: func(ctx context.Context, b *bench) error {
		return errors.Join(execFloor(ctx, b), execFloor(ctx, b))
	},
	contestant: func(_ context.Context, b *bench, p peer) (*contestant, error) {
		bp, ok := p.(builder)
		if !ok {
			return nil, nil
		}
		state := b.stateDir(p.name())
		var o builds
		end := func() error {
			if o == nil {
				return nil
			}
			err := o.close()
			o = nil
			return errors.Join(err, b.moveAway(state))
		}
		return &contestant{
			name: p.name(),
			run: func(ctx context.Context, c *calls) (err error) {
				if o, err = bp.open(ctx, state, 0); err != nil {
					return err
				}
				return c.do(o.build(build{dir: filepath.Join(b.dir, "context"), tag: "bench"}))
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
	},
}
