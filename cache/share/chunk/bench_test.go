// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"bytes"
	"context"
	"fmt"
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

// BenchmarkLargeLayer exports a layer of 500 MB, and again with one line changed in a file of it and every header's time: it reports what is sent the first and the second time, and
// compares the tar that comes out, byte for byte.
func BenchmarkLargeLayer(b *testing.B) {
	const files, each = 50, 10 << 20
	var content [files][]byte
	for i := range content {
		content[i] = random(uint64(i), each)
		for j := range content[i] { // text: two bits of eight, in lines
			if content[i][j] = 'a' + content[i][j]%4; j%80 == 79 {
				content[i][j] = '\n'
			}
		}
	}
	make := func(at int64) ([]byte, []Range) {
		return makeTar(b, files, time.Unix(at, 0), func(i int) (string, []byte) { return fmt.Sprintf("f%d", i), content[i] })
	}
	place := newMemory()
	w := NewWriter(place)
	add := func(tar []byte, ranges []Range) (Ref, Stats) {
		ref, stats, err := w.AddTar(b.Context(), bytes.NewReader(tar), int64(len(tar)), ranges)
		if err != nil {
			b.Fatal(err)
		}
		return ref, stats
	}
	for range b.N {
		_, first := add(make(1))
		copy(content[17][4<<20:], "one line is another one now")
		changed, ranges := make(2)
		ref, second := add(changed, ranges)
		r, err := OpenTar(b.Context(), place, ref, int64(len(changed)))
		if err != nil {
			b.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, changed) {
			b.Fatalf("another tar came out: %d bytes, %v", len(got), err)
		}
		r.Close()
		b.ReportMetric(float64(first.Sent)/1e6, "MB-first")
		b.ReportMetric(float64(second.Sent)/1e6, "MB-second")
	}
}
