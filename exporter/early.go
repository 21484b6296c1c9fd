// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"log/slog"
	"runtime"
	"sync"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Eager is an Exporter that can begin before the build has ended.
type Eager interface {
	Exporter
	// Begin returns what prepares the export of a result without snapshots yet, nil when there is nothing to prepare. What it
	// does Export would do too, and finds done.
	Begin(ctx context.Context, r Result, opts Options) (*Early, error)
}

// Early does what an export needs of single layers, as they are made. Its methods may be called concurrently.
type Early struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	prepare Prepare
	slots   chan struct{}
	group   sync.WaitGroup

	mu   sync.Mutex // guards seen
	seen map[earlyLayer]bool
}

type earlyLayer struct {
	ref string
	id  layer.ID
}

// Prepare works on the i-th layer of snap, which the result of a platform will have. An error is no failure of the export, which
// will try again and say what is wrong.
type Prepare func(ctx context.Context, ref Ref, snap snapshot.Snapshot, i int) error

// NewEarly returns an Early that calls prepare once for each layer of each platform, several at once. ctx is the build's.
func NewEarly(ctx context.Context, prepare Prepare) *Early {
	e := &Early{prepare: prepare, slots: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))), seen: map[earlyLayer]bool{}}
	e.ctx, e.cancel = context.WithCancelCause(ctx)
	return e
}

// Made says that all layers of snap, lowest first, are going to be in the result of ref. It does not wait.
func (e *Early) Made(ref Ref, snap snapshot.Snapshot) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, id := range snap {
		key := earlyLayer{ref.ID, id}
		if e.seen[key] {
			continue
		}
		e.seen[key] = true
		e.group.Go(func() {
			select {
			case e.slots <- struct{}{}:
				defer func() { <-e.slots }()
			case <-e.ctx.Done():
				return
			}
			if err := e.prepare(e.ctx, ref, snap, i); err != nil && e.ctx.Err() == nil {
				slog.Debug("prepare the export of a layer", "layer", id, "error", err)
			}
		})
	}
}

// Wait returns when everything has been done that was begun. After Made has been called for the last time.
func (e *Early) Wait() { e.group.Wait() }

// Stop gives up what is being done and waits for its end.
func (e *Early) Stop(cause error) {
	e.cancel(cause)
	e.group.Wait()
}
