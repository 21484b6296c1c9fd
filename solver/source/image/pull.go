// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Progress is called with the bytes of each layer that have come, by its digest in the registry, and last with done. A layer
// that is here already is only reported once, done, with its full size. It may be called from several goroutines. It fits
// solver.Progress.Status.
type Progress = registry.Progress

// Puller brings images here. It may be used concurrently; the same layer is pulled once by all who want it at the same time.
type Puller struct {
	deps     Deps
	resolver *Resolver
	memo     compress.Memo
	sources  registry.Sources
}

// NewPuller returns a Puller, which fetches the remote layers of deps.Layers that registries have. A store has one.
func NewPuller(deps Deps) *Puller {
	p := &Puller{
		deps:     deps,
		resolver: NewResolver(deps),
		memo:     compress.Memo{Values: deps.Records, Blobs: deps.Blobs},
		sources:  registry.Sources{Values: deps.Records},
	}
	deps.Layers.OnFetch(registry.OriginScheme, p.fetch)
	deps.Layers.OnFetch(givenScheme, p.fetch)
	return p
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
	if _, err := p.layers(ctx, reg, f, -1, false, progress); err != nil {
		return image.Image{}, err
	}
	return p.deps.Images.Add(ctx, image.Image{Name: f.name, Target: f.target})
}

// layers returns the root file system of f: what is noted for its manifest, or its layers. limit, unless negative, is how many of its
// layers are wanted. Lazy ones stay where they are until somebody reads them, if they are not here.
func (p *Puller) layers(ctx context.Context, from Origin, f *found, limit int, lazy bool, progress Progress) (snapshot.Snapshot, error) {
	if progress == nil {
		progress = func(string, int64, int64, bool) {}
	}
	whole := limit < 0
	if whole {
		snap, all, err := p.present(ctx, f.manifest.Digest)
		if err != nil || snap != nil && (all || lazy) {
			return snap, err
		}
	}
	layers, err := f.layers()
	if err != nil {
		return nil, err
	}
	if !whole && limit < len(layers) {
		layers = layers[:limit]
	} else {
		whole = true
	}
	snap, err := p.known(ctx, from, f, layers, progress)
	if err != nil {
		return nil, err
	}
	if !lazy {
		ctx := registry.WithProgress(withOrigin(ctx, from), progress)
		if err := p.deps.Layers.Materialise(ctx, snap...); err != nil {
			return nil, fmt.Errorf("image %s: %w", f.name, err)
		}
	}
	if whole {
		if err := p.deps.Images.SetLayers(ctx, f.manifest.Digest, snap); err != nil {
			return nil, err
		}
	}
	if _, ok := from.(*registry.Registry); ok {
		p.note(f, layers)
	}
	return snap, nil
}

// present returns the noted layers of a manifest, nil unless they are all still known, and whether they are all here.
func (p *Puller) present(ctx context.Context, manifest digest.Digest) (_ snapshot.Snapshot, here bool, err error) {
	snap, ok, err := p.deps.Images.Layers(ctx, manifest)
	if err != nil || !ok {
		return nil, false, err
	}
	here = true
	for _, id := range snap {
		info, err := p.deps.Layers.Stat(ctx, id)
		if errors.Is(err, layer.ErrNotFound) {
			return nil, false, nil
		} else if err != nil {
			return nil, false, err
		}
		here = here && info.Form != layer.FormRemote
	}
	return snap, here, nil
}

// wanted is one layer of a manifest.
type wanted struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	kind   compress.Kind
}

// known makes the layers of f known to the store, those that are not here as remote ones, and reports those that are.
func (p *Puller) known(ctx context.Context, from Origin, f *found, layers []wanted, progress Progress) (snapshot.Snapshot, error) {
	_, fromRegistry := from.(*registry.Registry)
	snap := snapshot.Snapshot{}
	for _, w := range layers {
		o := registry.Origin{Ref: f.name, Desc: w.desc}
		remote := layer.Remote{DiffID: w.diffID, Below: slices.Clone(snap), Origin: o.String()}
		if !fromRegistry {
			remote.Origin = given(o)
		}
		if w.kind == compress.None {
			remote.TarSize = w.desc.Size
		}
		id, err := p.deps.Layers.AddRemote(ctx, remote)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", f.name, err)
		}
		info, err := p.deps.Layers.Stat(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", f.name, err)
		}
		if info.Form != layer.FormRemote {
			progress(w.desc.Digest.String(), w.desc.Size, w.desc.Size, true)
		}
		snap = append(snap, id)
	}
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

// noteBlob remembers which blob a layer came as, so that it is pushed as the same.
func (p *Puller) noteBlob(diffID digest.Digest, desc ocispec.Descriptor) error {
	kind, err := compress.MediaTypeKind(desc.MediaType)
	if err != nil || kind == compress.None {
		return err
	}
	return p.memo.Put(diffID, kind, desc)
}

// note remembers which registry the layers come from, so that they need not be sent there.
func (p *Puller) note(f *found, layers []wanted) {
	blobs := make([]digest.Digest, len(layers))
	for i, w := range layers {
		blobs[i] = w.desc.Digest
	}
	if err := p.sources.Add(f.name, blobs...); err != nil {
		slog.Warn("note where layers come from", "image", f.name, "error", err)
	}
}

var _ solver.Source = (*source)(nil)
