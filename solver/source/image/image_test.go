// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	localimage "github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/source/image"
)

// testLayers are the files of a small image: a directory ends in "/", "-> x" is a symlink, a whiteout has its own name.
var testLayers = [][]file{
	{{"bin/", ""}, {"bin/busybox", "the binary"}, {"bin/sh", "-> busybox"}, {"etc/", ""}, {"etc/motd", "first"}, {"etc/gone", "x"}},
	{{"etc/", ""}, {"etc/motd", "second"}, {"etc/.wh.gone", ""}},
	{{"usr/lib/big", strings.Repeat("a line of a big file\n", 20_000)}}, // its directories have no entries
}

type file struct{ name, content string }

// testFiles are what the image shows.
var testFiles = map[string]string{
	"bin/busybox": "the binary", "bin/sh": "-> busybox", "etc/motd": "second", "usr/lib/big": testLayers[2][0].content,
}

func tarOf(t *testing.T, files []file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.content)), ModTime: time.Unix(1e9, 0)}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
		} else if to, ok := strings.CutPrefix(f.content, "-> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, to, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg || h.Typeflag == 0 {
			if _, err := io.WriteString(w, f.content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// layout is an OCI image layout being written.
type layout struct {
	t   *testing.T
	dir string
}

func newLayout(t *testing.T) layout {
	t.Helper()
	l := layout{t, t.TempDir()}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	l.write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return l
}

func (l layout) write(name string, b []byte) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, name), b, 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func (l layout) blob(mediaType string, b []byte) ocispec.Descriptor {
	l.t.Helper()
	d := digest.FromBytes(b)
	l.write("blobs/sha256/"+d.Encoded(), b)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

func (l layout) json(mediaType string, v any) ocispec.Descriptor {
	l.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.blob(mediaType, b)
}

// image adds an image with gzip layers.
func (l layout) image(arch string, layers [][]file) ocispec.Descriptor {
	l.t.Helper()
	return l.imageAs(arch, layers, ocispec.MediaTypeImageLayerGzip)
}

// imageAs adds an image whose layers have that media type.
func (l layout) imageAs(arch string, layers [][]file, mediaType string) ocispec.Descriptor {
	l.t.Helper()
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers"}}
	config.Config.Env = []string{"ARCH=" + arch}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, files := range layers {
		raw := tarOf(l.t, files)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(raw))
		m.Layers = append(m.Layers, l.blob(mediaType, compressed(l.t, mediaType, raw)))
	}
	m.Config = l.json(ocispec.MediaTypeImageConfig, config)
	return l.json(ocispec.MediaTypeImageManifest, m)
}

func compressed(t *testing.T, mediaType string, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var z io.WriteCloser
	var err error
	switch mediaType {
	case ocispec.MediaTypeImageLayerGzip:
		z = gzip.NewWriter(&b)
	case ocispec.MediaTypeImageLayerZstd:
		z, err = zstd.NewWriter(&b)
	default:
		return raw
	}
	if err == nil {
		_, err = z.Write(raw)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tag names an image in the layout's index.
func (l layout) tag(d ocispec.Descriptor) string {
	l.t.Helper()
	d.Annotations = map[string]string{ocispec.AnnotationRefName: "it"}
	b, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{d}})
	if err != nil {
		l.t.Fatal(err)
	}
	l.write("index.json", b)
	return "oci:" + l.dir + ":it"
}

func skopeo(t *testing.T, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("SKIPPED: skopeo is not installed (apt-get install skopeo)")
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(bin, append([]string{"--insecure-policy"}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("skopeo %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}

// side is a store with everything that pulls.
type side struct {
	*cache.Store
	deps     image.Deps
	puller   *image.Puller
	resolver *image.Resolver
	source   func(*solver.Vertex) (solver.Source, error)
}

func newSide(t *testing.T, opts registry.Options) *side {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: the layer store of this test needs root")
	}
	return newSideAt(t, t.TempDir(), opts)
}

func newSideAt(t *testing.T, dir string, opts registry.Options) *side {
	t.Helper()
	s, err := cache.Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	opts.DockerConfigDir, opts.CertDirs = t.TempDir(), []string{}
	opts.Wait = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	deps := image.Deps{
		Blobs: s.Blobs, Layers: s.Layers, Snapshots: s.Snapshots, Images: s.Images, Records: s.Records, Registry: registry.New(opts),
	}
	side := &side{Store: s, deps: deps, puller: image.NewPuller(deps), resolver: image.NewResolver(deps)}
	side.source = image.New(side.resolver, side.puller)
	return side
}

// files reads everything in a snapshot.
func (s *side) files(t *testing.T, snap snapshot.Snapshot) map[string]string {
	t.Helper()
	ctx := context.Background()
	view, err := s.Snapshots.View(ctx, snap)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	var walk func(dir string)
	walk = func(dir string) {
		for _, e := range view.ReadDir(dir) {
			switch {
			case e.Target != "":
				got[e.Path] = "-> " + e.Target
			case view.ReadDir(e.Path) != nil || e.Digest == "":
				walk(e.Path)
			default:
				r, err := view.OpenFile(ctx, e.Path)
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(r)
				r.Close()
				if err != nil {
					t.Fatal(err)
				}
				got[e.Path] = string(b)
			}
		}
	}
	walk("")
	return got
}

func checkFiles(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, content := range want {
		if got[name] != content {
			t.Errorf("%s = %.40q, want %.40q", name, got[name], content)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s should not be there", name)
		}
	}
}

// progress keeps the last report of each layer.
type progress struct {
	mu   sync.Mutex
	last map[string][2]int64
	done map[string]bool
}

func (p *progress) report(id string, current, total int64, done bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == nil {
		p.last, p.done = map[string][2]int64{}, map[string]bool{}
	}
	p.last[id] = [2]int64{current, total}
	p.done[id] = done
}

func TestPullWhatSkopeoPushed(t *testing.T) {
	ctx := context.Background()
	l := newLayout(t)
	for name, tc := range map[string]struct {
		mediaType string
		args      []string
		want      string // in the manifest
	}{
		"gzip":   {ocispec.MediaTypeImageLayerGzip, nil, "image.layer.v1.tar+gzip"},
		"zstd":   {ocispec.MediaTypeImageLayerZstd, []string{"--preserve-digests"}, "image.layer.v1.tar+zstd"},
		"plain":  {ocispec.MediaTypeImageLayer, []string{"--preserve-digests"}, `image.layer.v1.tar"`},
		"docker": {ocispec.MediaTypeImageLayerGzip, []string{"--format", "v2s2"}, "docker.image.rootfs.diff.tar.gzip"},
	} {
		t.Run(name, func(t *testing.T) {
			// A registry each: skopeo remembers in which other form one has a layer, and uses that.
			s := registrytest.Start(t, registrytest.Options{})
			ref := s.Host + "/test/" + name + ":1"
			src := l.tag(l.imageAs("amd64", testLayers, tc.mediaType))
			skopeo(t, append([]string{"copy", "--dest-tls-verify=false"}, append(tc.args, src, "docker://"+ref)...)...)
			side := newSide(t, registry.Options{})
			var p progress
			img, err := side.puller.Pull(ctx, ref, &ocispec.Platform{OS: "linux", Architecture: "amd64"}, nil, p.report)
			if err != nil {
				t.Fatal(err)
			}
			snap, ok, err := side.Images.Layers(ctx, img.Target.Digest)
			if err != nil || !ok {
				t.Fatalf("layers: %v %v", ok, err)
			}
			checkFiles(t, side.files(t, snap), testFiles)
			if got, err := side.Images.Get(ctx, ref); err != nil || got.Target.Digest != img.Target.Digest {
				t.Errorf("image store: %+v, %v", got, err)
			}
			if len(p.last) != len(testLayers) {
				t.Errorf("progress for %d layers", len(p.last))
			}
			for id, n := range p.last {
				if n[0] != n[1] || !p.done[id] {
					t.Errorf("progress of %s ended at %v, done %v", id, n, p.done[id])
				}
			}
			raw, err := side.Blobs.ReadAll(img.Target.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Count(string(raw), tc.want) != len(testLayers) {
				t.Errorf("the test is wrong: no %s in %s", tc.want, raw)
			}

			s.Forget()
			if _, err := side.puller.Pull(ctx, ref, nil, nil, nil); err != nil {
				t.Fatal(err)
			}
			if again := s.Requests("GET /v2/test/" + name + "/blobs"); len(again) != 0 {
				t.Errorf("the second pull fetched %v", again)
			}
		})
	}
}

// TestPullFaults: whatever the registry does, there is the right image or no image.
func TestPullFaults(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	l := newLayout(t)
	skopeo(t, "copy", "--dest-tls-verify=false", l.tag(l.image("amd64", testLayers)), "docker://"+s.Host+"/a:1")
	for _, tc := range []struct {
		kind registrytest.Kind
		n    int
		part string
		ok   bool
	}{
		{registrytest.Corrupt, 1, "/blobs/", true}, // fetched once more
		{registrytest.Corrupt, 99, "/blobs/", false},
		{registrytest.Corrupt, 99, "/manifests/", false},
		{registrytest.Truncate, 2, "/blobs/", true},
		{registrytest.Short, 99, "/blobs/", false},
		{registrytest.Gone, 99, "/blobs/", false},
		{registrytest.WrongName, 99, "/manifests/", false},
	} {
		side := newSide(t, registry.Options{})
		s.Fault.Break(tc.kind, tc.n, "", tc.part)
		img, err := side.puller.Pull(ctx, s.Host+"/a:1", nil, nil, nil)
		s.Fault.Heal()
		if tc.ok {
			if err != nil {
				t.Errorf("%s %d: %v", tc.kind, tc.n, err)
				continue
			}
			snap, _, _ := side.Images.Layers(ctx, img.Target.Digest)
			checkFiles(t, side.files(t, snap), testFiles)
			continue
		}
		if err == nil {
			t.Errorf("%s %d: pulled", tc.kind, tc.n)
		} else {
			t.Log(err)
		}
		if _, err := side.Images.Get(ctx, s.Host+"/a:1"); !errors.Is(err, localimage.ErrNotFound) {
			t.Errorf("%s %d: an image is left: %v", tc.kind, tc.n, err)
		}
		// And when the trouble is over, it works.
		if _, err := side.puller.Pull(ctx, s.Host+"/a:1", nil, nil, nil); err != nil {
			t.Errorf("%s %d: afterwards: %v", tc.kind, tc.n, err)
		}
	}
}

func TestPullChoosesPlatform(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	l := newLayout(t)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, arch := range []string{"amd64", "arm64"} {
		d := l.image(arch, [][]file{{{"arch", arch}}})
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	skopeo(t, "copy", "--all", "--dest-tls-verify=false", l.tag(l.json(ocispec.MediaTypeImageIndex, index)), "docker://"+s.Host+"/multi:1")
	side := newSide(t, registry.Options{})
	env := &solver.Env{BuildID: "b1"}
	for _, arch := range []string{"arm64", "amd64"} {
		p := ocispec.Platform{OS: "linux", Architecture: arch}
		if _, err := side.puller.Pull(ctx, s.Host+"/multi:1", &p, nil, nil); err != nil {
			t.Fatal(err)
		}
		dgst, config, _, err := side.resolver.ResolveConfig(ctx, env, s.Host+"/multi:1", &p, "")
		if err != nil || !strings.Contains(string(config), "ARCH="+arch) {
			t.Errorf("%s: config %s, %v", arch, config, err)
		}
		img, err := side.Images.Get(ctx, s.Host+"/multi:1")
		if err != nil || img.Target.Digest != dgst {
			t.Fatalf("%s: image %+v (%v), want %s", arch, img, err, dgst)
		}
		m, ok := img.ForPlatform(p)
		if !ok {
			t.Fatalf("%s: not in %+v", arch, img)
		}
		snap, _, err := side.Images.Layers(ctx, m.Target.Digest)
		if err != nil {
			t.Fatal(err)
		}
		checkFiles(t, side.files(t, snap), map[string]string{"arch": arch})
	}
	_, err := side.puller.Pull(ctx, s.Host+"/multi:1", &ocispec.Platform{OS: "linux", Architecture: "s390x"}, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "s390x") || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("s390x: %v", err)
	}
}

// discard is a solver.Progress that shows nothing.
type discard struct{}

func (discard) Log(int, []byte)                   {}
func (discard) Status(string, int64, int64, bool) {}
func (discard) Warn(string)                       {}

func vertex(ref string, attrs map[string]string) *solver.Vertex {
	return &solver.Vertex{Op: &pb.Op{
		Op:       &pb.Op_Source{Source: &pb.SourceOp{Identifier: ref, Attrs: attrs}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"},
	}}
}

// session is a client with one password.
type session struct {
	solver.Session
	user, secret string
}

func (s session) Credentials(context.Context, string) (string, string, error) {
	return s.user, s.secret, nil
}

func TestSource(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret", Token: true})
	l := newLayout(t)
	first, second := l.image("amd64", testLayers), l.image("amd64", testLayers[:2])
	push := func(d ocispec.Descriptor, ref string) {
		skopeo(t, "copy", "--dest-creds", "mia:s3cret", "--dest-tls-verify=false", l.tag(d), "docker://"+ref)
	}
	ref := s.Host + "/base:1"
	push(first, ref)

	side := newSide(t, registry.Options{})
	env := func(build string) *solver.Env {
		return &solver.Env{BuildID: build, Session: session{user: "mia", secret: "s3cret"}, Progress: discard{}}
	}
	src, err := side.source(vertex("docker-image://"+ref, map[string]string{pb.AttrImageResolveMode: "default", pb.AttrImageRecordType: "internal"}))
	if err != nil {
		t.Fatal(err)
	}
	// Without the client's password, no.
	if _, err := src.Pin(ctx, &solver.Env{BuildID: "anonymous", Progress: discard{}}); !errors.Is(err, registry.ErrUnauthorized) {
		t.Fatalf("anonymous: %v", err)
	}
	dgst, config, pinned, err := side.resolver.ResolveConfig(ctx, env("b1"), ref, nil, "default")
	if err != nil || dgst != first.Digest || !strings.Contains(string(config), "ARCH=amd64") || pinned != s.Host+"/base@"+dgst.String() {
		t.Fatalf("ResolveConfig = %s %s %s %v", dgst, config, pinned, err)
	}
	if layers := s.Requests("GET /v2/base/blobs"); len(layers) != 1 {
		t.Errorf("fetched for a config: %v", layers)
	}
	pin, err := src.Pin(ctx, env("b1"))
	if err != nil || len(pin.Parts) != 1 || pin.Parts[0].Value != first.Digest.String() || pin.ByContent {
		t.Fatalf("Pin = %+v, %v", pin, err)
	}
	// The tag moves while the build runs: the build does not notice.
	push(second, ref)
	s.Forget()
	if pin, err = src.Pin(ctx, env("b1")); err != nil || pin.Parts[0].Value != first.Digest.String() {
		t.Errorf("second Pin in the same build = %+v, %v", pin, err)
	}
	if asked := s.Requests("/manifests/"); len(asked) != 0 {
		t.Errorf("the second Pin asked %v", asked)
	}
	// Nor when so many others run that what it was told is forgotten.
	for i := range 100 {
		side.resolver.Registry(env(fmt.Sprint("other ", i)))
	}
	out, err := src.Run(ctx, env("b1"), nil)
	if err != nil || len(out) != 1 {
		t.Fatalf("Run = %v, %v", out, err)
	}
	checkFiles(t, side.files(t, out[0]), testFiles)
	if pin, err = src.Pin(ctx, env("b2")); err != nil || pin.Parts[0].Value != second.Digest.String() {
		t.Errorf("Pin in another build = %+v, %v, want %s", pin, err, second.Digest)
	}
	// A name with a digest needs no registry once it has been seen.
	s.Forget()
	s.Fault.Break(registrytest.Gone, 99, "", "/")
	byDigest, err := side.source(vertex("docker-image://"+s.Host+"/base:1@"+first.Digest.String(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if pin, err = byDigest.Pin(ctx, env("b3")); err != nil || pin.Parts[0].Value != first.Digest.String() {
		t.Errorf("Pin by digest = %+v, %v", pin, err)
	}
	if _, err = byDigest.Run(ctx, env("b3"), nil); err != nil {
		t.Errorf("Run by digest: %v", err)
	}
	if asked := s.Requests(""); len(asked) != 0 {
		t.Errorf("by digest asked %v", asked)
	}
	s.Fault.Heal()
}

func TestSourcePrefersTheLocalImage(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	l := newLayout(t)
	ref := s.Host + "/base:1"
	first, second := l.image("amd64", testLayers), l.image("amd64", testLayers[:1])
	skopeo(t, "copy", "--dest-tls-verify=false", l.tag(first), "docker://"+ref)
	side := newSide(t, registry.Options{})
	if _, err := side.puller.Pull(ctx, ref, nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	skopeo(t, "copy", "--dest-tls-verify=false", l.tag(second), "docker://"+ref)
	for _, tc := range []struct {
		name string
		env  *solver.Env
		mode string
		want digest.Digest
	}{
		{"default", &solver.Env{BuildID: "1"}, "", first.Digest},
		{"local", &solver.Env{BuildID: "2"}, "local", first.Digest},
		{"mode pull", &solver.Env{BuildID: "3"}, "pull", second.Digest},
		{"--pull", &solver.Env{BuildID: "4", Pull: true}, "", second.Digest},
	} {
		got, _, _, err := side.resolver.ResolveConfig(ctx, tc.env, ref, nil, tc.mode)
		if err != nil || got != tc.want {
			t.Errorf("%s: %s, %v, want %s", tc.name, got, err, tc.want)
		}
	}
	// The local store's image can be used when the registry is gone.
	s.Fault.Break(registrytest.Drop, 99, "", "/")
	src, err := side.source(vertex("docker-image://"+ref, nil))
	if err != nil {
		t.Fatal(err)
	}
	env := &solver.Env{BuildID: "5", Progress: discard{}}
	if _, err := src.Pin(ctx, env); err != nil {
		t.Fatal(err)
	}
	out, err := src.Run(ctx, env, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkFiles(t, side.files(t, out[0]), testFiles)
	_, _, _, err = side.resolver.ResolveConfig(ctx, env, s.Host+"/other:1", nil, "")
	if err == nil || !strings.Contains(err.Error(), "other:1 is not in the local image store") {
		t.Errorf("an image that is nowhere: %v", err)
	}
}

func TestSourceRefuses(t *testing.T) {
	side := newSide(t, registry.Options{})
	for _, tc := range []struct {
		ref   string
		attrs map[string]string
		say   string
	}{
		{"oci-layout://x@sha256:" + strings.Repeat("0", 64), nil, "not supported yet: oci-layout"},
		{"docker-image://UPPER", nil, "UPPER"},
		{"docker-image://a", map[string]string{"image.nonsense": "1"}, "not supported yet: image.nonsense"},
		{"docker-image://a", map[string]string{pb.AttrImageResolveMode: "x"}, "image.resolvemode=x"},
		{"docker-image://a", map[string]string{pb.AttrImageLayerLimit: "0"}, "image.layerlimit=0"},
		{"docker-image://a", map[string]string{pb.AttrImageChecksum: "0"}, "image.checksum=0"},
	} {
		if _, err := side.source(vertex(tc.ref, tc.attrs)); err == nil || !strings.Contains(err.Error(), tc.say) {
			t.Errorf("%s %v: %v, want %q", tc.ref, tc.attrs, err, tc.say)
		}
	}
}
