// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
)

var contextOneChange = &scenario{
	name:       "context-one-change",
	about:      "The same COPY of 50,000 files after one of them has changed: the image that comes out is whole again.",
	floorAbout: "the state of each file asked for once, then every file read and hashed once and the bytes written to one file, with fsync",
	group:      "50k",
	goal:       8,
	prepare:    noop50k.prepare,
	round:      func(b *bench, n int) error { return b.changeOne(n) },
	floor: func(_ context.Context, b *bench) error {
		if err := statAll(filepath.Join(b.big, "tree")); err != nil {
			return err
		}
		to := filepath.Join(b.dir, "floor")
		if err := copyAll(filepath.Join(b.big, "tree"), to); err != nil {
			return err
		}
		return b.moveAway(to)
	},
	contestant: noop50k.contestant,
}
