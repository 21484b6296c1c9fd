// SPDX-License-Identifier: Apache-2.0

package layerblob_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// commitTree is a layer as a step leaves it: a directory without a tar.
func commitTree(t *testing.T, s *cache.Store, files map[string][]byte) layer.ID {
	t.Helper()
	upper, err := s.Layers.NewUpper(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		path := filepath.Join(upper, "upper", name)
		if err := errors.Join(os.WriteFile(path, content, 0o644), os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0))); err != nil {
			t.Fatal(err)
		}
	}
	id, err := s.Layers.CommitTree(t.Context(), upper)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestPackAndCompress: a layer without a tar gets its tar and its blob in one pass, and they are those that it gets one after the other.
func TestPackAndCompress(t *testing.T) {
	ctx := t.Context()
	big := bytes.Repeat([]byte("some text that can be made smaller\n"), 200_000)
	files := map[string][]byte{"big": big, "empty": nil, "small": []byte("x")}
	var want []digest.Digest
	for _, together := range []bool{false, true} {
		s, err := cache.Open(ctx, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		m := layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
		var got []digest.Digest
		for _, kind := range []compress.Kind{compress.Gzip, compress.Zstd} {
			id := commitTree(t, s, files)
			if !together {
				if _, err := s.Layers.Pack(ctx, id); err != nil {
					t.Fatal(err)
				}
			}
			var wg sync.WaitGroup
			for range 4 { // who comes second waits, and finds it
				wg.Go(func() {
					if _, err := m.Layer(ctx, id, layerblob.Compression{Kind: kind}); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			b, err := m.Layer(ctx, id, layerblob.Compression{Kind: kind})
			if err != nil {
				t.Fatal(err)
			}
			r, err := m.Open(ctx, b)
			if err != nil {
				t.Fatal(err)
			}
			plain, _, err := compress.NewReader(r)
			if err != nil {
				t.Fatal(err)
			}
			if sum, err := digest.FromReader(plain); err != nil || sum != b.DiffID {
				t.Errorf("%s together=%v: the blob has %s, want %s, %v", kind, together, sum, b.DiffID, err)
			}
			r.Close()
			got = append(got, b.DiffID, b.Desc.Digest)
			if info, err := s.Layers.Stat(ctx, id); err != nil || info.DiffID != b.DiffID {
				t.Errorf("%+v %v", info, err)
			}
		}
		if want == nil {
			want = got
		} else if !slices.Equal(got, want) {
			t.Errorf("in one pass: %v, one after the other: %v", got, want)
		}
	}
}

// TestPackWithFails: who follows a layer that is packed can fail without harm to the layer, and a blob that is not whole is not left.
func TestPackWithFails(t *testing.T) {
	ctx, root := t.Context(), t.TempDir()
	s, err := cache.Open(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id := commitTree(t, s, map[string][]byte{"f": make([]byte, 5<<20)})
	boom := errors.New("boom")
	info, followed, err := s.Layers.PackWith(ctx, id, func(_ context.Context, tar io.Reader) error {
		_, _ = io.CopyN(io.Discard, tar, 1000)
		return boom
	})
	if !errors.Is(err, boom) || !followed {
		t.Errorf("%v %v", followed, err)
	}
	if info.DiffID == "" {
		t.Error("the layer was not packed")
	}
	if _, followed, err = s.Layers.PackWith(ctx, id, func(context.Context, io.Reader) error { return boom }); followed || err != nil {
		t.Errorf("a packed layer: %v %v", followed, err)
	}
	// A packing that fails is told to who follows.
	id = commitTree(t, s, map[string][]byte{"f": []byte("x"), "g": make([]byte, 5<<20)})
	if err := s.Layers.Ensure(ctx, id); err != nil { // indexed
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(root, "layers", string(id), "tree", "g"), 100); err != nil {
		t.Fatal(err)
	}
	var saw error
	_, followed, err = s.Layers.PackWith(ctx, id, func(_ context.Context, tar io.Reader) error {
		_, saw = io.Copy(io.Discard, tar)
		return saw
	})
	if err == nil || !followed || saw == nil {
		t.Errorf("a file has changed: %v %v %v", err, followed, saw)
	}
	m := layerblob.New(layerblob.Deps{Layers: s.Layers, Blobs: s.Blobs, Records: s.Records})
	if b, err := m.Layer(ctx, id, layerblob.Compression{Kind: compress.Gzip}); err == nil {
		t.Errorf("%+v", b)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Blobs.Dir(), "ingest", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
