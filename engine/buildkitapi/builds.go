// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/frontend/gateway"
)

const (
	// refTimeout is how long Status and the gateway wait for the Solve of their build: clients send them side by side.
	refTimeout = 10 * time.Second
	// keptBuilds is how many builds can still be asked for their events after they have ended.
	keptBuilds = 16
)

// build is one Solve request by its client's ref.
type build struct {
	ref    string
	events *events
	// bridge is set before the build is registered, for builds whose frontend runs in the client.
	bridge *gateway.Bridge
	cancel context.CancelCauseFunc
}

// builds are the running builds and the last few that have ended.
type builds struct {
	mu      sync.Mutex // guards all
	byRef   map[string]*build
	running map[string]*build
	ended   []string // oldest first
	changed chan struct{}
}

func newBuilds() *builds {
	return &builds{byRef: map[string]*build{}, running: map[string]*build{}, changed: make(chan struct{})}
}

// add registers a build that begins.
func (bs *builds) add(b *build) error {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if _, ok := bs.byRef[b.ref]; ok {
		return status.Errorf(codes.AlreadyExists, "build %s exists already", b.ref)
	}
	bs.byRef[b.ref] = b
	bs.running[b.ref] = b
	close(bs.changed)
	bs.changed = make(chan struct{})
	return nil
}

// refuse lets those go on who wait for a build that will not begin: clients send Solve and Status side by side.
func (bs *builds) refuse(ref string) {
	b := &build{ref: ref, events: newEvents(), cancel: func(error) {}}
	if ref != "" && bs.add(b) == nil {
		bs.end(b)
	}
}

// end says that b has ended; its events stay for a while.
func (bs *builds) end(b *build) {
	b.events.end()
	bs.mu.Lock()
	defer bs.mu.Unlock()
	delete(bs.running, b.ref)
	bs.ended = append(bs.ended, b.ref)
	if len(bs.ended) > keptBuilds {
		delete(bs.byRef, bs.ended[0])
		bs.ended = bs.ended[1:]
	}
}

// find returns a build if it is known.
func (bs *builds) find(ref string) *build {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	return bs.byRef[ref]
}

// get returns a build, which may be about to begin.
func (bs *builds) get(ctx context.Context, ref string) (*build, error) {
	timeout := time.NewTimer(refTimeout)
	defer timeout.Stop()
	for {
		bs.mu.Lock()
		b, changed := bs.byRef[ref], bs.changed
		bs.mu.Unlock()
		if b != nil {
			return b, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-timeout.C:
			return nil, status.Errorf(codes.NotFound, "no such build: %s", ref)
		}
	}
}

// active is the number of running builds.
func (bs *builds) active() int {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	return len(bs.running)
}

// cancelAll ends all running builds.
func (bs *builds) cancelAll(cause error) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	for _, b := range bs.running {
		b.cancel(fmt.Errorf("build canceled: %w", cause))
	}
}
