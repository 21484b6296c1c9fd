// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/chunk"
	"github.com/seed-68981b69/slipway/cache/share/s3"
)

// Where the bytes of an imported layer are is written to disk with the layer, without credentials. Registries are asked with the access of
// whoever needs the layer. What layers of images have is a registry.Origin; layers in chunks, and in registries that need no certificate, have a place
// here. A directory of a client and a bucket can be read while a build goes on that has imported from it, by everybody who knows the layer.

// place is a place that blobs can be read from.
type place struct {
	Registry string `json:"registry,omitempty"`
	Insecure bool   `json:"insecure,omitempty"`
	// Local is a directory of the client.
	Local string `json:"local,omitempty"`
	// Bucket is one of S3, by endpoint, and Prefix what the names in it begin with.
	Bucket   string `json:"bucket,omitempty"`
	Prefix   string `json:"prefix,omitempty"`
	Endpoint string `json:"endpoint,omitempty"`
}

func registryPlace(ref string, insecure bool) place { return place{Registry: ref, Insecure: insecure} }

func bucketPlace(o s3.Options) place {
	return place{Bucket: o.Bucket, Prefix: o.Prefix, Endpoint: o.EndpointURL}
}

// origin is where one layer is: a blob, or the manifest of its chunks.
type origin struct {
	place
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
}

// Scheme is that of the origins of layers of imported caches (layer.Store.OnFetch).
const Scheme = "cache"

const originPrefix = Scheme + ":"

// origin is the layer.Remote.Origin of a layer there.
func (p place) origin(l share.Layer) string {
	o := origin{place: p}
	switch {
	case l.Chunks != nil:
		o.MediaType, o.Digest, o.Size = chunk.MediaTypeManifest, l.Chunks.Manifest.Digest, l.Chunks.Manifest.Size
	case l.Blob != nil:
		o.MediaType, o.Digest, o.Size = l.Blob.MediaType, l.Blob.Digest, l.Blob.Size
	default:
		return ""
	}
	raw, err := json.Marshal(o)
	if err != nil {
		panic("remotecache: " + err.Error()) // strings and numbers always marshal
	}
	return originPrefix + string(raw)
}

// places are those that running builds have opened.
type places struct {
	mu   sync.Mutex // guards open
	open map[place][]share.Backend
}

// enter makes b good for p until the function that it returns is called.
func (ps *places) enter(p place, b share.Backend) (leave func()) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.open == nil {
		ps.open = map[place][]share.Backend{}
	}
	ps.open[p] = append(ps.open[p], b)
	return func() {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		i := slices.Index(ps.open[p], b)
		ps.open[p] = slices.Delete(ps.open[p], i, i+1)
		if len(ps.open[p]) == 0 {
			delete(ps.open, p)
		}
	}
}

func (ps *places) find(p place) []share.Backend {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return slices.Clone(ps.open[p])
}

// ways returns the ways to a place, best first.
func (c *Caches) ways(ctx context.Context, p place) ([]share.Backend, error) {
	ways := c.open.find(p)
	switch {
	case len(ways) > 0:
		return ways, nil
	case p.Registry != "":
		remote := c.deps.Registry
		if p.Insecure {
			remote = remote.Lenient()
		}
		repository, err := share.OpenRepository(remote.For(ctx), p.Registry, c.sources)
		if err != nil {
			return nil, err
		}
		return []share.Backend{repository}, nil
	case p.Bucket != "":
		return nil, errors.New("no build goes on that has credentials for the bucket that it is in")
	}
	return nil, errors.New("the client whose directory it is in has gone")
}

// OpenBlob opens the blob of a layer by its origin. ok is false for origins that are no blobs of caches. What comes is not verified.
func (c *Caches) OpenBlob(ctx context.Context, where string) (desc ocispec.Descriptor, rc io.ReadCloser, ok bool, err error) {
	o, ok := parseOrigin(where)
	if !ok || o.MediaType == chunk.MediaTypeManifest {
		return ocispec.Descriptor{}, nil, false, nil
	}
	desc = ocispec.Descriptor{MediaType: o.MediaType, Digest: o.Digest, Size: o.Size}
	ways, err := c.ways(ctx, o.place)
	for _, way := range ways {
		if rc, err = way.Open(ctx, desc, 0, -1); err == nil {
			break
		}
	}
	return desc, rc, true, err
}

// Fetch is a layer.Fetch.
func (c *Caches) Fetch(ctx context.Context, info layer.Info, where string) (io.ReadCloser, error) {
	if o, ok := parseOrigin(where); ok && o.MediaType == chunk.MediaTypeManifest {
		return c.openChunks(ctx, o, info.TarSize)
	}
	_, blob, ok, err := c.OpenBlob(ctx, where)
	if !ok {
		return nil, fmt.Errorf("origin %q is not one of a cache", where)
	}
	if err != nil {
		return nil, err
	}
	tar, _, err := compress.NewReader(blob)
	if err != nil {
		return nil, errors.Join(err, blob.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{tar, closers{tar, blob}}, nil
}

// openChunks reads a layer's tar that is kept in chunks.
func (c *Caches) openChunks(ctx context.Context, o origin, size int64) (rc io.ReadCloser, err error) {
	ref := chunk.Ref{Manifest: ocispec.Descriptor{MediaType: o.MediaType, Digest: o.Digest, Size: o.Size}}
	ways, err := c.ways(ctx, o.place)
	for _, way := range ways {
		if rc, err = chunk.OpenTar(ctx, way, ref, size); err == nil {
			break
		}
	}
	return rc, err
}

// closers are closed together.
type closers []io.Closer

func (cs closers) Close() error {
	var errs []error
	for _, c := range cs {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Blob returns the blob that an origin names; false for a layer in chunks.
func Blob(where string) (ocispec.Descriptor, bool) {
	o, ok := parseOrigin(where)
	return ocispec.Descriptor{MediaType: o.MediaType, Digest: o.Digest, Size: o.Size}, ok && o.MediaType != chunk.MediaTypeManifest
}

func parseOrigin(where string) (origin, bool) {
	var o origin
	if len(where) <= len(originPrefix) || where[:len(originPrefix)] != originPrefix {
		return o, false
	}
	if json.Unmarshal([]byte(where[len(originPrefix):]), &o) != nil || o.Digest.Validate() != nil || o.Size < 0 {
		return o, false
	}
	return o, true
}

// noteSources remembers that a repository has the layers of a hit, so that pushes to the same registry mount them.
func (c *Caches) noteSources(ref string, layers []share.Layer) {
	var blobs []digest.Digest
	for _, l := range layers {
		if l.Blob != nil {
			blobs = append(blobs, l.Blob.Digest)
		}
	}
	if err := c.sources.Add(ref, blobs...); err != nil {
		c.deps.Log.Warn("note where layers are", "cache", ref, "error", err)
	}
}

// isAboutOneBlob reports whether the rest of a cache may still be good.
func isAboutOneBlob(err error) bool {
	return errors.Is(err, share.ErrNotFound) || errors.Is(err, share.ErrCorrupt)
}

// hint says what can be done.
func hint(err error) error {
	switch {
	case errors.Is(err, share.ErrNotFound):
		return fmt.Errorf("there is none yet: %w", err)
	case errors.Is(err, share.ErrVersion):
		return fmt.Errorf("%w: it is left alone", err)
	}
	return err
}
