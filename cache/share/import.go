// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// LayerStore is the layer store as imports use it. layer.Store implements it.
type LayerStore interface {
	AddRemote(ctx context.Context, r layer.Remote) (layer.ID, error)
}

// ImportOptions say what an Import works with.
type ImportOptions struct {
	Backend Backend
	// Name is that of the document.
	Name string
	// Title is what records that come from here say of it (record.Record.From).
	Title  string
	Layers LayerStore
	// Origin says where the tar of a layer is, for layer.Remote.
	Origin func(Layer) string
	// Key makes a key of the parts of a record of that kind: records with another one are ignored.
	Key func(kind string, parts []record.Part) string
	// Used is told of the layers of each hit; may be nil.
	Used func([]Layer)
}

// Import is a cache that can be asked. Its methods may be called concurrently.
type Import struct {
	opts    ImportOptions
	doc     *Document
	byKey   map[string]int
	ignored int

	mu      sync.Mutex // guards indexes
	indexes map[int]*tableOfContents
}

// tableOfContents is the index of a layer, read once.
type tableOfContents struct {
	once sync.Once
	x    *index.Index
	err  error
}

// OpenImport reads the document. Errors wrap ErrNotFound, ErrNoCache, ErrBuildKit, ErrVersion or ErrCorrupt where they fit.
func OpenImport(ctx context.Context, opts ImportOptions) (*Import, error) {
	raw, _, err := opts.Backend.Ref(ctx, opts.Name)
	if err != nil {
		return nil, err
	}
	return NewImport(opts, raw)
}

// NewImport is OpenImport for a document that has been read.
func NewImport(opts ImportOptions, raw []byte) (*Import, error) {
	doc, ignored, err := Decode(raw)
	if err != nil {
		return nil, err
	}
	im := &Import{opts: opts, doc: doc, ignored: ignored, byKey: make(map[string]int, len(doc.Records)), indexes: map[int]*tableOfContents{}}
	before := len(doc.Records)
	doc.dropUnreadable()
	im.ignored += before - len(doc.Records)
	for i, r := range doc.Records {
		if !r.Redacted && opts.Key(r.Kind, r.Parts) != r.Key {
			im.ignored++
			continue
		}
		im.byKey[r.Key] = i
	}
	return im, nil
}

// Document is what the cache has. It must not be changed.
func (im *Import) Document() *Document { return im.doc }

// Ignored is how many records have been left out because they did not fit.
func (im *Import) Ignored() int { return im.ignored }

// Find returns what the cache has under a key, as it is there; its Outputs are empty. It asks nobody.
func (im *Import) Find(key string) (*record.Record, bool) {
	i, ok := im.byKey[key]
	if !ok {
		return nil, false
	}
	return im.record(&im.doc.Records[i]), true
}

func (im *Import) record(r *Record) *record.Record {
	return &record.Record{
		Kind: r.Kind, ContentKey: r.Content, Parts: r.Parts, Step: r.Step, Build: r.Build, From: im.opts.Title,
		Created: r.Created, LastUsed: time.Now(), Duration: r.Duration, PeakMemory: r.PeakMemory,
	}
}

// Get returns what the cache has under a key, with its layers made known to the store: of those that the store does not have, only the
// tables of contents are fetched. An error means that they could not be had.
func (im *Import) Get(ctx context.Context, key string) (*record.Record, bool, error) {
	i, ok := im.byKey[key]
	if !ok {
		return nil, false, nil
	}
	r := &im.doc.Records[i]
	if err := im.fetchIndexes(ctx, r.layersOf()); err != nil {
		return nil, false, err
	}
	rec := im.record(r)
	for _, out := range r.Outputs {
		snap := snapshot.Snapshot{}
		for _, n := range out {
			id, err := im.layer(ctx, n, snap)
			if err != nil {
				return nil, false, err
			}
			snap = append(snap, id)
		}
		rec.Outputs = append(rec.Outputs, snap)
	}
	if im.opts.Used != nil {
		var used []Layer
		for _, n := range r.layersOf() {
			used = append(used, im.doc.Layers[n])
		}
		im.opts.Used(used)
	}
	return rec, true, nil
}

// layer makes a layer over those below known to the store.
func (im *Import) layer(ctx context.Context, n int, below snapshot.Snapshot) (layer.ID, error) {
	l := im.doc.Layers[n]
	x, err := im.index(ctx, n)
	if err != nil {
		return "", err
	}
	id, err := im.opts.Layers.AddRemote(ctx, layer.Remote{
		DiffID: l.DiffID, TarSize: l.Size, Index: x, Below: below[:len(below):len(below)], Origin: im.opts.Origin(l),
	})
	if err != nil {
		return "", fmt.Errorf("take over layer %s: %w", l.DiffID, err)
	}
	return id, nil
}

func (im *Import) fetchIndexes(ctx context.Context, layers []int) error {
	var group errgroup.Group
	group.SetLimit(parallel)
	for _, n := range layers {
		group.Go(func() error {
			_, err := im.index(ctx, n)
			return err
		})
	}
	return group.Wait()
}

// index returns the table of contents of a layer; nil when the cache has none of it.
func (im *Import) index(ctx context.Context, n int) (*index.Index, error) {
	l := &im.doc.Layers[n]
	if l.Index == nil {
		return nil, nil
	}
	im.mu.Lock()
	t := im.indexes[n]
	if t == nil {
		t = &tableOfContents{}
		im.indexes[n] = t
	}
	im.mu.Unlock()
	t.once.Do(func() {
		t.x, t.err = readIndex(context.WithoutCancel(ctx), im.opts.Backend, *l.Index)
		if t.err == nil && t.x.Digest() != l.Content {
			t.err = fmt.Errorf("%w: it is that of another layer", ErrCorrupt)
		}
		if t.err != nil {
			t.x, t.err = nil, fmt.Errorf("index of layer %s: %w", l.DiffID, t.err)
		}
	})
	return t.x, t.err
}

func readIndex(ctx context.Context, b Backend, desc ocispec.Descriptor) (*index.Index, error) {
	packed, err := ReadBlob(ctx, b, desc, maxLayerIndex)
	if err != nil {
		return nil, err
	}
	raw, err := unpack(packed, maxLayerIndex)
	if err != nil {
		return nil, errors.Join(ErrCorrupt, err)
	}
	return index.Decode(raw)
}
