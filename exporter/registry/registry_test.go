// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	exportimage "github.com/seed-68981b69/slipway/exporter/image"
	exportregistry "github.com/seed-68981b69/slipway/exporter/registry"
	sourceimage "github.com/seed-68981b69/slipway/solver/source/image"
)

// side is a store with everything that exports, pushes and pulls.
type side struct {
	*cache.Store
	types  exporter.Types
	pusher *exportregistry.Pusher
	puller *sourceimage.Puller
}

func newSide(t *testing.T) *side {
	t.Helper()
	return newSideWith(t, registry.Options{CertDirs: []string{}})
}

func newSideWith(t *testing.T, opts registry.Options) *side {
	t.Helper()
	return openSide(t, t.TempDir(), opts)
}

// reopen is what another process sees.
func (s *side) reopen(t *testing.T) *side {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openSide(t, s.Dir, registry.Options{CertDirs: []string{}})
}

func openSide(t *testing.T, dir string, opts registry.Options) *side {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: the layer store of this test needs root")
	}
	s, err := cache.Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	opts.DockerConfigDir = t.TempDir()
	opts.Wait = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	reg := registry.New(opts)
	side := &side{Store: s}
	side.pusher = exportregistry.New(exportregistry.Deps{Layers: s.Layers, Blobs: s.Blobs, Images: s.Images, Records: s.Records, Registry: reg})
	side.puller = sourceimage.NewPuller(sourceimage.Deps{
		Blobs: s.Blobs, Layers: s.Layers, Snapshots: s.Snapshots, Images: s.Images, Records: s.Records, Registry: reg,
	})
	side.types = exporter.Types{"image": exportimage.New(exportimage.Deps{
		Layers: s.Layers, Blobs: s.Blobs, Images: s.Images, Records: s.Records, Pusher: side.pusher,
	})}
	return side
}

// layer makes a layer of files over below.
func (s *side) layer(t *testing.T, below snapshot.Snapshot, files map[string]string) snapshot.Snapshot {
	t.Helper()
	ctx := context.Background()
	view, err := s.Snapshots.View(ctx, below)
	if err != nil {
		t.Fatal(err)
	}
	d := s.Layers.NewDraft(view)
	for name, content := range files {
		d.Put(index.Entry{Path: name, Type: index.File, Mode: 0o644, Size: int64(len(content)), ModTime: 1e18}, func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(content)), nil
		})
	}
	id, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return append(below[:len(below):len(below)], id)
}

const config = `{"architecture":"amd64","os":"linux","config":{"Env":["A=b"],"Cmd":["/hello"]},` +
	`"history":[{"created_by":"COPY hello /"},{"created_by":"ENV A=b","empty_layer":true},{"created_by":"RUN big"}]}`

func (s *side) image(t *testing.T) exporter.Result {
	t.Helper()
	snap := s.layer(t, nil, map[string]string{"hello": "hello world\n"})
	snap = s.layer(t, snap, map[string]string{"big": big(3 << 20), "etc": "x"})
	r, err := exporter.NewResult(map[string][]byte{exptypes.ExporterImageConfigKey: []byte(config)}, map[string]snapshot.Snapshot{"": snap})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func big(n int) string {
	rng := rand.New(rand.NewPCG(1, 1))
	var b strings.Builder
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d %x\n", rng.IntN(1000), rng.Uint64())
	}
	return b.String()[:n]
}

func (s *side) export(t *testing.T, r exporter.Result, attrs map[string]string) map[string]string {
	t.Helper()
	e, err := s.types.New("image", attrs)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := e.Export(context.Background(), r, exporter.Options{Now: func() time.Time { return time.Unix(1.7e9, 0) }})
	if err != nil {
		t.Fatal(err)
	}
	return resp
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

func TestExportPushPull(t *testing.T) {
	ctx := context.Background()
	for _, oci := range []string{"true", "false"} {
		t.Run("oci-mediatypes="+oci, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			s := newSide(t)
			r := s.image(t)
			ref := reg.Host + "/team/app:1"
			local := s.export(t, r, map[string]string{"name": ref + ",app", "oci-mediatypes": oci})
			if n := len(reg.Requests("")); n != 0 {
				t.Fatalf("%d requests without push", n)
			}
			for _, name := range []string{ref, "app", "docker.io/library/app:latest"} {
				img, err := s.Images.Get(ctx, name)
				if err != nil || img.Target.Digest.String() != local[exptypes.ExporterImageDigestKey] || img.ID.String() != local[exptypes.ExporterImageConfigDigestKey] {
					t.Errorf("%s = %+v, %v; response %v", name, img, err, local)
				}
				snap, ok, err := s.Images.Layers(ctx, img.Target.Digest)
				if err != nil || !ok || len(snap) != 2 || snap[0] != r.Refs[0].Snapshot[0] {
					t.Errorf("layers of %s: %v %v %v", name, snap, ok, err)
				}
			}
			var blobs int64
			if err := s.Blobs.Walk(func(_ digest.Digest, size int64) error { blobs += size; return nil }); err != nil {
				t.Fatal(err)
			}
			if blobs > 10_000 {
				t.Errorf("the export wrote %d bytes of blobs: it copied or compressed a layer", blobs)
			}

			again := s.export(t, r, map[string]string{"name": ref, "push": "true", "oci-mediatypes": oci})
			if again[exptypes.ExporterImageConfigDigestKey] != local[exptypes.ExporterImageConfigDigestKey] {
				t.Error("the same result exported twice has two configs")
			}
			pushed := again[exptypes.ExporterImageDigestKey]
			var desc ocispec.Descriptor
			if raw, err := base64.StdEncoding.DecodeString(again[exptypes.ExporterImageDescriptorKey]); err != nil || json.Unmarshal(raw, &desc) != nil || desc.Digest.String() != pushed {
				t.Errorf("descriptor %q: %+v", again[exptypes.ExporterImageDescriptorKey], desc)
			}

			byDigest, err := s.Images.Get(ctx, reg.Host+"/team/app@"+pushed)
			if err != nil || byDigest.Target.Digest.String() != pushed || byDigest.ID.String() != local[exptypes.ExporterImageConfigDigestKey] {
				t.Errorf("by the digest that it has in the registry: %+v, %v", byDigest, err)
			}
			if snap, ok, err := s.Images.Layers(ctx, digest.Digest(pushed)); err != nil || !ok || len(snap) != 2 {
				t.Errorf("its layers: %v %v %v", snap, ok, err)
			}
			if _, err := s.Images.Remove(ctx, "app", false); err != nil {
				t.Error(err)
			}
			if removed, err := s.Images.Remove(ctx, ref, false); err != nil || len(removed.Untagged) != 2 {
				t.Errorf("removed by name: %+v, %v", removed, err)
			}

			var seen struct {
				Digest, Architecture string
				Layers               []string
				Env                  []string
			}
			if err := json.Unmarshal([]byte(skopeo(t, "inspect", "--tls-verify=false", "docker://"+ref)), &seen); err != nil {
				t.Fatal(err)
			}
			if seen.Digest != pushed || len(seen.Layers) != 2 || seen.Architecture != "amd64" || seen.Env[0] != "A=b" {
				t.Errorf("skopeo sees %+v, we pushed %s", seen, pushed)
			}
			// skopeo checks the digests of everything that it copies, and the diff IDs when it decompresses.
			dir := t.TempDir()
			skopeo(t, "copy", "--src-tls-verify=false", "--dest-decompress", "docker://"+ref, "dir:"+dir)
			raw, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			for i, l := range m.Layers {
				info, err := s.Layers.Pack(ctx, r.Refs[0].Snapshot[i])
				if err != nil || info.DiffID != l.Digest {
					t.Errorf("layer %d unpacked by skopeo is %s, ours %s (%v)", i, l.Digest, info.DiffID, err)
				}
			}

			// Another machine pulls it, and pushes it on as it is.
			other := newSide(t)
			img, err := other.puller.Pull(ctx, ref, nil, nil, nil)
			if err != nil || img.Target.Digest.String() != pushed {
				t.Fatalf("pull: %+v, %v", img, err)
			}
			snap, _, _ := other.Images.Layers(ctx, img.Target.Digest)
			view, err := other.Snapshots.View(ctx, snap)
			if err != nil {
				t.Fatal(err)
			}
			f, err := view.OpenFile(ctx, "hello")
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(f)
			f.Close()
			if err != nil || string(b) != "hello world\n" {
				t.Errorf("hello = %q, %v", b, err)
			}
			reg.Forget()
			desc, err = other.pusher.Push(ctx, img, reg.Host+"/other/app:2", exportregistry.Options{})
			if err != nil || desc.Digest.String() != pushed {
				t.Fatalf("push of what was pulled: %s, %v, want %s", desc.Digest, err, pushed)
			}
			if puts := reg.Requests("PUT /v2/other/app/blobs"); len(puts) != 1 {
				t.Errorf("%d blobs were sent although the registry has all layers: %v", len(puts), puts)
			}
			if mounts := reg.Requests("from=team%2Fapp"); len(mounts) != 2 {
				t.Errorf("%d layers were mounted", len(mounts))
			}
			elsewhere := registrytest.Start(t, registrytest.Options{})
			if desc, err = other.pusher.Push(ctx, img, elsewhere.Host+"/app", exportregistry.Options{}); err != nil || desc.Digest.String() != pushed {
				t.Fatalf("push to another registry: %s, %v", desc.Digest, err)
			}
			skopeo(t, "inspect", "--tls-verify=false", "docker://"+elsewhere.Host+"/app:latest")

			// A build on what was pulled ships the base as it came.
			r2 := exporter.Result{Refs: []exporter.Ref{{Platform: r.Refs[0].Platform, Config: []byte(config), Snapshot: other.layer(t, snap, map[string]string{"new": "file"})}}}
			resp := other.export(t, r2, map[string]string{"name": elsewhere.Host + "/app:3", "push": "true", "oci-mediatypes": oci})
			raw = []byte(skopeo(t, "inspect", "--raw", "--tls-verify=false", "docker://"+elsewhere.Host+"/app@"+resp[exptypes.ExporterImageDigestKey]))
			var m3 ocispec.Manifest
			if err := json.Unmarshal(raw, &m3); err != nil {
				t.Fatal(err)
			}
			if len(m3.Layers) != 3 || m3.Layers[0].Digest.String() != seen.Layers[0] || m3.Layers[1].Digest.String() != seen.Layers[1] {
				t.Errorf("the base's layers were compressed again: %s", raw)
			}
		})
	}
}

func TestExportIsReproducible(t *testing.T) {
	digests := map[string]bool{}
	for range 2 {
		reg := registrytest.Start(t, registrytest.Options{})
		s := newSide(t)
		resp := s.export(t, s.image(t), map[string]string{"name": reg.Host + "/a", "push": "1", "source-date-epoch": "1600000000"})
		digests[resp[exptypes.ExporterImageDigestKey]] = true
	}
	if len(digests) != 1 {
		t.Errorf("two stores make two images: %v", digests)
	}
}

func TestMultiPlatform(t *testing.T) {
	ctx := context.Background()
	reg := registrytest.Start(t, registrytest.Options{})
	s := newSide(t)
	meta := map[string][]byte{exptypes.ExporterPlatformsKey: []byte(
		`{"Platforms":[{"ID":"linux/amd64","Platform":{"os":"linux","architecture":"amd64"}},{"ID":"linux/arm64","Platform":{"os":"linux","architecture":"arm64"}}]}`)}
	snaps := map[string]snapshot.Snapshot{}
	for _, arch := range []string{"amd64", "arm64"} {
		meta[exptypes.ExporterImageConfigKey+"/linux/"+arch] = []byte(strings.Replace(config, "amd64", arch, 1))
		snaps["linux/"+arch] = s.layer(t, nil, map[string]string{"arch": arch})
	}
	r, err := exporter.NewResult(meta, snaps)
	if err != nil {
		t.Fatal(err)
	}
	ref := reg.Host + "/multi:1"
	resp := s.export(t, r, map[string]string{"name": ref, "push": "true"})
	for _, arch := range []string{"amd64", "arm64"} {
		out := skopeo(t, "--override-arch", arch, "inspect", "--tls-verify=false", "docker://"+ref)
		if !strings.Contains(out, `"Architecture": "`+arch+`"`) || !strings.Contains(out, resp[exptypes.ExporterImageDigestKey]) {
			t.Errorf("%s: %s", arch, out)
		}
	}
	// Pulled for one platform, that one can be pushed; pulled for both, the whole index.
	other := newSide(t)
	pull := func(arch string) {
		if _, err := other.puller.Pull(ctx, ref, &ocispec.Platform{OS: "linux", Architecture: arch}, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	push := func(to string) ocispec.Descriptor {
		img, err := other.Images.Get(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := other.pusher.Push(ctx, img, reg.Host+to, exportregistry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return desc
	}
	pull("arm64")
	if desc := push("/one:1"); desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("one platform is pushed as %+v", desc)
	}
	pull("amd64")
	if desc := push("/two:1"); desc.Digest.String() != resp[exptypes.ExporterImageDigestKey] {
		t.Errorf("both platforms are pushed as %+v, want %s", desc, resp[exptypes.ExporterImageDigestKey])
	}
}

// TestPushFaults: nothing is tagged that is not whole, and the next push finishes the work.
func TestPushFaults(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		kind         registrytest.Kind
		n            int
		method, part string
		ok           bool
	}{
		{registrytest.DropBody, 2, "PUT", "/uploads/", true},
		{registrytest.Busy, 2, "", "/blobs/", true},
		{registrytest.Fail, 99, "PUT", "/uploads/", false},
		{registrytest.Gone, 99, "PUT", "/manifests/", false},
	} {
		reg := registrytest.Start(t, registrytest.Options{})
		s := newSide(t)
		s.export(t, s.image(t), map[string]string{"name": "app"})
		img, err := s.Images.Get(ctx, "app")
		if err != nil {
			t.Fatal(err)
		}
		reg.Fault.Break(tc.kind, tc.n, tc.method, tc.part)
		_, err = s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{})
		reg.Fault.Heal()
		if (err == nil) != tc.ok {
			t.Errorf("%s %s %s: %v", tc.kind, tc.method, tc.part, err)
		}
		if !tc.ok {
			t.Log(err)
			if _, err := newSide(t).puller.Pull(ctx, reg.Host+"/app:1", nil, nil, nil); err == nil {
				t.Errorf("%s %s %s: the tag is there", tc.kind, tc.method, tc.part)
			}
			if _, err = s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{}); err != nil {
				t.Errorf("second push: %v", err)
			}
		}
		if _, err := newSide(t).puller.Pull(ctx, reg.Host+"/app:1", nil, nil, nil); err != nil {
			t.Errorf("%s %s %s: pull: %v", tc.kind, tc.method, tc.part, err)
		}
	}
}

func TestPushRefusesDamagedLayer(t *testing.T) {
	ctx := context.Background()
	reg := registrytest.Start(t, registrytest.Options{})
	s := newSide(t)
	r := s.image(t)
	s.export(t, r, map[string]string{"name": "app"})
	damage(t, s.Dir, r.Refs[0].Snapshot[0])
	s = s.reopen(t) // what a process has written itself it takes for good
	img, err := s.Images.Get(ctx, "app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("push of a damaged layer: %v", err)
	}
}

// damage changes a byte of a layer's tar on disk.
func damage(t *testing.T, dir string, id layer.ID) {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(path, string(id)) || !strings.HasSuffix(path, "tar") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		i := bytes.Index(b, []byte("hello world"))
		if i < 0 {
			return nil
		}
		b[i] ^= 1
		found = true
		return os.WriteFile(path, b, 0o600)
	})
	if err != nil || !found {
		t.Fatalf("no tar of %s found: %v", id, err)
	}
}

func TestProgressAndCredentials(t *testing.T) {
	ctx := context.Background()
	reg := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret"})
	s := newSide(t)
	s.export(t, s.image(t), map[string]string{"name": "app"})
	img, err := s.Images.Get(ctx, "app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{}); err == nil || !strings.Contains(err.Error(), "slipway login") {
		t.Errorf("without a password: %v", err)
	}
	var mu sync.Mutex
	ended, reports := map[string]bool{}, map[string]int{}
	_, err = s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{
		Credentials: func(context.Context, string) (string, string, error) { return "mia", "s3cret", nil },
		Progress: func(id string, current, total int64, done bool) {
			mu.Lock()
			defer mu.Unlock()
			if done != (current == total) {
				t.Errorf("%s: %d of %d, done %v", id, current, total, done)
			}
			ended[id] = done
			reports[id]++
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(ended) != 2 { // the layers; nobody waits for a config
		t.Errorf("progress of %v", ended)
	}
	for id, n := range reports {
		if n < 2 {
			t.Errorf("%s was sent, but reported as if the registry had had it", id)
		}
	}
}

func TestUnknownType(t *testing.T) {
	types := exporter.Types{"image": nil}
	if _, err := types.New("oci", nil); err == nil || !strings.Contains(err.Error(), "not supported yet: type=oci (there are: image)") {
		t.Errorf("%v", err)
	}
}
