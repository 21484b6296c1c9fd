// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// TestRanges: a large blob that comes slowly comes in parts, several at once, from wherever it is read, and whatever breaks then.
func TestRanges(t *testing.T) {
	content := make([]byte, 2<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(content), Size: int64(len(content))}
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{RangeSize: 64 << 10})
	ref := s.Host + "/large:1"
	if err := r.Push(t.Context(), ref, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	read := func(kind registrytest.Kind, offset int64) ([]byte, int, error) {
		t.Helper()
		s.Forget()
		s.Fault.Break(registrytest.Slow, 1, "GET", "/blobs/")
		if kind != "" {
			n := 2
			if kind == registrytest.Corrupt {
				n = 1000 // it is in the middle of what is sent, of which only the beginning is read
			}
			s.Fault.Break(kind, n, "GET", "/blobs/")
		}
		defer s.Fault.Heal()
		rc, err := r.FetchFrom(t.Context(), ref, desc, offset)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		defer rc.Close()
		got, err := io.ReadAll(rc)
		return got, len(s.Ranges()), err
	}
	for _, kind := range []registrytest.Kind{"", registrytest.Slow, registrytest.Truncate, registrytest.Drop, registrytest.Busy, registrytest.Corrupt} {
		for _, offset := range []int64{0, 100_001} {
			got, ranges, err := read(kind, offset)
			if right := bytes.Equal(got, content[offset:]); err != nil || right != (kind != registrytest.Corrupt) {
				t.Errorf("%s from %d: %d bytes, right: %v, %v", kind, offset, len(got), right, err)
			}
			if want := 2<<20/(64<<10) - 4; ranges < want {
				t.Errorf("%s from %d: %d ranges, want at least %d", kind, offset, ranges, want)
			}
		}
	}
	s.Fault.Break(registrytest.Slow, 1, "GET", "/blobs/")
	s.Fault.Break(registrytest.Corrupt, 1000, "GET", "/blobs/")
	rc, err := r.Fetch(t.Context(), ref, desc)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if _, err := io.Copy(io.Discard, rc); err == nil {
		t.Error("a wrong part was not noticed")
	}
	s.Fault.Heal()

	// A server that does not know ranges sends everything, from the beginning.
	asked := 0
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			asked++
			for part := range slices.Chunk(content, 16<<10) {
				_, _ = w.Write(part)
				_ = http.NewResponseController(w).Flush()
				time.Sleep(time.Millisecond)
			}
		}
	}))
	defer plain.Close()
	rc, err = r.Fetch(t.Context(), strings.TrimPrefix(plain.URL, "http://")+"/large:1", desc)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, content) || asked > 2 {
		t.Errorf("without ranges: %d bytes, %v, %d requests", len(got), err, asked)
	}
}

// TestFetchRange: of a stretch of a blob no more is asked for than there is in it, after a broken connection too.
func TestFetchRange(t *testing.T) {
	content := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(content)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(content), Size: int64(len(content))}
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{})
	ref := s.Host + "/stretch:1"
	if err := r.Push(t.Context(), ref, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []registrytest.Kind{"", registrytest.Truncate} {
		s.Forget()
		if kind != "" {
			s.Fault.Break(kind, 1, "GET", "/blobs/")
		}
		rc, err := r.FetchRange(t.Context(), ref, desc, 100_000, 300_000)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(rc)
		if err != nil || !bytes.Equal(got, content[100_000:400_000]) {
			t.Errorf("%q: %d bytes that are not those of the stretch, or %v", kind, len(got), err)
		}
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
		s.Fault.Heal()
		ranges := s.Ranges()
		if len(ranges) == 0 {
			t.Errorf("%q: no range was asked for", kind)
		}
		for _, asked := range ranges {
			if !strings.HasSuffix(asked, "-399999") {
				t.Errorf("%q: asked for %s, want an end at 399999", kind, asked)
			}
		}
	}
}
