// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// TestPullGoesOn breaks the connection in the middle of a layer until the pull fails. A later process goes on where it
// stopped; and begins anew if what was left is bad.
func TestPullGoesOn(t *testing.T) {
	ctx := context.Background()
	random := make([]byte, 3<<20)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	layers := [][]file{{{"big", string(random)}}}
	l := newLayout(t)
	src := l.tag(l.imageAs("amd64", layers, ocispec.MediaTypeImageLayer))
	for _, c := range []struct {
		name  string
		spoil func(path string) error
	}{
		{"as it was left", func(string) error { return nil }},
		{"with bytes that a power cut has taken", func(path string) error { return zero(path, 1000) }},
		{"longer than the blob", func(path string) error { return os.Truncate(path, 4<<20) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := registrytest.Start(t, registrytest.Options{})
			ref := s.Host + "/test/big:1"
			skopeo(t, "copy", "--dest-tls-verify=false", "--preserve-digests", src, "docker://"+ref)
			amd64 := &ocispec.Platform{OS: "linux", Architecture: "amd64"}
			dir := t.TempDir()
			left := func() []string {
				paths, _ := filepath.Glob(filepath.Join(dir, "content/ingest/resume-*"))
				return paths
			}

			first := newSideAt(t, dir, registry.Options{})
			// The documents come; of the layer half comes, and then nothing more.
			part := digest.FromBytes(tarOf(t, layers[0])).String()
			s.Fault.Break(registrytest.Truncate, 1, "GET", part)
			s.Fault.Break(registrytest.Gone, 99, "GET", part)
			if _, err := first.puller.Pull(ctx, ref, amd64, nil, nil); err == nil {
				t.Fatal("the pull succeeded")
			}
			if s.Fault.Heal() == 0 {
				t.Error("nothing was broken")
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			paths := left()
			if len(paths) != 1 {
				t.Fatalf("left to go on with: %q", paths)
			}
			st, err := os.Stat(paths[0])
			if err != nil || st.Size() < 1<<20 || st.Size() > 2<<20 {
				t.Fatalf("%d bytes are left, %v", st.Size(), err)
			}
			if err := c.spoil(paths[0]); err != nil {
				t.Fatal(err)
			}

			s.Forget()
			second := newSideAt(t, dir, registry.Options{})
			img, err := second.puller.Pull(ctx, ref, amd64, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			snap, _, err := second.Images.Layers(ctx, img.Target.Digest)
			if err != nil {
				t.Fatal(err)
			}
			checkFiles(t, second.files(t, snap), map[string]string{"big": string(random)})
			want := []string{fmt.Sprintf("bytes=%d-", st.Size())}
			if c.name == "longer than the blob" {
				want = nil
			}
			if got := s.Ranges(); !slices.Equal(got, want) {
				t.Errorf("asked for %q, want %q", got, want)
			}
			if paths := left(); len(paths) > 0 {
				t.Errorf("still left: %q", paths)
			}
		})
	}
}

// zero overwrites the first n bytes.
func zero(path string, n int) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(make([]byte, n), 0)
	return err
}

// TestPullHeals: an image whose layers are gone, as fsck or a power cut may leave it, is pulled again under its name.
func TestPullHeals(t *testing.T) {
	ctx := context.Background()
	l := newLayout(t)
	s := registrytest.Start(t, registrytest.Options{})
	ref := s.Host + "/test/heals:1"
	skopeo(t, "copy", "--dest-tls-verify=false", l.tag(l.imageAs("amd64", testLayers, ocispec.MediaTypeImageLayerGzip)), "docker://"+ref)
	amd64 := &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	dir := t.TempDir()
	first := newSideAt(t, dir, registry.Options{})
	if _, err := first.puller.Pull(ctx, ref, amd64, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"layers/r*", "content/blobs/sha256/*"} {
		paths, _ := filepath.Glob(filepath.Join(dir, pattern))
		if len(paths) == 0 {
			t.Fatalf("no %s", pattern)
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	second := newSideAt(t, dir, registry.Options{})
	found, err := second.Check(ctx, cache.CheckOptions{})
	if err != nil || !slices.ContainsFunc(found, func(p cache.Problem) bool { return p.Kind == cache.ProblemImage && p.Name == ref }) {
		t.Errorf("the image is not named: %+v, %v", found, err)
	}
	img, err := second.puller.Pull(ctx, ref, amd64, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	snap, _, err := second.Images.Layers(ctx, img.Target.Digest)
	if err != nil {
		t.Fatal(err)
	}
	checkFiles(t, second.files(t, snap), testFiles)
	if found, err := second.Check(ctx, cache.CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("after the pull: %+v, %v", found, err)
	}
}
