// SPDX-License-Identifier: Apache-2.0

// Package layerblob knows layers as the blobs that images name: the layer's tar as it is, its compressed form, made
// once and kept in the blob store, or the very blob that it was pulled as.
package layerblob

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
)

// Compression is what form a layer is wanted in.
type Compression struct {
	Kind compress.Kind
	// Level is one of compress.Levels; nil means the usual one.
	Level *int
	// Force is for pulled layers too, which otherwise stay the blobs that they came as.
	Force bool
	// Estargz asks for layers that have been through Maker.Estargz; Kind is gzip then.
	Estargz bool
}

// Set takes an attribute of an export if it is one of these.
func (c *Compression) Set(key, value string) (ok bool, err error) {
	switch exptypes.ImageExporterOptKey(key) {
	case exptypes.OptKeyLayerCompression:
		c.Estargz = false
		switch kind := compress.Kind(value); kind {
		case compress.None, compress.Gzip, compress.Zstd:
			c.Kind = kind
		case Estargz:
			c.Kind, c.Estargz = compress.Gzip, true
		default:
			err = fmt.Errorf("not supported: want %s, %s, %s or %s", compress.None, compress.Gzip, compress.Zstd, Estargz)
		}
	case exptypes.OptKeyCompressionLevel:
		var level int
		if level, err = strconv.Atoi(value); err != nil {
			err = errors.New("not a number")
		}
		c.Level = &level
	case exptypes.OptKeyForceCompression:
		c.Force = true
		if value != "" {
			if c.Force, err = strconv.ParseBool(value); err != nil {
				err = errors.New("not true or false")
			}
		}
	default:
		return false, nil
	}
	return true, err
}

// Shaped is what is left to ask for when layers have been made eStargz where that was wanted.
func (c Compression) Shaped() Compression {
	if c.Estargz {
		return Compression{Kind: compress.Gzip}
	}
	return c
}

// Check says what is wrong with the attributes together. docker asks for Docker's media types.
func (c Compression) Check(docker bool) error {
	switch {
	case docker && c.Estargz:
		return fmt.Errorf("compression=%s conflicts with oci-mediatypes=false", Estargz)
	case docker && c.Kind == compress.Zstd:
		return errors.New("compression=zstd conflicts with oci-mediatypes=false")
	}
	if level := c.Level; level != nil {
		if lowest, highest, _ := compress.Levels(c.Kind); *level < lowest || *level > highest {
			return fmt.Errorf("attribute compression-level=%d: %s has %d to %d", *level, c.Kind, lowest, highest)
		}
	}
	return nil
}

// Estargz is gzip with a table of contents, from which files can be read without the rest. It is no compress.Kind: the table
// becomes part of the layer's tar, so that another layer is what has this form (Maker.Estargz).
const Estargz = "estargz"

// Deps is what a Maker works with.
type Deps struct {
	Layers  *layer.Store
	Blobs   *blob.Store
	Records *record.Store
	// Registry gives the blobs of layers that are still there, with the access that a context carries; nil has them brought here.
	Registry *registry.Registry
}

// Maker finds and makes layer blobs. It may be used concurrently; all of one process should use the same, because two
// that are asked for one blob at the same time would both make it.
type Maker struct {
	deps   Deps
	memo   compress.Memo
	making Locks         // by diff ID, and by layer ID while that is not known
	slots  chan struct{} // taken while a layer is compressed
}

// New returns a Maker.
func New(deps Deps) *Maker {
	return &Maker{deps: deps, memo: compress.Memo{Values: deps.Records, Blobs: deps.Blobs}, slots: make(chan struct{}, compressors)}
}

// Blob is a layer as a blob.
type Blob struct {
	// Desc has OCI's media types.
	Desc   ocispec.Descriptor
	DiffID digest.Digest
	// tar is the layer whose tar the blob is; "" when it is in the blob store.
	tar layer.ID
	// origins are where the blob is instead.
	origins []registry.Origin
}

// Layer returns the blob of a layer, which is made if it is not there yet. A layer that has no tar yet is packed and compressed at
// the same time.
func (m *Maker) Layer(ctx context.Context, id layer.ID, c Compression) (Blob, error) {
	if b, ok, err := m.Remote(ctx, id, c); err != nil || ok {
		return b, err
	}
	info, err := m.pack(ctx, id, c)
	if err != nil {
		return Blob{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	b := Blob{DiffID: info.DiffID}
	b.Desc, err = m.DiffID(ctx, info.DiffID, c, func(context.Context) (layer.ID, error) { return id, nil })
	if err != nil {
		return Blob{}, err
	}
	if b.Desc.Digest == b.DiffID {
		b.tar = id
	}
	return b, nil
}

// Remote returns the blob of a layer that is in a registry and not here, if that is the form that is asked for: it is the very blob that
// the layer would come as, and nothing needs to come.
func (m *Maker) Remote(ctx context.Context, id layer.ID, c Compression) (Blob, bool, error) {
	info, err := m.deps.Layers.Stat(ctx, id)
	if err != nil || info.Form != layer.FormRemote || m.deps.Registry == nil {
		return Blob{}, false, err
	}
	if _, ok, err := m.pulled(info.DiffID, c); err != nil || ok { // its blob is here, and it is not
		return Blob{}, false, err
	}
	b := Blob{DiffID: info.DiffID}
	for _, text := range info.Where.Origins {
		o, err := registry.ParseOrigin(text)
		if err != nil {
			continue // somebody else's
		}
		kind, err := compress.MediaTypeKind(o.Desc.MediaType)
		if err != nil || kind == compress.None && c.Kind != compress.None || c.Force && (kind != c.Kind || c.Level != nil) {
			continue
		}
		if len(b.origins) > 0 && o.Desc.Digest != b.Desc.Digest {
			continue
		}
		b.Desc, b.origins = o.Desc, append(b.origins, o)
	}
	return b, len(b.origins) > 0, nil
}

// openRemote streams a blob from where it is. Its end is an error if the bytes are not those of its digest.
func (m *Maker) openRemote(ctx context.Context, b Blob) (io.ReadCloser, error) {
	if m.deps.Blobs.Has(b.Desc.Digest) { // it has come in the meantime
		return OpenBlob(m.deps.Blobs, b.Desc)
	}
	var errs []error
	for _, o := range b.origins {
		rc, err := m.deps.Registry.For(ctx).Fetch(ctx, o.Ref, o.Desc)
		if err == nil {
			return rc, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// ByDiffID is Layer for who does not know yet which layer has the diff ID; find is asked only if it must be read.
func (m *Maker) ByDiffID(ctx context.Context, diffID digest.Digest, c Compression, find func(context.Context) (layer.ID, error)) (b Blob, err error) {
	b.DiffID = diffID
	if b.Desc, err = m.DiffID(ctx, diffID, c, find); err == nil && b.Desc.Digest == diffID {
		b.tar, err = find(ctx)
	}
	return b, err
}

// Stored is a blob of the blob store.
func Stored(desc ocispec.Descriptor) Blob { return Blob{Desc: desc} }

// DiffID is Layer for who does not know yet which layer has the diff ID; find is asked only if it must be read.
func (m *Maker) DiffID(ctx context.Context, diffID digest.Digest, c Compression, find func(context.Context) (layer.ID, error)) (ocispec.Descriptor, error) {
	release, err := m.making.Acquire(ctx, diffID.String())
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer release()
	if desc, ok, err := m.known(diffID, c); err != nil || ok {
		if err == nil {
			desc.Annotations, err = m.annotations(desc.Digest)
		}
		return desc, err
	}
	id, err := find(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if c.Kind == compress.None {
		info, err := m.deps.Layers.Pack(ctx, id)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", id, err)
		}
		return ocispec.Descriptor{MediaType: compress.MediaType(compress.None, false), Digest: diffID, Size: info.TarSize}, nil
	}
	desc, err := m.compress(ctx, id, diffID, c)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("compress layer %s: %w", diffID, err)
	}
	return desc, nil
}

// made is under what compressed forms of our own are remembered, beside the plain kinds, which may be pulled ones: that is
// how the two are told apart.
func made(c Compression) compress.Kind {
	_, _, usual := compress.Levels(c.Kind)
	if c.Level == nil || *c.Level == usual {
		return "made+" + c.Kind
	}
	return compress.Kind(fmt.Sprintf("made+%s-%d", c.Kind, *c.Level))
}

// known looks for a blob that is there. What was pulled comes first, whatever its compression: others have it too.
func (m *Maker) known(diffID digest.Digest, c Compression) (ocispec.Descriptor, bool, error) {
	desc, ok, err := m.pulled(diffID, c)
	if err != nil || ok || c.Kind == compress.None {
		return desc, ok, err
	}
	return m.memo.Get(diffID, made(c))
}

// pulled looks for a blob that was not made here.
func (m *Maker) pulled(diffID digest.Digest, c Compression) (ocispec.Descriptor, bool, error) {
	kinds := []compress.Kind{compress.Gzip, compress.Zstd}
	slices.SortStableFunc(kinds, func(a, b compress.Kind) int { // the one that is wanted first
		switch c.Kind {
		case a:
			return -1
		case b:
			return 1
		}
		return 0
	})
	for _, kind := range kinds {
		desc, ok, err := m.memo.Get(diffID, kind)
		if err != nil {
			return ocispec.Descriptor{}, false, err
		}
		if !ok || c.Force && (kind != c.Kind || c.Level != nil) {
			continue
		}
		ours, ok, err := m.memo.Get(diffID, made(Compression{Kind: kind}))
		if err != nil {
			return ocispec.Descriptor{}, false, err
		}
		if !ok || ours.Digest != desc.Digest {
			return desc, true, nil
		}
	}
	return ocispec.Descriptor{}, false, nil
}

// compress makes a blob of a layer that has a tar. That is read once: a process that does not know yet that it is good finds
// out on the way, so that a damaged layer cannot leave the machine.
func (m *Maker) compress(ctx context.Context, id layer.ID, diffID digest.Digest, c Compression) (ocispec.Descriptor, error) {
	tar, _, err := m.deps.Layers.OpenTar(ctx, id)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer tar.Close()
	w, err := m.deps.Blobs.Writer(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer w.Close()
	if err := m.write(ctx, w, m.verify(tar, id, diffID), c); err != nil {
		return ocispec.Descriptor{}, err
	}
	return m.commit(w, diffID, c)
}

// pack makes sure that a layer has a tar. While it is written, it is compressed too, if c says so.
func (m *Maker) pack(ctx context.Context, id layer.ID, c Compression) (layer.Info, error) {
	info, err := m.deps.Layers.Stat(ctx, id)
	if err != nil || info.DiffID != "" {
		return info, err
	}
	if c.Kind == compress.None {
		return m.deps.Layers.Pack(ctx, id)
	}
	release, err := m.making.Acquire(ctx, string(id))
	if err != nil {
		return layer.Info{}, err
	}
	defer release()
	w, err := m.deps.Blobs.Writer(ctx)
	if err != nil {
		return layer.Info{}, err
	}
	defer w.Close()
	info, followed, err := m.deps.Layers.PackWith(ctx, id, func(ctx context.Context, tar io.Reader) error { return m.write(ctx, w, tar, c) })
	if err != nil || !followed {
		return info, err
	}
	if _, ok, err := m.known(info.DiffID, c); err != nil || ok {
		return info, err // the same tar as another layer's
	}
	_, err = m.commit(w, info.DiffID, c)
	return info, err
}

// compressors is how many layers are compressed at the same time: one alone has work for all processors, but for its end, and each needs
// some ten megabytes.
const compressors = 2

// slot waits until a layer may be compressed.
func (m *Maker) slot(ctx context.Context) (release func(), err error) {
	select {
	case m.slots <- struct{}{}:
		return func() { <-m.slots }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// write compresses in to w.
func (m *Maker) write(ctx context.Context, w io.Writer, in io.Reader, c Compression) error {
	release, err := m.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	_, _, level := compress.Levels(c.Kind)
	if c.Level != nil {
		level = *c.Level
	}
	buffered := bufio.NewWriterSize(w, 1<<20)
	if err := compress.Write(ctx, buffered, in, c.Kind, level); err != nil {
		return err
	}
	return buffered.Flush()
}

// commit makes what has been written to w the blob of a layer.
func (m *Maker) commit(w *blob.Writer, diffID digest.Digest, c Compression) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: compress.MediaType(c.Kind, false), Digest: w.Digest(), Size: w.Size()}
	if err := w.Commit(desc.Size, desc.Digest); err != nil {
		return ocispec.Descriptor{}, err
	}
	key := made(c)
	if err := m.memo.Put(diffID, key, desc); err != nil {
		return ocispec.Descriptor{}, err
	}
	if key != made(Compression{Kind: c.Kind}) {
		return desc, nil
	}
	if _, ok, err := m.memo.Get(diffID, c.Kind); err != nil || ok {
		return desc, err
	}
	return desc, m.memo.Put(diffID, c.Kind, desc)
}

// OpenBlob opens a blob of the store. The end is an error if the bytes are not those of its digest.
func OpenBlob(blobs *blob.Store, desc ocispec.Descriptor) (io.ReadCloser, error) {
	r, err := blobs.Open(desc.Digest)
	if err != nil {
		return nil, err
	}
	if r.Size() != desc.Size {
		_ = r.Close()
		return nil, fmt.Errorf("blob %s: has %d bytes, want %d", desc.Digest, r.Size(), desc.Size)
	}
	return r, nil
}
