// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// layer sends the i-th layer of a manifest and returns its descriptor in the registry: as it is when it is a blob that we
// have, or that the registry has; otherwise, or when that is forced, in the form that is asked for.
func (s *push) layer(ctx context.Context, find *finder, i int, l ocispec.Descriptor, docker bool) (ocispec.Descriptor, error) {
	kind, err := compress.MediaTypeKind(l.MediaType)
	if err != nil {
		// Not a layer of files (an attestation, an artifact): its bytes are all that there is to it.
		return l, s.blob(ctx, layerblob.Stored(l))
	}
	if kind != compress.None && !s.compression.Force {
		if s.deps.Blobs.Has(l.Digest) {
			return l, s.blob(ctx, layerblob.Stored(l))
		}
		there, err := s.to.Has(ctx, s.ref, l)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if there {
			s.progress(l.Digest.String(), l.Size, l.Size, true)
			return l, nil
		}
	}
	diffID, err := find.diffID(i)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if b, ok, err := find.remote(ctx, diffID, l); err != nil || ok {
		if err == nil {
			err = s.blob(ctx, b)
		}
		return l, err
	}
	b, err := s.layers.ByDiffID(ctx, diffID, s.compression, func(ctx context.Context) (layer.ID, error) {
		return find.layer(ctx, diffID)
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push %s: %w", s.ref, err)
	}
	desc := b.Desc
	if k, err := compress.MediaTypeKind(desc.MediaType); err == nil {
		desc.MediaType = compress.MediaType(k, docker && k != compress.Zstd)
	}
	if len(l.Annotations) > 0 {
		annotations := maps.Clone(l.Annotations)
		maps.Copy(annotations, desc.Annotations)
		desc.Annotations = annotations
	}
	b.Desc = desc
	return desc, s.blob(ctx, b)
}

// blob sends one blob.
func (s *push) blob(ctx context.Context, b layerblob.Blob) error {
	desc := b.Desc
	id := desc.Digest.String()
	// Who comes second finds it there: a push that began before the build's end, or another build's.
	release, err := s.sending.Acquire(ctx, s.repo+" "+id)
	if err != nil {
		return err
	}
	defer release()
	open := func() (io.ReadCloser, error) {
		s.progress(id, 0, desc.Size, false) // it is being sent, then
		r, err := s.layers.Open(ctx, b)
		if err != nil {
			return nil, fmt.Errorf("read blob %s: %w", desc.Digest, err)
		}
		return r, nil
	}
	err = s.to.Push(ctx, s.ref, s.sources.Annotate(s.ref, desc), open, func(n int64) {
		if n < desc.Size { // the end is reported below
			s.progress(id, n, desc.Size, false)
		}
	})
	if err != nil {
		return err
	}
	s.progress(id, desc.Size, desc.Size, true)
	return nil
}

// finder finds the layers of one image in the layer store.
type finder struct {
	*push
	manifest digest.Digest
	config   []byte

	once sync.Once
	byID map[digest.Digest]layer.ID
	err  error
}

// diffID is that of the i-th layer, from the config.
func (f *finder) diffID(i int) (digest.Digest, error) {
	var config ocispec.Image
	if err := json.Unmarshal(f.config, &config); err != nil {
		return "", fmt.Errorf("push %s: config: %w", f.ref, err)
	}
	if i >= len(config.RootFS.DiffIDs) {
		return "", fmt.Errorf("push %s: the config has %d diff IDs, the manifest more layers", f.ref, len(config.RootFS.DiffIDs))
	}
	return config.RootFS.DiffIDs[i], nil
}

// remote finds the blob l of a layer that is in another repository, and not here.
func (f *finder) remote(ctx context.Context, diffID digest.Digest, l ocispec.Descriptor) (layerblob.Blob, bool, error) {
	id, err := f.layer(ctx, diffID)
	if err != nil {
		return layerblob.Blob{}, false, nil // who needs the layer says so
	}
	b, ok, err := f.layers.Remote(ctx, id, f.compression)
	return b, ok && b.Desc.Digest == l.Digest, err
}

// layer is the layer with that diff ID in the image's snapshot.
func (f *finder) layer(ctx context.Context, diffID digest.Digest) (layer.ID, error) {
	f.once.Do(func() {
		snap, ok, err := f.deps.Images.Layers(ctx, f.manifest)
		if err != nil || !ok {
			f.err = err
			return
		}
		f.byID = map[digest.Digest]layer.ID{}
		for _, id := range snap {
			info, err := f.deps.Layers.Stat(ctx, id)
			if err == nil && info.DiffID == "" {
				info, err = f.deps.Layers.Pack(ctx, id)
			}
			if err != nil {
				f.err = err
				return
			}
			f.byID[info.DiffID] = id
		}
	})
	if f.err != nil {
		return "", f.err
	}
	id, ok := f.byID[diffID]
	if !ok {
		return "", fmt.Errorf("the layer is not in the local store: build or pull the image again")
	}
	return id, nil
}
