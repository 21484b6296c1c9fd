// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// blobBuckets of the record database have values that are worth nothing without the blob that they name: packed forms,
// and what was downloaded with what the server said about it.
var blobBuckets = []string{packedBucket, "http"}

// derivedBucket of the record database has the layer that was made of others, by which and how (exporter/reshape).
const derivedBucket = "derived-layers"

// boundedBuckets of the record database have facts about what was built, which nothing else ever deletes, and how many of
// them are kept: those that were noted last.
var boundedBuckets = map[string]int{"solver.costs": 1 << 14, "solver.chains": 1 << 12}

// compactAfter is how many deleted records make the database worth compacting.
const compactAfter = 500

// Swept is what a sweep deleted, sorted.
type Swept struct {
	Layers []layer.ID
	Blobs  []digest.Digest
	// Bytes is what they occupied.
	Bytes int64
	// PutOff says that something which nothing names stays because it is in use, perhaps by who holds a lease: the release
	// of the last one will begin another sweep.
	PutOff bool
}

// Pruned is what Prune has done.
type Pruned struct {
	// Deleted are the things that the policies deleted, in that order.
	Deleted []Deletion
	Swept
	// Left is what the cache still takes, in bytes, without what images share.
	Left int64
}

// Sweep deletes the layers and blobs that no image, no record and no mount names, and that nobody has used since the
// oldest lease was made.
func (s *Store) Sweep(ctx context.Context) (Swept, error) {
	p, err := s.Prune(ctx, nil)
	return p.Swept, err
}

// Prune deletes what policies say, in their order, and what nothing names any more. What is in use stays, and so do
// images: a result can go though an image has the same layers, but these stay. One Prune or Sweep is at work at a
// time. After an error a part is deleted; the next Prune does the rest.
func (s *Store) Prune(ctx context.Context, policies []Policy) (Pruned, error) {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	begun := time.Now()
	sweep := new(int)
	s.mu.Lock()
	s.sweepDue = false
	s.mu.Unlock()
	horizon := s.uses.beginSweep(sweep)
	defer s.uses.end(sweep)

	// A damaged database seems to name less than it does.
	if err := s.Records.Intact(); err != nil {
		return Pruned{}, fmt.Errorf("prune store: %w: 'slipway cache fsck --repair' begins a new one", err)
	}
	inv, err := s.takeInventory(ctx, horizon)
	if err != nil {
		return Pruned{}, fmt.Errorf("prune store: %w", err)
	}
	disk, err := s.Disk()
	if err != nil {
		return Pruned{}, fmt.Errorf("prune store: %w", err)
	}
	plan, err := makePlan(inv, policies, s.now(), disk.Free)
	if err != nil {
		return Pruned{}, fmt.Errorf("prune store: %w", err)
	}
	putOff := plan.kept && s.uses.leases() > 0
	if putOff {
		s.mu.Lock()
		s.sweepDue = true
		s.mu.Unlock()
	}
	done, err := s.carryOut(ctx, inv, plan, horizon)
	done.PutOff = putOff
	if err != nil {
		return done, fmt.Errorf("prune store: %w", err)
	}
	slog.Debug("pruned the store", "things", len(done.Deleted), "layers", len(done.Layers), "blobs", len(done.Blobs),
		"bytes", done.Bytes, "left", done.Left, "duration", time.Since(begun))
	return done, nil
}

// carryOut deletes what plan says: names before what they name, so that a crash in between leaves layers without a record,
// for the next sweep, and never a record without layers.
func (s *Store) carryOut(ctx context.Context, inv *inventory, plan plan, horizon uint64) (Pruned, error) {
	done := Pruned{Swept: Swept{Bytes: plan.bytes}, Left: plan.left}
	var keys []string
	var errs []error
	for n, i := range plan.units {
		u, ok := &inv.units[i], true
		if u.failed {
			var err error
			ok, err = s.removeFailed(u.ID)
			errs = append(errs, err)
		} else if len(u.keys) == 0 {
			var err error
			ok, err = s.sources[u.source].Remove(ctx, u.ID)
			errs = append(errs, err)
		} else if ok = !slices.ContainsFunc(u.keys, func(key string) bool { return s.uses.record(key, horizon) }); ok {
			keys = append(keys, u.keys...)
		}
		if ok {
			done.Deleted = append(done.Deleted, plan.deletions[n])
		}
	}
	if len(keys) > 0 {
		if err := s.Records.Delete(ctx, keys...); err != nil {
			return done, errors.Join(append(errs, err)...)
		}
	}
	for _, d := range plan.blobs {
		ok, err := s.Blobs.DeleteIf(d, func() bool { return !s.uses.blob(d, horizon) })
		errs = append(errs, err)
		if ok {
			done.Blobs = append(done.Blobs, d)
		}
	}
	var err error
	done.Layers, err = s.Layers.DeleteUnused(ctx, plan.layers, func(id layer.ID) bool {
		return !s.uses.layer(id, horizon) && !s.Snapshots.Mounted(id)
	})
	errs = append(errs, err)
	_, err = s.Layers.RemoveBroken(ctx) // what can never be found again
	errs = append(errs, err, s.forget(done.Layers))
	if len(keys) >= compactAfter {
		s.compact()
	}
	return done, errors.Join(errs...)
}

// forget drops the facts about what is gone: deleted now, or before a crash that came before forget.
func (s *Store) forget(layers []layer.ID) error {
	for bucket, keep := range boundedBuckets {
		if err := s.Records.TrimValues(bucket, keep); err != nil {
			return err
		}
	}
	for _, bucket := range blobBuckets {
		err := s.Records.DropValues(bucket, func(value []byte) bool {
			return slices.ContainsFunc(findDigests(value), func(d digest.Digest) bool {
				_, err := os.Lstat(filepath.Join(s.Blobs.Dir(), "blobs", string(d.Algorithm()), d.Encoded()))
				return errors.Is(err, os.ErrNotExist)
			})
		})
		if err != nil {
			return err
		}
	}
	if len(layers) == 0 {
		return nil
	}
	err := s.Records.DropValues(derivedBucket, func(value []byte) bool { return !s.Layers.Exists(layer.ID(value)) })
	if err != nil {
		return err
	}
	return s.Records.DropValues(image.LayersBucket, func(value []byte) bool {
		var snap snapshot.Snapshot
		return json.Unmarshal(value, &snap) != nil || slices.ContainsFunc(snap, func(id layer.ID) bool { return !s.Layers.Exists(id) })
	})
}

// compact gives back the database's room in the background.
func (s *Store) compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.sweeps.Go(func() {
		if err := s.Records.Compact(context.Background()); err != nil {
			slog.Warn("compact the record database", "error", err)
		}
	})
}

// unnamed lists what a sweep would delete now, sorted.
func (s *Store) unnamed(ctx context.Context) ([]layer.ID, []digest.Digest, error) {
	inv, err := s.takeInventory(ctx, s.uses.horizon())
	if err != nil {
		return nil, nil, err
	}
	plan, err := makePlan(inv, nil, s.now(), 0)
	return plan.layers, plan.blobs, err
}
