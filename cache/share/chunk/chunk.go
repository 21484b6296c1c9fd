// SPDX-License-Identifier: Apache-2.0

// Package chunk keeps file trees and layer tars as content-defined chunks, so that what is exported again costs about what has
// changed. docs/cache-format.md specifies the bytes.
//
// One thing (a tree or a tar) is a stream of bytes, cut where its content says (cut.go), each chunk named by its SHA-256. Chunks are
// compressed one by one and put together to packs of some megabytes, which are blobs. A manifest, another blob, says of which
// chunks the thing is made, where in which pack each of them is, and what the bytes are: the paths of a tree with their metadata, or
// which bytes of a tar are files and which are headers. A Ref names a manifest and its packs; it is what a cache document keeps.
//
//	Writer    trees and tars → packs and manifests; chunks that are there already are not sent again
//	Restore   a tree, into an empty directory
//	OpenTar   a tar, byte for byte, as a stream
//
// Nothing that is read is trusted: every chunk is verified, a manifest is checked whole before anything of it is used, and a tree cannot reach
// out of its directory. Who reads a tar verifies its diff ID besides.
package chunk

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The media types of the blobs written here.
const (
	MediaTypeManifest = "application/vnd.slipway.chunks.v1+zstd"
	MediaTypePack     = "application/vnd.slipway.pack.v1"
)

// ErrCorrupt is what errors about manifests and packs wrap that cannot be used: damaged, poisoned, or beyond the bounds.
var ErrCorrupt = errors.New("chunked data cannot be used")

// Blobs is the part of a share.Backend that chunks need.
type Blobs interface {
	Missing(ctx context.Context, descs []ocispec.Descriptor) ([]ocispec.Descriptor, error)
	Open(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error)
	Put(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error
}

// Ref names one tree or tar: all that a place must keep for it. The manifest alone is enough to read it.
type Ref struct {
	Manifest ocispec.Descriptor   `json:"manifest"`
	Packs    []ocispec.Descriptor `json:"packs,omitempty"` // in the manifest's order
}

// Blobs are all blobs of the Ref: the packs, then the manifest.
func (r *Ref) Blobs() []ocispec.Descriptor {
	return append(append([]ocispec.Descriptor(nil), r.Packs...), r.Manifest)
}

// Check says what is wrong with a Ref that comes from a document of somebody else; the error wraps ErrCorrupt.
func (r *Ref) Check() error {
	if len(r.Packs) > maxPacks {
		return fmt.Errorf("%w: %d packs", ErrCorrupt, len(r.Packs))
	}
	if err := checkBlob(&r.Manifest, maxManifest); err != nil {
		return fmt.Errorf("%w: manifest: %w", ErrCorrupt, err)
	}
	for i := range r.Packs {
		p := &r.Packs[i]
		if err := checkBlob(p, maxPack); err != nil {
			return fmt.Errorf("%w: pack: %w", ErrCorrupt, err)
		}
	}
	return nil
}

func checkBlob(d *ocispec.Descriptor, limit int64) error {
	// Only the place itself is asked.
	d.URLs, d.Data, d.Platform, d.Annotations = nil, nil, nil, nil
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	if d.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %q: not SHA-256", d.Digest)
	}
	if d.Size <= 0 || d.Size > limit {
		return fmt.Errorf("blob %s of %d bytes: at most %d are read", d.Digest, d.Size, limit)
	}
	return nil
}

// Stats says what an Add or a Restore has done, in bytes and pieces.
type Stats struct {
	Files   int   // regular files of a tree, each once
	Bytes   int64 // of the stream, uncompressed
	Chunks  int   // of the stream
	New     int   // chunks that were not there
	Sent    int64 // bytes put to the place: packs and manifest
	Packs   int   // packs put
	Changed int   // files left out because they changed while they were read
	Dropped int   // files left out for the cap
	Left    int   // sockets, devices and pipes left out: they are no content
}
