// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"io"
	"maps"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// Remote is an image in a registry, as source and as destination.
type Remote struct {
	reg  *registry.Registry
	name reference.Named
	// From is where the blobs come from if that is a registry as well: they are mounted if it is the same.
	From *Remote
}

// NewRemote returns the image that ref names.
func NewRemote(reg *registry.Registry, ref string) (*Remote, error) {
	named, err := registry.Parse(ref)
	if err != nil {
		return nil, err
	}
	return &Remote{reg: reg, name: named}, nil
}

// Root implements Source.
func (r *Remote) Root(ctx context.Context) (ocispec.Descriptor, error) {
	_, desc, err := r.reg.Resolve(ctx, r.name.String())
	return ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}, err
}

// Open implements Source.
func (r *Remote) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return r.reg.Fetch(ctx, r.name.String(), desc)
}

// Close implements Source and Destination.
func (r *Remote) Close() error { return nil }

// Blob implements Destination.
func (r *Remote) Blob(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64)) error {
	if r.From != nil && reference.Domain(r.From.name) == reference.Domain(r.name) {
		desc.Annotations = maps.Clone(desc.Annotations)
		if desc.Annotations == nil {
			desc.Annotations = map[string]string{}
		}
		desc.Annotations[registry.SourceAnnotation+reference.Domain(r.name)] = reference.Path(r.From.name)
	}
	return r.reg.Push(ctx, r.name.String(), desc, open, progress)
}

// Manifest implements Destination.
func (r *Remote) Manifest(ctx context.Context, desc ocispec.Descriptor, content []byte) error {
	return r.reg.PushManifest(ctx, r.name.Name(), desc, content)
}

// Name implements Destination.
func (r *Remote) Name(ctx context.Context, root ocispec.Descriptor, content []byte) error {
	if _, ok := r.name.(reference.Digested); ok {
		return r.reg.PushManifest(ctx, r.name.Name(), root, content)
	}
	return r.reg.Tag(ctx, r.name.String(), root, content)
}
