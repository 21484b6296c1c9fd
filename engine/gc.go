// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/layer"
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
	// PackDelay is how long it is idle before it packs the trees that steps have left; 0 means DefaultPackDelay.
	PackDelay time.Duration
}

// DefaultGCDelay is long enough not to be in the way of somebody who builds again and again.
const DefaultGCDelay = time.Second

// trimDelay is how long the engine is idle before it gives the memory back that builds have needed.
const trimDelay = 5 * time.Second

// DefaultPackDelay is how long it takes until nobody is likely to come back to what they were building.
const DefaultPackDelay = time.Minute

const (
	// gcWait is how long a build waits at most for a collection that makes room for what it writes.
	gcWait = time.Minute
	// gcMargin is the part of the limit that such a collection frees beside what is asked for, so that the next write does
	// not need another one.
	gcMargin = 20
	// gcUnknown is how much may be written before anybody knows how large the cache is.
	gcUnknown = 64 << 20

	// gcPause is how many times as long as the last collection took nothing is collected after one that was of no use.
	gcPause = 20
	// gcInterval is how old the last collection must be for an engine that ends to make one first. It is for engines
	// that live as long as one command.
	gcInterval = time.Hour
)

// collector collects garbage when the engine has been idle for a moment, and while builds run when what they write
// would exceed a limit: the write waits for it then. When the engine has been idle for longer, it packs trees. One goroutine does
// all of it.
type collector struct {
	collect  func(context.Context, []cache.Policy) (cache.Pruned, error)
	pack     func(context.Context) error
	free     func() (cache.Disk, error)
	busy     func() bool
	policies []cache.Policy
	delay    time.Duration
	log      *slog.Logger

	packDelay time.Duration

	// limit and minFree are what builds may go up and down to before the engine is idle; 0 is none.
	limit, minFree int64
	// left is what the cache took after the last collection, -1 before the first; grown is what was added since.
	left, grown atomic.Int64
	// coming is the part of grown whose writers wait: it is not in the store yet.
	coming atomic.Int64
	// rest is the time, in nanoseconds, before which no write asks for another collection: the last one was of no use.
	rest atomic.Int64

	mu       sync.Mutex    // guards what follows
	turn     chan struct{} // closed after the collection that writers wait for; nil when none is asked for
	stopPack func()        // ends packing; nil when there is none

	wanted, urgent chan struct{}
	ctx            context.Context // of the loop
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

// newCollector starts a collector for a store; g has its policies. busy says whether anybody builds.
func newCollector(g GC, store *cache.Store, busy func() bool, log *slog.Logger) *collector {
	c := &collector{
		collect: store.Prune, free: store.Disk, busy: busy, log: log,
		policies: g.Policies, delay: cmp.Or(g.Delay, DefaultGCDelay), packDelay: cmp.Or(g.PackDelay, DefaultPackDelay),
		pack:   func(ctx context.Context) error { return packTrees(ctx, store.Layers) },
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
	c.start()
	return c
}

func (c *collector) start() {
	c.ctx, c.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(c.ended)
		c.loop(c.ctx)
	}()
}

// request asks for a collection when the engine is idle.
func (c *collector) request() { signal(c.wanted) }

// add notes that a layer or blob of that size is about to become visible. If it would exceed a limit, add returns after a
// collection has made room for it, or has found that it cannot.
func (c *collector) add(bytes int64) {
	grown := c.grown.Add(bytes)
	if !c.exceeds(grown) || time.Now().UnixNano() < c.rest.Load() {
		return
	}
	c.coming.Add(bytes)
	defer c.coming.Add(-bytes)
	c.mu.Lock()
	if c.turn == nil {
		c.turn = make(chan struct{})
		signal(c.urgent)
	}
	turn := c.turn
	c.mu.Unlock()
	if c.left.Load() < 0 && grown <= c.limit/2 && !c.full() {
		return // nobody knows how large the cache is, which is being found out, and this is not much
	}
	long := time.NewTimer(gcWait)
	defer long.Stop()
	select {
	case <-turn:
	case <-c.ctx.Done():
	case <-long.C:
		c.log.Warn("a build goes on though the cache may exceed its limit: making room takes too long")
	}
}

// exceeds says whether what was added since the last collection is too much.
func (c *collector) exceeds(grown int64) bool {
	left := c.left.Load()
	return c.limit > 0 && (left >= 0 && left+grown > c.limit || left < 0 && grown > min(c.limit, gcUnknown)) || c.full()
}

// full says that the disk has not as much room as it should: what is about to become visible is on it already.
func (c *collector) full() bool {
	if c.minFree == 0 {
		return false
	}
	disk, err := c.free()
	return err == nil && disk.Free < c.minFree
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *collector) loop(ctx context.Context) {
	idle, pack, trim := time.NewTimer(c.delay), time.NewTimer(c.packDelay), time.NewTimer(trimDelay)
	idle.Stop()
	pack.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wanted:
			c.pending = true
			idle.Reset(max(c.delay, time.Until(time.Unix(0, c.rest.Load()))))
			pack.Reset(c.packDelay)
			trim.Reset(trimDelay)
			continue
		case <-c.urgent:
			c.makeRoom(ctx)
			continue
		case <-pack.C:
			c.packIdle(ctx)
			continue
		case <-trim.C:
			if !c.busy() {
				debug.FreeOSMemory()
			}
			continue
		case <-idle.C:
			if c.busy() {
				continue // its end asks again
			}
		}
		c.run(ctx, c.policies)
	}
}

// makeRoom collects for writers that wait.
func (c *collector) makeRoom(ctx context.Context) {
	c.mu.Lock()
	turn := c.turn
	c.turn = nil
	c.mu.Unlock()
	defer close(turn)
	if !c.exceeds(c.grown.Load()) {
		return // the collection before this one has made enough room
	}
	coming := c.coming.Load()
	policies := slices.Clone(c.policies)
	for i, p := range policies {
		if p.MaxUsedSpace > 0 && len(p.Filters) == 0 {
			policies[i].MaxUsedSpace = max(1, p.MaxUsedSpace-coming-p.MaxUsedSpace/gcMargin)
		}
	}
	begun := time.Now()
	// Those who have come since have a turn of their own.
	if !c.run(ctx, policies) || !c.exceeds(coming) {
		return
	}
	c.rest.Store(time.Now().Add(gcPause * time.Since(begun)).UnixNano())
	c.log.Warn("the cache exceeds its limit, and what could be deleted is in use: builds go on", "limit", c.limit, "takes", c.left.Load(), "coming", coming)
}

// packIdle packs trees until there are none or somebody builds. Meanwhile it collects for writers, of whom packing is one.
func (c *collector) packIdle(life context.Context) {
	ctx, cancel := context.WithCancel(life)
	defer cancel()
	c.mu.Lock()
	c.stopPack = cancel
	c.mu.Unlock()
	// After stopPack is set: a build that begins now either is seen here or stops it.
	if c.busy() {
		return
	}
	begun := time.Now()
	packed := make(chan error, 1)
	go func() { packed <- c.pack(ctx) }()
	var err error
	for packing := true; packing; {
		select {
		case err = <-packed:
			packing = false
		case <-c.urgent: // what packing writes may have to wait for room, as what a build does
			c.makeRoom(life)
		}
	}
	if err != nil && ctx.Err() == nil {
		c.log.Warn("pack layers", "error", err)
	}
	c.log.Debug("packed layers while idle", "duration", time.Since(begun), "interrupted", ctx.Err() != nil)
}

// begin is called when a build does: packing stops.
func (c *collector) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopPack != nil {
		c.stopPack()
	}
}

// packTrees packs the layers that are trees, if their trees can go then.
func packTrees(ctx context.Context, layers *layer.Store) error {
	if !layers.Info().EROFS {
		return nil // the tree would stay
	}
	var trees []layer.ID
	if err := layers.Walk(ctx, func(info layer.Info) error {
		if info.Form == layer.FormTree && info.DiffID == "" {
			trees = append(trees, info.ID)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, id := range trees {
		if _, err := layers.Pack(ctx, id); err != nil && !errors.Is(err, layer.ErrNotFound) {
			return err
		}
	}
	return nil
}

// run makes one collection and reports whether it has.
func (c *collector) run(ctx context.Context, policies []cache.Policy) bool {
	begun := time.Now()
	coming := c.coming.Load() // before grown: what comes in between counts twice rather than never
	grown := c.grown.Load() - coming
	done, err := c.collect(ctx, policies)
	if err != nil {
		if ctx.Err() == nil {
			c.rest.Store(time.Now().Add(gcPause * time.Since(begun)).UnixNano())
			c.log.Warn("collect garbage", "error", err)
		}
		return false
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
	return true
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
