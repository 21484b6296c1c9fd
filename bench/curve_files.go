// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

var filesCurve = &curve{
	name:  "files",
	about: "COPY of a context of so many files of 1 kB: into an empty store, and again when nothing has changed.",
	unit:  "files",
	sizes: []int{1_000, 5_000, 20_000, 50_000, 200_000},
	series: func(ctx context.Context, b *bench, s *slipway, n int) ([]*contestant, error) {
		dir := filepath.Join(b.dir, "context")
		if err := b.manyFiles(dir, n); err != nil {
			return nil, err
		}
		cold, err := coldBuilding(func(*bench) string { return dir })(ctx, b, s)
		if err != nil {
			return nil, err
		}
		again, err := building(build{dir: dir, tag: "bench"}, 0)(ctx, b, s)
		if err != nil {
			return []*contestant{cold}, err
		}
		cold.name, again.name = "empty store", "unchanged"
		return []*contestant{cold, again}, nil
	},
}

// manyFiles writes n files of 1 kB, a hundred in a directory, and a Dockerfile that copies them.
func (b *bench) manyFiles(dir string, n int) error {
	buf := make([]byte, 1000)
	r := b.random("many")
	for i := range n {
		sub := filepath.Join(dir, "tree", fmt.Sprintf("d%04d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return err
			}
		}
		_, _ = r.Read(buf)
		path := filepath.Join(sub, fmt.Sprintf("f%02d", i%100))
		if err := os.WriteFile(path, buf, 0o644); err != nil {
			return err
		}
		if err := os.Chtimes(path, inputTime, inputTime); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY tree /tree\n"), 0o644)
}
