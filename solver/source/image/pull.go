// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// parallel is how many layers are downloaded at once.
const parallel = 4

// Progress is called with the bytes of each layer that have come, by its digest in the registry, and last with done. A layer
// that is here already is only reported once, done, with its full size. It may be called from several goroutines. It fits
// solver.Progress.Status.
type Progress func(id string, current, total int64, done bool)

// Puller brings images here. It may be used concurrently; the same image is pulled once by all who want it at the same time.
type Puller struct {
	deps     Deps
	resolver *Resolver
	memo     compress.Memo
	sources  registry.Sources
	once     once[snapshot.Snapshot]
}

// NewPuller returns a Puller.
func NewPuller(deps Deps) *Puller {
	return &Puller{
		deps:     deps,
		resolver: NewResolver(deps),
		memo:     compress.Memo{Values: deps.Records, Blobs: deps.Blobs},
		sources:  registry.Sources{Values: deps.Records},
	}
}

// Pull asks the registry what ref stands for, brings its layers for platform (nil: this machine's) here, and names the image in the
// local store. creds, which may be nil, are asked before docker's config.json; progress may be nil.
func (p *Puller) Pull(ctx context.Context, ref string, platform *ocispec.Platform, creds registry.Credentials, progress Progress) (image.Image, error) {
	plat := DefaultPlatform()
	if platform != nil {
		plat = *platform
	}
	named, err := parse(ref)
	if err != nil {
		return image.Image{}, err
	}
	reg := p.deps.Registry.With(creds)
	f, err := p.resolver.remote(ctx, reg, named, plat)
	if err != nil {
		return image.Image{}, err
	}
	if _, err := p.layers(ctx, reg, "", f, -1, progress); err != nil {
		return image.Image{}, err
	}
	return p.deps.Images.Add(ctx, image.Image{Name: f.name, Target: f.target})
}

// layers returns the root file system of f: what is noted for its manifest, or its layers, pulled. limit, unless negative, is how
// many of its layers are wanted. origin tells places apart that may fail each on its own; registries are all "".
func (p *Puller) layers(ctx context.Context, from Origin, origin string, f *found, limit int, progress Progress) (snapshot.Snapshot, error) {
	if progress == nil {
		progress = func(string, int64, int64, bool) {}
	}
	key := f.manifest.Digest.String() + " " + origin
	if limit >= 0 {
		// What is noted of the whole image does not say which of its layers were empty.
		key += fmt.Sprintf(" %d layers", limit)
	} else if snap, ok, err := p.present(ctx, f.manifest.Digest); err != nil || ok {
		return snap, err
	}
	// Whoever asks first has the progress; the others wait.
	return p.once.do(ctx, key, func(ctx context.Context) (snapshot.Snapshot, error) {
		return p.pull(ctx, from, f, limit, progress)
	})
}

// present returns the noted layers of a manifest, if they are all still there.
func (p *Puller) present(ctx context.Context, manifest digest.Digest) (snapshot.Snapshot, bool, error) {
	snap, ok, err := p.deps.Images.Layers(ctx, manifest)
	if err != nil || !ok {
		return nil, false, err
	}
	for _, id := range snap {
		if _, err := p.deps.Layers.Stat(ctx, id); errors.Is(err, layer.ErrNotFound) {
			return nil, false, nil
		} else if err != nil {
			return nil, false, err
		}
	}
	return snap, true, nil
}

// wanted is one layer of a manifest.
type wanted struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	kind   compress.Kind
	ready  chan struct{} // closed when its blob is in the store
}

// pull downloads in parallel and unpacks in order, each layer as soon as it and those below it are here.
func (p *Puller) pull(ctx context.Context, from Origin, f *found, limit int, progress Progress) (snapshot.Snapshot, error) {
	layers, err := f.layers()
	if err != nil {
		return nil, err
	}
	whole := limit < 0 || limit >= len(layers)
	if !whole {
		layers = layers[:limit]
	}
	slots := make(chan struct{}, parallel)
	var snap snapshot.Snapshot
	i := 0
	// What is unpacked already, from the bottom up, need not come.
	for ; i < len(layers); i++ {
		id, ok, err := p.unpacked(ctx, snap, layers[i])
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		snap = add(snap, id)
		progress(layers[i].desc.Digest.String(), layers[i].desc.Size, layers[i].desc.Size, true)
	}
	rest := layers[i:]
	group, gctx := errgroup.WithContext(ctx)
	for i := range rest {
		rest[i].ready = make(chan struct{})
	}
	group.Go(func() error {
		for i := range rest {
			w := &rest[i]
			select {
			case <-w.ready:
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			id, err := p.unpack(gctx, snap, w)
			if err != nil {
				return fmt.Errorf("image %s: %w", f.name, err)
			}
			snap = add(snap, id)
		}
		return nil
	})
	// The lowest first: it is unpacked while the others come.
	for i := 0; i < len(rest) && gctx.Err() == nil; i++ {
		select {
		case slots <- struct{}{}:
		case <-gctx.Done():
			continue
		}
		w := &rest[i]
		group.Go(func() error {
			defer func() { <-slots }()
			if err := p.download(gctx, from, f.name, w, progress); err != nil {
				return err
			}
			close(w.ready)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if whole {
		if err := p.deps.Images.SetLayers(ctx, f.manifest.Digest, snap); err != nil {
			return nil, err
		}
	}
	_, fromRegistry := from.(*registry.Registry)
	p.note(f, layers, fromRegistry)
	return snap, nil
}

// layers pairs the layers of the manifest with their diff IDs.
func (f *found) layers() ([]wanted, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(f.raw, &m); err != nil {
		return nil, fmt.Errorf("image %s: manifest %s: %w", f.name, f.manifest.Digest, err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(f.config, &config); err != nil {
		return nil, fmt.Errorf("image %s: config %s: %w", f.name, m.Config.Digest, err)
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		return nil, fmt.Errorf("image %s: its manifest has %d layers, its config %d: not an image that can be run", f.name, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	ws := make([]wanted, len(m.Layers))
	for i, d := range m.Layers {
		kind, err := compress.MediaTypeKind(d.MediaType)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", f.name, err)
		}
		if err := errors.Join(d.Digest.Validate(), config.RootFS.DiffIDs[i].Validate()); err != nil {
			return nil, fmt.Errorf("image %s: layer %d: %w", f.name, i, err)
		}
		ws[i] = wanted{desc: d, diffID: config.RootFS.DiffIDs[i], kind: kind}
	}
	return ws, nil
}

// unpacked looks for a layer that has been unpacked over the same files.
func (p *Puller) unpacked(ctx context.Context, below snapshot.Snapshot, w wanted) (layer.ID, bool, error) {
	view, err := p.deps.Snapshots.View(ctx, below)
	if err != nil {
		return "", false, err
	}
	id, ok := p.deps.Layers.FindDiffID(ctx, w.diffID, view)
	return id, ok, nil
}

// download brings a layer's blob into the blob store.
func (p *Puller) download(ctx context.Context, from Origin, ref string, w *wanted, progress Progress) error {
	id, total := w.desc.Digest.String(), w.desc.Size
	if p.deps.Blobs.Has(w.desc.Digest) {
		progress(id, total, total, true)
		return nil
	}
	progress(id, 0, total, false)
	report := func(n int64) {
		if n < total {
			progress(id, n, total, false)
		}
	}
	fetch := p.fetch
	if origin, ok := from.(RangeOrigin); ok && w.desc.Digest.Algorithm() == digest.SHA256 {
		fetch = func(ctx context.Context, _ Origin, ref string, desc ocispec.Descriptor, report func(int64)) error {
			return p.resume(ctx, origin, ref, desc, report)
		}
	}
	err := fetch(ctx, from, ref, w.desc, report)
	if errors.Is(err, registry.ErrCorrupt) || errors.Is(err, blob.ErrDigest) || errors.Is(err, blob.ErrSize) {
		// Once more, from the beginning: a proxy on the way may have had a bad copy, or what was left here was bad.
		err = fetch(ctx, from, ref, w.desc, report)
	}
	if err != nil {
		return err
	}
	progress(id, total, total, true)
	return nil
}

// fetch downloads a blob, all of it.
func (p *Puller) fetch(ctx context.Context, from Origin, ref string, desc ocispec.Descriptor, report func(int64)) error {
	rc, err := from.Fetch(ctx, ref, desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	return p.deps.Blobs.Put(ctx, &counted{r: rc, report: report}, desc)
}

// resume downloads what is missing of a blob: an earlier attempt, perhaps of an earlier process, may have left a part. What
// comes is kept if this attempt fails too, unless it is wrong, or the disk is full and needs the room.
func (p *Puller) resume(ctx context.Context, from RangeOrigin, ref string, desc ocispec.Descriptor, report func(int64)) error {
	w, err := p.deps.Blobs.Resume(ctx, desc.Digest.String())
	if err != nil {
		return err
	}
	defer w.Close()
	if p.deps.Blobs.Has(desc.Digest) { // by somebody for whom Resume has waited
		return nil
	}
	if at := w.Size(); at < desc.Size {
		if at > 0 {
			slog.Debug("going on with a download", "image", ref, "blob", desc.Digest, "at", at, "of", desc.Size)
		}
		rc, err := from.FetchFrom(ctx, ref, desc, at)
		if err != nil {
			return err
		}
		defer rc.Close()
		if _, err := io.Copy(w, &counted{r: rc, n: at, told: at, report: report}); err != nil {
			if errors.Is(err, registry.ErrCorrupt) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
				return errors.Join(err, w.Drop())
			}
			return err
		}
	}
	if err := w.Commit(desc.Size, desc.Digest); err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

// counted reports how many bytes have been read, every 256 KiB.
type counted struct {
	r       io.Reader
	n, told int64
	report  func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 256<<10 {
		c.told = c.n
		c.report(c.n)
	}
	return n, err
}

// unpack makes a layer of a blob, over below.
func (p *Puller) unpack(ctx context.Context, below snapshot.Snapshot, w *wanted) (layer.ID, error) {
	view, err := p.deps.Snapshots.View(ctx, below)
	if err != nil {
		return "", err
	}
	if id, ok := p.deps.Layers.FindDiffID(ctx, w.diffID, view); ok {
		return id, nil
	}
	b, err := p.deps.Blobs.Open(w.desc.Digest)
	if err != nil {
		return "", err
	}
	defer b.Close()
	tar, _, err := compress.NewReader(io.NewSectionReader(b, 0, w.desc.Size))
	if err != nil {
		return "", fmt.Errorf("layer %s: %w", w.desc.Digest, err)
	}
	defer tar.Close()
	return p.deps.Layers.Unpack(ctx, tar, w.diffID, view)
}

// note remembers which blobs the layers came as, so that they are pushed as the same, and which registry they came from, so that they
// need not be sent there.
func (p *Puller) note(f *found, layers []wanted, fromRegistry bool) {
	var blobs []digest.Digest
	for _, w := range layers {
		blobs = append(blobs, w.desc.Digest)
		if w.kind == compress.None || !p.deps.Blobs.Has(w.desc.Digest) {
			continue
		}
		if err := p.memo.Put(w.diffID, w.kind, w.desc); err != nil {
			slog.Warn("note compressed layer", "image", f.name, "layer", w.desc.Digest, "error", err)
		}
	}
	if !fromRegistry {
		return
	}
	if err := p.sources.Add(f.name, blobs...); err != nil {
		slog.Warn("note where layers come from", "image", f.name, "error", err)
	}
}

// add puts id on top; a layer without anything in it has none.
func add(snap snapshot.Snapshot, id layer.ID) snapshot.Snapshot {
	if id == "" {
		return snap
	}
	return append(snap[:len(snap):len(snap)], id)
}

var _ solver.Source = (*source)(nil)
