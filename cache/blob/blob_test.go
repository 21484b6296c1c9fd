// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, _ := os.ReadDir(s.ingest()); len(left) > 0 {
			t.Errorf("left in ingest: %v", left)
		}
	})
	return s
}

func desc(b string) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromString(b), Size: int64(len(b))}
}

func TestPutVerifies(t *testing.T) {
	ctx := t.Context()
	s := open(t)
	good := desc("content")
	for name, tt := range map[string]struct {
		bytes string
		want  ocispec.Descriptor
		err   error
	}{
		"other bytes":    {"CONTENT", good, ErrDigest},
		"too short":      {"cont", good, ErrSize},
		"too long":       {"content and more", good, ErrSize},
		"size lies":      {"content", ocispec.Descriptor{Digest: good.Digest, Size: 8}, ErrSize},
		"unknown digest": {"content", ocispec.Descriptor{Digest: "md5:00"}, digest.ErrDigestUnsupported},
		"path as digest": {"content", ocispec.Descriptor{Digest: "sha256:../../../etc/passwd"}, digest.ErrDigestInvalidLength},
		"nothing at all": {"", ocispec.Descriptor{Digest: good.Digest}, ErrDigest},
	} {
		if err := s.Put(ctx, strings.NewReader(tt.bytes), tt.want); !errors.Is(err, tt.err) {
			t.Errorf("%s: %v, want %v", name, err, tt.err)
		}
	}
	if s.Has(good.Digest) {
		t.Error("a wrong blob is visible")
	}
	if _, err := s.Open(good.Digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("Open: %v", err)
	}
	if err := s.Put(ctx, strings.NewReader("content"), good); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(ctx, nil, good); err != nil {
		t.Errorf("a blob that is there must not be read: %v", err)
	}
	b, err := s.ReadAll(good.Digest)
	if string(b) != "content" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	r, err := s.Open(good.Digest)
	if err != nil {
		t.Fatal(err)
	}
	part := make([]byte, 3)
	if _, err := r.ReadAt(part, 2); err != nil || string(part) != "nte" || r.Size() != 7 {
		t.Errorf("%q, %v, size %d", part, err, r.Size())
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}

	if err := os.WriteFile(filepath.Join(s.Dir(), "blobs/sha256", good.Digest.Encoded()), []byte("c0ntent"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadAll(good.Digest); !errors.Is(err, ErrDigest) {
		t.Errorf("damaged blob: %v", err)
	}
	if err := errors.Join(s.Delete(good.Digest), s.Delete(good.Digest)); err != nil || s.Has(good.Digest) {
		t.Errorf("Delete: %v", err)
	}
}

// countingReader says how many bytes were read from all of its kind.
type countingReader struct {
	io.Reader
	n *atomic.Int64
}

func (c countingReader) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func TestConcurrentWritersWriteOnce(t *testing.T) {
	s := open(t)
	content := strings.Repeat("x", 1<<20)
	var read atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.Put(t.Context(), countingReader{strings.NewReader(content), &read}, desc(content)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if read.Load() != 1<<20 {
		t.Errorf("%d bytes were read", read.Load())
	}

	// The second takes over when the first fails, and gives up when it is cancelled.
	r, w := io.Pipe()
	first := make(chan error, 1)
	go func() { first <- s.Put(t.Context(), r, desc("slow")) }()
	if _, err := w.Write([]byte("sl")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if err := s.Put(ctx, strings.NewReader("slow"), desc("slow")); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	second := make(chan error, 1)
	go func() { second <- s.Put(t.Context(), strings.NewReader("slow"), desc("slow")) }()
	broken := errors.New("connection lost")
	w.CloseWithError(broken)
	if err := <-first; !errors.Is(err, broken) {
		t.Errorf("first: %v", err)
	}
	if err := <-second; err != nil || !s.Has(desc("slow").Digest) {
		t.Errorf("second: %v", err)
	}
}

func TestWriter(t *testing.T) {
	s := open(t)
	w, err := s.Writer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "abc"); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(4, ""); !errors.Is(err, ErrSize) {
		t.Errorf("wrong size: %v", err)
	}
	if err := w.Commit(3, desc("abc").Digest); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), w.Close()); err != nil || !s.Has(w.Digest()) || w.Size() != 3 {
		t.Errorf("%v", err)
	}
	dropped, err := s.Writer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(dropped, "gone"); err != nil {
		t.Fatal(err)
	}
	if err := dropped.Close(); err != nil || s.Has(dropped.Digest()) {
		t.Errorf("%v", err)
	}
}

func TestLinkAndWalk(t *testing.T) {
	s := open(t)
	path := filepath.Join(t.TempDir(), "layer.tar")
	if err := os.WriteFile(path, []byte("a tar"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := desc("a tar").Digest
	if err := errors.Join(s.Link(d, path), s.Link(d, path)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if b, err := s.ReadAll(d); string(b) != "a tar" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := s.Walk(func(got digest.Digest, size int64) error {
		if got != d || size != 5 {
			t.Errorf("%s, %d", got, size)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestOpenSweepsAndKeeps(t *testing.T) {
	s := open(t)
	if _, err := s.PutBytes(t.Context(), "text/plain", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.ingestName(), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := Open(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if !again.Has(desc("kept").Digest) {
		t.Error("a blob is gone")
	}
	for _, name := range []string{"oci-layout", "index.json"} {
		b, err := os.ReadFile(filepath.Join(s.Dir(), name))
		if err != nil || !json.Valid(bytes.TrimSpace(b)) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}
