// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/schema"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	exportregistry "github.com/seed-68981b69/slipway/exporter/registry"
)

func get(t *testing.T, url, accept string) []byte {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v: %s", url, resp.Status, err, b)
	}
	return b
}

// pushed reads an image from a registry by hand and checks that it is what it says.
func pushed(t *testing.T, reg *registrytest.Server, repo, ref string) (m ocispec.Manifest, config ocispec.Image, blobs [][]byte) {
	t.Helper()
	base := "http://" + reg.Host + "/v2/" + repo
	raw := get(t, base+"/manifests/"+ref, ocispec.MediaTypeImageManifest)
	if strings.HasPrefix(ref, "sha256:") && digest.FromBytes(raw).String() != ref {
		t.Errorf("%s is %s", ref, digest.FromBytes(raw))
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	rawConfig := get(t, base+"/blobs/"+m.Config.Digest.String(), "*/*")
	if err := json.Unmarshal(rawConfig, &config); err != nil {
		t.Fatal(err)
	}
	if m.MediaType == ocispec.MediaTypeImageManifest { // not Docker's, which has no such schema
		for mediaType, document := range map[string][]byte{m.MediaType: raw, ocispec.MediaTypeImageConfig: rawConfig} {
			if err := schema.Validator(mediaType).Validate(bytes.NewReader(document)); err != nil {
				t.Errorf("%s: %v\n%s", mediaType, err, document)
			}
		}
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		t.Fatalf("%d layers, %d diff IDs", len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for i, l := range m.Layers {
		b := get(t, base+"/blobs/"+l.Digest.String(), "*/*")
		if digest.FromBytes(b) != l.Digest || int64(len(b)) != l.Size {
			t.Errorf("layer %d: other bytes", i)
		}
		r, kind, err := compress.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if want, err := compress.MediaTypeKind(l.MediaType); err != nil || want != kind {
			t.Errorf("layer %d: %s is %s, %v", i, l.MediaType, kind, err)
		}
		if sum, err := digest.FromReader(r); err != nil || sum != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d: diff ID %s, want %s, %v", i, sum, config.RootFS.DiffIDs[i], err)
		}
		blobs = append(blobs, b)
	}
	return m, config, blobs
}

// small is side.image with less in it.
func small(t *testing.T, s *side) exporter.Result {
	t.Helper()
	snap := s.layer(t, s.layer(t, nil, map[string]string{"hello": "hello world\n"}), map[string]string{"big": big(200 << 10), "etc": "x"})
	r, err := exporter.NewResult(map[string][]byte{exptypes.ExporterImageConfigKey: []byte(config)}, map[string]snapshot.Snapshot{"": snap})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestCompression(t *testing.T) {
	ctx := context.Background()
	reg := registrytest.Start(t, registrytest.Options{})
	s := newSide(t)
	r := small(t, s)
	push := func(s *side, r exporter.Result, repo string, attrs ...string) (ocispec.Manifest, ocispec.Image, [][]byte) {
		t.Helper()
		all := map[string]string{"name": reg.Host + "/" + repo, "push": "true"}
		for i := 0; i < len(attrs); i += 2 {
			all[attrs[i]] = attrs[i+1]
		}
		resp := s.export(t, r, all)
		m, config, blobs := pushed(t, reg, repo, "latest")
		if desc := resp[exptypes.ExporterImageDigestKey]; !strings.Contains(desc, "sha256:") {
			t.Error(resp)
		}
		return m, config, blobs
	}
	none, plain, _ := push(s, r, "none", "compression", "uncompressed")
	if none.Layers[1].MediaType != ocispec.MediaTypeImageLayer || none.Layers[1].Digest != plain.RootFS.DiffIDs[1] {
		t.Errorf("uncompressed: %+v", none.Layers)
	}
	gzip, _, _ := push(s, r, "gzip")
	best, _, _ := push(s, r, "best", "compression-level", "9")
	zstd, _, _ := push(s, r, "zstd", "compression", "zstd")
	zstd19, _, _ := push(s, r, "zstd19", "compression", "zstd", "compression-level", "19")
	if best.Layers[1].Digest == gzip.Layers[1].Digest || zstd19.Layers[1].Size >= zstd.Layers[1].Size {
		t.Errorf("the level makes no difference: %+v %+v %+v %+v", gzip.Layers, best.Layers, zstd.Layers, zstd19.Layers)
	}
	again, _, _ := push(s, r, "again", "compression", "zstd")
	if again.Layers[1].Digest != zstd.Layers[1].Digest {
		t.Error("zstd of one layer twice has two digests")
	}

	// eStargz, read by the reference library, and the same whoever makes it.
	var first ocispec.Manifest
	for range 2 {
		s := newSide(t)
		m, config, blobs := push(s, small(t, s), "estargz", "compression", "estargz")
		if first.Layers == nil {
			first = m
		} else if m.Layers[1].Digest != first.Layers[1].Digest {
			t.Error("two stores make two estargz blobs of one layer")
		}
		if config.RootFS.DiffIDs[1] == plain.RootFS.DiffIDs[1] {
			t.Error("the diff ID does not cover the table of contents")
		}
		for i, l := range m.Layers {
			toc := l.Annotations[estargz.TOCJSONDigestAnnotation]
			z, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blobs[i]), 0, l.Size))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := z.VerifyTOC(digest.Digest(toc)); err != nil {
				t.Error(err)
			}
			if l.Annotations[estargz.StoreUncompressedSizeAnnotation] == "" {
				t.Errorf("annotations %v", l.Annotations)
			}
			if i > 0 {
				continue
			}
			f, err := z.OpenFile("hello")
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(f); err != nil || string(b) != "hello world\n" {
				t.Errorf("hello = %q, %v", b, err)
			}
		}
		if again, _, _ := push(s, small(t, s), "estargz2", "compression", "estargz"); again.Layers[1].Digest != m.Layers[1].Digest {
			t.Error("estargz of one layer twice has two digests")
		}
		// The image in the store is that one, and can be pulled elsewhere.
		other := newSide(t)
		img, err := other.puller.Pull(ctx, reg.Host+"/estargz", nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		snap, _, _ := other.Images.Layers(ctx, img.Target.Digest)
		view, err := other.Snapshots.View(ctx, snap)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := view.Lookup("etc"); !ok {
			t.Error("the layer has lost its files")
		}

		// What was pulled keeps its form unless that is not wanted.
		r2 := exporter.Result{Refs: []exporter.Ref{{Platform: r.Refs[0].Platform, Config: []byte(config2), Snapshot: other.layer(t, snap, map[string]string{"new": "file"})}}}
		kept, _, _ := push(other, r2, "kept", "compression", "zstd")
		forced, _, _ := push(other, r2, "forced", "compression", "zstd", "force-compression", "true")
		for i := range 3 {
			zstd := compress.MediaType(compress.Zstd, false)
			if i < 2 && kept.Layers[i].Digest != m.Layers[i].Digest || i == 2 && kept.Layers[i].MediaType != zstd {
				t.Errorf("kept: layer %d is %+v", i, kept.Layers[i])
			}
			if forced.Layers[i].MediaType != zstd {
				t.Errorf("forced: layer %d is %+v", i, forced.Layers[i])
			}
		}
	}
}

// TestCompressionWithoutPush: an image whose form is asked for has it in the local store, and is pushed as it is.
func TestCompressionWithoutPush(t *testing.T) {
	ctx := context.Background()
	reg := registrytest.Start(t, registrytest.Options{})
	s := newSide(t)
	for _, tc := range []struct {
		attrs map[string]string
		kind  compress.Kind
	}{
		{map[string]string{"compression": "zstd"}, compress.Zstd},
		{map[string]string{"compression-level": "9"}, compress.Gzip},
		{map[string]string{"compression": "estargz"}, compress.Gzip},
		{map[string]string{"compression": "uncompressed", "force-compression": "true"}, compress.None},
		{map[string]string{}, compress.None},
	} {
		tc.attrs["name"] = "app"
		resp := s.export(t, small(t, s), tc.attrs)
		img, err := s.Images.Get(ctx, "app")
		if err != nil {
			t.Fatal(err)
		}
		if got := resp[exptypes.ExporterImageDigestKey]; got != img.Target.Digest.String() {
			t.Errorf("%v: the client is told of %s, and it is %s", tc.attrs, got, img.Target.Digest)
		}
		raw, err := s.Blobs.ReadAll(img.Target.Digest)
		if err != nil {
			t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		for _, l := range m.Layers {
			if l.MediaType != compress.MediaType(tc.kind, false) {
				t.Errorf("%v: layer %+v", tc.attrs, l)
			}
		}
		desc, err := s.pusher.Push(ctx, img, reg.Host+"/app:1", exportregistry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if compressed := tc.kind != compress.None; compressed != (desc.Digest == img.Target.Digest) {
			t.Errorf("%v: %s is pushed as %s", tc.attrs, img.Target.Digest, desc.Digest)
		}
	}
	// Without a place in the store there is still a digest: the one that a push would have.
	before, err := s.Images.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	resp := s.export(t, small(t, s), map[string]string{"name": reg.Host + "/none:1", "store": "false"})
	after, err := s.Images.List(ctx)
	if err != nil || len(after) != len(before) {
		t.Errorf("%d images instead of %d, %v", len(after), len(before), err)
	}
	pushed := s.export(t, small(t, s), map[string]string{"name": reg.Host + "/none:1", "push": "true"})
	if got, want := resp[exptypes.ExporterImageDigestKey], pushed[exptypes.ExporterImageDigestKey]; got != want {
		t.Errorf("store=false says %s, a push %s", got, want)
	}
}

const config2 = `{"architecture":"amd64","os":"linux"}`

func TestNames(t *testing.T) {
	ctx := context.Background()
	reg, reg2 := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
	s := newSide(t)
	r := s.image(t)
	here := func(name string) bool {
		_, err := s.Images.Get(ctx, name)
		return err == nil
	}
	tags := func(reg *registrytest.Server, repo string) string {
		resp, err := http.Get("http://" + reg.Host + "/v2/" + repo + "/tags/list")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	// Several names and registries at once.
	resp := s.export(t, r, map[string]string{"name": reg.Host + "/a:1," + reg.Host + "/a:2," + reg2.Host + "/b", "push": "true"})
	for _, where := range []struct {
		reg  *registrytest.Server
		repo string
		tag  string
	}{{reg, "a", "1"}, {reg, "a", "2"}, {reg2, "b", "latest"}} {
		if m := get(t, "http://"+where.reg.Host+"/v2/"+where.repo+"/manifests/"+where.tag, ocispec.MediaTypeImageManifest); digest.FromBytes(m).String() != resp[exptypes.ExporterImageDigestKey] {
			t.Errorf("%+v has another manifest", where)
		}
	}
	if puts := reg.Requests("PUT /v2/a/blobs"); len(puts) != 3 {
		t.Errorf("%d uploads for two tags of one repository", len(puts))
	}

	// By digest: no tag in the registry, no name but with the digest here.
	resp = s.export(t, r, map[string]string{"name": reg.Host + "/quiet", "push": "true", "push-by-digest": "true"})
	d := resp[exptypes.ExporterImageDigestKey]
	pushed(t, reg, "quiet", d)
	if got := tags(reg, "quiet"); !strings.Contains(got, "null") && !strings.Contains(got, "[]") && !strings.Contains(got, "NAME_UNKNOWN") {
		t.Errorf("tags: %s", got)
	}
	if resp[exptypes.ExporterImageNameKey] != reg.Host+"/quiet" || here(reg.Host+"/quiet:latest") || !here(reg.Host+"/quiet@"+d) {
		t.Errorf("names after a push by digest: %v", resp)
	}

	// Names with the digest, here.
	local := s.export(t, r, map[string]string{"name": "canon:1", "name-canonical": "true"})[exptypes.ExporterImageDigestKey]
	if !here("docker.io/library/canon:1") || !here("docker.io/library/canon@"+local) {
		t.Error("name-canonical")
	}
	resp = s.export(t, r, map[string]string{"dangling-name-prefix": "loose"})
	if !here("docker.io/library/loose@"+local) || resp[exptypes.ExporterImageNameKey] != "docker.io/library/loose@"+local {
		t.Errorf("dangling-name-prefix: %v", resp)
	}
	s.export(t, r, map[string]string{"name": "named", "dangling-name-prefix": "loose2", "danging-name-empty-only": "true"})
	if here("docker.io/library/loose2@" + local) {
		t.Error("danging-name-empty-only with a name")
	}
	resp = s.export(t, r, map[string]string{"dangling-name-prefix": reg.Host + "/loose3", "push": "true"})
	pushed(t, reg, "loose3", resp[exptypes.ExporterImageDigestKey])

	// Not in the local store at all.
	s.export(t, r, map[string]string{"name": reg.Host + "/gone:1", "push": "true", "store": "false"})
	if here(reg.Host + "/gone:1") {
		t.Error("store=false")
	}
}
