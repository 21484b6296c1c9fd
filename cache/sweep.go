// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// packedBucket of the record database has, for a layer's diff ID and a compression, the blob that is its packed form.
const packedBucket = "blobs"

// roots is what something alive names: images, records, leases, mounts.
type roots struct {
	layers map[layer.ID]bool
	blobs  map[digest.Digest]bool
}

// packed is one entry of packedBucket.
type packed struct {
	key           string
	diffIDs, blob []digest.Digest
}

// inventory is everything that a sweep looks at.
type inventory struct {
	layers []layer.Info
	blobs  map[digest.Digest]int64 // size in bytes
	packed []packed
	named  roots
}

// Swept is what a sweep deleted, sorted.
type Swept struct {
	Layers []layer.ID
	Blobs  []digest.Digest
	// Bytes is what they occupied.
	Bytes int64
	// PutOff says that nothing was deleted because somebody holds a lease; the release of the last one will begin the
	// sweep.
	PutOff bool
}

// planSweep says what nothing names: every layer that is not named; every blob that is neither named nor a packed
// form of a layer that stays.
func planSweep(inv inventory) Swept {
	var plan Swept
	stays := maps.Clone(inv.named.blobs)
	if stays == nil {
		stays = map[digest.Digest]bool{}
	}
	kept := map[digest.Digest]bool{} // diff IDs
	for _, l := range inv.layers {
		if !inv.named.layers[l.ID] {
			plan.Layers = append(plan.Layers, l.ID)
			plan.Bytes += l.Size
			continue
		}
		if l.DiffID != "" {
			kept[l.DiffID] = true
			stays[l.DiffID] = true // its tar, as a blob
		}
	}
	for _, p := range inv.packed {
		if slices.ContainsFunc(p.diffIDs, func(d digest.Digest) bool { return kept[d] }) {
			for _, d := range p.blob {
				stays[d] = true
			}
		}
	}
	for d, size := range inv.blobs {
		if !stays[d] {
			plan.Blobs = append(plan.Blobs, d)
			plan.Bytes += size
		}
	}
	slices.Sort(plan.Layers)
	slices.SortFunc(plan.Blobs, func(a, b digest.Digest) int { return cmp.Compare(a, b) })
	return plan
}

// Sweep deletes the layers and blobs that no image, no record and no mount names. While anybody holds a lease it
// deletes nothing and says so.
func (s *Store) Sweep(ctx context.Context) (Swept, error) {
	s.sweeping.Lock() // no new leases from here on
	defer s.sweeping.Unlock()
	s.mu.Lock()
	s.sweepDue = len(s.leases) > 0
	due := s.sweepDue
	s.mu.Unlock()
	if due {
		return Swept{PutOff: true}, nil
	}
	inv, err := s.takeInventory(ctx)
	if err != nil {
		return Swept{}, fmt.Errorf("sweep store: %w", err)
	}
	plan := planSweep(inv)
	var errs []error
	for _, d := range plan.Blobs {
		errs = append(errs, s.Blobs.Delete(d))
	}
	for _, id := range plan.Layers {
		errs = append(errs, s.Layers.Delete(ctx, id))
	}
	if err := s.forget(plan, inv); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return plan, fmt.Errorf("sweep store: %w", err)
	}
	slog.Debug("swept the store", "layers", len(plan.Layers), "blobs", len(plan.Blobs), "bytes", plan.Bytes)
	return plan, nil
}

// takeInventory reads what there is and what is named.
func (s *Store) takeInventory(ctx context.Context) (inventory, error) {
	inv := inventory{
		blobs: map[digest.Digest]int64{},
		named: roots{layers: s.Snapshots.InUse(), blobs: s.Images.Digests()},
	}
	nameLayers := func(snap snapshot.Snapshot) {
		for _, id := range snap {
			inv.named.layers[id] = true
		}
	}
	for l := range s.leases { // empty today: Sweep does nothing while there are any
		l.addRoots(&inv.named)
	}
	images, err := s.Images.List(ctx)
	if err != nil {
		return inv, err
	}
	for _, m := range images {
		for _, man := range m.Manifests {
			snap, _, err := s.Images.Layers(ctx, man.Target.Digest)
			if err != nil {
				return inv, err
			}
			nameLayers(snap)
			for _, d := range s.manifestLayers(man.Target.Digest) {
				inv.named.blobs[d] = true
			}
		}
	}
	err = s.Records.Walk(ctx, func(_ string, rec *record.Record) error {
		for _, snap := range rec.Outputs {
			nameLayers(snap)
		}
		if rec.Log != "" {
			inv.named.blobs[rec.Log] = true
		}
		return nil
	})
	if err != nil {
		return inv, err
	}
	err = s.Records.WalkValues(packedBucket, func(key string, value []byte) error {
		inv.packed = append(inv.packed, packed{key: key, diffIDs: findDigests([]byte(key)), blob: findDigests(value)})
		return nil
	})
	if err != nil {
		return inv, err
	}
	err = s.Layers.Walk(ctx, func(info layer.Info) error {
		inv.layers = append(inv.layers, info)
		return nil
	})
	if err != nil {
		return inv, err
	}
	err = s.Blobs.Walk(func(d digest.Digest, size int64) error {
		inv.blobs[d] = size
		return nil
	})
	return inv, err
}

// manifestLayers returns the layers that a manifest lists. An unreadable one lists nothing.
func (s *Store) manifestLayers(d digest.Digest) []digest.Digest {
	raw, err := s.Blobs.ReadAll(d)
	if err != nil {
		return nil
	}
	var man ocispec.Manifest
	if err := json.Unmarshal(raw, &man); err != nil {
		return nil
	}
	var ds []digest.Digest
	for _, l := range man.Layers {
		ds = append(ds, l.Digest)
	}
	return ds
}

var digestPattern = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

// findDigests returns the digests in b, whatever the form of the text around them.
func findDigests(b []byte) []digest.Digest {
	var ds []digest.Digest
	for _, m := range digestPattern.FindAll(b, -1) {
		ds = append(ds, digest.Digest(m))
	}
	return ds
}

// forget drops the facts about what plan has deleted.
func (s *Store) forget(plan Swept, inv inventory) error {
	gone := map[digest.Digest]bool{}
	for _, d := range plan.Blobs {
		gone[d] = true
	}
	stale := map[string][]byte{}
	for _, p := range inv.packed {
		if slices.ContainsFunc(p.blob, func(d digest.Digest) bool { return gone[d] }) {
			stale[p.key] = nil
		}
	}
	if len(stale) > 0 {
		if err := s.Records.ChangeValues(packedBucket, stale); err != nil {
			return err
		}
	}
	goneLayers := map[layer.ID]bool{}
	for _, id := range plan.Layers {
		goneLayers[id] = true
	}
	stale = map[string][]byte{}
	err := s.Records.WalkValues(image.LayersBucket, func(key string, value []byte) error {
		var snap snapshot.Snapshot
		if json.Unmarshal(value, &snap) != nil || slices.ContainsFunc(snap, func(id layer.ID) bool { return goneLayers[id] }) {
			stale[key] = nil
		}
		return nil
	})
	if err != nil || len(stale) == 0 {
		return err
	}
	return s.Records.ChangeValues(image.LayersBucket, stale)
}
