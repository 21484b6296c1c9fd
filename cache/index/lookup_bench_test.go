// SPDX-License-Identifier: Apache-2.0

package index

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// stackForBench returns the encoded layers of a stack of 200,000 entries in 30 layers, and all of its paths.
func stackForBench(tb testing.TB) (encoded [][]byte, paths []string) {
	tb.Helper()
	r := rand.New(rand.NewPCG(1, 4))
	const layers = 30
	stack := make([][]Entry, layers)
	layerOf := func() int { return max(0, r.IntN(2*layers)-layers) }
	dirs := []string{"usr"}
	home, depth := map[string]int{}, map[string]int{}
	for n := 1; n < 200_000; n++ {
		parent := dirs[r.IntN(len(dirs))]
		if n%20 == 1 && depth[parent] < 6 {
			path := fmt.Sprintf("%s/library%05d", parent, n)
			depth[path], home[path] = depth[parent]+1, layerOf()
			dirs = append(dirs, path)
			stack[home[path]] = append(stack[home[path]], dir(path))
			paths = append(paths, path)
			continue
		}
		at := home[parent]
		if r.IntN(10) == 0 {
			at = layerOf()
		}
		e := file(fmt.Sprintf("%s/module_%06d.rb", parent, n), "x")
		stack[at] = append(stack[at], e)
		paths = append(paths, e.Path)
	}
	for _, entries := range stack {
		encoded = append(encoded, New(entries).Encode())
	}
	return encoded, paths
}

func decodeAll(tb testing.TB, encoded [][]byte) []*Index {
	var out []*Index
	for _, raw := range encoded {
		x, err := Decode(raw)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, x)
	}
	return out
}

// BenchmarkLookup is 1,000 look-ups in 30 layers with 200,000 entries: "first" in indexes that have just been loaded,
// "again" in a new view of the same indexes.
func BenchmarkLookup(b *testing.B) {
	encoded, paths := stackForBench(b)
	r := rand.New(rand.NewPCG(1, 5))
	ask := make([]string, 1000)
	for i := range ask {
		ask[i] = paths[r.IntN(len(paths))]
	}
	run := func(b *testing.B, layers []*Index) {
		v := Merge(layers...)
		for _, path := range ask {
			if _, ok := v.Lookup(path); !ok {
				b.Fatalf("%q is not found", path)
			}
		}
	}
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			layers := decodeAll(b, encoded)
			b.StartTimer()
			run(b, layers)
		}
	})
	b.Run("again", func(b *testing.B) {
		layers := decodeAll(b, encoded)
		for b.Loop() {
			run(b, layers)
		}
	})
	b.Run("load", func(b *testing.B) {
		for b.Loop() {
			decodeAll(b, encoded)
		}
	})
}
