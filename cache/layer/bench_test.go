// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The layers of these benchmarks have 1,000 files of 10 kB.
const benchFiles = 1000

var benchContent = strings.Repeat("a layer is its tar\n", 540)

func openBenchStore(b *testing.B) *Store {
	s, err := Open(b.TempDir(), Options{Log: discard})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return s
}

// BenchmarkUnpack is a tar that becomes a layer: its bytes are copied and hashed, index and EROFS metadata are made.
func BenchmarkUnpack(b *testing.B) {
	needRoot(b)
	s := openBenchStore(b)
	for n := 0; b.Loop(); n++ {
		b.StopTimer()
		entries := []tarEntry{mkdir("d/"), reg("d/n", fmt.Sprint(n))} // another layer each time
		for i := range benchFiles {
			entries = append(entries, reg(fmt.Sprintf("d/%d", i), benchContent))
		}
		raw := makeTar(b, entries...)
		b.SetBytes(int64(len(raw)))
		b.StartTimer()
		if _, err := s.Unpack(b.Context(), bytes.NewReader(raw), "", nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPack is the directory that a step has left, which becomes a layer ("commit") and gets its tar and its diff ID ("pack").
func BenchmarkPack(b *testing.B) {
	needRoot(b)
	s := openBenchStore(b)
	n := 0
	upper := func(b *testing.B) string {
		dir, err := s.NewUpper(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		n++
		for i := range benchFiles {
			if err := os.WriteFile(filepath.Join(dir, "upper", fmt.Sprint(i)), []byte(fmt.Sprint(n, benchContent)), 0o644); err != nil {
				b.Fatal(err)
			}
		}
		return dir
	}
	b.Run("commit", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			dir := upper(b)
			b.StartTimer()
			id, err := s.CommitTree(b.Context(), dir)
			if err == nil {
				_, err = s.Index(b.Context(), id)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("pack", func(b *testing.B) {
		b.SetBytes(int64(benchFiles * len(benchContent)))
		for b.Loop() {
			b.StopTimer()
			id, err := s.CommitTree(b.Context(), upper(b))
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := s.Pack(b.Context(), id); err != nil {
				b.Fatal(err)
			}
		}
	})
}
