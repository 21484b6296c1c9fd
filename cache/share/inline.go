// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
)

// InlineKey is the member of an image's config that has the document of an inline cache, base64.
const InlineKey = "slipway.cache.v1"

// InlineSource is where an inline cache gets what it says of layers.
type InlineSource interface {
	// Describe returns a layer's diff ID, tar size and content digest.
	Describe(ctx context.Context, id layer.ID) (Layer, error)
}

// Inline returns the document for the config of an image that has the layers of items.
func Inline(ctx context.Context, source InlineSource, items []Item) ([]byte, error) {
	d := &Document{}
	number := map[layer.ID]int{}
	for _, item := range items {
		r := item.record(time.Unix(0, 0)) // the same image each time
		for _, snap := range item.Record.Outputs {
			out := make([]int, 0, len(snap))
			for _, id := range snap {
				n, ok := number[id]
				if !ok {
					l, err := source.Describe(ctx, id)
					if err != nil {
						return nil, fmt.Errorf("layer %s: %w", id, err)
					}
					n = len(d.Layers)
					number[id] = n
					d.Layers = append(d.Layers, l)
				}
				out = append(out, n)
			}
			r.Outputs = append(r.Outputs, out)
		}
		d.Records = append(d.Records, r)
	}
	return d.Encode()
}

// InlineDocument returns the document in the config of the image that the repository was opened for; of an index, what its images have together.
// Errors wrap ErrNoCache, or ErrBuildKit if there is one of BuildKit's.
func (r *Repository) InlineDocument(ctx context.Context) ([]byte, error) {
	full, desc, err := r.remote.Resolve(ctx, r.ref)
	if err != nil {
		return nil, notFound(err)
	}
	raw, err := r.remote.FetchBytes(ctx, full, desc)
	if err != nil {
		return nil, notFound(err)
	}
	var top ocispec.Index
	if err := json.Unmarshal(raw, &top); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if len(top.Manifests) == 0 {
		return inlineDocument(ctx, r.remote, full, raw)
	}
	var all *Document
	last := error(ErrNoCache)
	for _, m := range top.Manifests {
		if m.Platform == nil || m.Platform.OS == "unknown" { // an attestation
			continue
		}
		raw, err := r.remote.FetchBytes(ctx, full, m)
		if err != nil {
			return nil, notFound(err)
		}
		document, err := inlineDocument(ctx, r.remote, full, raw)
		if err != nil {
			last = err
			continue
		}
		d, _, err := Decode(document)
		if err != nil {
			return nil, err
		}
		if all == nil {
			all = d
		} else {
			all = Merge(all, d, time.Unix(0, 0)) // an image is kept as it is
		}
	}
	if all == nil {
		return nil, last
	}
	return all.Encode()
}

// inlineDocument returns the document in the config of an image whose manifest is raw, with the blobs of its layers filled in. Errors wrap
// ErrNoCache, or ErrBuildKit if there is one of BuildKit's.
func inlineDocument(ctx context.Context, remote *registry.Registry, ref string, raw []byte) ([]byte, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if m.Config.MediaType != ocispec.MediaTypeImageConfig && m.Config.MediaType != "application/vnd.docker.container.image.v1+json" {
		return nil, ErrNoCache
	}
	rawConfig, err := remote.FetchBytes(ctx, ref, m.Config)
	if err != nil {
		return nil, err
	}
	var config struct {
		RootFS  ocispec.RootFS  `json:"rootfs"`
		Inline  []byte          `json:"slipway.cache.v1"`
		Foreign json.RawMessage `json:"moby.buildkit.cache.v0"`
	}
	if err := json.Unmarshal(rawConfig, &config); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	switch {
	case len(config.Inline) == 0 && len(config.Foreign) > 0:
		return nil, ErrBuildKit
	case len(config.Inline) == 0:
		return nil, fmt.Errorf("%w: the image has no inline cache", ErrNoCache)
	case len(config.RootFS.DiffIDs) != len(m.Layers):
		return nil, fmt.Errorf("%w: its manifest has %d layers, its config %d", ErrNoCache, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	d, _, err := Decode(config.Inline)
	if err != nil {
		return nil, err
	}
	blobs := map[digest.Digest]ocispec.Descriptor{}
	for i, id := range config.RootFS.DiffIDs {
		blobs[id] = ocispec.Descriptor{MediaType: m.Layers[i].MediaType, Digest: m.Layers[i].Digest, Size: m.Layers[i].Size}
	}
	for i := range d.Layers {
		if b, ok := blobs[d.Layers[i].DiffID]; ok {
			d.Layers[i].Blob = &b
		}
	}
	d.dropUnreadable()
	return d.Encode()
}

// dropUnreadable takes away the records with layers that are nowhere.
func (d *Document) dropUnreadable() {
	kept := d.Records[:0]
	for _, r := range d.Records {
		whole := true
		for _, i := range r.layersOf() {
			whole = whole && (d.Layers[i].Blob != nil || d.Layers[i].Chunks != nil)
		}
		if whole {
			kept = append(kept, r)
		}
	}
	d.Records = kept
}
