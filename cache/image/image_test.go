// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// memory is a blob store in memory.
type memory struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
}

func (m *memory) ReadAll(d digest.Digest) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[d]
	if !ok {
		return nil, errors.New("no such blob")
	}
	return b, nil
}

func (m *memory) Has(d digest.Digest) bool {
	_, err := m.ReadAll(d)
	return err == nil
}

func (m *memory) Delete(d digest.Digest) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.blobs, d)
	return nil
}

func (m *memory) put(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blobs[d.Digest] = b
	return d
}

var created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// image puts the blobs of an image that content tells from others; packing tells two manifests of one config apart.
func (m *memory) image(t *testing.T, content, arch, packing string) (target ocispec.Descriptor, config digest.Digest) {
	t.Helper()
	c := m.put(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		Author: content, Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: arch},
	})
	man := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(packing), Size: 1000},
		{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(packing + "2"), Size: 234},
	}}
	return m.put(t, man.MediaType, man), c.Digest
}

type fixture struct {
	*Store
	t     *testing.T
	dir   string
	recs  *record.Store
	blobs *memory
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{t: t, dir: filepath.Join(t.TempDir(), "records"), blobs: &memory{blobs: map[digest.Digest][]byte{}}}
	f.reopen()
	t.Cleanup(func() { f.recs.Close() })
	return f
}

func (f *fixture) reopen() {
	f.t.Helper()
	if f.recs != nil {
		f.recs.Close()
	}
	var err error
	if f.recs, err = record.Open(f.dir); err != nil {
		f.t.Fatal(err)
	}
	if f.Store, err = Open(f.recs, f.blobs, nil); err != nil {
		f.t.Fatal(err)
	}
}

// put stores an image of that content under name, with a layer named after it, and returns it.
func (f *fixture) put(name, content string) Image {
	f.t.Helper()
	target, _ := f.blobs.image(f.t, content, "amd64", content)
	if err := f.SetLayers(f.t.Context(), target.Digest, snapshot.Snapshot{"d0", "d1"}); err != nil {
		f.t.Fatal(err)
	}
	m, err := f.Add(f.t.Context(), Image{Name: name, Target: target})
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

// list shows the store as NAME=content, in the order of List.
func (f *fixture) list() string {
	f.t.Helper()
	ms, err := f.List(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	var out []string
	for _, m := range ms {
		var c ocispec.Image
		raw, err := f.blobs.ReadAll(m.ID)
		if err != nil {
			f.t.Fatalf("%s: config is gone: %v", m.Name, err)
		}
		if err := json.Unmarshal(raw, &c); err != nil {
			f.t.Fatal(err)
		}
		if snap, ok, err := f.Layers(f.t.Context(), m.Manifests[0].Target.Digest); err != nil || !ok || len(snap) != 2 {
			f.t.Errorf("layers of %s: %v, %v, %v", m.Name, snap, ok, err)
		}
		out = append(out, Familiar(m.Name)+"="+c.Author)
	}
	return strings.Join(out, " ")
}

func (f *fixture) wantList(want string) {
	f.t.Helper()
	if got := f.list(); got != want {
		f.t.Errorf("images: %s\nwant:   %s", got, want)
	}
}

func TestNormalize(t *testing.T) {
	const d = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	for _, c := range []struct{ name, full, familiar string }{
		{"busybox", "docker.io/library/busybox:latest", "busybox:latest"},
		{"docker.io/library/x:1", "docker.io/library/x:1", "x:1"},
		{"me/x", "docker.io/me/x:latest", "me/x:latest"},
		{"localhost:5000/a/b:t", "localhost:5000/a/b:t", "localhost:5000/a/b:t"},
		{"x@" + d, "docker.io/library/x@" + d, "x@" + d},
		{"x:1@" + d, "docker.io/library/x@" + d, "x@" + d},
		{"Upper", "", ""},
		{"", "", ""},
		{"a b", "", ""},
		{"x:", "", ""},
	} {
		full, err := Normalize(c.name)
		if full != c.full || (err == nil) != (c.full != "") || err != nil && !errors.Is(err, ErrInvalidName) {
			t.Errorf("Normalize(%q) = %q, %v; want %q", c.name, full, err, c.full)
		}
		if err == nil && Familiar(full) != c.familiar {
			t.Errorf("Familiar(%q) = %q, want %q", full, Familiar(full), c.familiar)
		}
	}
}

func TestPutReadsBlobs(t *testing.T) {
	f := newFixture(t)
	got := f.put("app", "one")
	target, config := f.blobs.image(t, "one", "amd64", "one")
	withPlatform := target
	withPlatform.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	want := Image{
		Name: "docker.io/library/app:latest", Target: target, ID: config,
		Manifests: []Manifest{{Target: withPlatform, Config: config}}, Size: 1234, Created: created,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Add (-want +got):\n%s", diff)
	}
	f.reopen()
	for _, name := range []string{"app", "app:latest", "docker.io/library/app:latest"} {
		got, err := f.Get(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("Get(%s) after reopening (-want +got):\n%s", name, diff)
		}
	}
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
	if err := f.Put(t.Context(), Image{Name: "app", Target: missing}); err == nil {
		t.Error("an image whose manifest is not there was accepted")
	}
	f.wantList("app:latest=one")
}

func TestIndex(t *testing.T) {
	f := newFixture(t)
	amd, amdConfig := f.blobs.image(t, "amd", "amd64", "a")
	arm, armConfig := f.blobs.image(t, "arm", "arm64", "b")
	ppc, ppcConfig := f.blobs.image(t, "ppc", "ppc64le", "c")
	f.blobs.Delete(ppcConfig) // its manifest was pulled, the rest was not
	absent := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("never pulled"), Size: 1}
	amd.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	idx := f.blobs.put(t, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{absent, ppc, arm, amd}})
	m, err := f.Add(t.Context(), Image{Name: "multi", Target: idx})
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 3 {
		t.Errorf("manifests: %+v", m.Manifests)
	}
	for arch, want := range map[string]digest.Digest{"amd64": amdConfig, "arm64": armConfig, "ppc64le": "", "s390x": ""} {
		c, ok := m.ForPlatform(ocispec.Platform{OS: "linux", Architecture: arch})
		if c.Config != want || ok != (want != "") {
			t.Errorf("%s: %+v, %v", arch, c, ok)
		}
	}
	if m.ID != amdConfig && m.ID != armConfig {
		t.Errorf("ID %s is no config", m.ID)
	}
	for _, ref := range []string{"multi", idx.Digest.String(), arm.Digest.Encoded()[:20], "multi@" + amd.Digest.String(), "multi:x@" + idx.Digest.String()} {
		if got, err := f.Resolve(t.Context(), ref); err != nil || got.Target.Digest != idx.Digest {
			t.Errorf("Resolve(%s) = %v, %v", ref, got.Target.Digest, err)
		}
	}
	if _, err := f.Resolve(t.Context(), "other@"+amd.Digest.String()); !errors.Is(err, ErrNotFound) {
		t.Errorf("a digest under another name: %v", err)
	}
	r, err := f.Remove(t.Context(), "multi", false)
	if err != nil || r.Deleted != m.ID {
		t.Fatalf("remove: %+v, %v", r, err)
	}
	if len(f.blobs.blobs) != 0 {
		t.Errorf("blobs left: %v", slices.Collect(maps.Keys(f.blobs.blobs)))
	}
}

func TestNames(t *testing.T) {
	f := newFixture(t)
	one := f.put("app:1", "one")
	tag := func(ref, name string) {
		t.Helper()
		if err := f.Tag(t.Context(), ref, name); err != nil {
			t.Fatal(err)
		}
	}
	tag("app:1", "app:stable")
	f.wantList("app:1=one app:stable=one")
	tag(one.ID.Encoded()[:12], "other/name")
	f.wantList("app:1=one app:stable=one other/name:latest=one")

	two := f.put("app:1", "two") // app:1 moves; the old image has other names
	f.wantList("app:1=two app:stable=one other/name:latest=one")
	tag("app:1", "app:stable")
	tag("app:1", "other/name") // its last name moves: dangling
	f.wantList("app:1=two app:stable=two other/name:latest=two =one")
	f.reopen()
	f.wantList("app:1=two app:stable=two other/name:latest=two =one")
	if got := f.Names(t.Context(), two.ID); len(got) != 3 {
		t.Errorf("Names: %v", got)
	}
	tag(one.ID.String(), "back") // a dangling image gets a name again
	f.wantList("app:1=two app:stable=two back:latest=one other/name:latest=two")
	f.put("app:stable", "two") // again the same: nothing changes
	f.put("", "one")           // has a name
	f.wantList("app:1=two app:stable=two back:latest=one other/name:latest=two")
	f.put("", "three")
	f.wantList("app:1=two app:stable=two back:latest=one other/name:latest=two =three")
	for _, name := range []string{"app:stable", "back"} {
		if err := f.Untag(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	f.wantList("app:1=two other/name:latest=two =three =one")
	if err := f.Untag(t.Context(), "back"); !errors.Is(err, ErrNotFound) {
		t.Errorf("untag of an absent name: %v", err)
	}
	if err := f.Tag(t.Context(), "app:1", "x@"+one.ID.String()); !errors.Is(err, ErrInvalidName) {
		t.Errorf("tag with a digest: %v", err)
	}
	if err := f.Tag(t.Context(), "absent", "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("tag of an absent image: %v", err)
	}
}

// The same image packed another way has another manifest, but is the same image.
func TestSameConfigOtherManifest(t *testing.T) {
	f := newFixture(t)
	one := f.put("app", "one")
	target, _ := f.blobs.image(t, "one", "amd64", "packed")
	if err := f.SetLayers(t.Context(), target.Digest, snapshot.Snapshot{"d0", "d1"}); err != nil {
		t.Fatal(err)
	}
	if err := f.Put(t.Context(), Image{Name: "app", Target: target}); err != nil {
		t.Fatal(err)
	}
	f.wantList("app:latest=one")
	if f.blobs.Has(one.Target.Digest) {
		t.Error("the manifest that nothing names is still there")
	}
	if _, ok, _ := f.Layers(t.Context(), one.Target.Digest); ok {
		t.Error("its layers are still noted")
	}
}

func TestRemove(t *testing.T) {
	const a1, a2, b = "docker.io/library/a:1", "docker.io/library/a:2", "docker.io/library/b:latest"
	for _, c := range []struct {
		name     string
		names    []string // of image one; image two is "keep"
		digestOf string   // also known as digestOf@<manifest>
		ref      string   // "ID": the first digits of its ID
		force    bool
		want     []string // untagged, with "@" for the digest name
		deleted  bool
		err      error
		left     string
	}{
		{"last name", []string{"a:1"}, "", "a:1", false, []string{a1}, true, nil, "keep:latest=two"},
		{"one of two", []string{"a:1", "b"}, "", "a:1", false, []string{a1}, false, nil, "b:latest=one keep:latest=two"},
		{"by ID", []string{"a:1"}, "", "ID", false, []string{a1}, true, nil, "keep:latest=two"},
		{"by ID, two names", []string{"a:1", "b"}, "", "ID", false, nil, false, ErrConflict, "a:1=one b:latest=one keep:latest=two"},
		{"by ID, two tags", []string{"a:1", "a:2"}, "", "ID", false, nil, false, ErrConflict, "a:1=one a:2=one keep:latest=two"},
		{"by ID, forced", []string{"a:1", "b"}, "", "ID", true, []string{a1, b}, true, nil, "keep:latest=two"},
		{"dangling by ID", nil, "", "ID", false, nil, true, nil, "keep:latest=two"},
		{"digest goes with last tag", []string{"a:1"}, "a", "a:1", false, []string{a1, "@"}, true, nil, "keep:latest=two"},
		{"digest stays with another tag", []string{"a:1", "a:2"}, "a", "a:1", false, []string{a1}, false, nil, "a:2=one a@=one keep:latest=two"},
		{"digest of another repository stays", []string{"b"}, "a", "b", false, []string{b}, false, nil, "a@=one keep:latest=two"},
		{"by ID, tag and its digest", []string{"a:1"}, "a", "ID", false, []string{a1, "@"}, true, nil, "keep:latest=two"},
		{"absent", []string{"a:1"}, "", "a:7", false, nil, false, ErrNotFound, "a:1=one keep:latest=two"},
		{"not a name", []string{"a:1"}, "", "A B", false, nil, false, ErrInvalidName, "a:1=one keep:latest=two"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			one := f.put("", "one")
			f.put("keep", "two")
			for _, n := range c.names {
				f.put(n, "one")
			}
			if c.digestOf != "" {
				f.put(c.digestOf+"@"+one.Target.Digest.String(), "one")
			}
			ref := c.ref
			if ref == "ID" {
				ref = one.ID.Encoded()[:8]
			}
			r, err := f.Remove(t.Context(), ref, c.force)
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			for i, n := range r.Untagged {
				if strings.Contains(n, "@") {
					r.Untagged[i] = "@"
				}
			}
			if diff := cmp.Diff(c.want, r.Untagged); diff != "" {
				t.Errorf("untagged (-want +got):\n%s", diff)
			}
			if (r.Deleted == one.ID) != c.deleted || !c.deleted && r.Deleted != "" {
				t.Errorf("deleted %q", r.Deleted)
			}
			if got := strings.ReplaceAll(f.list(), one.Target.Digest.String(), ""); got != c.left {
				t.Errorf("left: %s\nwant: %s", got, c.left)
			}
			if f.blobs.Has(one.Target.Digest) == c.deleted || f.blobs.Has(one.ID) == c.deleted {
				t.Errorf("manifest there: %v, config there: %v", f.blobs.Has(one.Target.Digest), f.blobs.Has(one.ID))
			}
			if _, ok, _ := f.Layers(t.Context(), one.Target.Digest); ok == c.deleted {
				t.Errorf("layers noted: %v", ok)
			}
		})
	}
}

func TestInUseBlobsStay(t *testing.T) {
	f := newFixture(t)
	one := f.put("a", "one")
	f.inUse = func(d digest.Digest) bool { return d == one.ID }
	if err := f.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if !f.blobs.Has(one.ID) || f.blobs.Has(one.Target.Digest) {
		t.Errorf("config there: %v (in use), manifest there: %v", f.blobs.Has(one.ID), f.blobs.Has(one.Target.Digest))
	}
	if err := f.Delete(t.Context(), "a"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "a:latest") {
		t.Errorf("second delete: %v", err)
	}
}

func TestResolveID(t *testing.T) {
	id := func(hex string) digest.Digest {
		return digest.Digest("sha256:" + hex + strings.Repeat("0", 64-len(hex)))
	}
	tab := table{}
	for _, m := range []struct{ name, id, target string }{
		{"docker.io/library/a:latest", "abc1", "1111"},
		{"docker.io/library/b:latest", "abc1", "1112"},
		{"docker.io/library/abc:latest", "ffff", "abc9"},
		{"", "abd2", "2222"},
		{"docker.io/library/c:latest", "0001", "eee1"},
		{"docker.io/library/d:latest", "0002", "eee2"},
	} {
		v := Image{Name: m.name, ID: id(m.id), Target: ocispec.Descriptor{Digest: id(m.target)}}
		tab[key(v)] = v
	}
	for _, c := range []struct {
		ref, name, id string
		err           error
	}{
		{"abc", "docker.io/library/abc:latest", "ffff", nil}, // a name comes first
		{"abc1", "docker.io/library/a:latest", "abc1", nil},
		{"sha256:abc", "docker.io/library/a:latest", "abc1", nil}, // an ID before a manifest
		{"ab", "", "", ErrAmbiguous},
		{"abd", "", "abd2", nil},
		{"111", "docker.io/library/a:latest", "abc1", nil}, // two manifests of one image
		{"eee", "", "", ErrAmbiguous},
		{"eee2", "docker.io/library/d:latest", "0002", nil},
		{string(id("ffff")), "docker.io/library/abc:latest", "ffff", nil},
		{string(id("1112"))[7:], "docker.io/library/b:latest", "abc1", nil},
		{"123", "", "", ErrNotFound},
		{"sha256:", "", "", ErrInvalidName},
		{"sha256:xyz", "", "", ErrNotFound},
		{"", "", "", ErrInvalidName},
		{"nothing/here", "", "", ErrNotFound},
	} {
		m, _, err := tab.find(c.ref)
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%q: error %v, want %v", c.ref, err, c.err)
			continue
		}
		if err == nil && (m.ID != id(c.id) || m.Name != c.name) {
			t.Errorf("%q: %s %s; want %s %s", c.ref, m.Name, m.ID.Encoded()[:4], c.name, c.id)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	f := newFixture(t)
	base := f.put("base", "base")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ctx := context.Background()
			name := fmt.Sprint("n", i)
			for range 5 {
				if err := f.Tag(ctx, "base", name); err != nil {
					t.Error(err)
				}
				if _, err := f.List(ctx); err != nil {
					t.Error(err)
				}
				if _, err := f.Remove(ctx, name, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	f.wantList("base:latest=base")
	if !f.blobs.Has(base.ID) {
		t.Error("config is gone")
	}
}

func FuzzFind(f *testing.F) {
	for _, s := range []string{"busybox", "a:b@sha256:00", "sha256:ab", "ff", "", "docker.io/x/y:z", "A", "@"} {
		f.Add(s)
	}
	m := Image{Name: "docker.io/library/busybox:latest", ID: digest.FromString("id"), Target: ocispec.Descriptor{Digest: digest.FromString("target")}}
	tab := table{key(m): m}
	f.Fuzz(func(t *testing.T, ref string) {
		got, _, err := tab.find(ref)
		if err == nil && got.Name != m.Name {
			t.Fatalf("find(%q) = %+v", ref, got)
		}
		if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrInvalidName) {
			t.Fatalf("find(%q): error of no class: %v", ref, err)
		}
		if full, err := Normalize(ref); err == nil {
			if again, err := Normalize(full); err != nil || again != full {
				t.Fatalf("Normalize(%q) = %q, and of that %q, %v", ref, full, again, err)
			}
		}
	})
}

// fullDisk has no room for a write as long as full is set.
type fullDisk struct {
	fsys.FS
	full bool
}

func (f *fullDisk) Free(path string) (int64, error) {
	if f.full {
		return 0, nil
	}
	return f.FS.Free(path)
}

// A build of what has not changed writes nothing: it works on a full disk.
func TestSetLayersThatAreSetWritesNothing(t *testing.T) {
	disk := &fullDisk{FS: fsys.OS}
	recs, err := record.OpenWith(filepath.Join(t.TempDir(), "records"), record.Options{FS: disk})
	if err != nil {
		t.Fatal(err)
	}
	defer recs.Close()
	s, err := Open(recs, &memory{blobs: map[digest.Digest][]byte{}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := digest.FromString("a manifest")
	if err := s.SetLayers(t.Context(), m, snapshot.Snapshot{"d0"}); err != nil {
		t.Fatal(err)
	}
	disk.full = true
	if err := s.SetLayers(t.Context(), m, snapshot.Snapshot{"d0"}); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := s.SetLayers(t.Context(), m, snapshot.Snapshot{"d1"}); err == nil {
		t.Error("other layers are noted although the disk is full")
	}
	disk.full = false
	if err := s.SetLayers(t.Context(), m, snapshot.Snapshot{"d2"}); err != nil {
		t.Fatal(err)
	}
	if snap, _, err := s.Layers(t.Context(), m); err != nil || len(snap) != 1 || snap[0] != "d2" {
		t.Errorf("got %v, %v, want d2", snap, err)
	}
}
