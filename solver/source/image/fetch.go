// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
)

// How the tar of a layer comes from its blob. If the blob is in the store it is read there. Otherwise it is downloaded, written
// to the store and uncompressed at the same time, hashed once; what an earlier attempt has left of it comes first.

// givenScheme begins origins that only the caller of a pull has: an archive, a layout of a client. They are good as long as that
// call lasts.
const givenScheme = "given"

func given(o registry.Origin) string {
	return givenScheme + strings.TrimPrefix(o.String(), registry.OriginScheme)
}

type originKey struct{}

// withOrigin returns a context whose fetches go to from.
func withOrigin(ctx context.Context, from Origin) context.Context {
	return context.WithValue(ctx, originKey{}, from)
}

// fetch is a layer.Fetch for the layers of images.
func (p *Puller) fetch(ctx context.Context, info layer.Info, origin string) (io.ReadCloser, error) {
	rest, isGiven := strings.CutPrefix(origin, givenScheme)
	if isGiven {
		origin = registry.OriginScheme + rest
	}
	o, err := registry.ParseOrigin(origin)
	if err != nil {
		return nil, err
	}
	from, _ := ctx.Value(originKey{}).(Origin)
	_, fromRegistry := from.(*registry.Registry)
	switch {
	case isGiven && (from == nil || fromRegistry):
		return nil, fmt.Errorf("layer %s was in an archive, or in a layout of a client: load or build it again", o.Desc.Digest)
	case !isGiven && !fromRegistry:
		from = p.deps.Registry.For(ctx)
	}
	compressed, err := p.open(ctx, from, o.Ref, o.Desc)
	if err != nil {
		return nil, err
	}
	tar, _, err := compress.NewReader(compressed)
	if err != nil {
		return nil, errors.Join(wrongBytes(fmt.Errorf("layer %s: %w", o.Desc.Digest, err)), compressed.Close())
	}
	return &layerTar{tar: tar, compressed: compressed, desc: o.Desc, accept: func() error { return p.noteBlob(info.DiffID, o.Desc) }}, nil
}

// wrongBytes says of errors about bytes that were not what they should be that it may help to fetch them again: a proxy on the way
// may have had a bad copy, or what was left here was bad.
func wrongBytes(err error) error {
	if errors.Is(err, registry.ErrCorrupt) || errors.Is(err, blob.ErrDigest) || errors.Is(err, blob.ErrSize) {
		return fmt.Errorf("%w: %w", layer.ErrDigest, err)
	}
	return err
}

// layerTar is the tar of a layer while its blob is read. Its end is an error if the blob was not what it should be.
type layerTar struct {
	tar        io.ReadCloser
	compressed io.ReadCloser
	desc       ocispec.Descriptor
	accept     func() error
}

// Accept implements layer.Accepter: now the blob is known to be the layer's.
func (t *layerTar) Accept() error { return t.accept() }

func (t *layerTar) Read(p []byte) (int, error) {
	n, err := t.tar.Read(p)
	switch {
	case err == io.EOF:
		// What follows the compressed stream is part of the blob, and of its digest.
		if _, err := io.Copy(io.Discard, t.compressed); err != nil {
			return n, wrongBytes(err)
		}
		return n, io.EOF
	case err != nil:
		// Is it the blob that was asked for, which is no tar, or was it damaged on the way? Its digest tells.
		if _, rest := io.Copy(io.Discard, t.compressed); rest != nil {
			err = rest
		}
		return n, wrongBytes(fmt.Errorf("layer %s: %w", t.desc.Digest, err))
	}
	return n, nil
}

// Close waits until the blob is in the store, if it came whole.
func (t *layerTar) Close() error { return errors.Join(t.tar.Close(), t.compressed.Close()) }

// open opens a blob: in the store, or on its way there.
func (p *Puller) open(ctx context.Context, from Origin, ref string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	progress := registry.ProgressOf(ctx)
	id, total := desc.Digest.String(), desc.Size
	stored := func() (io.ReadCloser, error) {
		progress(id, total, total, true)
		return p.deps.Blobs.Open(desc.Digest)
	}
	if p.deps.Blobs.Has(desc.Digest) {
		return stored()
	}
	progress(id, 0, total, false)
	report := func(n int64) {
		if n < total {
			progress(id, n, total, false)
		}
	}
	ranges, ok := from.(RangeOrigin)
	if !ok || desc.Digest.Algorithm() != digest.SHA256 {
		if err := p.put(ctx, from, ref, desc, report); err != nil {
			return nil, err
		}
		return stored()
	}
	w, err := p.deps.Blobs.Resume(ctx, id)
	if err != nil {
		return nil, err
	}
	if p.deps.Blobs.Has(desc.Digest) { // by somebody for whom Resume has waited
		if err := w.Close(); err != nil {
			return nil, err
		}
		return stored()
	}
	if w.Size() >= total && (w.Size() > total || w.Digest() != desc.Digest) {
		return nil, wrongBytes(fmt.Errorf("pull %s: %w", ref, w.Commit(total, desc.Digest))) // which throws it away
	}
	in := &incoming{w: w, ref: ref, desc: desc, done: func() { progress(id, total, total, true) }}
	if at := w.Size(); at > 0 {
		slog.Debug("going on with a download", "image", ref, "blob", desc.Digest, "at", at, "of", total)
		if in.old, err = w.Written(); err != nil {
			return nil, errors.Join(err, w.Close())
		}
	}
	if w.Size() < total {
		rc, err := ranges.FetchFrom(ctx, ref, desc, w.Size())
		if err != nil {
			return nil, errors.Join(err, in.Close())
		}
		in.rest = rc
		in.counted = &counted{r: rc, n: w.Size(), told: w.Size(), report: report}
	}
	return in, nil
}

// put downloads a blob, all of it, into the store.
func (p *Puller) put(ctx context.Context, from Origin, ref string, desc ocispec.Descriptor, report func(int64)) error {
	rc, err := from.Fetch(ctx, ref, desc)
	if err != nil {
		return wrongBytes(err)
	}
	defer rc.Close()
	return wrongBytes(p.deps.Blobs.Put(ctx, &counted{r: rc, report: report}, desc))
}

// incoming is a blob that is written to the store while it is read. What has come of one that breaks off is kept, unless it is
// wrong, or the disk is full and needs the room.
type incoming struct {
	w    *blob.Writer
	ref  string
	desc ocispec.Descriptor
	done func()

	old     io.ReadCloser // what was there already; nil when that has been read
	rest    io.ReadCloser // what comes; nil if nothing is missing
	counted *counted
	err     error      // the end of reading
	stored  chan error // of the commit, once everything is there
}

func (in *incoming) Read(p []byte) (int, error) {
	if in.err != nil {
		return 0, in.err
	}
	n, err := in.next(p)
	in.err = err
	return n, err
}

func (in *incoming) next(p []byte) (int, error) {
	if in.old != nil {
		n, err := in.old.Read(p)
		if err == nil || err != io.EOF {
			return n, err
		}
		err = in.old.Close()
		in.old = nil
		if n > 0 || err != nil {
			return n, err
		}
	}
	if in.rest == nil {
		return 0, in.finish()
	}
	n, err := in.counted.Read(p)
	if n > 0 {
		if _, werr := in.w.Write(p[:n]); werr != nil {
			if errors.Is(werr, syscall.ENOSPC) || errors.Is(werr, syscall.EDQUOT) {
				werr = errors.Join(werr, in.w.Drop())
			}
			return 0, werr
		}
	}
	switch {
	case err == io.EOF:
		return n, in.finish()
	case errors.Is(err, registry.ErrCorrupt):
		return n, errors.Join(err, in.w.Drop())
	}
	return n, err
}

// finish verifies what has come, and brings it to the disk while its reader goes on.
func (in *incoming) finish() error {
	if in.w.Size() != in.desc.Size || in.w.Digest() != in.desc.Digest {
		err := in.w.Commit(in.desc.Size, in.desc.Digest) // which says what is wrong, and throws it away
		return fmt.Errorf("pull %s: %w", in.ref, err)
	}
	in.stored = make(chan error, 1)
	go func() { in.stored <- in.w.Commit(in.desc.Size, in.desc.Digest) }()
	in.done()
	return io.EOF
}

// Close waits for the blob to be in the store if everything has come.
func (in *incoming) Close() error {
	var errs []error
	for _, c := range []io.ReadCloser{in.old, in.rest} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if in.stored != nil {
		errs = append(errs, <-in.stored)
		in.stored = nil
	}
	return errors.Join(append(errs, in.w.Close())...)
}

// counted reports how many bytes have been read, every 256 KiB.
type counted struct {
	r       io.Reader
	n, told int64
	report  func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 256<<10 {
		c.told = c.n
		c.report(c.n)
	}
	return n, err
}
