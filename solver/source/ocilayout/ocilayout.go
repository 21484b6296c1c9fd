// SPDX-License-Identifier: Apache-2.0

// Package ocilayout is the source of images in OCI layouts that a client offers: FROM a named context of kind oci-layout. The
// client names the manifest or index by its digest; it has looked up the tag, if there was one. Blobs come through the
// client's session. Nothing about them is believed: every blob must have the digest by which it was asked for, and layers
// also the diff IDs of the config. What is in the blob store already is not asked for.
package ocilayout

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/source/image"
)

// Scheme is the scheme of the identifiers, oci-layout://NAME@DIGEST. The name is only for people: which layout is meant is in the
// attributes.
const Scheme = "oci-layout"

// readAhead is how much of a layer is asked for at once: one call to the client each, in bytes.
const readAhead = 4 << 20

// Resolver finds images in clients' layouts. It may be used concurrently.
type Resolver struct {
	blobs *blob.Store
}

// NewResolver returns a Resolver that keeps manifests and configs in blobs.
func NewResolver(blobs *blob.Store) *Resolver { return &Resolver{blobs: blobs} }

// Layout says which layout of which client is meant.
type Layout struct {
	// Session is the session of the client; "" is the one of the build.
	Session string
	// Store is the name under which the client offers the layout.
	Store string
}

// ResolveConfig returns the digest in ref, NAME@DIGEST, and the image's config for platform (nil: this machine's). No layer is fetched.
func (r *Resolver) ResolveConfig(ctx context.Context, env *solver.Env, ref string, l Layout, platform *ocispec.Platform) (digest.Digest, []byte, error) {
	p := image.DefaultPlatform()
	if platform != nil {
		p = *platform
	}
	target, err := parse(ref)
	if err != nil {
		return "", nil, err
	}
	f, err := r.find(ctx, env, ref, target, l, p)
	if err != nil {
		return "", nil, err
	}
	return f.Target(), f.Config(), nil
}

// parse returns the digest in a name.
func parse(ref string) (digest.Digest, error) {
	parsed, err := reference.Parse(ref)
	if err != nil {
		return "", fmt.Errorf("%s://%s: %w", Scheme, ref, err)
	}
	digested, ok := parsed.(reference.Digested)
	if !ok {
		return "", fmt.Errorf("%s://%s: has no digest: the client must look up the tag and name the image by its digest", Scheme, ref)
	}
	return digested.Digest(), nil
}

func (r *Resolver) find(ctx context.Context, env *solver.Env, ref string, target digest.Digest, l Layout, p ocispec.Platform) (image.Found, error) {
	if l.Store == "" {
		return image.Found{}, fmt.Errorf("%s://%s: says not which layout is meant (attribute %s)", Scheme, ref, pb.AttrOCILayoutStoreID)
	}
	o := origin{env: env, layout: l}
	return image.Find(Scheme+"://"+ref, target, p, func(d ocispec.Descriptor) ([]byte, error) {
		return r.document(ctx, o, d)
	})
}

// document returns a manifest, index or config: from the blob store, or from the client into it.
func (r *Resolver) document(ctx context.Context, o origin, d ocispec.Descriptor) ([]byte, error) {
	if r.blobs.Has(d.Digest) {
		if raw, err := r.blobs.ReadAll(d.Digest); err == nil {
			return raw, nil
		}
		// Damaged: the client has a good one.
		if err := r.blobs.Delete(d.Digest); err != nil {
			return nil, err
		}
	}
	b, err := o.open(ctx, d.Digest)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if b.Size() > registry.MaxDocument {
		return nil, fmt.Errorf("%s: %s: %d bytes are too many for a manifest or config", o, d.Digest, b.Size())
	}
	if err := r.blobs.Put(ctx, content(b), ocispec.Descriptor{Digest: d.Digest, Size: b.Size()}); err != nil {
		return nil, fmt.Errorf("%s: %w", o, err)
	}
	return r.blobs.ReadAll(d.Digest)
}

// origin is a layout, for the layers of an image.
type origin struct {
	env    *solver.Env
	layout Layout
}

func (o origin) String() string { return "OCI layout " + o.layout.Store + " of the client" }

func (o origin) open(ctx context.Context, d digest.Digest) (solver.LayoutBlob, error) {
	b, err := solver.OpenLayoutBlob(ctx, o.env.Session, o.layout.Session, o.layout.Store, d)
	if err != nil {
		return nil, fmt.Errorf("%s: read %s: %w", o, d, err)
	}
	return b, nil
}

// Fetch implements image.Origin.
func (o origin) Fetch(ctx context.Context, _ string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	b, err := o.open(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	if b.Size() != desc.Size {
		_ = b.Close()
		return nil, fmt.Errorf("%s: %s has %d bytes, not the %d that the manifest says", o, desc.Digest, b.Size(), desc.Size)
	}
	return struct {
		io.Reader
		io.Closer
	}{content(b), b}, nil
}

// content reads b from its beginning, in few calls to the client.
func content(b solver.LayoutBlob) io.Reader {
	return bufio.NewReaderSize(io.NewSectionReader(b, 0, b.Size()), int(min(readAhead, max(b.Size(), 1))))
}

// New returns the function that makes sources of vertices.
func New(r *Resolver, p *image.Puller) func(*solver.Vertex) (solver.Source, error) {
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		ref := op.GetIdentifier()[len(Scheme+"://"):]
		s := &source{resolver: r, puller: p, ref: ref, platform: image.DefaultPlatform(), limit: -1}
		var err error
		if s.target, err = parse(ref); err != nil {
			return nil, err
		}
		if pl := v.Op.GetPlatform(); pl != nil && pl.OS != "" {
			s.platform = platforms.Normalize(ocispec.Platform{
				OS: pl.OS, Architecture: pl.Architecture, Variant: pl.Variant, OSVersion: pl.OSVersion, OSFeatures: pl.OSFeatures,
			})
		}
		for key, value := range op.Attrs {
			switch key {
			case pb.AttrOCILayoutSessionID:
				s.layout.Session = value
			case pb.AttrOCILayoutStoreID:
				s.layout.Store = value
			case pb.AttrOCILayoutLayerLimit:
				if s.limit, err = strconv.Atoi(value); err != nil || s.limit < 1 {
					return nil, fmt.Errorf("%s://%s: attribute %s=%s: not a positive number", Scheme, ref, key, value)
				}
			default:
				return nil, fmt.Errorf("%s://%s: attribute not supported yet: %s", Scheme, ref, key)
			}
		}
		return s, nil
	}
}

// source is the op of one vertex.
type source struct {
	resolver *Resolver
	puller   *image.Puller
	ref      string
	target   digest.Digest
	layout   Layout
	platform ocispec.Platform
	limit    int // of layers; -1: all
}

var _ solver.Source = (*source)(nil)

// Parts implements solver.Op. What the source is comes from its pin; where the layout is does not matter.
func (s *source) Parts() []record.Part {
	parts := []record.Part{{Name: "source", Value: Scheme}}
	if s.limit >= 0 {
		parts = append(parts, record.Part{Name: "layer limit", Value: strconv.Itoa(s.limit)})
	}
	return parts
}

// InputDigest implements solver.Op. A source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("%s://%s: a source has no inputs", Scheme, s.ref)
}

func (s *source) find(ctx context.Context, env *solver.Env) (image.Found, error) {
	return s.resolver.find(ctx, env, s.ref, s.target, s.layout, s.platform)
}

// Pin implements solver.Source: an image is pinned by the manifest for its platform.
func (s *source) Pin(ctx context.Context, env *solver.Env) (solver.Pin, error) {
	f, err := s.find(ctx, env)
	if err != nil {
		return solver.Pin{}, err
	}
	return solver.Pin{Parts: []record.Part{{Name: "manifest", Value: f.Manifest().String()}}, Resolved: f.Target().String()}, nil
}

// Run implements solver.Op: it fetches the layers that are not here.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	f, err := s.find(ctx, env)
	if err != nil {
		return nil, err
	}
	o := origin{env: env, layout: s.layout}
	snap, err := s.puller.Layers(ctx, o, f, s.limit, env.Progress.Status)
	if err != nil {
		return nil, err
	}
	return []snapshot.Snapshot{snap}, nil
}
