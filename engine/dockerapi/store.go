// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// StoreImages is the Images of a store.
func StoreImages(images *image.Store, blobs BlobReader, layers *layer.Store) Images {
	return &storeImages{images, blobs, layers}
}

// BlobReader reads small blobs.
type BlobReader interface {
	ReadAll(digest.Digest) ([]byte, error)
}

type storeImages struct {
	images *image.Store
	blobs  BlobReader
	layers *layer.Store
}

func (s *storeImages) List(ctx context.Context) ([]Image, error) {
	names, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []Image
	seen := map[digest.Digest]bool{}
	for _, m := range names {
		if seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		same := slices.DeleteFunc(slices.Clone(names), func(o image.Image) bool { return o.ID != m.ID })
		img, err := s.assemble(ctx, same)
		switch {
		case errors.Is(err, errNoConfig):
			continue // an artifact, or an image of other platforms only: nothing that docker could show
		case err != nil:
			return nil, err
		}
		out = append(out, img)
	}
	return out, nil
}

func (s *storeImages) Get(ctx context.Context, ref string) (Image, error) {
	m, err := s.images.Resolve(ctx, ref)
	if err != nil {
		return Image{}, err
	}
	names, err := s.images.List(ctx)
	if err != nil {
		return Image{}, err
	}
	same := []image.Image{m}
	for _, o := range names {
		if o.ID == m.ID && (o.Name != m.Name || o.Target.Digest != m.Target.Digest) {
			same = append(same, o)
		}
	}
	img, err := s.assemble(ctx, same)
	if errors.Is(err, errNoConfig) {
		return Image{}, notFound("image %s has no manifest for %s in the local store", ref, platforms.DefaultString())
	}
	return img, err
}

// errNoConfig is an image of which no manifest has a config here.
var errNoConfig = errors.New("image without a config")

// assemble makes one image of all its names; the first decides.
func (s *storeImages) assemble(ctx context.Context, names []image.Image) (Image, error) {
	m := names[0]
	manifest, ok := m.ForPlatform(platforms.DefaultSpec())
	if !ok {
		i := slices.IndexFunc(m.Manifests, func(c image.Manifest) bool { return c.Config == m.ID })
		if i < 0 {
			return Image{}, errNoConfig
		}
		manifest = m.Manifests[i]
	}
	out := Image{ID: m.ID, Target: m.Target, Created: m.Created, Size: m.Size}
	var err error
	if out.Config, err = s.blobs.ReadAll(manifest.Config); err != nil {
		return out, fmt.Errorf("config of image %s: %w", m.ID, err)
	}
	if out.Layers, out.Runnable, err = s.images.Layers(ctx, manifest.Target.Digest); err != nil {
		return out, fmt.Errorf("layers of image %s: %w", m.ID, err)
	}
	if out.Runnable {
		if size, err := s.size(ctx, out.Layers); err == nil {
			out.Size = size
		} else if !errors.Is(err, layer.ErrNotFound) {
			return out, err
		}
	}
	digests := map[string]bool{}
	known := map[string]bool{} // repositories of which a registry's digest is known
	for _, n := range names {
		if repo, _, ok := strings.Cut(n.Name, "@"); ok {
			digests[n.Name], known[repo] = true, true
		}
	}
	for _, n := range names {
		if n.Name == "" || strings.Contains(n.Name, "@") {
			continue
		}
		out.Names = append(out.Names, n.Name)
		// What was built here becomes another manifest by the compression of its layers when it is pushed.
		if named, err := reference.ParseNormalizedNamed(n.Name); err == nil && !known[named.Name()] {
			digests[named.Name()+"@"+n.Target.Digest.String()] = true
		}
	}
	slices.Sort(out.Names)
	for d := range digests {
		out.Digests = append(out.Digests, d)
	}
	slices.Sort(out.Digests)
	return out, nil
}

// size is what the layers take on disk.
func (s *storeImages) size(ctx context.Context, snap snapshot.Snapshot) (int64, error) {
	var sum int64
	for _, id := range snap {
		info, err := s.layers.Stat(ctx, id)
		if err != nil {
			return 0, err
		}
		sum += info.Size
	}
	return sum, nil
}

// Tag goes by the manifest or index: several of them can have one config, and so one ID.
func (s *storeImages) Tag(ctx context.Context, img Image, name string) error {
	return s.images.Tag(ctx, img.Target.Digest.String(), name)
}

func (s *storeImages) Untag(ctx context.Context, name string) error {
	_, err := s.images.Remove(ctx, name, false)
	return err
}

func (s *storeImages) Delete(ctx context.Context, img Image) error {
	_, err := s.images.Remove(ctx, img.ID.String(), true)
	return err
}

func (s *storeImages) LayerSizes(ctx context.Context, img Image) ([]int64, error) {
	var out []int64
	for _, id := range img.Layers {
		x, err := s.layers.Index(ctx, id)
		if errors.Is(err, layer.ErrNotFound) {
			out = append(out, 0)
			continue
		}
		if err != nil {
			return nil, err
		}
		var sum int64
		for e := range x.All() {
			if e.Type == index.File && e.HardLink == "" {
				sum += e.Size
			}
		}
		out = append(out, sum)
	}
	return out, nil
}

// StoreRoots is the Roots of a store.
func StoreRoots(snapshots *snapshot.Store) Roots { return storeRoots{snapshots} }

type storeRoots struct{ snapshots *snapshot.Store }

func (s storeRoots) Files(ctx context.Context, snap snapshot.Snapshot) (layer.Files, error) {
	return s.snapshots.View(ctx, snap)
}

func (s storeRoots) Mount(ctx context.Context, snap snapshot.Snapshot) (Mount, error) {
	m, err := s.snapshots.Mount(ctx, snap, snapshot.MountOptions{Writable: true})
	if errors.Is(err, layer.ErrNotFound) {
		return nil, fmt.Errorf("the image is damaged, build or pull it again: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}
