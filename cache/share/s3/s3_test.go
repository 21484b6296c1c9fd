// SPDX-License-Identifier: Apache-2.0

package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/chunk"
	"github.com/seed-68981b69/slipway/cache/share/s3/s3test"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, s *s3test.Server, change func(*Options)) *Backend {
	t.Helper()
	o := Options{
		Bucket: s.Bucket, EndpointURL: s.Endpoint, PathStyle: true, Prefix: "ci/", AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey,
	}
	if change != nil {
		change(&o)
	}
	b, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func describe(b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
}

func from(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

func TestS3(t *testing.T) {
	server := s3test.New(t)
	ctx := t.Context()
	b := open(t, server, nil)
	content := bytes.Repeat([]byte("0123456789"), 200_000)
	desc := describe(content)
	other := describe([]byte("other"))

	t.Run("blobs", func(t *testing.T) {
		if m, err := b.Missing(ctx, []ocispec.Descriptor{desc, other}); err != nil || len(m) != 2 {
			t.Fatalf("missing at first: %v, %v", m, err)
		}
		if _, err := b.Open(ctx, desc, 0, -1); !errors.Is(err, share.ErrNotFound) {
			t.Errorf("what is not there: %v", err)
		}
		if err := b.Put(ctx, desc, from(content)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(server.Dir, "ci/blobs/sha256", desc.Digest.Encoded())); err != nil {
			t.Error(err)
		}
		if err := b.Put(ctx, desc, func() (io.ReadCloser, error) { return nil, errors.New("opened though it is there") }); err != nil {
			t.Error(err)
		}
		if m, err := b.Missing(ctx, []ocispec.Descriptor{desc, other}); err != nil || len(m) != 1 || m[0].Digest != other.Digest {
			t.Errorf("missing: %v, %v", m, err)
		}
		for _, r := range [][2]int64{{0, -1}, {0, 10}, {0, 1}, {5, 10}, {1_999_990, 10}, {1_999_990, -1}, {7, 0}, {0, 0}} {
			r0, length := r[0], r[1]
			rc, err := b.Open(ctx, desc, r0, length)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(rc)
			rc.Close()
			want := content[r0:]
			if length >= 0 {
				want = want[:length]
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes at %d: %d, %v", length, r0, len(got), err)
			}
		}
	})
	t.Run("other bytes", func(t *testing.T) {
		for name, bad := range map[string][]byte{"short": []byte("othe"), "wrong": []byte("0ther")} {
			if err := b.Put(ctx, other, from(bad)); err == nil {
				t.Errorf("%s: put without an error", name)
			}
		}
		if m, err := b.Missing(ctx, []ocispec.Descriptor{other}); err != nil || len(m) != 1 {
			t.Errorf("it has become visible: %v, %v", m, err)
		}
		if err := b.Put(ctx, other, func() (io.ReadCloser, error) { return nil, os.ErrDeadlineExceeded }); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("what cannot be opened: %v", err)
		}
	})
	t.Run("refs", func(t *testing.T) {
		if _, _, err := b.Ref(ctx, "main"); !errors.Is(err, share.ErrNotFound) {
			t.Errorf("no ref: %v", err)
		}
		if err := b.PutRef(ctx, "main", []byte("one"), nil, ""); err != nil {
			t.Fatal(err)
		}
		doc, v1, err := b.Ref(ctx, "main")
		if err != nil || string(doc) != "one" || v1 == "" {
			t.Fatalf("%q %q %v", doc, v1, err)
		}
		if err := b.PutRef(ctx, "main", []byte("x"), nil, ""); !errors.Is(err, share.ErrConflict) {
			t.Errorf("as if it were new: %v", err)
		}
		if err := b.PutRef(ctx, "main", []byte("two"), nil, v1); err != nil {
			t.Fatal(err)
		}
		if err := b.PutRef(ctx, "main", []byte("x"), nil, v1); !errors.Is(err, share.ErrConflict) {
			t.Errorf("over one that has changed: %v", err)
		}
		if err := b.PutRef(ctx, "gone", []byte("x"), nil, v1); !errors.Is(err, share.ErrConflict) {
			t.Errorf("over one that has gone: %v", err)
		}
		if doc, _, err := b.Ref(ctx, "main"); err != nil || string(doc) != "two" {
			t.Errorf("%q, %v", doc, err)
		}
		for _, name := range []string{"", "..", "a/../b", "/a"} {
			if err := b.PutRef(ctx, name, nil, nil, ""); err == nil {
				t.Errorf("name %q was taken", name)
			}
		}
	})
	t.Run("two writers", func(t *testing.T) {
		// Each adds its line to the ref again and again: nothing is lost.
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := range 5 {
					for {
						doc, v, err := b.Ref(ctx, "lines")
						if err != nil && !errors.Is(err, share.ErrNotFound) {
							t.Error(err)
							return
						}
						err = b.PutRef(ctx, "lines", fmt.Appendf(doc, "%d-%d\n", w, i), nil, v)
						if err == nil {
							break
						} else if !errors.Is(err, share.ErrConflict) {
							t.Error(err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
		doc, _, err := b.Ref(ctx, "lines")
		if n := strings.Count(string(doc), "\n"); err != nil || n != 20 {
			t.Errorf("%d lines of 20, %v", n, err)
		}
	})
	t.Run("touch", func(t *testing.T) {
		b := open(t, server, func(o *Options) { o.TouchRefresh = 24 * time.Hour })
		p := filepath.Join(server.Dir, "ci/blobs/sha256", desc.Digest.Encoded())
		old := time.Now().Add(-25 * time.Hour)
		younger := time.Now().Add(-23 * time.Hour)
		for _, when := range []time.Time{younger, old} {
			if err := os.Chtimes(p, when, when); err != nil {
				t.Fatal(err)
			}
			if m, err := b.Missing(ctx, []ocispec.Descriptor{desc}); err != nil || len(m) != 0 {
				t.Fatalf("%v, %v", m, err)
			}
			// This server changes the metadata of what is copied onto itself and leaves it its time, unlike Amazon's.
			info, err := b.client.StatObject(ctx, server.Bucket, b.blobName(desc.Digest), minio.StatObjectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if touched := info.UserMetadata["Touched"] != ""; touched != when.Equal(old) {
				t.Errorf("of %v: touched: %v", when, touched)
			}
		}
		got, err := os.ReadFile(p)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
	t.Run("size", func(t *testing.T) {
		// What is there under the digest and is not the blob does not count.
		p := filepath.Join(server.Dir, "ci/blobs/sha256", desc.Digest.Encoded())
		if err := os.Truncate(p, 100); err != nil {
			t.Fatal(err)
		}
		if err := b.Put(ctx, desc, from(content)); err != nil {
			t.Fatal(err)
		}
		if m, err := b.Missing(ctx, []ocispec.Descriptor{desc}); err != nil || len(m) != 0 {
			t.Errorf("%v, %v", m, err)
		}
	})
	t.Run("credentials", func(t *testing.T) {
		b := open(t, server, func(o *Options) { o.SecretAccessKey = "secret-that-is-wrong" })
		_, err := b.Missing(ctx, []ocispec.Descriptor{desc})
		if err == nil || strings.Contains(err.Error(), "secret-that-is-wrong") || !strings.Contains(err.Error(), "credentials") {
			t.Errorf("wrong secret: %v", err)
		}
		t.Setenv("AWS_ACCESS_KEY_ID", server.AccessKey)
		t.Setenv("AWS_SECRET_ACCESS_KEY", server.SecretKey)
		id, secret, _, err := Ambient()
		if err != nil || id != server.AccessKey || secret != server.SecretKey {
			t.Errorf("from the environment: %q, %v", id, err)
		}
		b = open(t, server, func(o *Options) { o.AccessKeyID, o.SecretAccessKey = "", "" })
		if _, err := b.Missing(ctx, []ocispec.Descriptor{desc}); err == nil {
			t.Error("a request without credentials was answered: with whose?")
		}
	})
	t.Run("chunks", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "file"), content, 0o640); err != nil {
			t.Fatal(err)
		}
		ref, _, err := chunk.NewWriter(b).AddTree(ctx, dir, chunk.TreeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		to := t.TempDir()
		if _, err := chunk.Restore(ctx, b, ref, to); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(to, "file")); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

// TestTrouble has a server that fails at times, and one that has no conditional writes.
func TestTrouble(t *testing.T) {
	server := s3test.New(t)
	target, err := url.Parse(server.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var fail atomic.Int32
	var plain atomic.Bool
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host
	}}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && fail.Add(-1) >= 0 {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		if plain.Load() && (r.Header.Get("If-Match") != "" || r.Header.Get("If-None-Match") != "") {
			w.WriteHeader(http.StatusNotImplemented)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	b := open(t, server, func(o *Options) { o.EndpointURL = front.URL })
	ctx := t.Context()
	content := []byte("content")
	fail.Store(2)
	if err := b.Put(ctx, describe(content), from(content)); err != nil {
		t.Errorf("after two failures: %v", err)
	}
	plain.Store(true)
	for range 2 {
		if err := b.PutRef(ctx, "ref", []byte("doc"), nil, ""); err != nil {
			t.Error(err)
		}
	}
	if !b.unconditional.Load() {
		t.Error("it still asks for conditional writes")
	}
	canceled, cancel := context.WithCancel(ctx)
	fail.Store(100)
	cancel()
	if err := b.Put(canceled, describe([]byte("y")), from([]byte("y"))); err == nil {
		t.Error("put after a cancellation")
	}
	front.CloseClientConnections()
}

func TestOptions(t *testing.T) {
	o, taken, err := ParseOptions(map[string]string{
		"type": "s3", "bucket": "b", "region": "r", "prefix": "p/", "endpoint_url": "http://x", "use_path_style": "true", "name": "n",
		"access_key_id": "a", "secret_access_key": "s", "session_token": "t", "upload_parallelism": "8", "touch_refresh": "1h",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Options{"b", "r", "p/", "http://x", true, "a", "s", "t", 8, time.Hour}
	if o != want || len(taken) != 10 {
		t.Errorf("%+v, %v", o, taken)
	}
	for _, attrs := range []map[string]string{{"use_path_style": "maybe"}, {"upload_parallelism": "0"}, {"touch_refresh": "soon"}} {
		if _, _, err := ParseOptions(attrs); err == nil {
			t.Errorf("%v was taken", attrs)
		}
	}
	for _, o := range []Options{{}, {Bucket: "b", EndpointURL: "ftp://x"}, {Bucket: "b", EndpointURL: "http://x/path"}, {Bucket: "b", AccessKeyID: "a"}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
	_, err = New(Options{Bucket: "b", EndpointURL: "http://user:hunter2@host"})
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v", err)
	}
}
