// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"context"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// cpuTime is what this process has used of processors: on a busy machine it says more than the clock.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func perCore(b *testing.B, bytes int64, run func()) {
	b.SetBytes(bytes)
	b.ResetTimer()
	began := cpuTime()
	for range b.N {
		run()
	}
	b.ReportMetric(float64(bytes)*float64(b.N)/1e6/(cpuTime()-began).Seconds(), "MB/cpu-s")
}

func BenchmarkCut(b *testing.B) {
	data := random(1, 16<<20)
	perCore(b, int64(len(data)), func() {
		for rest := data; len(rest) > 0; {
			rest = rest[cut(rest):]
		}
	})
}

// nowhere takes everything and has it.
type nowhere struct{ *memory }

func (nowhere) Put(_ context.Context, _ ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	r, err := open()
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// BenchmarkTree exports and restores the directory $SLIPWAY_BENCH_TREE, such as a part of Go's build cache.
func BenchmarkTree(b *testing.B) {
	dir := os.Getenv("SLIPWAY_BENCH_TREE")
	if dir == "" {
		b.Skip("SLIPWAY_BENCH_TREE names no directory")
	}
	place := newMemory()
	w := NewWriter(place)
	ref, stats, err := w.AddTree(b.Context(), dir, TreeOptions{})
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%+v, %d bytes of manifest", stats, ref.Manifest.Size)
	add := func(b *testing.B, writer func() *Writer) {
		perCore(b, stats.Bytes, func() {
			if _, _, err := writer().AddTree(b.Context(), dir, TreeOptions{}); err != nil {
				b.Fatal(err)
			}
		})
	}
	b.Run("new", func(b *testing.B) { add(b, func() *Writer { return NewWriter(nowhere{newMemory()}) }) })
	b.Run("known", func(b *testing.B) { add(b, func() *Writer { return w }) })
	b.Run("restore", func(b *testing.B) {
		perCore(b, stats.Bytes, func() {
			if _, err := Restore(b.Context(), place, ref, b.TempDir()); err != nil {
				b.Fatal(err)
			}
		})
	})
}
