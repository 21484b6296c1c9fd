// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

const (
	indexEntries = 200_000
	indexLayers  = 30
	lookups      = 1000
)

// indexInputs are what the rows about the index work on.
type indexInputs struct {
	encoded [][]byte // a stack with indexEntries entries
	paths   []string // of all of them, sorted
	ask     []string
}

// indexGroup asks the tables of contents, without any store.
var indexGroup = group{
	name: "index",
	prepare: func(ctx context.Context, b *bench) error {
		all := indexList(b.seed)
		if err := os.WriteFile(b.path("index"), index.New(slices.Clone(all)).Encode(), 0o600); err != nil {
			return err
		}
		// As in an image: half of it in one layer; the others add directories of their own, and one file in ten to
		// directories of others.
		r := rand.New(rand.NewPCG(b.seed, 5))
		layerOf := func() int { return max(0, r.IntN(2*indexLayers)-indexLayers) }
		stack := make([][]index.Entry, indexLayers)
		home := map[string]int{}
		for _, e := range all {
			dir := e.Path
			if e.Type != index.Dir {
				dir = index.Parent(e.Path)
			}
			if _, ok := home[dir]; !ok {
				home[dir] = layerOf()
			}
			i := home[dir]
			if e.Type != index.Dir && r.IntN(10) == 0 {
				i = layerOf()
			}
			stack[i] = append(stack[i], e)
		}
		in := &indexInputs{}
		for _, entries := range stack {
			in.encoded = append(in.encoded, index.New(entries).Encode())
		}
		for _, e := range all {
			in.paths = append(in.paths, e.Path)
		}
		slices.Sort(in.paths)
		for range lookups {
			in.ask = append(in.ask, in.paths[r.IntN(len(in.paths))])
		}
		b.index = in
		return nil
	},
	round: func(ctx context.Context, b *bench) error {
		in := b.index
		// Fresh ones: what an index makes for its first question, and keeps, is part of the figures.
		var layers []*index.Index
		for _, raw := range in.encoded {
			x, err := index.Decode(raw)
			if err != nil {
				return err
			}
			layers = append(layers, x)
		}
		runtime.GC()
		var x *index.Index
		err := b.floor("index-load", func() error {
			raw, err := os.ReadFile(b.path("index"))
			sha256.Sum256(raw)
			return err
		})
		if err != nil {
			return err
		}
		err = b.ours("index-load", func() error {
			raw, err := os.ReadFile(b.path("index"))
			if err == nil {
				x, err = index.Decode(raw)
			}
			return err
		})
		if err != nil {
			return err
		}
		err = b.floor("index-lookup", func() error {
			for _, path := range in.ask {
				if _, ok := slices.BinarySearch(in.paths, path); !ok {
					return fmt.Errorf("%q is not in the list", path)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		err = b.ours("index-lookup", func() error {
			view := index.Merge(layers...)
			for _, path := range in.ask {
				if _, ok := view.Lookup(path); !ok {
					return fmt.Errorf("%q is not found", path)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		_ = b.floor("index-merkle", func() error {
			for _, raw := range in.encoded {
				sha256.Sum256(raw)
			}
			return nil
		})
		err = b.ours("index-merkle", func() error {
			_, err := index.Digest(index.Merge(layers...), "")
			return err
		})
		if err != nil {
			return err
		}
		b.of("index-merkle-one").floor = b.of("index-merkle").floor
		return b.ours("index-merkle-one", func() error {
			_, err := index.Digest(index.Merge(x), "")
			return err
		})
	},
}

// indexList makes entries like those of a large image: 10,000 directories up to six deep.
func indexList(seed uint64) []index.Entry {
	r := rand.New(rand.NewPCG(seed, 4))
	dirs := []string{"usr"}
	entries := []index.Entry{{Path: "usr", Type: index.Dir, Mode: 0o755, Offset: -1}}
	depth := map[string]int{}
	for len(entries) < indexEntries-1 {
		parent := dirs[r.IntN(len(dirs))]
		if len(entries)%20 == 1 && depth[parent] < 6 {
			path := fmt.Sprintf("%s/library%05d", parent, len(entries))
			depth[path] = depth[parent] + 1
			dirs = append(dirs, path)
			entries = append(entries, index.Entry{Path: path, Type: index.Dir, Mode: 0o755, ModTime: inputTime.UnixNano(), Offset: -1})
			continue
		}
		path := fmt.Sprintf("%s/module_%06d.rb", parent, len(entries))
		entries = append(entries, index.Entry{
			Path: path, Type: index.File, Mode: 0o644, ModTime: inputTime.UnixNano(), Size: int64(r.IntN(100_000)),
			Digest: digest.FromString(path), Offset: int64(len(entries)) << 10,
		})
	}
	return entries
}
