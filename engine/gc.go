// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/seed-68981b69/slipway/cache"
)

// GC says how the engine collects garbage by itself.
type GC struct {
	// Off switches it off; prune still works.
	Off bool
	// Policies are the rules; nil means those of Rules, or cache.DefaultPolicies for the disk of the state directory.
	Policies []cache.Policy
	// Rules makes the rules for a disk; it, or what it returns, may be nil.
	Rules func(cache.Disk) []cache.Policy
	// Delay is how long the engine is idle after a build before it collects; 0 means DefaultGCDelay.
	Delay time.Duration
}

// DefaultGCDelay is long enough not to be in the way of somebody who builds again and again.
const DefaultGCDelay = time.Second

const (
	// gcPause is how many times as long as the last collection took nothing is collected after it.
	gcPause = 20
	// gcInterval is how old the last collection must be for an engine that ends to make one first. It is for engines
	// that live as long as one command.
	gcInterval = time.Hour
)

// collector collects garbage when the engine has been idle for a moment, and while builds run when what they write
// would exceed a limit. One goroutine does all of it.
type collector struct {
	collect  func(context.Context, []cache.Policy) (cache.Pruned, error)
	free     func() (cache.Disk, error)
	busy     func() bool
	policies []cache.Policy
	delay    time.Duration
	log      *slog.Logger

	// limit and minFree are what builds may go up and down to before the engine is idle; 0 is none.
	limit, minFree int64
	// left is what the cache took after the last collection, -1 before the first; grown is what was added since.
	left, grown atomic.Int64
	// rest is the time, in nanoseconds, before which a full disk alone is no reason for another collection.
	rest atomic.Int64

	wanted, urgent chan struct{}
	cancel         context.CancelFunc
	ended          chan struct{}
	// pending says that what was asked for has not been done. It is the goroutine's until ended is closed.
	pending bool
}

// rules returns the policies for a store, none when collecting is off.
func (g GC) rules(store *cache.Store) ([]cache.Policy, error) {
	switch {
	case g.Off:
		return nil, nil
	case g.Policies != nil:
		return g.Policies, nil
	}
	disk, err := store.Disk()
	if err != nil {
		return nil, err
	}
	if g.Rules != nil {
		if rules := g.Rules(disk); rules != nil {
			return rules, nil
		}
	}
	return cache.DefaultPolicies(disk), nil
}

// newCollector starts a collector for a store. busy says whether anybody builds.
func newCollector(policies []cache.Policy, delay time.Duration, store *cache.Store, busy func() bool, log *slog.Logger) *collector {
	c := &collector{
		collect: store.Prune, free: store.Disk, busy: busy, policies: policies, delay: cmp.Or(delay, DefaultGCDelay), log: log,
		wanted: make(chan struct{}, 1), urgent: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	for _, p := range c.policies {
		if len(p.Filters) > 0 {
			continue
		}
		if p.MaxUsedSpace > 0 && (c.limit == 0 || p.MaxUsedSpace < c.limit) {
			c.limit = p.MaxUsedSpace
		}
		c.minFree = max(c.minFree, p.MinFreeSpace)
	}
	c.left.Store(-1)
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go func() {
		defer close(c.ended)
		c.loop(ctx)
	}()
	return c
}

// request asks for a collection when the engine is idle.
func (c *collector) request() { signal(c.wanted) }

// add notes that a layer or blob of that size is about to be written, and asks for a collection at once if it would
// exceed a limit.
func (c *collector) add(bytes int64) {
	grown := c.grown.Add(bytes)
	if time.Now().UnixNano() < c.rest.Load() {
		return
	}
	if left := c.left.Load(); c.limit > 0 && left >= 0 && left+grown > c.limit {
		signal(c.urgent)
		return
	}
	if c.minFree > 0 {
		if disk, err := c.free(); err == nil && disk.Free-bytes < c.minFree {
			signal(c.urgent)
		}
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *collector) loop(ctx context.Context) {
	idle := time.NewTimer(c.delay)
	idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wanted:
			c.pending = true
			idle.Reset(max(c.delay, time.Until(time.Unix(0, c.rest.Load()))))
			continue
		case <-c.urgent:
			c.log.Debug("a build is about to exceed a limit of the cache")
		case <-idle.C:
			if c.busy() {
				continue // its end asks again
			}
		}
		c.run(ctx)
	}
}

// run makes one collection.
func (c *collector) run(ctx context.Context) {
	begun := time.Now()
	grown := c.grown.Load()
	done, err := c.collect(ctx, c.policies)
	c.rest.Store(time.Now().Add(gcPause * time.Since(begun)).UnixNano())
	if err != nil {
		if ctx.Err() == nil {
			c.log.Warn("collect garbage", "error", err)
		}
		return
	}
	c.pending = false
	c.left.Store(done.Left)
	c.grown.Add(-grown)
	for _, d := range done.Deleted {
		c.log.Debug("collected", "id", d.ID, "what", d.Description, "bytes", d.Freed, "reason", d.Reason)
	}
	if len(done.Deleted) > 0 || done.Bytes > 0 {
		c.log.Info("collected garbage", "things", len(done.Deleted), "bytes", done.Bytes, "left", done.Left, "duration", time.Since(begun))
	}
}

// close stops collecting. It reports whether something was asked for and not done.
func (c *collector) close() (pending bool) {
	c.cancel()
	<-c.ended
	select {
	case <-c.wanted:
		return true
	default:
		return c.pending
	}
}

// Under this key the store has when an engine that ended has collected garbage last, in seconds since 1970.
const gcBucket, gcKey = "engine", "last-collection"

// collectBeforeEnd collects garbage if that has not been done for long: the engines of single commands are never idle.
func (e *Engine) collectBeforeEnd() error {
	now := time.Now()
	if b, ok, err := e.store.Records.GetValue(gcBucket, gcKey); err != nil {
		return err
	} else if ok {
		last, err := strconv.ParseInt(string(b), 10, 64)
		if err == nil && now.Sub(time.Unix(last, 0)) < gcInterval && now.Unix() >= last {
			return nil
		}
	}
	if _, err := e.store.Prune(context.Background(), e.gc.policies); err != nil {
		return err
	}
	return e.store.Records.PutValue(gcBucket, gcKey, strconv.AppendInt(nil, now.Unix(), 10))
}
