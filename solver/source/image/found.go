// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Origin is where the blobs of an image come from: *registry.Registry, or what a client offers.
type Origin interface {
	// Fetch opens the blob desc of the image ref. Who reads it verifies it.
	Fetch(ctx context.Context, ref string, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// RangeOrigin is an Origin that can give a part of a blob, so that a broken download goes on where it stopped.
type RangeOrigin interface {
	Origin
	// FetchFrom is Fetch from the byte at offset on. Nothing is verified but the size.
	FetchFrom(ctx context.Context, ref string, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error)
}

// Found is an image whose documents have been read, on one platform. The zero value is no image.
type Found struct{ found *found }

// Find reads what target, a manifest or an index, stands for on platform p: the manifest and its config. read returns the content
// of a descriptor of which only the digest may be known, and has verified it. name is what errors call the image.
func Find(name string, target digest.Digest, p ocispec.Platform, read func(ocispec.Descriptor) ([]byte, error)) (Found, error) {
	if err := target.Validate(); err != nil {
		return Found{}, fmt.Errorf("image %s: %w", name, err)
	}
	f := &found{name: name, target: ocispec.Descriptor{Digest: target}}
	if err := f.complete(p, read); err != nil {
		return Found{}, err
	}
	return Found{f}, nil
}

// Target is the digest that the image was found by.
func (f Found) Target() digest.Digest { return f.found.target.Digest }

// Manifest is the digest of the manifest for the platform: Target, or what the index at Target says.
func (f Found) Manifest() digest.Digest { return f.found.manifest.Digest }

// Config is the image's config, JSON.
func (f Found) Config() []byte { return f.found.config }

// Layers brings f's layers here and returns its root file system. limit, unless negative, is how many of its layers are wanted.
func (p *Puller) Layers(ctx context.Context, from Origin, f Found, limit int, progress Progress) (snapshot.Snapshot, error) {
	return p.layers(ctx, from, f.found, limit, false, progress)
}
