// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// TestUploadsTakeTurns: one sends, the others wait for it to end; if it fails the next one sends. Who gives up does not wait.
func TestUploadsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		us := &uploads{now: map[uploading]*sending{}}
		blob := digest.FromString("blob")
		from, end, err := us.enter(t.Context(), "host", blob, "a")
		if from != "" || err != nil {
			t.Fatalf("the first: %q, %v", from, err)
		}
		var sent, mounted atomic.Int32
		for range 5 {
			go func() {
				from, end, err := us.enter(t.Context(), "host", blob, "b")
				switch {
				case err != nil:
					t.Error(err)
				case from == "":
					sent.Add(1)
					end(true)
				case from == "b":
					mounted.Add(1)
				}
			}()
		}
		gaveUp := errors.New("gave up")
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			if _, _, err := us.enter(ctx, "host", blob, "c"); !errors.Is(err, gaveUp) {
				t.Errorf("who gives up: %v", err)
			}
		}()
		synctest.Wait()
		cancel(gaveUp)
		for _, other := range []uploading{{"other host", blob}, {"host", digest.FromString("other blob")}} {
			_, end, err := us.enter(t.Context(), other.host, other.digest, "b")
			if err != nil {
				t.Fatal(err)
			}
			end(true) // nobody was in its way
		}
		synctest.Wait()
		if sent.Load()+mounted.Load() != 0 {
			t.Error("somebody did not wait")
		}
		end(false)
		synctest.Wait()
		if sent.Load() < 1 || sent.Load()+mounted.Load() != 5 || len(us.now) != 0 {
			t.Errorf("%d sent, %d need not, %d left; the first had failed", sent.Load(), mounted.Load(), len(us.now))
		}
	})
}

// TestPushWhileSent sends a blob to a repository while it is on its way to another one and to the same: both wait, nothing is sent twice.
func TestPushWhileSent(t *testing.T) {
	blob := bytes.Repeat([]byte("blob"), 1<<16)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }
	var puts atomic.Int32
	s := registrytest.Start(t, registrytest.Options{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodPut && strings.Contains(req.URL.Path, "/uploads/") {
				puts.Add(1)
			}
			next.ServeHTTP(w, req)
		})
	}})
	r := New(Options{DockerConfigDir: t.TempDir()})
	named, err := reference.ParseNormalizedNamed(s.Host + "/a")
	if err != nil {
		t.Fatal(err)
	}
	u, err := r.uploader(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	host := strings.TrimSuffix(u.base, "a/")
	_, end, err := r.hosts.uploads.enter(t.Context(), host, desc.Digest, "a") // the first is about to send
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error)
	for _, repository := range []string{"/a", "/b"} {
		other := r.With(func(context.Context, string) (string, string, error) { return "", "", nil })
		go func() { errs <- other.Push(t.Context(), s.Host+repository, desc, open, nil) }()
	}
	err = u.send(desc, open, func(int64) {}, &partial{})
	end(err == nil)
	for range 2 {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, repository := range []string{"/a", "/b"} {
		if b, err := r.FetchBytes(t.Context(), s.Host+repository, desc); err != nil || !bytes.Equal(b, blob) {
			t.Errorf("%s: %d bytes came back, %v", repository, len(b), err)
		}
	}
	if n := puts.Load(); n > 2 { // who comes after the end of the first knows of no repository to mount from
		t.Errorf("sent %d times", n)
	}
}
