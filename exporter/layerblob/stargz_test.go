// SPDX-License-Identifier: Apache-2.0

package layerblob

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

// stargzTar is a tar with everything that a layer has.
func stargzTar(t *testing.T) (raw []byte, contents map[string][]byte) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	contents = map[string][]byte{}
	rng := rand.New(rand.NewPCG(1, 2))
	put := func(h tar.Header, content []byte) {
		t.Helper()
		h.Size, h.ModTime = int64(len(content)), time.Unix(1600000000, 0)
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			contents[h.Name] = content
		}
	}
	file := func(name string, size int) {
		content := make([]byte, size)
		for i := range content[:min(size, 10_000)] {
			content[i] = byte(rng.IntN(20))
		}
		put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Uname: "u", Uid: 1}, content)
	}
	put(tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, nil)
	file("d/empty", 0)
	for i, size := range []int{1, 511, 512, 513, stargzChunk - 1, stargzChunk, stargzChunk + 1, 2*stargzChunk + 17} {
		file("d/f"+strings.Repeat("x", i), size)
	}
	put(tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("long/", 60) + "name", Mode: 0o4755, PAXRecords: map[string]string{
		"SCHILY.xattr.user.k": "v",
	}}, []byte("long"))
	put(tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "d/f"}, nil)
	put(tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "d/f"}, nil)
	put(tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}, nil)
	put(tar.Header{Typeflag: tar.TypeFifo, Name: "p"}, nil)
	for range 300 { // more than there is room for at once
		file("many/"+digest.FromBytes([]byte{byte(rng.IntN(256)), byte(rng.IntN(256))}).Encoded()[:8], 1+rng.IntN(5000))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return append(b.Bytes(), make([]byte, 4096)...), contents
}

// TestStargz: the reference library reads what we write, it says the same as what the library writes itself, and any number of processors writes
// the same.
func TestStargz(t *testing.T) {
	raw, contents := stargzTar(t)
	want := digest.FromBytes(raw)
	var ours bytes.Buffer
	made, err := writeStargz(t.Context(), &ours, bytes.NewReader(raw), want, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, workers := range []int{8} {
		var b bytes.Buffer
		again, err := writeStargz(t.Context(), &b, &dribble{bytes.NewReader(raw)}, want, 1, workers)
		if err != nil || again != made || !bytes.Equal(b.Bytes(), ours.Bytes()) {
			t.Errorf("%d workers make something else: %+v, %v", workers, again, err)
		}
	}

	// It is gzip, of the tar and what is behind it.
	z, err := gzip.NewReader(bytes.NewReader(ours.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil || !bytes.HasPrefix(plain, raw) || digest.FromBytes(plain) != made.diffID {
		t.Errorf("%d bytes, diff ID %s, want %s, %v", len(plain), digest.FromBytes(plain), made.diffID, err)
	}

	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(ours.Bytes()), 0, int64(ours.Len())))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.VerifyTOC(made.toc); err != nil {
		t.Error(err)
	}
	verifiers, err := r.Verifiers()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range contents {
		f, err := r.OpenFile(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := io.ReadAll(f)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %d bytes instead of %d, %v", name, len(got), len(content), err)
		}
		for at := int64(0); at < int64(len(content)); {
			e, ok := r.ChunkEntryForOffset(name, at)
			if !ok {
				t.Fatalf("%s: no chunk at %d", name, at)
			}
			v, err := verifiers.Verifier(e)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = v.Write(content[e.ChunkOffset : e.ChunkOffset+e.ChunkSize])
			if !v.Verified() {
				t.Errorf("%s: chunk at %d has another digest", name, at)
			}
			at += e.ChunkSize
		}
	}

	var theirs bytes.Buffer
	lib := estargz.NewWriterLevel(&theirs, 1)
	if err := lib.AppendTarLossLess(bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	if _, err := lib.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(tocOf(t, theirs.Bytes()), tocOf(t, ours.Bytes()), cmpopts.IgnoreUnexported(estargz.TOCEntry{})); diff != "" {
		t.Errorf("the table of contents is not the library's:\n%s", diff)
	}
}

// tocOf reads the table of contents without what depends on the compressor, or on how often names are repeated.
func tocOf(t *testing.T, blob []byte) *estargz.JTOC {
	t.Helper()
	sr := io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob)))
	at, _, err := estargz.OpenFooter(sr)
	if err != nil {
		t.Fatal(err)
	}
	toc, _, err := new(estargz.GzipDecompressor).ParseTOC(io.NewSectionReader(sr, at, sr.Size()-at))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range toc.Entries {
		if (e.Offset > 0) != (e.ChunkDigest != "") {
			t.Errorf("%s: offset %d", e.Name, e.Offset)
		}
		e.Offset, e.Uname, e.Gname = 0, "", ""
		if len(e.Xattrs) == 0 {
			e.Xattrs = nil
		}
	}
	return toc
}

type dribble struct{ r io.Reader }

func (d *dribble) Read(p []byte) (int, error) { return d.r.Read(p[:min(len(p), 1+len(p)/3)]) }

func TestStargzErrors(t *testing.T) {
	raw, _ := stargzTar(t)
	if _, err := writeStargz(t.Context(), io.Discard, bytes.NewReader(raw), digest.FromString("x"), 1, 2); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("another digest: %v", err)
	}
	if _, err := writeStargz(t.Context(), io.Discard, bytes.NewReader(raw[:len(raw)/2]), digest.FromBytes(raw[:len(raw)/2]), 1, 2); err == nil {
		t.Error("half a tar was taken")
	}
	boom := errors.New("boom")
	if _, err := writeStargz(t.Context(), full{boom}, bytes.NewReader(raw), digest.FromBytes(raw), 1, 2); !errors.Is(err, boom) {
		t.Errorf("full disk: %v", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "./stargz.index.json"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := writeStargz(t.Context(), io.Discard, bytes.NewReader(b.Bytes()), digest.FromBytes(b.Bytes()), 1, 2); err == nil || !strings.Contains(err.Error(), "stargz.index.json") {
		t.Errorf("a table of contents already: %v", err)
	}
}

type full struct{ err error }

func (f full) Write([]byte) (int, error) { return 0, f.err }
