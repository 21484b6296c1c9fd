// SPDX-License-Identifier: Apache-2.0

// Package share carries the cache between machines: records, layers with their indexes, and cache mounts, to and from a
// registry, a directory or an object store. docs/cache-format.md specifies what is written there.
package share

import (
	"context"
	"errors"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNotFound is what errors about a blob or a ref that a backend does not have wrap.
var ErrNotFound = errors.New("not found")

// ErrConflict is what PutRef's error wraps when somebody else has changed the ref in the meantime.
var ErrConflict = errors.New("changed in the meantime")

// Backend is a place for caches: blobs by digest, and named documents (refs) that name them. Nothing that comes from it is
// trusted: callers check digests. Its methods may be called concurrently.
type Backend interface {
	// Missing returns those of descs that are not there. Only Digest and Size need to be set.
	Missing(ctx context.Context, descs []ocispec.Descriptor) ([]ocispec.Descriptor, error)
	// Open reads length bytes of a blob from offset; length < 0 reads to its end. A blob that is not there is an error that
	// wraps ErrNotFound.
	Open(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error)
	// Put stores a blob. open may be called more than once, and not at all if the blob is there. What does not have the
	// digest never becomes visible.
	Put(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error
	// Ref returns the document of that name and its version, an opaque string for PutRef. A name that is not there is an
	// error that wraps ErrNotFound.
	Ref(ctx context.Context, name string) (document []byte, version string, err error)
	// PutRef makes document that of the name. blobs is everything that it needs; all must have been put or be there: a
	// backend that collects garbage (a registry) keeps them for it. version is what Ref has returned, "" for a name
	// that was not there; where the place can compare, a ref that was changed since is an error that wraps ErrConflict, elsewhere the
	// last writer wins whole.
	PutRef(ctx context.Context, name string, document []byte, blobs []ocispec.Descriptor, version string) error
	// Close releases what the backend holds; it stores nothing.
	Close() error
}
