// SPDX-License-Identifier: Apache-2.0

// Package transport knows the places where images are kept (registries, OCI layouts, OCI and docker archives) and copies images
// between them without touching their content: every manifest and every blob arrives with the bytes that it had.
//
// Nothing is believed: what is read is checked against the digest and the size of its descriptor before it counts. A destination
// gets an image's name last, and an archive its file name when everything is in it. The engine is not needed, nor its store.
package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// parallel is how many blobs are copied at once.
const parallel = 4

// Source is where an image is.
type Source interface {
	// Root is the manifest or index that the source names.
	Root(ctx context.Context) (ocispec.Descriptor, error)
	// Open opens a manifest or a blob of the image. Its end is an error if it is not what desc says.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	Close() error
}

// Destination is where an image goes.
type Destination interface {
	// Blob makes sure that a blob is there; open is called if it is not.
	Blob(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64)) error
	// Manifest stores a manifest or index, when everything that it names is there.
	Manifest(ctx context.Context, desc ocispec.Descriptor, content []byte) error
	// Name gives the image, whose manifests are there, the name of the destination.
	Name(ctx context.Context, root ocispec.Descriptor, content []byte) error
	// Close takes away what has no name yet.
	Close() error
}

// ordered is a destination whose bytes depend on the order in which it is given things: it gets one after the other, in the order
// of the manifest.
type ordered interface {
	Destination
	Ordered()
}

// Options of a copy.
type Options struct {
	// Platform copies only the manifest for it; nil copies the index with all it has.
	Platform *ocispec.Platform
	// Progress is called with the bytes of each blob, by its digest; may be nil. It is called from several goroutines.
	Progress func(id string, current, total int64)
}

// Copy copies the image at from to to and returns its manifest or index.
func Copy(ctx context.Context, from Source, to Destination, o Options) (ocispec.Descriptor, error) {
	root, err := from.Root(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if o.Platform != nil {
		if root, err = choose(ctx, from, root, *o.Platform); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	c := &copying{from: from, to: to, o: o, slots: make(chan struct{}, parallel), begun: map[digest.Digest]chan struct{}{}}
	content, err := c.manifest(ctx, root, true)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return root, to.Name(ctx, root, content)
}

// choose finds the manifest for a platform.
func choose(ctx context.Context, from Source, root ocispec.Descriptor, p ocispec.Platform) (ocispec.Descriptor, error) {
	if !isIndex(root.MediaType) {
		return root, nil // an image for one platform is that
	}
	raw, err := read(ctx, from, root)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index %s: %w", root.Digest, err)
	}
	match := platforms.OnlyStrict(p)
	i := slices.IndexFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Platform != nil && match.Match(*d.Platform) })
	if i < 0 {
		return ocispec.Descriptor{}, fmt.Errorf("the image has nothing for platform %s", platforms.FormatAll(p))
	}
	d := index.Manifests[i]
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
}

type copying struct {
	from  Source
	to    Destination
	o     Options
	slots chan struct{}

	mu    sync.Mutex // guards begun
	begun map[digest.Digest]chan struct{}
}

// maxDepth bounds indexes in indexes.
const maxDepth = 4

// manifest copies what a manifest or index names, and itself unless it is the root.
func (c *copying) manifest(ctx context.Context, desc ocispec.Descriptor, root bool) ([]byte, error) {
	return c.manifestAt(ctx, desc, root, 0)
}

func (c *copying) manifestAt(ctx context.Context, desc ocispec.Descriptor, root bool, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, errors.New("indexes within indexes, more than is reasonable")
	}
	raw, err := read(ctx, c.from, desc)
	if err != nil {
		return nil, err
	}
	var named struct {
		MediaType string               `json:"mediaType"`
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(raw, &named); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	group, gctx := errgroup.WithContext(ctx)
	if _, ok := c.to.(ordered); ok {
		group.SetLimit(1)
	}
	if isIndex(desc.MediaType) {
		for _, d := range named.Manifests {
			group.Go(func() error {
				_, err := c.manifestAt(gctx, d, false, depth+1)
				return err
			})
		}
	} else {
		if named.Config == nil {
			return nil, fmt.Errorf("manifest %s (%s): has no config: not supported", desc.Digest, desc.MediaType)
		}
		for _, d := range append([]ocispec.Descriptor{*named.Config}, named.Layers...) {
			group.Go(func() error { return c.blob(gctx, d) })
		}
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if root {
		return raw, nil
	}
	return raw, c.to.Manifest(ctx, desc, raw)
}

// blob copies a blob once, whoever names it.
func (c *copying) blob(ctx context.Context, desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("blob %q: %w", desc.Digest, err)
	}
	c.mu.Lock()
	busy, ok := c.begun[desc.Digest]
	done := make(chan struct{})
	if !ok {
		c.begun[desc.Digest] = done
	}
	c.mu.Unlock()
	if ok { // its failure is that of the whole copy
		select {
		case <-busy:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := c.to.Blob(ctx, desc, func() (io.ReadCloser, error) { return c.from.Open(ctx, desc) }, func(n int64) {
		if c.o.Progress != nil {
			c.o.Progress(desc.Digest.String(), n, desc.Size)
		}
	})
	if err != nil {
		return fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	close(done)
	return nil
}

// read reads a manifest.
func read(ctx context.Context, from Source, desc ocispec.Descriptor) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("manifest %q: %w", desc.Digest, err)
	}
	if desc.Size > registry.MaxDocument {
		return nil, fmt.Errorf("manifest %s: %d bytes are too many", desc.Digest, desc.Size)
	}
	r, err := from.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	return raw, nil
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}

// verify makes the end of a stream an error if it is not what desc says.
func verify(r io.ReadCloser, desc ocispec.Descriptor) io.ReadCloser {
	return &verified{r, desc, desc.Digest.Algorithm().Digester(), desc.Size}
}

type verified struct {
	io.ReadCloser
	desc ocispec.Descriptor
	hash digest.Digester
	left int64
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	v.hash.Hash().Write(p[:n])
	v.left -= int64(n)
	switch {
	case v.left < 0 || err == io.EOF && v.left > 0:
		return n, fmt.Errorf("%w: %s does not have %d bytes", registry.ErrCorrupt, v.desc.Digest, v.desc.Size)
	case err == io.EOF && v.hash.Digest() != v.desc.Digest:
		return n, fmt.Errorf("%w: those of %s", registry.ErrCorrupt, v.hash.Digest())
	}
	return n, err
}

// Index makes an index of the images at from, of which each may be an index itself, at to. Their manifests come from where they are.
func Index(ctx context.Context, from []Source, to Destination, o Options) (ocispec.Descriptor, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, source := range from {
		c := &copying{from: source, to: to, o: o, slots: make(chan struct{}, parallel), begun: map[digest.Digest]chan struct{}{}}
		root, err := source.Root(ctx)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		members, err := c.members(ctx, root)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		for _, d := range members {
			if _, err := c.manifest(ctx, d, false); err != nil {
				return ocispec.Descriptor{}, err
			}
			same := func(o ocispec.Descriptor) bool { return o.Digest == d.Digest }
			if !slices.ContainsFunc(index.Manifests, same) {
				index.Manifests = append(index.Manifests, d)
			}
		}
	}
	raw, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	root := ocispec.Descriptor{MediaType: index.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	return root, to.Name(ctx, root, raw)
}

// members are what an image contributes to an index: its manifests with their platforms.
func (c *copying) members(ctx context.Context, root ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	raw, err := read(ctx, c.from, root)
	if err != nil {
		return nil, err
	}
	if isIndex(root.MediaType) {
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return nil, fmt.Errorf("index %s: %w", root.Digest, err)
		}
		return index.Manifests, nil
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", root.Digest, err)
	}
	config, err := read(ctx, c.from, m.Config)
	if err != nil {
		return nil, err
	}
	var p ocispec.Platform
	if err := json.Unmarshal(config, &p); err != nil || p.OS == "" || p.Architecture == "" {
		return nil, fmt.Errorf("config %s does not say for which platform the image is", m.Config.Digest)
	}
	p = platforms.Normalize(p)
	root.Platform = &p
	return []ocispec.Descriptor{root}, nil
}

// Read returns the manifest or index of an image.
func Read(ctx context.Context, from Source) (ocispec.Descriptor, []byte, error) {
	root, err := from.Root(ctx)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	raw, err := read(ctx, from, root)
	return root, raw, err
}
