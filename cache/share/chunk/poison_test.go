// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// small is a manifest that is right: one pack of one chunk of 10 bytes.
func small() *manifest {
	var s sum
	copy(s[:], mustDecode(digest.FromString("0123456789")))
	p := pack{Size: 10}
	copy(p.Sum[:], mustDecode(digest.FromString("0123456789")))
	return &manifest{
		Kind: kindTree, Packs: []pack{p}, Chunks: []place{{Sum: s, Packed: 10, Size: 10}}, Stream: []int{0}, Small: smallFile, SmallBytes: 10,
		Entries: []entry{
			{Type: typeDir, Mode: 0o755},
			{Path: "dir", Type: typeDir, Mode: 0o755},
			{Path: "dir/file", Type: typeFile, Mode: 0o644, Size: 10},
		},
	}
}

// TestPoison decodes manifests that somebody has made by hand: each is refused for what is wrong with it.
func TestPoison(t *testing.T) {
	file := func(path string) entry { return entry{Path: path, Type: typeFile, Mode: 0o600} }
	link := func(path, target string) entry {
		return entry{Path: path, Type: typeSymlink, Mode: 0o777, Target: target}
	}
	add := func(es ...entry) func(*manifest) {
		return func(m *manifest) { m.Entries = append(m.Entries, es...) }
	}
	for name, c := range map[string]struct {
		change func(*manifest)
		want   string // "" for nothing wrong
	}{
		"good":                 {func(*manifest) {}, ""},
		"links anywhere":       {add(link("up", "../../../etc/passwd"), link("x", "/etc")), ""},
		"dots":                 {add(file("..")), `path ".."`},
		"dots inside":          {add(file("dir/../../x")), `path "dir/../../x"`},
		"dot":                  {add(file("dir/./x")), `path "dir/./x"`},
		"absolute":             {add(file("/etc/passwd")), `path "/etc/passwd"`},
		"empty name":           {add(file("dir//x")), `path "dir//x"`},
		"slash behind":         {add(file("x/")), `path "x/"`},
		"NUL":                  {add(file("x\x00y")), `path "x\x00y"`},
		"long name":            {add(file(strings.Repeat("n", 256))), "path"},
		"long path":            {add(file(strings.Repeat("n/", 2100))), "number"},
		"twice":                {add(file("dir/file")), `"dir/file" is there twice`},
		"link over file":       {add(link("dir/file", "/etc/passwd")), `"dir/file" is there twice`},
		"out of order":         {add(file("aaa")), `"aaa" comes too late`},
		"below a link":         {add(link("evil", "/etc"), file("evil/passwd")), `"evil/passwd" is in no directory`},
		"below a file":         {add(file("evil"), file("evil/passwd")), `"evil/passwd" is in no directory`},
		"below nothing":        {add(file("no/such")), `"no/such" is in no directory`},
		"root twice":           {add(entry{Type: typeDir}), `path ""`},
		"root is a link":       {func(m *manifest) { m.Entries = []entry{link("", "/etc")} }, "instead of the root"},
		"no root":              {func(m *manifest) { m.Entries = m.Entries[1:] }, "instead of the root"},
		"no entries":           {func(m *manifest) { m.Entries = nil }, "no root"},
		"device":               {add(entry{Path: "sda", Type: 'b'}), `"sda" is neither`},
		"character device":     {add(entry{Path: "null", Type: 'c'}), `"null" is neither`},
		"pipe":                 {add(entry{Path: "pipe", Type: 'p'}), `"pipe" is neither`},
		"hard link to a dir":   {add(entry{Path: "x", Type: typeHardLink, Link: 1}), "a link to what is no file"},
		"hard link to itself":  {add(entry{Path: "x", Type: typeHardLink, Link: 3}), "a link to what is no file"},
		"hard link to nothing": {add(entry{Path: "x", Type: typeHardLink, Link: -9}), "is the most"},
		"link to nothing":      {add(link("x", "")), `a link to ""`},
		"mode":                 {add(entry{Path: "x", Type: typeFile, Mode: 0o100644}), "is the most"},
		"owner":                {add(entry{Path: "x", Type: typeFile, UID: 1<<32 - 1}), "is the most"},
		"huge file":            {add(entry{Path: "x", Type: typeFile, Size: 1 << 50}), "is the most"},
		"more than there is":   {add(entry{Path: "x", Type: typeFile, Size: 10}), `"x" has bytes beyond the stream`},
		"skips too far":        {add(entry{Path: "x", Type: typeFile, Skip: 1}), `"x" has bytes beyond the stream`},
		"trusted xattr":        {add(entry{Path: "x", Type: typeFile, Xattrs: []xattr{{"trusted.overlay.opaque", "y"}}}), `attribute "trusted.overlay.opaque"`},
		"overlay xattr":        {add(entry{Path: "x", Type: typeFile, Xattrs: []xattr{{"user.overlay.redirect", "/"}}}), `attribute "user.overlay.redirect"`},
		"selinux xattr":        {add(entry{Path: "x", Type: typeFile, Xattrs: []xattr{{"security.selinux", "x"}}}), `attribute "security.selinux"`},
		"xattr twice":          {add(entry{Path: "x", Type: typeFile, Xattrs: []xattr{{"user.a", ""}, {"user.a", ""}}}), "twice"},
		"chunk beyond pack":    {func(m *manifest) { m.Chunks[0].Offset = 1 }, "of a pack of 10"},
		"chunk in no pack":     {func(m *manifest) { m.Chunks[0].Pack = 1 }, "is the most"},
		"huge chunk":           {func(m *manifest) { m.Chunks[0].Size = maxChunk + 1 }, "is the most"},
		"chunk grows":          {func(m *manifest) { m.Chunks[0].Size = 5 }, "chunk 0"},
		"no such chunk":        {func(m *manifest) { m.Stream = []int{1} }, "names no chunk"},
		"negative chunk":       {func(m *manifest) { m.Stream = []int{-1} }, "names no chunk"},
		"small too many":       {func(m *manifest) { m.SmallBytes = 11 }, "is the most"},
		"kind":                 {func(m *manifest) { m.Kind = 'x' }, "kind 120"},
		"tar too short":        {func(m *manifest) { m.Kind, m.Tar = kindTar, []piece{{4, 5}} }, "pieces of 9 bytes of a stream of 10"},
		"tar too long":         {func(m *manifest) { m.Kind, m.Tar = kindTar, []piece{{10, 10}} }, "more bytes than the stream"},
	} {
		t.Run(name, func(t *testing.T) {
			m := small()
			c.change(m)
			b, err := m.encode()
			if err != nil {
				t.Fatal(err)
			}
			_, err = decode(b)
			switch {
			case c.want == "":
				if err != nil {
					t.Error(err)
				}
			case !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// TestStream that repeats one chunk does not write more than there is room for.
func TestHugeStream(t *testing.T) {
	m := small()
	m.Chunks[0].Size = maxChunk
	m.Entries[2].Size = 0
	m.Stream = make([]int, 1<<20+1)
	b, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decode(b); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "is the most") {
		t.Errorf("a stream of more than a TiB: %v", err)
	}
	m.Stream = m.Stream[:1<<20]
	m.Small, m.SmallBytes = 1, 0
	m.Entries[2].Size = 1 << 40
	if b, err = m.encode(); err != nil {
		t.Fatal(err)
	}
	place := newMemory()
	ref := Ref{Manifest: ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}, Packs: []ocispec.Descriptor{m.Packs[0].descriptor()}}
	place.blobs[ref.Manifest.Digest] = b
	dir := t.TempDir()
	if _, err := Restore(t.Context(), place, ref, dir); err == nil || !strings.Contains(err.Error(), "are free") {
		t.Errorf("a TiB was restored: %v", err)
	}
	ref.Packs = []ocispec.Descriptor{ref.Manifest}
	if _, err := Restore(t.Context(), place, ref, dir); !errors.Is(err, ErrCorrupt) {
		t.Errorf("packs that the document does not name: %v", err)
	}
}

// TestRestoreInto puts things into the way: what is there is not followed or written to.
func TestRestoreInto(t *testing.T) {
	place := newMemory()
	from := t.TempDir()
	if err := os.MkdirAll(filepath.Join(from, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(from, "dir/file"), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	ref, _, err := NewWriter(place).AddTree(t.Context(), from, TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	for _, name := range []string{"dir", "dir/file"} {
		to := t.TempDir()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(t.Context(), place, ref, to); !errors.Is(err, fs.ErrExist) {
			t.Errorf("restored over %s: %v", name, err)
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Errorf("outside has %v", entries)
	}
}

func FuzzDecode(f *testing.F) {
	m := small()
	for range 2 {
		b, err := m.encode()
		if err != nil {
			f.Fatal(err)
		}
		plain, err := unpackManifest(b)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(plain)
		m.Kind, m.Tar = kindTar, []piece{{0, 10}}
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		m, err := decodePlain(plain)
		if err != nil {
			return
		}
		// What is taken is safe to use, and has one way to be written.
		at := int64(0)
		for i, e := range m.Entries {
			if i > 0 && (!filepath.IsLocal(e.Path) || filepath.Clean(e.Path) != e.Path) {
				t.Errorf("path %q", e.Path)
			}
			if e.Type == typeFile && (e.offset < 0 || e.offset+e.Size > m.length()) {
				t.Errorf("%q is at %d", e.Path, e.offset)
			}
			at += e.Size
		}
		if at > m.length() {
			t.Errorf("files of %d bytes of a stream of %d", at, m.length())
		}
		b, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := unpackManifest(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodePlain(again); err != nil {
			t.Errorf("what was decoded cannot be decoded: %v", err)
		}
		if len(again) < len(plain) && bytes.Equal(again, plain[:len(again)]) {
			t.Error("something behind the end was taken")
		}
	})
}
