// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// The short way to a header gives the bytes that archive/tar gives.
func TestPlainHeaders(t *testing.T) {
	plain := 0
	rapid.Check(t, func(t *rapid.T) {
		e := index.Entry{
			Path:    rapid.StringMatching(`[a-zA-Z0-9._ é-]{1,40}(/[a-z]{0,30}x){0,4}`).Draw(t, "path"),
			Type:    rapid.SampledFrom([]index.Type{index.Dir, index.File, index.Symlink, index.CharDevice, index.BlockDevice, index.Fifo}).Draw(t, "type"),
			Mode:    rapid.Uint32Range(0, 0o7777).Draw(t, "mode"),
			UID:     rapid.SampledFrom([]uint32{0, 1000, 1<<21 - 1, 1 << 21, 1<<32 - 1}).Draw(t, "uid"),
			GID:     rapid.SampledFrom([]uint32{0, 1<<21 - 1, 1 << 21}).Draw(t, "gid"),
			ModTime: rapid.SampledFrom([]int64{0, 1, -1, 1714979289e9, 1<<33*1e9 - 1, 1 << 33 * 1e9}).Draw(t, "mtime"),
		}
		switch e.Type {
		case index.File:
			e.Size = rapid.SampledFrom([]int64{0, 1, 1<<33 - 1, 1 << 33}).Draw(t, "size")
			if rapid.Bool().Draw(t, "is hard link") {
				e.HardLink = rapid.StringMatching(`[a-z]{1,110}`).Draw(t, "hard link")
			}
		case index.Symlink:
			e.Target = rapid.StringMatching(`[./a-zé]{1,110}`).Draw(t, "target")
		case index.CharDevice, index.BlockDevice:
			e.Major, e.Minor = rapid.Uint32Range(1, 4095).Draw(t, "major"), rapid.Uint32Range(0, 1<<20-1).Draw(t, "minor")
		}
		got, ok := appendPlainHeader([]byte("before"), &e)
		if !ok {
			return
		}
		plain++
		h, err := tarHeader(&e)
		if err != nil {
			t.Fatal(err)
		}
		want, err := appendTarHeader([]byte("before"), h)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("header of %+v:\n%q\nwant\n%q", e, got, want)
		}
	})
	if plain < 10 {
		t.Errorf("only %d headers were plain", plain)
	}
}

// chopped hands out its bytes in odd pieces, as no file does.
type chopped struct {
	io.Reader
	r *rand.Rand
}

func (c chopped) Read(p []byte) (int, error) {
	return c.Reader.Read(p[:min(len(p), 1+c.r.IntN(70_000))])
}

// Whatever the sizes, where batches end and how many workers there are: the tar is the one that archive/tar writes.
func TestWriteTarIsPlain(t *testing.T) {
	defer func(n int) { readAheadWorkers = n }(readAheadWorkers)
	r := rand.New(rand.NewPCG(1, 2))
	var items []tarItem
	var want bytes.Buffer
	tw := tar.NewWriter(&want)
	add := func(e index.Entry, content []byte) {
		h, err := tarHeader(&e)
		if err == nil {
			err = tw.WriteHeader(h)
		}
		if err == nil && e.HardLink == "" {
			_, err = tw.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
		items = append(items, tarItem{entry: e, open: func() (io.ReadCloser, error) {
			return io.NopCloser(chopped{bytes.NewReader(content), rand.New(rand.NewPCG(uint64(len(content)), 3))}), nil
		}})
	}
	items = append(items, tarItem{entry: index.Entry{Type: index.Dir, Mode: 0o755}}) // the root, which is not written
	for i, size := range []int{0, 1, 511, 512, 513, largeFile - 1, largeFile, largeFile + 1, 2*largeFile + 512, batchBytes, 3 * largeFile, 5, 100, 0} {
		content := make([]byte, size)
		for j := range content {
			content[j] = byte(r.Uint32())
		}
		e := index.Entry{Path: fmt.Sprintf("file%02d-%s", i, strings.Repeat("long", i*4)), Type: index.File, Mode: 0o644, Size: int64(size)}
		if i%2 == 0 {
			e.Digest = digest.FromBytes(content)
		}
		if i == 3 {
			e.Xattrs = map[string]string{"user.x": "y"}
		}
		add(e, content)
		link := e
		link.Path, link.HardLink = e.Path+"link", e.Path
		add(link, nil)
	}
	for i := range 1500 {
		content := []byte(strings.Repeat("x", i))
		add(index.Entry{Path: fmt.Sprintf("small%04d", i), Type: index.File, Mode: 0o600, Size: int64(i)}, content)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	for _, readAheadWorkers = range []int{1, 2, 7} {
		path := filepath.Join(t.TempDir(), "tar")
		mine := append([]tarItem(nil), items...)
		size, diffID, err := writeTar(t.Context(), fsys.OS, path, mine, false)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want.Bytes()) || size != int64(len(got)) || diffID != digest.FromBytes(got) {
			t.Fatalf("%d workers: not the same tar (%d bytes, should be %d)", readAheadWorkers, len(got), want.Len())
		}
		for _, it := range mine[1:] {
			e := it.entry
			content := got[e.Offset : e.Offset+e.Size]
			if digest.FromBytes(content) != e.Digest {
				t.Errorf("%q is not at its offset", e.Path)
			}
		}
	}
}

// A file that is not what it was, longer, shorter or other, is found out.
func TestWriteTarNoticesChanges(t *testing.T) {
	for _, size := range []int64{100, largeFile + 100} {
		for name, delta := range map[string]int64{"longer": 1, "shorter": -1, "other": 0} {
			e := index.Entry{Path: "f", Type: index.File, Size: size, Digest: digest.FromString("what it was")}
			if delta != 0 {
				e.Digest = ""
			}
			path := filepath.Join(t.TempDir(), "content")
			if err := os.WriteFile(path, make([]byte, size+delta), 0o600); err != nil {
				t.Fatal(err)
			}
			for kind, open := range map[string]func() (io.ReadCloser, error){
				"file":   func() (io.ReadCloser, error) { return os.Open(path) },
				"reader": func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(make([]byte, size+delta))), nil },
			} {
				items := []tarItem{{entry: index.Entry{Type: index.Dir}}, {entry: e, open: open}}
				_, _, err := writeTar(t.Context(), fsys.OS, filepath.Join(t.TempDir(), "tar"), items, false)
				if !errors.Is(err, ErrChanged) {
					t.Errorf("%s of %d bytes, %s: %v", kind, size, name, err)
				}
			}
		}
	}
}

// knownReader is a file that says, as often as it is allowed to, that its digest is known.
type knownReader struct {
	io.Reader
	sum   digest.Digest
	times int
}

func (k *knownReader) Close() error { return nil }

func (k *knownReader) Digest() (digest.Digest, bool) {
	k.times--
	return k.sum, k.times >= 0
}

// TestWriteTarTakesKnownDigests claims digests that no bytes have, so that it shows which ones are taken.
func TestWriteTarTakesKnownDigests(t *testing.T) {
	claimed := digest.FromString("not what is in it")
	for _, c := range []struct {
		name  string
		size  int
		times int
		want  error
	}{
		{"small", 5000, 1, nil},
		{"small, changed", 5000, 0, ErrChanged},
		{"large", 3 * largeFile, 2, nil},
		{"large, changed before", 3 * largeFile, 0, ErrChanged},
		{"large, changed while it was read", 3 * largeFile, 1, ErrChanged},
	} {
		t.Run(c.name, func(t *testing.T) {
			items := []tarItem{
				{entry: index.Entry{Type: index.Dir, Mode: 0o755}},
				{
					entry: index.Entry{Path: "f", Type: index.File, Mode: 0o644, Size: int64(c.size), Digest: claimed},
					open: func() (io.ReadCloser, error) {
						return &knownReader{bytes.NewReader(make([]byte, c.size)), claimed, c.times}, nil
					},
				},
			}
			_, _, err := writeTar(t.Context(), fsys.OS, filepath.Join(t.TempDir(), "tar"), items, false)
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if err == nil && items[1].entry.Digest != claimed {
				t.Errorf("digest %s", items[1].entry.Digest)
			}
		})
	}
}
