// SPDX-License-Identifier: Apache-2.0

package solver

// Results that other machines have made. A build may ask imported caches for records that its own cache does not have; their layers
// are then known to the layer store, but their bytes are elsewhere, until something reads them. If they cannot be had then, the
// layers are forgotten, and with them every record that names one: what made them runs.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Imports are the caches that a build may use besides its own. Its methods may be called concurrently.
type Imports interface {
	// Get returns the record of key, whose layers are known to the layer store then. What cannot be had is a miss.
	Get(ctx context.Context, key string) (*record.Record, bool)
}

// RemoteLayers are Layers that may have their bytes elsewhere. layer.Store implements it.
type RemoteLayers interface {
	Layers
	// Forget removes a layer whose bytes are elsewhere.
	Forget(ctx context.Context, id layer.ID) error
}

// Key is the key of a record of that kind with these parts, "" for kinds that there are not.
func Key(kind string, parts []record.Part) string {
	switch kind {
	case record.KindRecipe:
		return string(recipeKey(parts))
	case record.KindContent:
		return string(contentKey(parts))
	}
	return ""
}

// lookup is Solver.lookup, and what the build's imports have. What is found there is put into the solver's own records.
func (b *Build) lookup(ctx context.Context, key string, outputs int) (*record.Record, bool) {
	s := b.solver
	if rec, ok := s.lookup(ctx, key, outputs); ok && !b.names(rec) {
		return rec, true
	}
	if b.imports == nil {
		return nil, false
	}
	rec, ok := b.imports.Get(ctx, key)
	if !ok || len(rec.Outputs) != outputs || b.names(rec) {
		return nil, false
	}
	// If it cannot be written, the next build asks again.
	_ = s.records.PutBatch(context.WithoutCancel(ctx), []record.Item{{Record: rec, Keys: []string{key}}})
	return rec, true
}

// Lookup returns the record of key, of the cache or an import.
func (b *Build) Lookup(ctx context.Context, key string, outputs int) (*record.Record, bool) {
	return b.lookup(ctx, key, outputs)
}

// names reports whether rec names a layer that could not be fetched.
func (b *Build) names(rec *record.Record) bool {
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	return len(b.lost) > 0 && slices.ContainsFunc(rec.Outputs, b.isLost)
}

// isLost reports whether snap has a layer that could not be fetched. Solver.mu is held.
func (b *Build) isLost(snap snapshot.Snapshot) bool {
	return slices.ContainsFunc(snap, func(id layer.ID) bool { return b.lost[id] })
}

// unfetched reports whether err is about layers whose bytes could not be had.
func unfetched(err error) bool {
	return errors.Is(err, layer.ErrUnavailable) || errors.Is(err, layer.ErrFalseIndex)
}

// forgetInputs is for the error of an evaluation. If vertices failed because what they read could not be fetched, it forgets that, and
// reports that it makes sense to evaluate again.
func (b *Build) forgetInputs(ctx context.Context, err error) bool {
	if !unfetched(err) {
		return false
	}
	var snaps []snapshot.Snapshot
	var vertices []*Vertex
	b.solver.mu.Lock()
	for _, failure := range failuresOf(err) {
		if !unfetched(failure.Err) {
			b.solver.mu.Unlock()
			return false
		}
		vertices = append(vertices, failure.Vertex)
		for _, in := range failure.Vertex.Inputs {
			if m := b.made[in.Vertex.Digest]; in.Index < len(m.outputs) {
				snaps = append(snaps, m.outputs[in.Index])
			}
		}
	}
	b.solver.mu.Unlock()
	if !b.ForgetLost(ctx, snaps...) {
		return false
	}
	for _, v := range vertices {
		b.display.warn(v, fmt.Sprintf("what this step reads was in an imported cache and cannot be fetched, it is made again: %v", err))
	}
	return true
}

// ForgetLost tries to fetch the layers of snaps whose bytes are elsewhere. Those that cannot be had are forgotten, with the results of this
// build that have them; it reports whether there were any. What a failed export needs can then be evaluated again.
func (b *Build) ForgetLost(ctx context.Context, snaps ...snapshot.Snapshot) bool {
	s := b.solver
	layers, ok := s.layers.(RemoteLayers)
	if !ok {
		return false
	}
	ids := slices.Concat(snaps...)
	slices.Sort(ids)
	var lost []layer.ID
	for _, id := range slices.Compact(ids) {
		err := layers.Materialise(ctx, id)
		if ctx.Err() != nil {
			return false
		}
		if err == nil || !unfetched(err) && !errors.Is(err, layer.ErrNotFound) {
			continue
		}
		if layers.Forget(ctx, id) == nil {
			lost = append(lost, id)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range lost {
		b.lost[id] = true
	}
	maps.DeleteFunc(b.made, func(_ digest.Digest, m made) bool { return slices.ContainsFunc(m.outputs, b.isLost) })
	return len(lost) > 0
}
