// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/share/s3/s3test"
)

// patience bounds waiting for what must happen: longer than any machine needs.
const patience = time.Minute

// TestSharedCachePlaces: every place with min and max, read on an empty store. min has what the result is made of, max every stage.
func TestSharedCachePlaces(t *testing.T) {
	s := newSharing(t)
	dir := t.TempDir()
	places := map[string]func(mode string) (to, from bkclient.CacheOptionsEntry){
		"registry": func(mode string) (to, from bkclient.CacheOptionsEntry) {
			ref := s.server.Host + "/places/cache:" + mode
			return bkclient.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref, "mode": mode}},
				bkclient.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}}
		},
		"local": func(mode string) (to, from bkclient.CacheOptionsEntry) {
			return bkclient.CacheOptionsEntry{Type: "local", Attrs: map[string]string{"dest": filepath.Join(dir, mode), "mode": mode}},
				bkclient.CacheOptionsEntry{Type: "local", Attrs: map[string]string{"src": filepath.Join(dir, mode)}}
		},
	}
	if bucket, err := s3test.Start(t.TempDir()); err != nil {
		t.Logf("NO S3 SERVER: LEFT OUT: %v", err)
	} else {
		t.Cleanup(bucket.Stop)
		places["s3"] = func(mode string) (to, from bkclient.CacheOptionsEntry) {
			entry := func() bkclient.CacheOptionsEntry {
				return bkclient.CacheOptionsEntry{Type: "s3", Attrs: map[string]string{
					"bucket": bucket.Bucket, "endpoint_url": bucket.Endpoint, "use_path_style": "true", "region": "us-east-1", "prefix": "ci/", "name": mode,
					"access_key_id": bucket.AccessKey, "secret_access_key": bucket.SecretKey,
				}}
			}
			to, from = entry(), entry()
			to.Attrs["mode"], to.Attrs["touch_refresh"], to.Attrs["upload_parallelism"] = mode, "1h", "2"
			return to, from
		}
	}
	te := openTest(t)
	for _, mode := range []string{"min", "max"} {
		var all []bkclient.CacheOptionsEntry
		for _, place := range places {
			to, _ := place(mode)
			all = append(all, to)
		}
		s.build(te, "1", func(r *request) { r.cacheTo = all })
	}
	for kind, place := range places {
		for _, mode := range []string{"min", "max"} {
			t.Run(kind+" "+mode, func(t *testing.T) {
				s := &sharing{t, s.server, s.ref}
				_, from := place(mode)
				te := openTest(t)
				out := s.build(te, "1", func(r *request) {
					r.cacheFrom = []bkclient.CacheOptionsEntry{from}
					r.attrs["target"] = "tool"
				})
				if got, want := ran(out, "echo tool"), mode == "min"; got != want {
					t.Errorf("a stage that is not in the result ran: %v, want %v", got, want)
				}
				te.stop()
				te = openTest(t)
				out = s.build(te, "1", func(r *request) { r.cacheFrom = []bkclient.CacheOptionsEntry{from} })
				if ran(out, "RUN") || ran(out, "COPY") {
					t.Errorf("ran %+v", out.vertices)
				}
			})
		}
	}
}

// TestSharedCacheOrder: caches are asked in the order in which they are named, and of the later ones nothing is fetched but the document.
func TestSharedCacheOrder(t *testing.T) {
	s := newSharing(t)
	both := func(first, second string) (list []bkclient.CacheOptionsEntry) {
		for _, ref := range []string{first, second} {
			list = append(list, bkclient.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": s.server.Host + ref + "/cache:x"}})
		}
		return list
	}
	s.build(openTest(t), "1", func(r *request) { r.cacheTo = both("/one", "/two") })
	for first, second := range map[string]string{"/one": "/two", "/two": "/one"} {
		s.server.Forget()
		te := openTest(t)
		out := s.build(te, "1", func(r *request) { r.cacheFrom = both(first, second) })
		te.stop()
		if ran(out, "RUN") {
			t.Errorf("ran %+v", out.vertices)
		}
		// The documents of both are read, as blobs.
		if a, b := s.server.Requests("GET /v2"+first+"/cache/blobs/"), s.server.Requests("GET /v2"+second+"/cache/blobs/"); len(a) < 2 || len(b) > 1 {
			t.Errorf("asked the first for %q, the second for %q", a, b)
		}
	}
}

// TestSharedCacheCopyKey: the key of a COPY is made of what the indexes of its source say: no layer is fetched for it, though the stage that it
// copies from is another one than when it ran.
func TestSharedCacheCopyKey(t *testing.T) {
	s := newSharing(t)
	with := func(target, last string) func(*request) {
		return func(r *request) {
			r.files["Dockerfile"] = strings.Replace(cachedDockerfile, "FROM base\n", `FROM base AS other
RUN /bin/busybox echo tool > /tool && /bin/busybox echo more > /more

FROM scratch AS one
COPY --from=tool /tool /tool
FROM scratch AS two
COPY --from=other /tool /tool
FROM base
`, 1)
			r.attrs["target"] = target
		}
	}
	te := openTest(t)
	for _, target := range []string{"one", "other"} {
		s.build(te, "1", func(r *request) { with(target, "1")(r); r.cacheTo = s.entry("mode=max") })
	}
	d, _ := s.document()
	s.server.Forget()
	out := s.build(openTest(t), "1", func(r *request) { with("two", "1")(r); r.cacheFrom = s.entry() })
	if ran(out, "COPY") || ran(out, "RUN") {
		t.Errorf("ran %+v", out.vertices)
	}
	if layers := s.fetched(d); len(layers) > 0 {
		t.Errorf("fetched %d layers for a key", len(layers))
	}
}

// TestSharedCacheStartsEarly: a layer is on its way to the cache while a later step runs: that step waits for it.
func TestSharedCacheStartsEarly(t *testing.T) {
	sent := make(chan struct{})
	var once sync.Once
	server := registrytest.Start(t, registrytest.Options{Wrap: func(registry http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			registry.ServeHTTP(w, r)
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/team/cache/blobs/uploads/") {
				once.Do(func() { close(sent) })
			}
		})
	}})
	s := &sharing{t, server, server.Host + "/team/cache:main"}
	if err := runner(); err != nil {
		t.Skipf("needs slipway-runner: %v", err)
	}
	te := openTest(t)
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, errors.New("nothing has been sent while the build runs"))
	defer cancel()
	// The step waits for a file in its cache mount.
	open := func() {
		select {
		case <-sent:
		case <-ctx.Done():
			return
		}
		for ; ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
			if dirs, _ := filepath.Glob(filepath.Join(te.root, "mounts", "*", "0")); len(dirs) > 0 && os.WriteFile(filepath.Join(dirs[0], "open"), nil, 0o644) == nil {
				return
			}
		}
	}
	var group sync.WaitGroup
	group.Go(open)
	defer group.Wait()
	defer cancel()
	r := request{files: map[string]string{"busybox": s.busybox()}, cacheTo: s.entry("mode=max")}
	r.files["Dockerfile"] = strings.Replace(cachedDockerfile, "ARG LAST=1\n",
		"RUN --mount=type=cache,id=gate,target=/gate until test -e /gate/open; do /bin/busybox sleep 0.01; done\n", 1)
	if _, err := te.build(ctx, r); err != nil {
		t.Fatal(err, context.Cause(ctx))
	}
}

// TestSharedCacheArrives: layers come at the same time, and are unpacked while they come: the registry holds back the second half of each until
// all are asked for and something of each lies in the store.
func TestSharedCacheArrives(t *testing.T) {
	// (the layers are made of noise, so that half of a blob is half of a layer)
	var mu sync.Mutex
	halves := 0
	both := make(chan struct{})
	var layers []string
	var stored func() int
	server := registrytest.Start(t, registrytest.Options{Wrap: func(registry http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			held := r.Method == http.MethodGet && slices.ContainsFunc(layers, func(d string) bool { return strings.HasSuffix(r.URL.Path, d) })
			mu.Unlock()
			if !held {
				registry.ServeHTTP(w, r)
				return
			}
			rec := httptest.NewRecorder()
			registry.ServeHTTP(rec, r)
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			body := rec.Body.Bytes()
			_, _ = w.Write(body[:len(body)/2])
			_ = http.NewResponseController(w).Flush()
			mu.Lock()
			if halves++; halves == len(layers) {
				close(both)
			}
			mu.Unlock()
			select {
			case <-both:
			case <-time.After(patience):
				t.Error("layers come one after the other")
			}
			for end := time.Now().Add(patience); stored() < len(layers); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Error("nothing is unpacked before all has come")
					break
				}
			}
			_, _ = w.Write(body[len(body)/2:])
		})
	}})
	s := &sharing{t, server, server.Host + "/team/cache:main"}
	const dockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
FROM base AS a
RUN /bin/busybox head -c 4000000 /dev/urandom > /a
FROM base AS b
RUN /bin/busybox head -c 4000000 /dev/urandom > /b
FROM scratch
COPY --from=a /a /a
COPY --from=b /b /b
`
	s.build(openTest(t), "1", func(r *request) { r.files["Dockerfile"] = dockerfile; r.cacheTo = s.entry() })
	d, _ := s.document()
	mu.Lock()
	for _, l := range d.Layers {
		if l.Size > 3_000_000 && l.Size < 5_000_000 {
			layers = append(layers, l.Blob.Digest.String())
		}
	}
	n := len(layers)
	mu.Unlock()
	if n < 2 {
		t.Fatalf("%d layers: %+v", n, d.Layers)
	}
	te := openTest(t)
	stored = func() (n int) {
		_ = filepath.WalkDir(te.root, func(_ string, f fs.DirEntry, err error) error {
			if err != nil || f.IsDir() {
				return nil //nolint:nilerr // it is gone
			}
			if info, err := f.Info(); err == nil && info.Size() > 1_000_000 && info.Size() < 3_900_000 {
				n++
			}
			return nil
		})
		return n
	}
	s.build(te, "1", func(r *request) {
		r.files["Dockerfile"] = dockerfile
		r.cacheFrom = s.entry()
		r.exports = []bkclient.ExportEntry{{Type: "local", OutputDir: t.TempDir()}}
	})
}

// TestSharedCacheMountSharing: shared, locked and private mean of restored mounts what they mean of others. Two steps that run at once have one shared mount; they
// take turns with a locked one; of a private one the second begins empty.
func TestSharedCacheMountSharing(t *testing.T) {
	s := newSharing(t)
	const dockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
FROM base AS fill
RUN --mount=type=cache,id=s,target=/s,sharing=shared --mount=type=cache,id=l,target=/l,sharing=locked --mount=type=cache,id=p,target=/p,sharing=private \
    echo old > /s/old && echo old > /l/log && echo old > /p/old
FROM base AS one
RUN --mount=type=cache,id=s,target=/s,sharing=shared --mount=type=cache,id=p,target=/p,sharing=private \
    echo 1 > /s/1; until test -e /s/2; do /bin/busybox sleep 0.01; done; /bin/busybox cat /s/old; echo private one: $(/bin/busybox cat /p/old)
FROM base AS two
RUN --mount=type=cache,id=s,target=/s,sharing=shared --mount=type=cache,id=p,target=/p,sharing=private \
    echo 2 > /s/2; until test -e /s/1; do /bin/busybox sleep 0.01; done; /bin/busybox cat /s/old; echo private two: $(/bin/busybox cat /p/old)
FROM base AS three
RUN --mount=type=cache,id=l,target=/l,sharing=locked echo begin >> /l/log; /bin/busybox sleep 0.2; echo end >> /l/log
FROM base AS four
RUN --mount=type=cache,id=l,target=/l,sharing=locked echo begin >> /l/log; : ; /bin/busybox sleep 0.2; echo end >> /l/log
FROM base
COPY --from=one /bin/busybox /1
COPY --from=two /bin/busybox /2
COPY --from=three /bin/busybox /3
COPY --from=four /bin/busybox /4
RUN --mount=type=cache,id=l,target=/l,sharing=locked echo log: $(/bin/busybox cat /l/log)
`
	s.build(openTest(t), "1", func(r *request) {
		r.files["Dockerfile"], r.attrs["target"], r.cacheTo = dockerfile, "fill", s.entry("mode=max", "mounts=all")
	})
	te := openTest(t)
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, errors.New("the steps do not run at once"))
	defer cancel()
	r := request{files: map[string]string{"Dockerfile": dockerfile}, attrs: map[string]string{}, cacheFrom: s.entry()}
	s.build(te, "1", func(r *request) { r.files["Dockerfile"], r.attrs["target"] = dockerfile, "base" })
	r.files["busybox"] = s.busybox()
	out, err := te.build(ctx, r)
	if err != nil {
		t.Fatal(err, context.Cause(ctx))
	}
	if n := strings.Count(out.logs, "\nold\n") + strings.Count(out.logs, "old\nold"); n == 0 || !strings.Contains(out.logs, "log: old begin end begin end") {
		t.Errorf("logs: %s", out.logs)
	}
	if got := len(regexp.MustCompile(`private (one|two): old`).FindAllString(out.logs, -1)); got != 1 {
		t.Errorf("%d steps have the restored private mount, want 1: %s", got, out.logs)
	}
}
