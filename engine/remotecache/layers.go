// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"context"
	"io"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// layers are the engine's as an export sends them. It implements share.LayerSource.
type layers struct {
	caches      *Caches
	compression layerblob.Compression
}

// Blob implements share.LayerSource.
func (l layers) Blob(ctx context.Context, id layer.ID) (share.LayerBlob, error) {
	if b, ok, err := l.remote(ctx, id); err != nil || ok {
		return b, err
	}
	maker := l.caches.deps.LayerBlobs
	b, err := maker.Layer(ctx, id, l.compression)
	if err != nil {
		return share.LayerBlob{}, err
	}
	info, err := l.caches.deps.Layers.Stat(ctx, id)
	if err != nil {
		return share.LayerBlob{}, err
	}
	return share.LayerBlob{
		DiffID: b.DiffID, Size: info.TarSize, Desc: b.Desc,
		Open: func() (io.ReadCloser, error) { return maker.Open(ctx, b) },
	}, nil
}

// remote returns a layer that is not here as the blob that it is elsewhere.
func (l layers) remote(ctx context.Context, id layer.ID) (share.LayerBlob, bool, error) {
	info, err := l.caches.deps.Layers.Stat(ctx, id)
	if err != nil || info.Form != layer.FormRemote || info.TarSize == 0 {
		return share.LayerBlob{}, false, err
	}
	for _, where := range info.Where.Origins {
		desc, ok := Blob(where)
		if !ok {
			continue
		}
		return share.LayerBlob{DiffID: info.DiffID, Size: info.TarSize, Desc: desc, Open: func() (io.ReadCloser, error) {
			_, rc, _, err := l.caches.OpenBlob(ctx, where)
			return rc, err
		}}, true, nil
	}
	return share.LayerBlob{}, false, nil
}

// Index implements share.LayerSource.
func (l layers) Index(ctx context.Context, id layer.ID) (*index.Index, error) {
	return l.caches.deps.Layers.Index(ctx, id)
}

// Tar implements share.ChunkSource.
func (l layers) Tar(ctx context.Context, id layer.ID) (share.TarReader, error) {
	tar, _, err := l.caches.deps.Layers.OpenTar(ctx, id)
	if err != nil {
		return nil, err
	}
	return tar, nil
}

// Describe implements share.InlineSource and share.ChunkSource.
func (l layers) Describe(ctx context.Context, id layer.ID) (share.Layer, error) {
	info, err := l.caches.deps.Layers.Stat(ctx, id)
	if err == nil && (info.Form != layer.FormRemote || info.Content == "") {
		info, err = l.caches.deps.Layers.Pack(ctx, id)
	}
	if err != nil {
		return share.Layer{}, err
	}
	return share.Layer{DiffID: info.DiffID, Size: info.TarSize, Content: info.Content}, nil
}
