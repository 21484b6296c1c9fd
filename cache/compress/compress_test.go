// SPDX-License-Identifier: Apache-2.0

package compress

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// text is n bytes that compress about as well as source code.
func text(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 500)
	for i := range words {
		b := make([]byte, 2+rng.IntN(9))
		for j := range b {
			b[j] = byte('a' + rng.IntN(26))
		}
		words[i] = string(b)
	}
	var b bytes.Buffer
	for b.Len() < n {
		b.WriteString(words[rng.IntN(len(words))])
		b.WriteByte(' ')
	}
	return b.Bytes()[:n]
}

func TestWriteGzip(t *testing.T) {
	for _, n := range []int{0, 1, 1000, gzipWindow, gzipBlock - 1, gzipBlock, gzipBlock + 1, 2*gzipBlock + 12345} {
		in := text(n)
		var one bytes.Buffer
		if err := WriteGzip(context.Background(), &one, bytes.NewReader(in), 1); err != nil {
			t.Fatal(err)
		}
		for _, workers := range []int{3} {
			var many bytes.Buffer
			// A reader that gives little at a time must not change the blocks.
			if err := WriteGzip(context.Background(), &many, &dribble{bytes.NewReader(in)}, workers); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(one.Bytes(), many.Bytes()) {
				t.Errorf("%d bytes: %d workers write other bytes than one", n, workers)
			}
		}
		z, err := stdgzip.NewReader(&one)
		if err != nil {
			t.Fatal(err)
		}
		z.Multistream(false)
		out, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(out, in) {
			t.Errorf("%d bytes: read back %d, %v", n, len(out), err)
		}
		if one.Len() != 0 {
			t.Errorf("%d bytes: %d bytes behind the end", n, one.Len())
		}
	}
}

type dribble struct{ r io.Reader }

func (d *dribble) Read(p []byte) (int, error) { return d.r.Read(p[:min(len(p), 1+len(p)/3)]) }

func TestGzipIsAsSmallAsOneStream(t *testing.T) {
	in := text(3 << 20)
	var blocks, std bytes.Buffer
	if err := WriteGzip(context.Background(), &blocks, bytes.NewReader(in), 0); err != nil {
		t.Fatal(err)
	}
	z := stdgzip.NewWriter(&std)
	_, _ = z.Write(in)
	z.Close()
	if blocks.Len() > std.Len()*103/100 {
		t.Errorf("%d bytes, one stream of the standard library %d: more than 3 %% larger", blocks.Len(), std.Len())
	}
}

func TestWriteGzipErrors(t *testing.T) {
	boom := errors.New("boom")
	in := text(3 * gzipBlock)
	if err := WriteGzip(context.Background(), &failing{n: 100, err: boom}, bytes.NewReader(in), 2); !errors.Is(err, boom) {
		t.Errorf("writer: %v", err)
	}
	r := io.MultiReader(bytes.NewReader(in), &failing{err: boom})
	if err := WriteGzip(context.Background(), io.Discard, r, 2); !errors.Is(err, boom) {
		t.Errorf("reader: %v", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(boom)
	if err := WriteGzip(ctx, io.Discard, bytes.NewReader(in), 2); !errors.Is(err, boom) {
		t.Errorf("context: %v", err)
	}
}

type failing struct {
	n   int
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, f.err
	}
	return len(p), nil
}
func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func TestNewReader(t *testing.T) {
	in := text(100_000)
	var gz, zs bytes.Buffer
	if err := WriteGzip(context.Background(), &gz, bytes.NewReader(in), 0); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = z.Write(in)
	z.Close()
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}, zs.Bytes()...)
	for _, tc := range []struct {
		name string
		in   []byte
		kind Kind
		want []byte
	}{
		{"gzip", gz.Bytes(), Gzip, in},
		{"two gzip members", append(bytes.Clone(gz.Bytes()), gz.Bytes()...), Gzip, append(bytes.Clone(in), in...)},
		{"zstd", zs.Bytes(), Zstd, in},
		{"zstd behind a skippable frame", skippable, Zstd, in},
		{"tar", in, None, in},
		{"nothing", nil, None, nil},
	} {
		r, kind, err := NewReader(bytes.NewReader(tc.in))
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		got, err := io.ReadAll(r)
		if err != nil || kind != tc.kind || !bytes.Equal(got, tc.want) {
			t.Errorf("%s: %s, %d bytes, %v", tc.name, kind, len(got), err)
		}
		r.Close()
	}
	for name, in := range map[string][]byte{"gzip": gz.Bytes(), "zstd": zs.Bytes()} {
		r, _, err := NewReader(bytes.NewReader(in[:len(in)/2]))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err == nil {
			t.Errorf("half of a %s stream was read without an error", name)
		}
		r.Close()
	}
}

func TestMediaTypes(t *testing.T) {
	for mediaType, want := range map[string]Kind{
		ocispec.MediaTypeImageLayer:                                    None,
		ocispec.MediaTypeImageLayerGzip:                                Gzip,
		ocispec.MediaTypeImageLayerZstd:                                Zstd,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Gzip,
		"application/vnd.docker.image.rootfs.diff.tar":                 None,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            Gzip,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    Gzip,
		"application/vnd.oci.image.layer.v1.tar+encrypted":             "",
		"application/vnd.in-toto+json":                                 "",
		"application/vnd.oci.image.config.v1+json":                     "",
		"application/vnd.oci.image.layer.v1.tar.gzip+x":                "",
		"": "",
	} {
		got, err := MediaTypeKind(mediaType)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("MediaTypeKind(%q) = %q, %v, want %q", mediaType, got, err, want)
		}
	}
	for _, docker := range []bool{false, true} {
		for _, k := range []Kind{None, Gzip} {
			if got, err := MediaTypeKind(MediaType(k, docker)); got != k || err != nil {
				t.Errorf("MediaType(%s, %v) = %s: %s, %v", k, docker, MediaType(k, docker), got, err)
			}
		}
	}
}

type values map[string][]byte

func (v values) GetValue(b, k string) ([]byte, bool, error) {
	raw, ok := v[b+"/"+k]
	return raw, ok, nil
}
func (v values) PutValue(b, k string, value []byte) error { v[b+"/"+k] = value; return nil }

type has map[digest.Digest]bool

func (h has) Has(d digest.Digest) bool { return h[d] }

func TestMemo(t *testing.T) {
	layer, gz := digest.FromString("layer"), digest.FromString("gz")
	vs, blobs := values{}, has{gz: true}
	m := Memo{Values: vs, Blobs: blobs}
	if _, ok, err := m.Get(layer, Gzip); ok || err != nil {
		t.Fatalf("empty memo: %v %v", ok, err)
	}
	want := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: gz, Size: 7}
	if err := m.Put(layer, Gzip, want); err != nil {
		t.Fatal(err)
	}
	got, ok, err := m.Get(layer, Gzip)
	if !ok || err != nil || got.Digest != gz || got.Size != 7 {
		t.Fatalf("Get = %+v %v %v", got, ok, err)
	}
	if _, ok, _ := m.Get(layer, Zstd); ok {
		t.Error("gzip found as zstd")
	}
	delete(blobs, gz)
	if _, ok, _ := m.Get(layer, Gzip); ok {
		t.Error("found although its blob is gone")
	}
	for k := range vs {
		vs[k] = []byte(strings.Repeat("x", 10))
	}
	if _, ok, err := m.Get(layer, Gzip); ok || err != nil {
		t.Errorf("unreadable note: %v %v, want a miss", ok, err)
	}
}

// TestWriteLevels: each level of each kind can be read back, and the bytes do not depend on the number of workers.
func TestWriteLevels(t *testing.T) {
	ctx := context.Background()
	for _, size := range []int{0, 1, zstdBlock, zstdBlock + 1, 2*zstdBlock + 12345} {
		in := make([]byte, size)
		for i := range in {
			in[i] = byte(i*i>>9) ^ byte(i>>3)
		}
		var first []byte
		for _, workers := range []int{1, 2, 8} {
			var out bytes.Buffer
			if err := WriteZstd(ctx, &out, bytes.NewReader(in), workers); err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = out.Bytes()
			} else if !bytes.Equal(first, out.Bytes()) {
				t.Errorf("%d bytes with %d workers differ", size, workers)
			}
		}
		for _, kind := range []Kind{None, Gzip, Zstd} {
			lowest, highest, usual := Levels(kind)
			for _, level := range []int{lowest, 1, usual, highest} {
				if level > highest || size > 1 && size != zstdBlock+1 && level != usual {
					continue // the higher levels take their time
				}
				var out bytes.Buffer
				if err := Write(ctx, &out, bytes.NewReader(in), kind, level); err != nil {
					t.Fatal(err)
				}
				r, found, err := NewReader(bytes.NewReader(out.Bytes()))
				if err != nil || found != kind {
					t.Fatalf("%s %d: %s, %v", kind, level, found, err)
				}
				back, err := io.ReadAll(r)
				if err != nil || !bytes.Equal(back, in) {
					t.Errorf("%s level %d of %d bytes: %d came back, %v", kind, level, size, len(back), err)
				}
			}
		}
	}
	if err := Write(ctx, io.Discard, bytes.NewReader(nil), Gzip, 10); err == nil {
		t.Error("gzip has no level 10")
	}
}
