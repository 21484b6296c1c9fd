// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
)

var noop50k = &scenario{
	name:       "noop-50k",
	about:      "A build in which nothing has changed, of a context of 50,000 files (500 MB) that is copied whole: one call of the command line.",
	floorAbout: "one start of a small static program, and the state of each of the 50,000 files asked for once",
	group:      "50k",
	goal:       8,
	prepare: func(_ context.Context, b *bench) error {
		_, err := b.bigTree()
		if err != nil {
			return err
		}
		return b.writeInput(b.big, map[string]string{"Dockerfile": "FROM scratch\nCOPY tree /tree\n"})
	},
	floor: func(ctx context.Context, b *bench) error {
		if err := execFloor(ctx, b); err != nil {
			return err
		}
		return statAll(filepath.Join(b.big, "tree"))
	},
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		return rebuilding(build{dir: b.big, tag: "bench"})(ctx, b, p)
	},
}
