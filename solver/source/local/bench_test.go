// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchFiles is small enough for a normal test machine; SLIPWAY_BENCH_CONTEXT names a directory to use instead.
const benchFiles = 20_000

func benchContext(b *testing.B, f *fixture) {
	b.Helper()
	if dir := os.Getenv("SLIPWAY_BENCH_CONTEXT"); dir != "" {
		f.dir = dir
		return
	}
	old := time.Now().Add(-time.Hour)
	for i := range benchFiles {
		f.write(fmt.Sprintf("d%03d/f%d", i/100, i), strings.Repeat("x", 1000))
		_ = os.Chtimes(filepath.Join(f.dir, fmt.Sprintf("d%03d/f%d", i/100, i)), old, old)
	}
	// The times of the last change cannot be set: let them grow old enough to be trusted.
	time.Sleep(racyMargin + 100*time.Millisecond)
}

// BenchmarkUnchanged is a context that has not changed since the last build.
func BenchmarkUnchanged(b *testing.B) {
	f := newFixture(b)
	benchContext(b, f)
	if _, err := f.run(nil, nil); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := f.run(nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOneChange is the same with another file every time.
func BenchmarkOneChange(b *testing.B) {
	f := newFixture(b)
	benchContext(b, f)
	if _, err := f.run(nil, nil); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.Remove(filepath.Join(f.dir, "changed")) })
	for i := 0; b.Loop(); i++ {
		f.write("changed", fmt.Sprint(i))
		if _, err := f.run(nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNew is a context that nobody has seen before.
func BenchmarkNew(b *testing.B) {
	f := newFixture(b)
	benchContext(b, f)
	for b.Loop() {
		f.make = New(Deps{Layers: f.layers})
		if _, err := f.run(nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWalk is the floor: getdents and fstatat of every name, with as many goroutines as the scan has, and nothing
// done with the answers.
func BenchmarkWalk(b *testing.B) {
	f := newFixture(b)
	benchContext(b, f)
	for b.Loop() {
		bareWalk(b, f.dir)
	}
}

func bareWalk(b *testing.B, dir string) int64 {
	var files atomic.Int64
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	var walk func(path string)
	walk = func(path string) {
		slots <- struct{}{}
		defer func() { <-slots }()
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			b.Error(err)
			return
		}
		defer unix.Close(fd)
		buf := make([]byte, 64<<10)
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil {
				b.Error(err)
			}
			if n <= 0 {
				return
			}
			_, _, names := unix.ParseDirent(buf[:n], -1, nil)
			for _, name := range names {
				var st unix.Stat_t
				if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					b.Error(err)
				}
				files.Add(1)
				if st.Mode&unix.S_IFMT == unix.S_IFDIR {
					wg.Go(func() { walk(path + "/" + name) })
				}
			}
		}
	}
	wg.Go(func() { walk(dir) })
	wg.Wait()
	return files.Load()
}
