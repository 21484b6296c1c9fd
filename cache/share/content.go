// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Content is a Backend in a content store: a directory of the client. There names are digests of manifests, which the client gives
// tags (index.json) when the build has ended.
type Content struct {
	store content.Store
	// manifest is what PutRef has written last.
	manifest ocispec.Descriptor
	// last is what name "" stands for.
	last digest.Digest
	// writer tells the writes of this export from those of others: two processes that write to a directory under one name take each other's
	// files away.
	writer string
	claim  sync.Once
}

// writePrefix is what the names of our writes begin with. One that nobody has written to for as long as abandoned is of an export that was killed.
const (
	writePrefix = "slipway-cache-"
	abandoned   = 24 * time.Hour
)

var _ Backend = (*Content)(nil)

// OpenContent returns the Backend of a content store. last is the manifest that Ref and PutRef call "", "" when there is none or it is
// not known.
func OpenContent(store content.Store, last digest.Digest) *Content {
	return &Content{store: store, last: last, writer: rand.Text()}
}

// Manifest is what the last PutRef has written, which now needs a tag.
func (c *Content) Manifest() ocispec.Descriptor { return c.manifest }

// Missing implements Backend.
func (c *Content) Missing(ctx context.Context, descs []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	c.claim.Do(func() { c.use(ctx) })
	var missing []ocispec.Descriptor
	for _, d := range descs {
		info, err := c.store.Info(ctx, d.Digest)
		switch {
		case errdefs.IsNotFound(err) || err == nil && info.Size != d.Size:
			missing = append(missing, d)
		case err != nil:
			return nil, fmt.Errorf("look for blob %s in the client's directory: %w", d.Digest, err)
		}
	}
	return missing, nil
}

// use writes what every cache has, without looking whether it is there. BuildKit's client lets nobody delete blobs from its directory (reset=true) from
// the first attempt to write until the export has its tag, also such as were there already.
func (c *Content) use(ctx context.Context) {
	// Whoever writes more says what is wrong.
	_ = c.write(ctx, descriptorOf(MediaTypeConfig, emptyConfig), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(emptyConfig)), nil })
}

// Open implements Backend.
func (c *Content) Open(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	r, err := c.store.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest, Size: desc.Size})
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read blob %s of the client's directory: %w", desc.Digest, err)
	}
	if length < 0 {
		length = max(0, desc.Size-offset)
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(r, offset, length), r}, nil
}

// Put implements Backend.
func (c *Content) Put(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	c.claim.Do(func() { c.use(ctx) })
	if info, err := c.store.Info(ctx, desc.Digest); err == nil && info.Size == desc.Size {
		return nil
	}
	return c.write(ctx, desc, open)
}

func (c *Content) write(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	w, err := content.OpenWriter(ctx, c.store, content.WithRef(writePrefix+desc.Digest.String()+"-"+c.writer), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write blob %s to the client's directory: %w", desc.Digest, err)
	}
	defer w.Close()
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	if err := content.Copy(ctx, w, rc, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("write blob %s to the client's directory: %w", desc.Digest, err)
	}
	return nil
}

// Ref implements Backend: name is the digest of a manifest, or "".
func (c *Content) Ref(ctx context.Context, name string) ([]byte, string, error) {
	d := digest.Digest(name)
	if name == "" {
		d = c.last
	}
	if d == "" {
		return nil, "", fmt.Errorf("cache in the client's directory: %w", ErrNotFound)
	}
	if err := checkDigest(d); err != nil {
		return nil, "", err
	}
	info, err := c.store.Info(ctx, d)
	if errdefs.IsNotFound(err) {
		return nil, "", fmt.Errorf("manifest %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, "", err
	}
	raw, err := ReadBlob(ctx, c, ocispec.Descriptor{Digest: d, Size: info.Size}, maxPacked)
	if err != nil {
		return nil, "", err
	}
	document, err := readDocument(ctx, c, raw)
	return document, d.String(), err
}

// PutRef implements Backend. The name is the client's to give; see Manifest.
func (c *Content) PutRef(ctx context.Context, _ string, document []byte, blobs []ocispec.Descriptor, _ string) error {
	raw, config, doc, err := manifestOf(document, blobs)
	if err != nil {
		return err
	}
	desc := descriptorOf(ocispec.MediaTypeImageManifest, raw)
	if err := errors.Join(putBytes(ctx, c, config, emptyConfig), putBytes(ctx, c, doc, document)); err != nil {
		return err
	}
	if err := putBytes(ctx, c, desc, raw); err != nil {
		return err
	}
	c.manifest = desc
	c.sweep(ctx)
	return nil
}

// sweep ends the writes of exports that were killed long ago. If that cannot be done the next export tries.
func (c *Content) sweep(ctx context.Context) {
	writes, err := c.store.ListStatuses(ctx)
	if err != nil {
		return
	}
	for _, w := range writes {
		if strings.HasPrefix(w.Ref, writePrefix) && time.Since(w.UpdatedAt) > abandoned {
			_ = c.store.Abort(ctx, w.Ref)
		}
	}
}

// Close implements Backend.
func (c *Content) Close() error { return nil }
