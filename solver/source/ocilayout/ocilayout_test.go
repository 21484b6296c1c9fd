// SPDX-License-Identifier: Apache-2.0

package ocilayout_test

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
	"strings"
	"sync"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/source/image"
	"github.com/seed-68981b69/slipway/solver/source/ocilayout"
)

// client is a session with one layout, "mine".
type client struct {
	solver.Session
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	sizes map[digest.Digest]int64 // that it claims, where they are not true
	asked []digest.Digest
}

var _ solver.LayoutSession = (*client)(nil)

type openBlob struct {
	*bytes.Reader
	size int64
}

func (b openBlob) Size() int64  { return b.size }
func (b openBlob) Close() error { return nil }

func (c *client) LayoutBlob(_ context.Context, session, store string, d digest.Digest) (solver.LayoutBlob, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blobs[d]
	if !ok || store != "mine" || session != "their session" {
		return nil, fmt.Errorf("session %q, store %q: %w", session, store, solver.ErrNotFound)
	}
	c.asked = append(c.asked, d)
	size := int64(len(b))
	if claimed, ok := c.sizes[d]; ok {
		size = claimed
	}
	return openBlob{bytes.NewReader(b), size}, nil
}

func (c *client) forget() []digest.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	asked := c.asked
	c.asked = nil
	return asked
}

func (c *client) put(b []byte) ocispec.Descriptor {
	d := digest.FromBytes(b)
	c.blobs[d] = b
	return ocispec.Descriptor{Digest: d, Size: int64(len(b))}
}

func (c *client) json(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := c.put(b)
	d.MediaType = mediaType
	return d
}

// manifest adds an image of layers with one file each, named like its content; an empty name is a layer without files.
func (c *client) manifest(t *testing.T, arch string, files ...string) (ocispec.Descriptor, ocispec.Manifest) {
	t.Helper()
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, name := range files {
		var raw, packed bytes.Buffer
		w := tar.NewWriter(&raw)
		if name != "" {
			if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(name))}); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(w, name)
		}
		z := gzip.NewWriter(&packed)
		if err := errors.Join(w.Close(), func() error { _, err := z.Write(raw.Bytes()); return err }(), z.Close()); err != nil {
			t.Fatal(err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(raw.Bytes()))
		d := c.put(packed.Bytes())
		d.MediaType = ocispec.MediaTypeImageLayerGzip
		m.Layers = append(m.Layers, d)
	}
	m.Config = c.json(t, ocispec.MediaTypeImageConfig, config)
	return c.json(t, ocispec.MediaTypeImageManifest, m), m
}

type discard struct{}

func (discard) Log(int, []byte)                   {}
func (discard) Status(string, int64, int64, bool) {}
func (discard) Warn(string)                       {}

// side is a store that loads from layouts.
type side struct {
	*cache.Store
	resolver *ocilayout.Resolver
	source   func(*solver.Vertex) (solver.Source, error)
}

func newSide(t *testing.T) *side {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: the layer store of this test needs root")
	}
	s, err := cache.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	puller := image.NewPuller(image.Deps{
		Blobs: s.Blobs, Layers: s.Layers, Snapshots: s.Snapshots, Images: s.Images, Records: s.Records,
		Registry: registry.New(registry.Options{DockerConfigDir: t.TempDir(), CertDirs: []string{}}),
	})
	resolver := ocilayout.NewResolver(s.Blobs)
	return &side{s, resolver, ocilayout.New(resolver, puller)}
}

func vertex(ref string, attrs map[string]string) *solver.Vertex {
	all := map[string]string{pb.AttrOCILayoutSessionID: "their session", pb.AttrOCILayoutStoreID: "mine"}
	for k, v := range attrs {
		all[k] = v
	}
	return &solver.Vertex{Op: &pb.Op{
		Op:       &pb.Op_Source{Source: &pb.SourceOp{Identifier: "oci-layout://" + ref, Attrs: all}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"},
	}}
}

// load pins and runs a vertex, and returns the names of the files at the top, sorted.
func (s *side) load(t *testing.T, v *solver.Vertex, env *solver.Env) (pin string, files []string, err error) {
	t.Helper()
	src, err := s.source(v)
	if err != nil {
		t.Fatal(err)
	}
	p, err := src.Pin(t.Context(), env)
	if err != nil {
		return "", nil, err
	}
	out, err := src.Run(t.Context(), env, nil)
	if err != nil {
		return "", nil, err
	}
	view, err := s.Snapshots.View(t.Context(), out[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range view.ReadDir("") {
		files = append(files, e.Path)
	}
	return p.Parts[0].Value, files, nil
}

func TestLayout(t *testing.T) {
	c := &client{blobs: map[digest.Digest][]byte{}}
	amd, m := c.manifest(t, "amd64", "", "a", "b")
	arm, _ := c.manifest(t, "arm64", "c")
	amd.Platform, arm.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	index := c.json(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{arm, amd},
	})
	s := newSide(t)
	env := &solver.Env{Session: c, BuildID: "1", Progress: discard{}}
	ref := "docker.io/library/base@" + index.Digest.String()
	l := ocilayout.Layout{Session: "their session", Store: "mine"}

	for _, arch := range []string{"amd64", "arm64"} {
		d, config, err := s.resolver.ResolveConfig(t.Context(), env, ref, l, &ocispec.Platform{OS: "linux", Architecture: arch})
		if err != nil || d != index.Digest || !strings.Contains(string(config), arch) {
			t.Errorf("%s: %s %s %v, want %s", arch, d, config, err, index.Digest)
		}
	}
	if asked := c.forget(); len(asked) != 5 {
		t.Errorf("for two configs the client was asked for %v, want the index, two manifests, two configs", asked)
	}
	if _, _, err := s.resolver.ResolveConfig(t.Context(), env, ref, l, &ocispec.Platform{OS: "linux", Architecture: "s390x"}); err == nil || !strings.Contains(err.Error(), "s390x") {
		t.Errorf("s390x: %v", err)
	}

	// Some of the layers first: the empty one counts.
	pin, files, err := s.load(t, vertex(ref, map[string]string{pb.AttrOCILayoutLayerLimit: "2"}), env)
	if err != nil || pin != amd.Digest.String() || strings.Join(files, " ") != "a" {
		t.Errorf("two layers: %s %v %v", pin, files, err)
	}
	pin, files, err = s.load(t, vertex(ref, nil), env)
	if err != nil || pin != amd.Digest.String() || strings.Join(files, " ") != "a b" {
		t.Errorf("all layers: %s %v %v", pin, files, err)
	}
	if _, files, err = s.load(t, vertex(ref, map[string]string{pb.AttrOCILayoutLayerLimit: "1"}), env); err != nil || len(files) != 0 {
		t.Errorf("one layer: %v %v", files, err)
	}
	if asked := c.forget(); len(asked) != len(m.Layers) {
		t.Errorf("for three layers the client was asked for %v", asked)
	}
	// What is here needs no client.
	if _, _, err = s.load(t, vertex("x@"+amd.Digest.String(), nil), &solver.Env{BuildID: "2", Progress: discard{}}); err != nil {
		t.Errorf("without a client: %v", err)
	}
}

// Nothing that a client sends becomes part of the store unless it is what its name says.
func TestLayoutIsNotTrusted(t *testing.T) {
	fresh := func() (*client, ocispec.Descriptor, ocispec.Manifest) {
		c := &client{blobs: map[digest.Digest][]byte{}, sizes: map[digest.Digest]int64{}}
		d, m := c.manifest(t, "amd64", "a", "b")
		return c, d, m
	}
	change := func(c *client, d digest.Digest) {
		b := bytes.Clone(c.blobs[d])
		b[len(b)/2] ^= 1
		c.blobs[d] = b
	}
	for name, tc := range map[string]struct {
		spoil func(c *client, d ocispec.Descriptor, m ocispec.Manifest) digest.Digest // returns what must not be kept
		is    error
		say   string
	}{
		"manifest": {func(c *client, d ocispec.Descriptor, _ ocispec.Manifest) digest.Digest {
			change(c, d.Digest)
			return d.Digest
		}, blob.ErrDigest, ""},
		"config": {func(c *client, _ ocispec.Descriptor, m ocispec.Manifest) digest.Digest {
			change(c, m.Config.Digest)
			return m.Config.Digest
		}, blob.ErrDigest, ""},
		"layer": {func(c *client, _ ocispec.Descriptor, m ocispec.Manifest) digest.Digest {
			change(c, m.Layers[1].Digest)
			return m.Layers[1].Digest
		}, blob.ErrDigest, ""},
		"size of a layer": {func(c *client, _ ocispec.Descriptor, m ocispec.Manifest) digest.Digest {
			c.sizes[m.Layers[0].Digest] = 5
			return m.Layers[0].Digest
		}, nil, "has 5 bytes"},
		"a huge manifest": {func(c *client, d ocispec.Descriptor, _ ocispec.Manifest) digest.Digest {
			c.sizes[d.Digest] = 1 << 40
			return d.Digest
		}, nil, "too many"},
		"a short manifest": {func(c *client, d ocispec.Descriptor, _ ocispec.Manifest) digest.Digest {
			c.sizes[d.Digest] = 1 << 20
			return d.Digest
		}, blob.ErrSize, ""},
		"missing": {func(c *client, _ ocispec.Descriptor, m ocispec.Manifest) digest.Digest {
			delete(c.blobs, m.Layers[0].Digest)
			return m.Layers[0].Digest
		}, solver.ErrNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSide(t)
			c, d, m := fresh()
			spoiled := tc.spoil(c, d, m)
			_, _, err := s.load(t, vertex("base@"+d.Digest.String(), nil), &solver.Env{Session: c, Progress: discard{}})
			if err == nil || tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.say) {
				t.Errorf("got %v, want %v %q", err, tc.is, tc.say)
			}
			if s.Blobs.Has(spoiled) {
				t.Errorf("%s is in the store", spoiled)
			}
			// A client with the right bytes gets its build.
			good, _, _ := fresh()
			if _, _, err := s.load(t, vertex("base@"+d.Digest.String(), nil), &solver.Env{Session: good, Progress: discard{}}); err != nil {
				t.Errorf("with the right bytes: %v", err)
			}
		})
	}
}

func TestLayoutRefuses(t *testing.T) {
	s := newSide(t)
	sum := "x@sha256:" + strings.Repeat("0", 64)
	for _, tc := range []struct {
		ref   string
		attrs map[string]string
		say   string
	}{
		{"x:tag", nil, "has no digest"},
		{"UPPER@sha256:" + strings.Repeat("0", 64), nil, "UPPER"},
		{"x@sha256:00", nil, "x@sha256:00"},
		{sum, map[string]string{"oci.nonsense": "1"}, "not supported yet: oci.nonsense"},
		{sum, map[string]string{pb.AttrOCILayoutLayerLimit: "0"}, "oci.layerlimit=0"},
		{sum, map[string]string{pb.AttrOCILayoutLayerLimit: "many"}, "oci.layerlimit=many"},
	} {
		if _, err := s.source(vertex(tc.ref, tc.attrs)); err == nil || !strings.Contains(err.Error(), tc.say) {
			t.Errorf("%s %v: %v, want %q", tc.ref, tc.attrs, err, tc.say)
		}
	}
	src, err := s.source(vertex(sum, map[string]string{pb.AttrOCILayoutStoreID: ""}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := src.Pin(t.Context(), &solver.Env{Progress: discard{}}); err == nil || !strings.Contains(err.Error(), pb.AttrOCILayoutStoreID) {
		t.Errorf("without a store: %v", err)
	}
	if _, err := src.Run(t.Context(), &solver.Env{Progress: discard{}}, []snapshot.Snapshot{}); err == nil {
		t.Error("Run without a store succeeds")
	}
}
