// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
	"strconv"
)

// copyFromBytes is the size of the tree that is copied, in bytes, in files of copyFromFile.
const (
	copyFromBytes = 1 << 30
	copyFromFile  = 16 << 20
)

var copyFrom = &scenario{
	name:       "copy-from-1GB",
	about:      "COPY --from another stage of 1 GB in files of 16 MB; the stage is in the cache, the copy is not.",
	floorAbout: "the files read once, hashed, and written one after the other into one file, which is synced",
	prepare: func(_ context.Context, b *bench) error {
		dir := filepath.Join(b.dir, "context")
		if err := b.randomFiles(filepath.Join(dir, "data"), copyFromBytes/copyFromFile, copyFromFile); err != nil {
			return err
		}
		return b.writeCopyFrom(-2)
	},
	// The destination changes, so that the copy is a new one each time.
	round: func(b *bench, n int) error { return b.writeCopyFrom(n) },
	floor: func(_ context.Context, b *bench) error {
		to := filepath.Join(b.dir, "floor")
		if err := copyAll(filepath.Join(b.dir, "context", "data"), to); err != nil {
			return err
		}
		return b.moveAway(to)
	},
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		return rebuilding(build{dir: "context", tag: "bench"})(ctx, b, p)
	},
}

func (b *bench) writeCopyFrom(n int) error {
	return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
		"Dockerfile": "FROM scratch AS from\nCOPY data /data\nFROM scratch\nCOPY --from=from /data /to" + strconv.Itoa(n+2) + "/\n",
	})
}
