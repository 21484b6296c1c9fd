// SPDX-License-Identifier: Apache-2.0

package layerblob

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
)

// Open opens a blob for reading from its beginning. The end is an error if the bytes are not those of its digest; a process
// finds that out once. What is in a file here is a registry.Stored, which can be sent without that.
func (m *Maker) Open(ctx context.Context, b Blob) (io.ReadCloser, error) {
	if len(b.origins) > 0 {
		return m.openRemote(ctx, b)
	}
	if b.tar == "" {
		return OpenBlob(m.deps.Blobs, b.Desc)
	}
	f, sizeBytes, err := m.deps.Layers.OpenTar(ctx, b.tar)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", b.tar, err)
	}
	if sizeBytes != b.Desc.Size {
		_ = f.Close()
		return nil, fmt.Errorf("layer %s: its tar has %d bytes, want %d", b.tar, sizeBytes, b.Desc.Size)
	}
	t := &layerTar{f: f, size: sizeBytes, m: m, id: b.tar, want: b.Desc.Digest}
	t.unseen, _ = m.verify(f, b.tar, b.Desc.Digest).(*verified)
	return t, nil
}

// layerTar is the tar of a layer.
type layerTar struct {
	f    *os.File
	size int64
	m    *Maker
	id   layer.ID
	want digest.Digest
	// unseen verifies it; nil when this process has written it or read it before.
	unseen *verified
}

var _ registry.Stored = (*layerTar)(nil)

func (t *layerTar) Read(p []byte) (int, error) {
	if t.unseen == nil {
		return t.f.Read(p)
	}
	return t.unseen.Read(p)
}

func (t *layerTar) Close() error { return t.f.Close() }

// WriteTo leaves the copying to the kernel where it can do it, and hashes at the same time.
func (t *layerTar) WriteTo(w io.Writer) (int64, error) {
	switch {
	case t.unseen == nil:
		return io.Copy(w, t.f)
	case t.unseen.started:
		return io.Copy(w, struct{ io.Reader }{t.unseen})
	}
	n, got, err := blob.CopyAndHash(w, t.f, t.size, t.want.Algorithm())
	if err == nil {
		err = t.unseen.judge(got)
	}
	return n, err
}

// File implements registry.Stored.
func (t *layerTar) File() *os.File { return t.f }

// Check implements registry.Stored.
func (t *layerTar) Check(ctx context.Context) error {
	f, _, err := t.m.deps.Layers.OpenTar(ctx, t.id)
	if err != nil {
		return fmt.Errorf("layer %s: %w", t.id, err)
	}
	defer f.Close()
	for v := verify(f, t.want); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := io.CopyN(io.Discard, v, 8<<20); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// verify returns the tar of a layer as it is if this process has written it or read it before, and else what finds out whether it is good.
func (m *Maker) verify(tar io.Reader, id layer.ID, diffID digest.Digest) io.Reader {
	if m.deps.Layers.Verified(id) {
		return tar
	}
	v := verify(tar, diffID)
	v.good = func() { m.deps.Layers.SetVerified(id) }
	return v
}

// verified fails at the end of the stream if it was not what it should have been.
type verified struct {
	r    io.Reader
	want digest.Digest
	hash digest.Digester
	good func() // called when it was; may be nil
	// started says that something has been read.
	started bool
}

func verify(r io.Reader, want digest.Digest) *verified {
	return &verified{r: r, want: want, hash: want.Algorithm().Digester()}
}

func (v *verified) Read(p []byte) (int, error) {
	v.started = true
	n, err := v.r.Read(p)
	v.hash.Hash().Write(p[:n])
	if err == io.EOF {
		if bad := v.judge(v.hash.Digest()); bad != nil {
			return n, bad
		}
	}
	return n, err
}

// judge says what it means that everything together has this digest.
func (v *verified) judge(got digest.Digest) error {
	if got != v.want {
		return fmt.Errorf("the layer is damaged: its tar has digest %s", got)
	}
	if v.good != nil {
		v.good()
	}
	return nil
}
