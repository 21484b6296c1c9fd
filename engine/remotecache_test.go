// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// cachedDockerfile has two stages; the argument LAST changes its last step only.
const cachedDockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
RUN /bin/busybox echo made > /made

FROM base AS tool
RUN /bin/busybox echo tool > /tool

FROM base
COPY --from=tool /tool /tool
RUN /bin/busybox cat /made /tool > /copy
ARG LAST=1
RUN /bin/busybox echo $LAST >> /copy
`

// sharing is a registry with a cache.
type sharing struct {
	t      *testing.T
	server *registrytest.Server
	ref    string
}

func newSharing(t *testing.T) *sharing {
	t.Helper()
	s := registrytest.Start(t, registrytest.Options{})
	return &sharing{t, s, s.Host + "/team/cache:main"}
}

func (s *sharing) entry(attrs ...string) []bkclient.CacheOptionsEntry {
	e := bkclient.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": s.ref}}
	for _, a := range attrs {
		k, v, _ := strings.Cut(a, "=")
		e.Attrs[k] = v
	}
	return []bkclient.CacheOptionsEntry{e}
}

// document reads what is there.
func (s *sharing) document() (*share.Document, *share.Repository) {
	s.t.Helper()
	r, err := share.OpenRepository(registry.New(registry.Options{DockerConfigDir: s.t.TempDir()}), s.ref, registry.Sources{})
	if err != nil {
		s.t.Fatal(err)
	}
	raw, _, err := r.Ref(s.t.Context(), s.ref)
	if err != nil {
		s.t.Fatal(err)
	}
	d, ignored, err := share.Decode(raw)
	if err != nil || ignored > 0 {
		s.t.Fatal(ignored, err)
	}
	return d, r
}

// build is a build of cachedDockerfile.
func (s *sharing) build(te *testEngine, last string, more func(*request)) result {
	s.t.Helper()
	if err := runner(); err != nil {
		s.t.Skipf("needs slipway-runner: %v", err)
	}
	path, err := exec.LookPath("busybox")
	if err != nil {
		s.t.Skip("needs busybox (Debian: busybox-static)")
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	r := request{
		files: map[string]string{"Dockerfile": cachedDockerfile, "busybox": string(busybox)},
		attrs: map[string]string{"build-arg:LAST": last},
	}
	more(&r)
	return te.mustBuild(r)
}

// fetched are the layers of the cache that have been asked for since the last Forget.
func (s *sharing) fetched(d *share.Document) (layers []string) {
	for _, l := range d.Layers {
		if len(s.server.Requests("GET /v2/team/cache/blobs/"+l.Blob.Digest.String())) > 0 {
			layers = append(layers, l.Blob.Digest.String())
		}
	}
	return layers
}

func ran(r result, part string) bool {
	_, names := r.steps()
	return slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, part) })
}

// TestSharedCache: a fresh machine finds everything and fetches no layer; one change fetches what is read.
func TestSharedCache(t *testing.T) {
	s := newSharing(t)
	s.build(openTest(t), "1", func(r *request) { r.cacheTo = s.entry("mode=max") })
	d, _ := s.document()

	te := openTest(t)
	s.server.Forget()
	out := s.build(te, "1", func(r *request) { r.cacheFrom = s.entry() })
	if _, names := out.steps(); len(names) != 1 || !strings.HasPrefix(names[0], "importing cache manifest from ") {
		t.Errorf("ran %q", names)
	}
	if layers := s.fetched(d); len(layers) > 0 {
		t.Errorf("fetched %d of %d layers for nothing", len(layers), len(d.Layers))
	}
	if out := s.build(te, "1", func(*request) {}); ran(out, "RUN") || ran(out, "COPY") {
		t.Error("the next build does not know what the import has said")
	}
	s.server.Forget()
	out = s.build(te, "2", func(r *request) {
		r.cacheFrom = s.entry()
		r.exports = []bkclient.ExportEntry{{Type: "local", OutputDir: t.TempDir()}}
	})
	if !ran(out, "echo 2") || ran(out, "cat /made") {
		t.Errorf("ran %+v", out.vertices)
	}
	if layers := s.fetched(d); len(layers) == 0 || len(layers) == len(d.Layers) {
		t.Errorf("fetched %d of %d layers", len(layers), len(d.Layers))
	}
}

// TestSharedCachePush: an image of a fresh machine is pushed without that any layer comes.
func TestSharedCachePush(t *testing.T) {
	s := newSharing(t)
	push := func(name string) func(r *request) {
		return func(r *request) {
			r.cacheFrom, r.cacheTo = s.entry(), s.entry("mode=max")
			r.exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": s.server.Host + name, "push": "true"}}}
		}
	}
	s.build(openTest(t), "1", push("/team/app"))
	d, _ := s.document()
	s.server.Forget()
	s.build(openTest(t), "1", push("/team/app"))
	s.build(openTest(t), "1", push("/team/another"))
	if layers := s.fetched(d); len(layers) > 0 {
		t.Errorf("fetched %d of %d layers", len(layers), len(d.Layers))
	}
	if sent := s.server.Requests("PATCH "); len(sent) > 0 {
		t.Errorf("sent %q", sent)
	}
	for _, l := range d.Layers {
		if sent := s.server.Requests("digest=" + strings.Replace(l.Blob.Digest.String(), ":", "%3A", 1)); len(sent) > 0 {
			t.Errorf("sent %q", sent)
		}
	}
}

// TestSharedCacheLost: layers that are gone or wrong are made again, whenever that is found out.
func TestSharedCacheLost(t *testing.T) {
	for _, kind := range []registrytest.Kind{registrytest.Missing, registrytest.Corrupt} {
		for _, when := range []string{"step", "export"} {
			t.Run(string(kind)+" "+when, func(t *testing.T) {
				s := newSharing(t)
				s.build(openTest(t), "1", func(r *request) { r.cacheTo = s.entry("mode=max") })
				d, _ := s.document()
				for _, l := range d.Layers {
					s.server.Fault.Break(kind, 1000, "GET", l.Blob.Digest.String())
				}
				last := "1"
				if when == "step" {
					last = "2"
				}
				dir := t.TempDir()
				out := s.build(openTest(t), last, func(r *request) {
					r.cacheFrom = s.entry()
					r.exports = []bkclient.ExportEntry{{Type: "local", OutputDir: dir}}
				})
				if !ran(out, "cat /made") || !ran(out, "echo made") {
					t.Errorf("ran %+v", out.vertices)
				}
				if b, err := os.ReadFile(filepath.Join(dir, "copy")); err != nil || string(b) != "made\ntool\n"+last+"\n" {
					t.Errorf("%q, %v", b, err)
				}
			})
		}
	}
}

// TestSharedCacheFails: an import or export that does not work, and the registry's every error.
func TestSharedCacheFails(t *testing.T) {
	s := newSharing(t)
	te := openTest(t)
	s.server.Fault.Break(registrytest.Missing, 1000, "PUT", "/team/cache/manifests/")
	r := request{files: map[string]string{"Dockerfile": "FROM scratch\nCOPY f /f\n", "f": "f"}, cacheTo: s.entry()}
	if _, err := te.build(t.Context(), r); err == nil || !strings.Contains(err.Error(), "export cache to "+s.ref) {
		t.Errorf("a failing export: %v", err)
	}
	r.cacheTo = s.entry("ignore-error=true")
	te.mustBuild(r)
	s.server.Fault.Heal()
	te.mustBuild(r)
	if d, _ := s.document(); len(d.Records) == 0 {
		t.Error("nothing exported")
	}
	for _, kind := range []registrytest.Kind{registrytest.Missing, registrytest.Corrupt, registrytest.Fail, registrytest.Truncate} {
		s.server.Fault.Break(kind, 1000, "GET", "/team/cache/")
		fresh := openTest(t)
		r := request{files: r.files, cacheFrom: s.entry()}
		fresh.mustBuild(r)
		s.server.Fault.Heal()
		fresh.stop()
	}
}

// TestSharedCacheSecrets searches every exported byte for what nobody may see.
func TestSharedCacheSecrets(t *testing.T) {
	s := newSharing(t)
	te := openTest(t)
	const secret, token = "open-sesame-4711", "tok-abcdef-0815"
	s.build(te, "1", func(r *request) {
		r.files["Dockerfile"] = strings.Replace(cachedDockerfile, "RUN /bin/busybox cat", `ARG API_TOKEN
RUN --mount=type=secret,id=s --mount=type=secret,id=e,env=SECRET_ENV /bin/busybox test $(/bin/busybox cat /run/secrets/s) = $SECRET_ENV
RUN /bin/busybox cat`, 1)
		r.attrs["build-arg:API_TOKEN"] = token
		r.session = []session.Attachable{secretsprovider.FromMap(map[string][]byte{"s": []byte(secret), "e": []byte(secret)})}
		r.cacheTo = append(s.entry("mode=max"), bkclient.CacheOptionsEntry{Type: "inline"})
		r.exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": s.server.Host + "/team/image", "push": "true"}}}
	})
	d, repository := s.document()
	raw, _, err := repository.Ref(t.Context(), s.ref)
	if err != nil {
		t.Fatal(err)
	}
	all := [][]byte{raw}
	for _, b := range d.Blobs() {
		rc, err := repository.Open(t.Context(), b, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		blob, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, blob)
	}
	image, err := share.OpenRepository(registry.New(registry.Options{DockerConfigDir: t.TempDir()}), s.server.Host+"/team/image", registry.Sources{})
	if err != nil {
		t.Fatal(err)
	}
	inline, err := image.InlineDocument(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, inline)
	seen := 0
	for _, b := range all {
		plain, _, err := compress.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(plain)
		if err != nil {
			t.Fatal(err)
		}
		for _, hidden := range []string{secret, token} {
			if bytes.Contains(text, []byte(hidden)) || bytes.Contains(b, []byte(hidden)) {
				t.Errorf("%q is in %d exported bytes", hidden, len(text))
			}
		}
		seen += bytes.Count(text, []byte("API_TOKEN"))
	}
	if seen == 0 {
		t.Error("the search finds nothing at all")
	}
	// Records with something hidden are found all the same.
	out := s.build(openTest(t), "1", func(r *request) { r.cacheFrom = s.entry() })
	if ran(out, "echo made") {
		t.Error("nothing found")
	}
}

// TestSharedCacheOfBuildKit: a cache in BuildKit's format is left alone.
func TestSharedCacheOfBuildKit(t *testing.T) {
	s := newSharing(t)
	remote := registry.New(registry.Options{DockerConfigDir: t.TempDir()})
	config := []byte(`{"layers":[],"records":[]}`)
	desc := ocispec.Descriptor{MediaType: share.BuildKitConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if err := remote.Push(t.Context(), s.ref, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil }, nil); err != nil {
		t.Fatal(err)
	}
	manifest := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{"mediaType":"` + share.BuildKitConfig +
		`","digest":"` + desc.Digest.String() + `","size":26},"layers":[]}`)
	if err := remote.Tag(t.Context(), s.ref, ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest)),
	}, manifest); err != nil {
		t.Fatal(err)
	}
	out := s.build(openTest(t), "1", func(r *request) { r.cacheFrom = s.entry() })
	v := out.vertices["importing cache manifest from "+s.ref]
	if v == nil || !strings.Contains(v.Error, "made by BuildKit") {
		t.Errorf("%+v", v)
	}
}

// TestSharedCacheCanceled: a build that is canceled while it exports leaves the cache as it was.
func TestSharedCacheCanceled(t *testing.T) {
	s := newSharing(t)
	te := openTest(t)
	s.build(te, "1", func(r *request) { r.cacheTo = s.entry("mode=max") })
	before, _ := s.document()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	r := request{files: map[string]string{"Dockerfile": "FROM scratch\nCOPY g /g\n", "g": "g"}, cacheTo: s.entry("mode=max", "on-failure=true")}
	r.status = func(st *bkclient.SolveStatus) {
		for _, v := range st.Vertexes {
			if v.Name == "exporting cache to registry" {
				cancel(context.Canceled)
			}
		}
	}
	if _, err := te.build(ctx, r); err == nil {
		t.Skip("it was faster")
	}
	after, repository := s.document()
	if missing, err := repository.Missing(t.Context(), after.Blobs()); err != nil || len(missing) > 0 {
		t.Errorf("missing %d blobs, %v", len(missing), err)
	}
	if len(after.Records) < len(before.Records) {
		t.Errorf("%d records, before %d", len(after.Records), len(before.Records))
	}
}

// TestSharedCachePlan asks what would be found, and nothing runs.
func TestSharedCachePlan(t *testing.T) {
	s := newSharing(t)
	s.build(openTest(t), "1", func(r *request) { r.cacheTo = s.entry("mode=max") })
	te := openTest(t)
	for last, want := range map[string]int{"1": 6, "2": 5} {
		out := s.build(te, last, func(r *request) {
			r.cacheFrom = s.entry()
			r.attrs[buildkitapi.PlanAttr] = "true"
		})
		var plan buildkitapi.CachePlan
		if err := json.Unmarshal([]byte(out.response[buildkitapi.PlanAttr]), &plan); err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, step := range plan.Steps {
			if step.Found != "" {
				found++
			}
		}
		if found != want {
			t.Errorf("LAST=%s: %d found, want %d: %+v", last, found, want, plan)
		}
	}
}
