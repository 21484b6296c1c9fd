// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// parallel is how many blobs are sent or asked for at once.
const parallel = 8

// Repository is a Backend in a repository of a registry. The names of its documents are full references of that repository
// (HOST/REPOSITORY:TAG), or with a digest to read what does not change.
type Repository struct {
	remote  *registry.Registry
	ref     string
	sources registry.Sources
	// manifest is what PutRef has written last.
	manifest ocispec.Descriptor
}

var _ Backend = (*Repository)(nil)

// OpenRepository returns the Backend of ref's repository. sources says from where blobs can be mounted; its zero value knows nothing.
func OpenRepository(remote *registry.Registry, ref string, sources registry.Sources) (*Repository, error) {
	named, err := registry.Parse(ref)
	if err != nil {
		return nil, err
	}
	return &Repository{remote: remote, ref: named.String(), sources: sources}, nil
}

// Name is the name of the document that the repository was opened for.
func (r *Repository) Name() string { return r.ref }

// Manifest is what the last PutRef has written.
func (r *Repository) Manifest() ocispec.Descriptor { return r.manifest }

// Missing implements Backend.
func (r *Repository) Missing(ctx context.Context, descs []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	there := make([]bool, len(descs))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for i, d := range descs {
		group.Go(func() (err error) {
			there[i], err = r.remote.Has(ctx, r.ref, d)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	var missing []ocispec.Descriptor
	for i, d := range descs {
		if !there[i] {
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// Open implements Backend. What is read whole is verified.
func (r *Repository) Open(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	// As a blob, whatever is in it: registries keep manifests elsewhere.
	desc.MediaType = ocispec.MediaTypeImageLayer
	var rc io.ReadCloser
	var err error
	if length < 0 {
		rc, err = r.remote.FetchFrom(ctx, r.ref, desc, offset)
	} else {
		rc, err = r.remote.FetchRange(ctx, r.ref, desc, offset, length)
	}
	if err != nil {
		return nil, notFound(err)
	}
	return rc, nil
}

// Put implements Backend.
func (r *Repository) Put(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	d := ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
	if r.sources.Values != nil {
		d = r.sources.Annotate(r.ref, d)
	}
	// The file of a blob that is stored here goes as it is, and says itself how far it has come.
	var sent atomic.Pointer[reporting]
	return r.remote.Push(ctx, r.ref, d, func() (io.ReadCloser, error) {
		rc, err := open()
		if rep, ok := rc.(*reporting); ok {
			if stored, ok := rep.ReadCloser.(registry.Stored); ok {
				sent.Store(rep)
				return stored, err
			}
		}
		return rc, err
	}, func(n int64) {
		if rep := sent.Load(); rep != nil {
			rep.reached(n)
		}
	})
}

// Ref implements Backend. The version is the digest of the manifest.
func (r *Repository) Ref(ctx context.Context, name string) ([]byte, string, error) {
	full, desc, err := r.remote.Resolve(ctx, name)
	if err != nil {
		return nil, "", notFound(err)
	}
	raw, err := r.remote.FetchBytes(ctx, full, desc)
	if err != nil {
		return nil, desc.Digest.String(), notFound(err)
	}
	document, err := readDocument(ctx, r, raw)
	return document, desc.Digest.String(), err
}

// PutRef implements Backend.
func (r *Repository) PutRef(ctx context.Context, name string, document []byte, blobs []ocispec.Descriptor, version string) error {
	raw, config, doc, err := manifestOf(document, blobs)
	if err != nil {
		return err
	}
	if err := putBytes(ctx, r, config, emptyConfig); err != nil {
		return err
	}
	if err := putBytes(ctx, r, doc, document); err != nil {
		return err
	}
	// Registries cannot compare and swap. This makes the moment short in which another writer's document is lost.
	_, now, err := r.remote.Resolve(ctx, name)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		now.Digest = ""
	case err != nil:
		return err
	}
	if now.Digest.String() != version {
		return fmt.Errorf("%s: %w", name, ErrConflict)
	}
	r.manifest = descriptorOf(ocispec.MediaTypeImageManifest, raw)
	return r.remote.Tag(ctx, name, r.manifest, raw)
}

// Close implements Backend.
func (r *Repository) Close() error { return nil }

// notFound makes an error of a registry one of Backend's.
func notFound(err error) error {
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return notFoundError{err}
	case errors.Is(err, registry.ErrCorrupt):
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// notFoundError is a registry's error that something is not there, which it says itself.
type notFoundError struct{ error }

func (e notFoundError) Unwrap() []error { return []error{ErrNotFound, e.error} }

// readDocument reads the document that a manifest names.
func readDocument(ctx context.Context, b Backend, manifest []byte) ([]byte, error) {
	desc, err := documentIn(manifest)
	if err != nil {
		return nil, err
	}
	return ReadBlob(ctx, b, desc, maxPacked)
}

// ReadBlob reads a blob whole and verifies it.
func ReadBlob(ctx context.Context, b Backend, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size < 0 || desc.Size > limit {
		return nil, fmt.Errorf("blob %s: %d bytes are more than %d", desc.Digest, desc.Size, limit)
	}
	rc, err := b.Open(ctx, desc, 0, -1)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, desc.Size+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) != desc.Size || digest.FromBytes(raw) != desc.Digest {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, ErrCorrupt)
	}
	return raw, nil
}

// putBytes is Put for bytes.
func putBytes(ctx context.Context, b Backend, desc ocispec.Descriptor, raw []byte) error {
	return b.Put(ctx, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
}
