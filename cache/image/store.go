// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// The buckets of the record database that are used here.
const (
	// namesBucket has every Image under its name, or "@" and the digest of its target.
	namesBucket = "images"
	// LayersBucket has the snapshot (a JSON list of layer IDs) that a manifest's image runs from, under the digest of the manifest.
	LayersBucket = "image-layers"
)

// Store is the images of one store directory. Its methods may be called concurrently.
type Store struct {
	records *record.Store
	blobs   Blobs
	inUse   func(digest.Digest) bool
	now     func() time.Time

	mu     sync.Mutex // held by every change, until it is on disk
	images table      // what the database has; replaced, never changed, under mu
}

// Open reads the images that records names. inUse, which may be nil, says that a blob must stay although no
// image names it any more; it is called with the store locked.
func Open(records *record.Store, blobs Blobs, inUse func(digest.Digest) bool) (*Store, error) {
	s := &Store{records: records, blobs: blobs, inUse: inUse, now: time.Now, images: table{}}
	var bad []string
	err := records.WalkValues(namesBucket, func(k string, value []byte) error {
		var m Image
		if err := json.Unmarshal(value, &m); err != nil || key(m) != k || m.Target.Digest.Validate() != nil || m.ID.Validate() != nil {
			slog.Warn("dropping an image that cannot be read", "image", k, "error", err)
			bad = append(bad, k)
			return nil
		}
		s.images[k] = m
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	for _, k := range bad {
		if err := records.DeleteValue(namesBucket, k); err != nil {
			return nil, fmt.Errorf("drop unreadable image: %w", err)
		}
	}
	return s, nil
}

// Get returns the image of a name, which need not be normalised. Errors wrap ErrNotFound or ErrInvalidName.
func (s *Store) Get(ctx context.Context, name string) (Image, error) {
	full, err := Normalize(name)
	if err != nil {
		return Image{}, err
	}
	if m, ok := s.table()[full]; ok {
		return m, nil
	}
	return Image{}, notFound(Familiar(full))
}

// Resolve returns the image that ref means: a name (normalised or not), NAME@DIGEST, an image ID or the digest of a
// manifest, or the first digits of one of these. Errors wrap ErrNotFound, ErrAmbiguous or ErrInvalidName.
func (s *Store) Resolve(ctx context.Context, ref string) (Image, error) {
	m, _, err := s.table().find(ref)
	return m, err
}

// List returns every name with its image, by name, then the dangling images, newest first.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	return s.table().sorted(), nil
}

// Names returns the names of an image, by its ID.
func (s *Store) Names(ctx context.Context, id digest.Digest) []string {
	var names []string
	for _, m := range s.table().withID(id) {
		if m.Name != "" {
			names = append(names, m.Name)
		}
	}
	return names
}

// Put adds an image under its Name, which is normalised, or as a dangling image when that is "". The manifest (of an
// index: each manifest that is there) and its config must be in the blob store: ID and Manifests are read from
// them, Size and Created when they are zero. What had the name before becomes dangling if it has no other.
func (s *Store) Put(ctx context.Context, m Image) error {
	_, err := s.Add(ctx, m)
	return err
}

// Add is Put that also returns the image as it was stored.
func (s *Store) Add(ctx context.Context, m Image) (Image, error) {
	if m.Name != "" {
		full, err := Normalize(m.Name)
		if err != nil {
			return Image{}, err
		}
		m.Name = full
	}
	if err := m.Target.Digest.Validate(); err != nil {
		return Image{}, fmt.Errorf("put image %s: target: %w", m.Name, err)
	}
	err := s.change(ctx, func(t table) (table, error) {
		// Read under the lock: a removal meanwhile could delete the blobs.
		if err := fill(&m, s.blobs, s.now().UTC()); err != nil {
			return nil, err
		}
		return t.put(m), nil
	})
	if err != nil {
		return Image{}, fmt.Errorf("put image %s: %w", Familiar(m.Name), err)
	}
	return m, nil
}

// Tag gives what ref means one more name.
func (s *Store) Tag(ctx context.Context, ref, name string) error {
	full, err := Normalize(name)
	if err != nil {
		return err
	}
	if nameDigest(full) != "" {
		return fmt.Errorf("%w %q: a new name cannot have a digest", ErrInvalidName, name)
	}
	return s.change(ctx, func(t table) (table, error) {
		m, _, err := t.find(ref)
		if err != nil {
			return nil, err
		}
		m.Name = full
		return t.put(m), nil
	})
}

// Remove does what docker rmi does. By name: the name goes, and the image with its last name. By ID (or its
// first digits): the image goes with its name; one with several names is refused with ErrConflict unless force is
// set. The manifests and configs that nothing names any more are deleted; layers are left to a sweep of the store.
func (s *Store) Remove(ctx context.Context, ref string, force bool) (Removed, error) {
	var r Removed
	err := s.change(ctx, func(t table) (next table, err error) {
		next, r, err = t.remove(ref, force)
		return next, err
	})
	return r, err
}

// Untag takes a name away from its image, which stays, dangling when that was its last name.
func (s *Store) Untag(ctx context.Context, name string) error {
	full, err := Normalize(name)
	if err != nil {
		return err
	}
	return s.change(ctx, func(t table) (table, error) {
		if _, ok := t[full]; !ok {
			return nil, notFound(Familiar(full))
		}
		return t.untag(full), nil
	})
}

// Delete removes a name, and the image when it was its last.
func (s *Store) Delete(ctx context.Context, name string) error {
	full, err := Normalize(name)
	if err != nil {
		return err
	}
	_, err = s.Remove(ctx, full, false)
	return err
}

// Layers returns the snapshot that the image of a manifest runs from; false when none is known. Its layers
// may have gone: whoever mounts it finds out.
func (s *Store) Layers(ctx context.Context, manifest digest.Digest) (snapshot.Snapshot, bool, error) {
	raw, ok, err := s.records.GetValue(LayersBucket, manifest.String())
	if err != nil || !ok {
		return nil, false, err
	}
	var snap snapshot.Snapshot
	if err := json.Unmarshal(raw, &snap); err != nil {
		slog.Warn("dropping the layers of an image, which cannot be read", "manifest", manifest, "error", err)
		return nil, false, s.records.DeleteValue(LayersBucket, manifest.String())
	}
	return snap, true, nil
}

// SetLayers notes which snapshot the image of a manifest runs from. Call it before Put, so that an image is
// never seen without.
func (s *Store) SetLayers(ctx context.Context, manifest digest.Digest, snap snapshot.Snapshot) error {
	if err := manifest.Validate(); err != nil {
		return fmt.Errorf("set layers of manifest %q: %w", manifest, err)
	}
	raw, err := json.Marshal(snap)
	if err != nil {
		return fmt.Errorf("set layers of manifest %s: %w", manifest, err)
	}
	// Every build of what has not changed comes here: a write to the disk would cost it more than all else.
	if old, ok, err := s.records.GetValue(LayersBucket, manifest.String()); err == nil && ok && bytes.Equal(old, raw) {
		return nil
	}
	return s.records.ChangeValues(LayersBucket, map[string][]byte{manifest.String(): raw})
}

// Digests returns every manifest, index and config that an image names.
func (s *Store) Digests() map[digest.Digest]bool { return s.table().digests() }

func (s *Store) table() table {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.images
}

// change carries out the step from the table as it is to what decide returns: first in the database, then here, and
// last it deletes what no image names any more. A crash in between leaves blobs for a sweep to find.
func (s *Store) change(ctx context.Context, decide func(table) (table, error)) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := decide(s.images)
	if err != nil {
		return err
	}
	diff := map[string][]byte{}
	for k, m := range next {
		if old, ok := s.images[k]; ok && reflect.DeepEqual(old, m) {
			continue
		}
		raw, err := json.Marshal(m)
		if err != nil {
			return fmt.Errorf("encode image %s: %w", k, err)
		}
		diff[k] = raw
	}
	for k := range s.images {
		if _, ok := next[k]; !ok {
			diff[k] = nil
		}
	}
	if len(diff) == 0 {
		return nil
	}
	if err := s.records.ChangeValues(namesBucket, diff); err != nil {
		return err
	}
	before := s.images.digests()
	s.images = next
	after := next.digests()
	maps.DeleteFunc(before, func(d digest.Digest, _ bool) bool { return after[d] || s.inUse != nil && s.inUse(d) })
	s.forget(slices.Sorted(maps.Keys(before)))
	return nil
}

// forget deletes blobs of images that are gone, and the layers noted for them. The images are gone already, so trouble here
// is logged: a sweep will find what is left.
func (s *Store) forget(ds []digest.Digest) {
	layers := map[string][]byte{}
	for _, d := range ds {
		layers[d.String()] = nil
		if err := s.blobs.Delete(d); err != nil && s.blobs.Has(d) {
			slog.Warn("delete blob of a removed image", "digest", d, "error", err)
		}
	}
	if len(layers) == 0 {
		return
	}
	if err := s.records.ChangeValues(LayersBucket, layers); err != nil {
		slog.Warn("forget layers of a removed image", "error", err)
	}
}
