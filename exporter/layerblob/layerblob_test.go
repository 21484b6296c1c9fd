// SPDX-License-Identifier: Apache-2.0

package layerblob_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

func TestLayer(t *testing.T) {
	ctx := t.Context()
	s, err := cache.Open(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	text := strings.Repeat("some text that can be made smaller\n", 5000)
	d := s.Layers.NewDraft(nil)
	d.Put(index.Entry{Path: "file", Type: index.File, Mode: 0o644, Size: int64(len(text))}, func() (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(text)), nil
	})
	id, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
	get := func(c layerblob.Compression) layerblob.Blob {
		t.Helper()
		b, err := m.Layer(ctx, id, c)
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.Open(ctx, b)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		raw, err := io.ReadAll(r)
		if err != nil || digest.FromBytes(raw) != b.Desc.Digest || int64(len(raw)) != b.Desc.Size {
			t.Fatalf("%+v: %d bytes, %v", b, len(raw), err)
		}
		plain, kind, err := compress.NewReader(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		if want, err := compress.MediaTypeKind(b.Desc.MediaType); err != nil || kind != want {
			t.Errorf("%+v is %s, %v", b, kind, err)
		}
		if sum, err := digest.FromReader(plain); err != nil || sum != b.DiffID {
			t.Errorf("diff ID %s, want %s, %v", sum, b.DiffID, err)
		}
		return b
	}
	nine := 9
	none := get(layerblob.Compression{Kind: compress.None})
	gzip := get(layerblob.Compression{Kind: compress.Gzip})
	best := get(layerblob.Compression{Kind: compress.Gzip, Level: &nine})
	zstd := get(layerblob.Compression{Kind: compress.Zstd})
	if none.Desc.Digest != none.DiffID || gzip.Desc.MediaType != ocispec.MediaTypeImageLayerGzip || zstd.Desc.MediaType != ocispec.MediaTypeImageLayerZstd {
		t.Errorf("%+v %+v %+v", none, gzip, zstd)
	}
	if best.Desc.Digest == gzip.Desc.Digest {
		t.Error("the level makes no difference")
	}

	// Asked again, nothing is written; ten at once make one.
	before := blobs(t, s)
	var group sync.WaitGroup
	for range 10 {
		group.Go(func() {
			if b, err := m.Layer(ctx, id, layerblob.Compression{Kind: compress.Gzip}); err != nil || b.Desc.Digest != gzip.Desc.Digest {
				t.Errorf("again: %+v, %v", b, err)
			}
		})
	}
	group.Wait()
	get(layerblob.Compression{Kind: compress.Gzip, Level: &nine})
	if after := blobs(t, s); after != before {
		t.Errorf("%d blobs, then %d", before, after)
	}

	// What was pulled stays as it came, unless that is not wanted.
	var pulled bytes.Buffer
	tar, _, err := s.Layers.OpenTar(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	defer tar.Close()
	if err := compress.Write(ctx, &pulled, tar, compress.Zstd, 19); err != nil {
		t.Fatal(err)
	}
	desc, err := s.Blobs.PutBytes(ctx, ocispec.MediaTypeImageLayerZstd, pulled.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if err := (compress.Memo{Values: s.Records, Blobs: s.Blobs}).Put(none.DiffID, compress.Zstd, desc); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []compress.Kind{compress.None, compress.Gzip, compress.Zstd} {
		if b := get(layerblob.Compression{Kind: kind}); b.Desc.Digest != desc.Digest {
			t.Errorf("%s of a pulled layer is %+v", kind, b.Desc)
		}
	}
	for _, tc := range []struct {
		c    layerblob.Compression
		want digest.Digest
	}{
		{layerblob.Compression{Kind: compress.None, Force: true}, none.DiffID},
		{layerblob.Compression{Kind: compress.Gzip, Force: true}, gzip.Desc.Digest},
		{layerblob.Compression{Kind: compress.Gzip, Level: &nine, Force: true}, best.Desc.Digest},
		{layerblob.Compression{Kind: compress.Zstd, Force: true}, desc.Digest},
	} {
		if b := get(tc.c); b.Desc.Digest != tc.want {
			t.Errorf("%+v: %s, want %s", tc.c, b.Desc.Digest, tc.want)
		}
	}
}

func blobs(t *testing.T, s *cache.Store) (n int) {
	t.Helper()
	if err := s.Blobs.Walk(func(digest.Digest, int64) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestCanceled(t *testing.T) {
	s, err := cache.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(nil)
	if _, err := m.Layer(ctx, "d00", layerblob.Compression{Kind: compress.Gzip}); err == nil {
		t.Error("a layer that is not there has a blob")
	}
}

// TestDamaged: nothing that is not what its digest says is copied without an error, whoever copies.
func TestDamaged(t *testing.T) {
	ctx := t.Context()
	root := t.TempDir()
	s, err := cache.Open(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	const size = 3 << 20
	d := s.Layers.NewDraft(nil)
	d.Put(index.Entry{Path: "file", Type: index.File, Mode: 0o644, Size: size}, func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(make([]byte, size))), nil
	})
	id, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
	if _, err := m.Layer(ctx, id, layerblob.Compression{Kind: compress.Gzip}); err != nil {
		t.Fatal(err)
	}
	// What a process has written itself it takes for good.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = cache.Open(ctx, root); err != nil {
		t.Fatal(err)
	}
	m = layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
	flip := func(path string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := []byte{0}
		if _, err := f.ReadAt(b, 600); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, 600); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []compress.Kind{compress.None, compress.Gzip} {
		b, err := m.Layer(ctx, id, layerblob.Compression{Kind: kind})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(root, "layers", string(id), "layer.tar")
		if kind != compress.None {
			path = filepath.Join(s.Blobs.Dir(), "blobs", "sha256", b.Desc.Digest.Encoded())
		}
		copyTo := func(w io.Writer) error {
			r, err := m.Open(ctx, b)
			if err != nil {
				return err
			}
			defer r.Close()
			_, err = io.Copy(w, r)
			return err
		}
		flip(path)
		file, err := os.Create(filepath.Join(t.TempDir(), "copy"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := copyTo(file); err == nil {
			t.Errorf("%s: a damaged blob was copied into a file", kind)
		}
		if kind == compress.None {
			if err := copyTo(struct{ io.Writer }{io.Discard}); err == nil {
				t.Errorf("%s: a damaged blob was copied", kind)
			}
			flip(path)
			if err := copyTo(file); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
		} else if s.Blobs.Has(b.Desc.Digest) {
			t.Errorf("%s: a damaged blob stays", kind)
		}
	}
}
