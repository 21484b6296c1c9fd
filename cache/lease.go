// SPDX-License-Identifier: Apache-2.0

package cache

// How builds and collections go on at the same time.
//
// A lease keeps everything that is touched or made while it is held, by whomever: there is one clock, every lease has
// the time at which it was made, and every layer, blob and record the time at which it was used last. What was used
// since the oldest lease was made stays. So nobody has to say what they use, and nothing can be forgotten.
//
// The order that makes it safe: a hit is the record first, then each of its layers; looking for a layer notes its use
// before it looks; a collection deletes a layer only if no use is noted, in the same critical section of the layer store in
// which the layer vanishes (layer.Store.DeleteUnused, blob.Store.DeleteIf). A build that comes too late finds a layer
// missing, which is a miss. A collection counts as a lease as well, from before it takes its inventory: what a build
// used and named meanwhile stays, even if that build has ended.

import (
	"context"
	"log/slog"
	"maps"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// Lease is held by whoever makes or uses layers and blobs that no image or record may name yet: a build, a pull, a
// push. What is used while it is held is not deleted before it is released. Its methods may be called concurrently.
type Lease struct {
	// ID says who holds the lease; it need not be unique.
	ID string

	s *Store
}

// Lease makes a lease. It never waits. Leases end with the process.
func (s *Store) Lease(id string) *Lease {
	l := &Lease{ID: id, s: s}
	s.uses.begin(l)
	return l
}

// Add notes layers that the holder uses, beside those that it looks for or makes.
func (l *Lease) Add(ids ...layer.ID) {
	for _, id := range ids {
		l.s.uses.noteLayer(id)
	}
}

// AddBlobs notes blobs that the holder uses, beside those that it looks for or makes.
func (l *Lease) AddBlobs(ds ...digest.Digest) {
	for _, d := range ds {
		l.s.uses.noteBlob(d)
	}
}

// Release ends the lease; a second Release does nothing. The last lease of all begins a sweep, in the background, if
// an earlier one has left something because of a lease.
func (l *Lease) Release() {
	s := l.s
	if !s.uses.end(l) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.sweepDue || s.closed || s.uses.leases() > 0 {
		return
	}
	s.sweep()
}

// SweepSoon sweeps, in the background, what was made and could not be recorded: at once, or, while anybody holds a lease, at
// the release of the last one.
func (s *Store) SweepSoon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if s.uses.leases() > 0 {
		s.sweepDue = true
		return
	}
	s.sweep()
}

// sweep sweeps in the background. mu is held.
func (s *Store) sweep() {
	s.sweepDue = false
	s.sweeps.Go(func() {
		if _, err := s.Sweep(context.Background()); err != nil {
			slog.Warn("sweep of the store", "error", err)
		}
	})
}

// holdBlob says that a blob must stay although its image was removed: somebody may be about to name it again.
func (s *Store) holdBlob(digest.Digest) bool {
	if s.uses.leases() == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepDue = true
	return true
}

// uses are when what was used last, as far as anybody wants to know.
type uses struct {
	mu    sync.Mutex // guards what follows
	clock uint64
	// begins has the leases and collections there are now.
	begins  map[any]uint64
	held    int // leases among them
	layers  map[layer.ID]uint64
	blobs   map[digest.Digest]uint64
	records map[string]uint64
}

func newUses() *uses {
	return &uses{
		begins: map[any]uint64{}, layers: map[layer.ID]uint64{}, blobs: map[digest.Digest]uint64{}, records: map[string]uint64{},
	}
}

// begin registers a lease.
func (u *uses) begin(l *Lease) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.clock++
	u.held++
	u.begins[l] = u.clock
}

// beginSweep registers a collection and returns its horizon: what is used since is not to be deleted. It lies before
// every lease that there is, so that what those keep is still kept when they end while the collection is at work.
func (u *uses) beginSweep(who any) uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.clock++
	u.begins[who] = u.oldest()
	return u.begins[who]
}

// end takes a lease or a collection out and reports whether it was there.
func (u *uses) end(who any) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.begins[who]; !ok {
		return false
	}
	delete(u.begins, who)
	if _, ok := who.(*Lease); ok {
		u.held--
	}
	switch oldest := u.oldest(); {
	case len(u.begins) == 0:
		u.layers, u.blobs, u.records = map[layer.ID]uint64{}, map[digest.Digest]uint64{}, map[string]uint64{}
	case len(u.layers)+len(u.blobs)+len(u.records) > 1<<14: // builds that overlap without end must not fill the memory
		maps.DeleteFunc(u.layers, func(_ layer.ID, at uint64) bool { return at < oldest })
		maps.DeleteFunc(u.blobs, func(_ digest.Digest, at uint64) bool { return at < oldest })
		maps.DeleteFunc(u.records, func(_ string, at uint64) bool { return at < oldest })
	}
	return true
}

// oldest is when the oldest lease or collection began; now when there is none. mu is held.
func (u *uses) oldest() uint64 {
	oldest := u.clock
	if len(u.begins) == 0 {
		return oldest
	}
	for _, at := range u.begins {
		oldest = min(oldest, at)
	}
	return oldest
}

// horizon is the time since which what is used is not to be deleted.
func (u *uses) horizon() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.oldest()
}

// leases is the number of leases.
func (u *uses) leases() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.held
}

func (u *uses) noteLayer(id layer.ID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.begins) > 0 {
		u.layers[id] = u.clock
	}
}

func (u *uses) noteBlob(d digest.Digest) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.begins) > 0 {
		u.blobs[d] = u.clock
	}
}

func (u *uses) noteRecord(key string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.begins) > 0 {
		u.records[key] = u.clock
	}
}

// layer, blob and record say whether something was used since horizon.

func (u *uses) layer(id layer.ID, horizon uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	at, ok := u.layers[id]
	return ok && at >= horizon
}

func (u *uses) blob(d digest.Digest, horizon uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	at, ok := u.blobs[d]
	return ok && at >= horizon
}

func (u *uses) record(key string, horizon uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	at, ok := u.records[key]
	return ok && at >= horizon
}
