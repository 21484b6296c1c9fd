// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// How much memory a container has needed is what admission to the next build goes by, so it must not be what the kernel
// counts as its peak: that has the page cache in it, which costs a step that copies files nothing when it is taken away. The
// kernel keeps no peak of the rest, so the rest is looked at while the container runs, and what is certain is added at
// the end: the peak of everything, less the most page cache that was seen.

const (
	// firstSample is late enough that short steps are not looked at, sampleEvery seldom enough to cost 0.2 % of a processor.
	firstSample = 50 * time.Millisecond
	sampleEvery = 100 * time.Millisecond
	// smallPeak is a peak, in bytes, that nobody needs to know more exactly.
	smallPeak = 64 << 20
)

// memoryWatch looks at the memory of one container until end is called.
type memoryWatch struct {
	dir      string // of the memory controller, "" when there is none
	stop     chan struct{}
	sampling sync.WaitGroup
	// What follows belongs to the goroutine until it has ended.
	needed int64 // most bytes that were not page cache
	cache  int64 // most bytes that were
}

// watchMemory begins to watch the container whose cgroup directories are paths, by controller ("" on cgroup v2).
func watchMemory(paths map[string]string) *memoryWatch {
	w := &memoryWatch{dir: paths["memory"], stop: make(chan struct{})}
	if unified, ok := paths[""]; ok && len(paths) == 1 {
		w.dir = unified
	}
	if w.dir != "" {
		w.sampling.Go(w.run)
	}
	return w
}

func (w *memoryWatch) run() {
	timer := time.NewTimer(firstSample)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			w.sample()
			timer.Reset(sampleEvery)
		case <-w.stop:
			return
		}
	}
}

func (w *memoryWatch) sample() {
	b, err := os.ReadFile(filepath.Join(w.dir, "memory.stat"))
	if err != nil {
		return
	}
	needed, cache := memoryStat(string(b))
	w.needed, w.cache = max(w.needed, needed), max(w.cache, cache)
}

// end stops watching and returns the most bytes that were needed at once, given the kernel's peak of everything. Call it
// before the cgroup is removed.
func (w *memoryWatch) end(peak int64) int64 {
	close(w.stop)
	w.sampling.Wait()
	if w.dir == "" || peak <= smallPeak {
		return peak
	}
	w.sample()
	return min(peak, max(w.needed, peak-w.cache))
}

// memoryStat reads what a memory.stat of either version says of a cgroup and those below it: the bytes that are needed, and
// those that the kernel can take away without harm. Files on tmpfs are needed.
func memoryStat(text string) (needed, cache int64) {
	values := map[string]int64{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			values[key], _ = strconv.ParseInt(value, 10, 64)
		}
	}
	if _, v1 := values["total_rss"]; v1 {
		shmem := values["total_shmem"]
		return values["total_rss"] + shmem + values["total_swap"], values["total_cache"] - shmem
	}
	return values["anon"] + values["shmem"], values["file"] - values["shmem"] + values["slab_reclaimable"]
}
