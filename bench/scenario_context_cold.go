// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
)

var contextCold = &scenario{
	name:       "context-cold",
	about:      "COPY of 50,000 files (500 MB) into an image, by an engine that runs but has an empty store: the first build on a machine.",
	floorAbout: "every file read and hashed once, and the bytes written to one file, with fsync",
	goal:       6,
	prepare:    noop50k.prepare,
	floor: func(_ context.Context, b *bench) error {
		to := filepath.Join(b.dir, "floor")
		if err := copyAll(filepath.Join(b.big, "tree"), to); err != nil {
			return err
		}
		return b.moveAway(to)
	},
	contestant: coldBuilding(func(b *bench) string { return b.big }),
}
