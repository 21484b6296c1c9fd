// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"log/slog"
	"maps"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// Lease is held by whoever makes or uses layers and blobs that no image or record may name yet: a build, a pull, a
// push, the start of a container. As long as there is one, nothing is deleted. Its methods may be called
// concurrently.
type Lease struct {
	// ID says who holds the lease; it need not be unique.
	ID string

	s  *Store
	mu sync.Mutex // guards what follows

	layers map[layer.ID]bool
	blobs  map[digest.Digest]bool
}

// Lease makes a lease. It waits for a sweep that is deleting. Leases end with the process.
func (s *Store) Lease(id string) *Lease {
	l := &Lease{ID: id, s: s, layers: map[layer.ID]bool{}, blobs: map[digest.Digest]bool{}}
	s.sweeping.RLock()
	defer s.sweeping.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases[l] = true
	return l
}

// Add notes layers that the holder uses.
func (l *Lease) Add(ids ...layer.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		l.layers[id] = true
	}
}

// AddBlobs notes blobs that the holder uses.
func (l *Lease) AddBlobs(ds ...digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range ds {
		l.blobs[d] = true
	}
}

// Release ends the lease; a second Release does nothing. The last lease of all begins the sweep, in the background,
// that was put off meanwhile.
func (l *Lease) Release() {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.leases[l] {
		return
	}
	delete(s.leases, l)
	if len(s.leases) > 0 || !s.sweepDue || s.closed {
		return
	}
	s.sweeps.Go(func() {
		if _, err := s.Sweep(context.Background()); err != nil {
			slog.Warn("sweep of the store", "error", err)
		}
	})
}

// addRoots adds what l holds to r.
func (l *Lease) addRoots(r *roots) {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.Copy(r.layers, l.layers)
	maps.Copy(r.blobs, l.blobs)
}
