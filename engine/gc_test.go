// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-68981b69/slipway/cache"
)

// fakeStore is a store of which only sizes are known.
type fakeStore struct {
	mu       sync.Mutex
	has      int64
	inUse    int64 // of that, what cannot be deleted
	runs     int
	duration time.Duration
}

func (f *fakeStore) prune(_ context.Context, policies []cache.Policy) (cache.Pruned, error) {
	f.mu.Lock()
	has := f.has // as the inventory finds it
	f.mu.Unlock()
	time.Sleep(f.duration) // fake time
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs++
	left := max(min(f.inUse, has), min(has, policies[0].MaxUsedSpace))
	f.has -= has - left
	return cache.Pruned{Left: left}, nil
}

func (f *fakeStore) collector(limit int64, log *slog.Logger) *collector {
	c := &collector{
		collect: f.prune, free: func() (cache.Disk, error) { return cache.Disk{Total: 1 << 40, Free: 1 << 39}, nil },
		busy: func() bool { return true }, policies: []cache.Policy{{MaxUsedSpace: limit}}, delay: time.Second, packDelay: time.Minute,
		pack: func(context.Context) error { return nil }, log: log, limit: limit,
		wanted: make(chan struct{}, 1), urgent: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	c.left.Store(-1)
	c.start()
	return c
}

// TestPackingWaitsForRoom: what packing writes may need a collection first, which it gets; and so does what a build writes
// meanwhile.
func TestPackingWaitsForRoom(t *testing.T) {
	const limit = 1000 << 20
	synctest.Test(t, func(t *testing.T) {
		f := &fakeStore{duration: 100 * time.Millisecond, has: limit}
		c := f.collector(limit, slog.New(slog.DiscardHandler))
		defer c.close()
		c.busy = func() bool { return false }
		took := make(chan time.Duration, 1)
		c.pack = func(context.Context) error {
			begun := time.Now()
			for range 3 {
				c.add(limit / 2)
			}
			took <- time.Since(begun)
			return nil
		}
		c.left.Store(limit)
		c.request()
		if d := <-took; d > 5*time.Second {
			t.Errorf("packing has waited for %v", d)
		}
	})
}

// TestWritersWait: at no time has the store more than its limit, however many write at once; and when nothing can be deleted,
// writers go on.
func TestWritersWait(t *testing.T) {
	const limit = 1000 << 20
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		f := &fakeStore{duration: 100 * time.Millisecond}
		c := f.collector(limit, slog.New(slog.NewTextHandler(&log, nil)))
		defer c.close()
		var most atomic.Int64
		var writers sync.WaitGroup
		for range 4 {
			writers.Go(func() {
				for range 50 {
					c.add(20 << 20)
					f.mu.Lock()
					f.has += 20 << 20
					most.Store(max(most.Load(), f.has))
					f.mu.Unlock()
					time.Sleep(time.Millisecond)
				}
			})
		}
		writers.Wait()
		if most.Load() > limit {
			t.Errorf("the store had %d MiB", most.Load()>>20)
		}
		if f.runs < 3 || f.runs > 150 {
			t.Errorf("%d collections for 4000 MiB", f.runs)
		}
		if log.Len() > 0 {
			t.Errorf("logged: %s", &log)
		}

		// Everything is in use now.
		f.mu.Lock()
		f.inUse = f.has
		runs := f.runs
		f.mu.Unlock()
		begun := time.Now()
		for range 50 {
			c.add(20 << 20)
			f.mu.Lock()
			f.has += 20 << 20
			f.inUse = f.has
			f.mu.Unlock()
		}
		if took := time.Since(begun); took > time.Second || f.runs == runs {
			t.Errorf("50 writes took %v and %d collections", took, f.runs-runs)
		}
		if !strings.Contains(log.String(), "exceeds its limit") {
			t.Errorf("logged: %q", &log)
		}
	})
}

// TestCapHoldsDuringBuild measures the cache during a build whose steps write more than the cap after another build has filled it.
func TestCapHoldsDuringBuild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root: mounts and containers")
	}
	const limit = 60e6
	te := openWith(t, Options{Root: t.TempDir(), GC: GC{Delay: time.Hour, Policies: []cache.Policy{{MaxUsedSpace: limit}}}})
	te.base()
	big := func(i int) request {
		return request{files: map[string]string{"Dockerfile": fmt.Sprintf("FROM base\nRUN head -c 25000000 /dev/urandom > /f && echo %d\n", i)}}
	}
	for i := range 4 {
		te.mustBuild(big(i))
		var sum int64
		for _, u := range te.usage() {
			if !u.Shared && u.RecordType != "internal" {
				sum += u.Size
			}
		}
		if sum > limit {
			t.Errorf("after build %d the cache takes %d bytes:\n%s", i, sum, table(te.usage()))
		}
	}
}

// TestPackWhenIdle: what a step has left becomes a tar when nobody builds, and its tree goes.
func TestPackWhenIdle(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root: mounts and containers")
	}
	te := openWith(t, Options{Root: t.TempDir(), GC: GC{Delay: time.Millisecond, PackDelay: 10 * time.Millisecond}})
	te.base()
	te.mustBuild(request{files: map[string]string{"Dockerfile": "FROM base\nRUN echo packed > /by-run\n"}})
	deadline := time.Now().Add(20 * time.Second)
	for {
		tars, _ := filepath.Glob(filepath.Join(te.root, "layers", "t*", "layer.tar"))
		trees, _ := filepath.Glob(filepath.Join(te.root, "layers", "t*", "tree"))
		if len(tars) > 1 && len(trees) == 0 { // base has one, too
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("tars %q, trees %q", tars, trees)
		}
		time.Sleep(20 * time.Millisecond)
	}
	out := te.mustBuild(request{files: map[string]string{"Dockerfile": "FROM base\nRUN echo packed > /by-run\nRUN cat /by-run\n"}})
	if _, ran := out.steps(); len(ran) != 1 {
		t.Errorf("ran %q", ran)
	}
}
