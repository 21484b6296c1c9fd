// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/s3/s3test"
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
	r := request{
		files: map[string]string{"Dockerfile": cachedDockerfile, "busybox": s.busybox()},
		attrs: map[string]string{"build-arg:LAST": last},
	}
	more(&r)
	return te.mustBuild(r)
}

// busybox is the program.
func (s *sharing) busybox() string {
	s.t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		s.t.Skip("needs busybox (Debian: busybox-static)")
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(busybox)
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

// TestSharedCachePush: an image of a fresh machine is pushed without that any layer comes, and it is the same image: where the registry has it nothing is sent at all.
func TestSharedCachePush(t *testing.T) {
	s := newSharing(t)
	push := func(name string) func(r *request) {
		return func(r *request) {
			r.cacheFrom = s.entry()
			r.exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": s.server.Host + name, "push": "true"}}}
		}
	}
	first := s.build(openTest(t), "1", func(r *request) { push("/team/app")(r); r.cacheTo = s.entry("mode=max") })
	d, _ := s.document()
	s.server.Forget()
	again := s.build(openTest(t), "1", push("/team/app"))
	if a, b := first.response[exptypes.ExporterImageDigestKey], again.response[exptypes.ExporterImageDigestKey]; a == "" || a != b {
		t.Errorf("image %s, from the cache on another machine %s", a, b)
	}
	for _, method := range []string{"POST ", "PUT ", "PATCH "} {
		if sent := s.server.Requests(method); len(sent) > 0 {
			t.Errorf("sent %q", sent)
		}
	}
	s.build(openTest(t), "1", push("/team/another"))
	s.build(openTest(t), "1", func(r *request) { push("/team/third")(r); r.cacheTo = s.entry("mode=max") })
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

// TestSharedCacheSecrets searches every exported byte for what nobody may see: all that lies in the files of a registry, a bucket and a directory after exports
// in every form, with whatever is compressed unpacked.
func TestSharedCacheSecrets(t *testing.T) {
	s := newSharing(t)
	files := t.TempDir()
	s.server = registrytest.Start(t, registrytest.Options{Dir: filepath.Join(files, "registry")})
	bucket, err := s3test.Start(filepath.Join(files, "s3"))
	if err != nil {
		t.Skipf("NO S3 SERVER: SKIPPED: %v", err)
	}
	defer bucket.Stop()
	te := openTest(t)
	const secret, token, layerMark, mountMark = "open-sesame-4711", "tok-abcdef-0815", "mark-of-a-layer", "mark-of-a-mount"
	to := func(tag string, attrs ...string) bkclient.CacheOptionsEntry {
		s.ref = s.server.Host + "/team/cache:" + tag
		return s.entry(append(attrs, "mode=max")...)[0]
	}
	s.build(te, "1", func(r *request) {
		r.files["Dockerfile"] = strings.Replace(cachedDockerfile, "RUN /bin/busybox cat", `ARG API_TOKEN
RUN --mount=type=secret,id=s --mount=type=secret,id=e,env=SECRET_ENV /bin/busybox test $(/bin/busybox cat /run/secrets/s) = $SECRET_ENV
RUN --mount=type=cache,id=m,target=/m --mount=type=secret,id=s,target=/m/token /bin/busybox test -s /m/token && \
    /bin/busybox head -c 3000000 /dev/zero | /bin/busybox tr '\0' x > /big && echo mark-of-a-layer >> /big && echo mark-of-a-mount > /m/file
RUN /bin/busybox cat`, 1)
		r.attrs["build-arg:API_TOKEN"] = token
		r.session = []session.Attachable{secretsprovider.FromMap(map[string][]byte{"s": []byte(secret), "e": []byte(secret)})}
		r.cacheTo = []bkclient.CacheOptionsEntry{
			to("gzip", "compression=gzip"), to("zstd", "compression=zstd", "force-compression=true"), to("chunks", "chunked=true", "mounts=all"),
			{Type: "local", Attrs: map[string]string{"dest": filepath.Join(files, "dir"), "mode": "max", "chunked": "true", "mounts": "m"}},
			{Type: "s3", Attrs: map[string]string{
				"bucket": bucket.Bucket, "endpoint_url": bucket.Endpoint, "use_path_style": "true", "access_key_id": bucket.AccessKey,
				"secret_access_key": bucket.SecretKey, "mode": "max", "chunked": "true", "mounts": "all",
			}},
			{Type: "inline"},
		}
		r.exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": s.server.Host + "/team/image", "push": "true"}}}
	})
	seen := map[string]map[string]int{} // place: word: how often
	err = filepath.WalkDir(files, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		place := strings.Split(strings.TrimPrefix(path, files+"/"), "/")[0]
		if seen[place] == nil {
			seen[place] = map[string]int{}
		}
		texts := unpacked(b)
		if bytes.HasPrefix(b, []byte("{")) && bytes.Contains(b, []byte(`"rootfs":`)) {
			texts = texts[1:] // an image's history has its arguments, as everywhere; the cache in it must not
		}
		for _, text := range texts {
			for _, hidden := range []string{secret, token, bucket.SecretKey} {
				if bytes.Contains(text, []byte(hidden)) {
					t.Errorf("%q is in %s", hidden, path)
				}
			}
			for _, word := range []string{"API_TOKEN", layerMark + "\n", mountMark + "\n"} {
				seen[place][word] += bytes.Count(text, []byte(word))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// The search finds what is there: in the registry a layer as gzip, as zstd and in chunks.
	for place, want := range map[string]int{"registry": 3, "dir": 1, "s3": 1} {
		if n := seen[place]; n["API_TOKEN"] == 0 || n[layerMark+"\n"] < want || n[mountMark+"\n"] == 0 {
			t.Errorf("the search does not find what is in %s: %v", place, n)
		}
	}
	// Records with something hidden are found all the same.
	s.ref = s.server.Host + "/team/cache:gzip"
	out := s.build(openTest(t), "1", func(r *request) { r.cacheFrom = s.entry() })
	if ran(out, "echo made") {
		t.Error("nothing found")
	}
}

// unpacked returns b and all that is compressed in it: a gzip stream, and zstd wherever frames begin, as in packs of chunks.
func unpacked(b []byte) [][]byte {
	out := [][]byte{b}
	if r, err := gzip.NewReader(bytes.NewReader(b)); err == nil {
		text, _ := io.ReadAll(r)
		out = append(out, text)
	}
	// An image's config has a document in base64.
	for _, word := range bytes.FieldsFunc(b, func(c rune) bool { return c == '"' }) {
		if inner, err := base64.StdEncoding.DecodeString(string(word)); err == nil && bytes.HasPrefix(inner, zstdMagic) {
			out = append(out, unpacked(inner)...)
		}
	}
	for at := 0; ; {
		i := bytes.Index(b[at:], zstdMagic)
		if i < 0 {
			return out
		}
		at += i + len(zstdMagic)
		r, err := zstd.NewReader(bytes.NewReader(b[at-len(zstdMagic):]), zstd.WithDecoderConcurrency(1))
		if err != nil {
			continue
		}
		text, _ := io.ReadAll(r) // frames up to the first thing that is none
		r.Close()
		out = append(out, text)
	}
}

var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}

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
