// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"
)

func dir(path string) Entry { return Entry{Path: path, Type: Dir, Mode: 0o755, Offset: -1} }

func file(path, content string) Entry {
	return Entry{
		Path: path, Type: File, Mode: 0o644, Size: int64(len(content)),
		Digest: digest.FromString(content), Offset: -1,
	}
}

func link(path, target string) Entry {
	return Entry{Path: path, Type: Symlink, Mode: 0o777, Target: target, Offset: -1}
}

func paths(entries []Entry) []string {
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.Path)
	}
	return out
}

func TestCompareIsComponentwise(t *testing.T) {
	want := []string{"", "a", "a/b", "a/b/c", "a/b-c", "a!", "a-b", "a-b/c", "a0", "b"}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, Compare)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	rapid.Check(t, func(t *rapid.T) {
		path := rapid.StringMatching(`([a-c!-]{1,2}(/[a-c!-]{1,2}){0,3})?`)
		a, b := path.Draw(t, "a"), path.Draw(t, "b")
		want := slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
		if a == "" || b == "" {
			want = len(a) - len(b)
		}
		got := Compare(a, b)
		if (want < 0) != (got < 0) || (want > 0) != (got > 0) {
			t.Fatalf("Compare(%q, %q) = %d", a, b, got)
		}
	})
}

func TestNew(t *testing.T) {
	x := New([]Entry{file("a/b/c", "old"), file("z", "z"), file("a/b/c", "new"), dir("a-b"), file("a!", "")})
	var got []string
	for e := range x.All() {
		got = append(got, e.Path)
	}
	if diff := cmp.Diff([]string{"", "a", "a/b", "a/b/c", "a!", "a-b", "z"}, got); diff != "" {
		t.Error(diff)
	}
	if e, _ := x.Lookup("a/b/c"); e.Digest != digest.FromString("new") {
		t.Error("of two entries with one path the last one must count")
	}
	if diff := cmp.Diff([]string{"a", "a!", "a-b", "z"}, paths(x.ReadDir(""))); diff != "" {
		t.Error(diff)
	}
	if x.ReadDir("z") != nil || x.ReadDir("nothing") != nil {
		t.Error("ReadDir of no directory must be nil")
	}
	if x.ReadDir("a-b") == nil {
		t.Error("ReadDir of an empty directory must not be nil")
	}
	if New(nil).Len() != 1 {
		t.Error("an empty index must have its root")
	}
}

func TestNewCheckedRefuses(t *testing.T) {
	for name, entries := range map[string][]Entry{
		"twice":        {dir("a"), dir("a")},
		"absolute":     {dir("/a")},
		"dot dot":      {dir("a/../b")},
		"double slash": {dir("a//b")},
		"slash at end": {dir("a/")},
		"NUL":          {dir("a\x00")},
		"below a file": {file("a", ""), file("a/b", "")},
		"root file":    {file("", "")},
		"no type":      {{Path: "a"}},
	} {
		if _, err := NewChecked(entries); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestEncodeRoundTrip(t *testing.T) {
	entries := []Entry{
		{Path: "", Type: Dir, Mode: 0o1777, Offset: -1},
		{Path: "bin", Type: Dir, Mode: 0o755, Opaque: true, ModTime: -5, Offset: -1},
		{Path: "bin/!\xff\n", Type: File, Mode: 0o4755, UID: 1 << 31, GID: 7, Size: 1 << 40, ModTime: 1e18 + 1, Digest: digest.FromString("x"), Offset: 1536},
		{Path: "bin/link", Type: Symlink, Mode: 0o777, Target: "../x", Offset: -1},
		{Path: "bin/other", Type: File, HardLink: "bin/!\xff\n", Digest: "sha512:" + digest.Digest(strings.Repeat("a", 128)), Offset: 0},
		{Path: "dev", Type: CharDevice, Major: 1, Minor: 1 << 19, Xattrs: map[string]string{"user.a": "\x00", "security.capability": "x"}, Offset: -1},
		{Path: "gone", Type: Whiteout, Offset: -1},
	}
	x := New(slices.Clone(entries))
	b := x.Encode()
	y, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(entries, slices.Collect(y.All())); diff != "" {
		t.Error(diff)
	}
	if x.Digest() != y.Digest() {
		t.Error("digest differs after a round trip")
	}
	for i := range b {
		bad := slices.Clone(b)
		bad[i] ^= 0x20
		if _, err := Decode(bad); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
	}
	for i := range b {
		if _, err := Decode(b[:i]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
}

// FuzzDecode feeds bytes past the checksum, which would otherwise stop nearly everything.
func FuzzDecode(f *testing.F) {
	x := New([]Entry{
		file("a/b", "x"), link("c", "d"),
		{Path: "w", Type: Whiteout, Offset: -1},
		{Path: "x", Type: File, HardLink: "a/b", Xattrs: map[string]string{"k": "v"}, Offset: 512},
	})
	enc := x.Encode()
	f.Add(string(enc[len(magic) : len(enc)-32]))
	f.Add("")
	f.Add("\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00")
	f.Add("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
	f.Fuzz(func(t *testing.T, body string) {
		x, err := decodeBody(body)
		if err != nil {
			return
		}
		again, err := Decode(x.Encode())
		if err != nil {
			t.Fatalf("what was decoded cannot be decoded again: %v", err)
		}
		if diff := cmp.Diff(slices.Collect(x.All()), slices.Collect(again.All())); diff != "" {
			t.Fatal(diff)
		}
		if anew, err := NewChecked(slices.Collect(x.All())); err != nil || !bytes.Equal(anew.Encode(), x.Encode()) {
			t.Fatalf("the same entries are encoded in two ways (%v)", err)
		}
		x.Digest()
		_, _ = Digest(Merge(x, again), "")
		for e := range x.All() {
			if got, ok := x.Lookup(e.Path); !ok || got.Path != e.Path {
				t.Fatalf("%q is not found", e.Path)
			}
		}
	})
}

func TestDigestCoversContentOnly(t *testing.T) {
	base := func() []Entry {
		return []Entry{dir("d"), file("d/f", "1"), file("d/g", "2"), {Path: "d/w", Type: Whiteout, Offset: -1}}
	}
	same := map[string]func([]Entry){
		"mtime":  func(e []Entry) { e[1].ModTime = 5 },
		"offset": func(e []Entry) { e[1].Offset = 512 },
	}
	other := map[string]func([]Entry){
		"mode":     func(e []Entry) { e[1].Mode = 0o600 },
		"owner":    func(e []Entry) { e[1].UID = 1 },
		"group":    func(e []Entry) { e[1].GID = 1 },
		"name":     func(e []Entry) { e[1].Path = "d/e" },
		"bytes":    func(e []Entry) { e[1].Digest = digest.FromString("3") },
		"xattr":    func(e []Entry) { e[1].Xattrs = map[string]string{"user.a": "b"} },
		"opaque":   func(e []Entry) { e[0].Opaque = true },
		"whiteout": func(e []Entry) { e[3].Path = "d/x" },
		"hardlink": func(e []Entry) { e[2] = e[1]; e[2].Path = "d/g"; e[2].HardLink = "d/f" },
		"swap":     func(e []Entry) { e[1].Digest, e[2].Digest = e[2].Digest, e[1].Digest },
	}
	want := New(base()).Digest()
	for name, change := range same {
		e := base()
		change(e)
		if New(e).Digest() != want {
			t.Errorf("%s must not change the digest", name)
		}
	}
	seen := map[digest.Digest]string{want: "unchanged"}
	for name, change := range other {
		e := base()
		change(e)
		d := New(e).Digest()
		if was, ok := seen[d]; ok {
			t.Errorf("%s: digest as of %s", name, was)
		}
		seen[d] = name
	}
}

func TestMerkleDigest(t *testing.T) {
	v := Merge(New([]Entry{file("a/x/f", "1"), file("b/x/f", "1"), file("c/x/g", "1"), file("u", "")}),
		New([]Entry{{Path: "b", Type: Dir, Mode: 0o755, ModTime: 99, Offset: -1}}))
	get := func(path string) digest.Digest {
		t.Helper()
		d, err := Digest(v, path)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if get("a") != get("b") {
		t.Error("the name of the root of a digest, times and layers must not count")
	}
	if get("a") == get("c") {
		t.Error("names below must count")
	}
	if get("a") == get("") {
		t.Error("different trees")
	}
	if _, err := Digest(v, "nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
	if _, err := Digest(New([]Entry{{Path: "f", Type: File, Size: 1, Offset: -1}}), "f"); err == nil {
		t.Error("a file that was not hashed must be an error")
	}
}

func TestResolve(t *testing.T) {
	v := Merge(New([]Entry{
		link("lib", "usr/lib"), dir("usr/lib"), file("usr/lib/x", ""), link("usr/lib/up", "../../../../etc"),
		dir("etc"), link("abs", "/usr/./lib//"), link("loop", "loop2"), link("loop2", "loop"),
		link("usr/lib/self", "."), link("dangling", "no/where"),
	}))
	for _, tt := range []struct {
		path   string
		follow bool
		want   string
		err    error
	}{
		{"", true, "", nil},
		{"/", true, "", nil},
		{"lib/x", true, "usr/lib/x", nil},
		{"/lib/../x", true, "usr/x", nil},
		{"lib", false, "lib", nil},
		{"lib/", false, "lib", nil},
		{"lib", true, "usr/lib", nil},
		{"abs/up/passwd", true, "etc/passwd", nil},
		{"lib/self/self/x", true, "usr/lib/x", nil},
		{"../../..", true, "", nil},
		{"no/such/../x", true, "no/x", nil},
		{"dangling/y", true, "no/where/y", nil},
		{"usr/lib/x/y", true, "usr/lib/x/y", nil},
		{"loop/x", true, "", syscall.ELOOP},
		{"loop", false, "loop", nil},
	} {
		got, err := Resolve(v, tt.path, tt.follow)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("Resolve(%q, %v) = %q, %v; want %q, %v", tt.path, tt.follow, got, err, tt.want, tt.err)
		}
	}
}

func TestWalk(t *testing.T) {
	x := New([]Entry{file("a/1", ""), file("a/2", ""), file("b/1", ""), file("c", "")})
	var got []string
	err := Walk(x, "", func(e Entry) error {
		got = append(got, e.Path)
		switch e.Path {
		case "a/1":
			return fs.SkipDir
		case "b/1":
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"", "a", "a/1", "b", "b/1"}, got); diff != "" {
		t.Error(diff)
	}
	if err := Walk(x, "zz", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestViewHidesBrokenHardLinks(t *testing.T) {
	second := file("b", "x")
	second.HardLink = "a"
	v := Merge(New([]Entry{file("a", "x"), second}), New([]Entry{file("a", "new")}))
	if e, _ := v.Lookup("b"); e.HardLink != "" {
		t.Error("b still points to a, which is another file now")
	}
	if e, _ := Merge(v.layers[0]).Lookup("b"); e.HardLink != "a" {
		t.Error("b must point to a")
	}
}

// apply is what overlayfs shows, one layer after the other, said as simply as possible.
func apply(tree map[string]Entry, layer *Index) {
	hide := func(dir string) {
		maps.DeleteFunc(tree, func(p string, _ Entry) bool { return p != dir && Within(p, dir) })
	}
	for e := range layer.All() {
		below, ok := tree[e.Path]
		if e.Type == Whiteout {
			hide(e.Path)
			delete(tree, e.Path)
			continue
		}
		if e.Type != Dir || e.Opaque || ok && below.Type != Dir {
			hide(e.Path)
		}
		e.Opaque = false
		tree[e.Path] = e
	}
}

func drawLayer(t *rapid.T, n int) *Index {
	var entries []Entry
	have := map[string]Type{"": Dir}
	for i := range rapid.IntRange(0, 8).Draw(t, "entries") {
		depth := rapid.IntRange(1, 3).Draw(t, "depth")
		path := ""
		for range depth {
			path = Join(path, rapid.SampledFrom([]string{"a", "b", "a-"}).Draw(t, "name"))
		}
		e := Entry{Path: path, Mode: uint32(n*64 + i), Offset: -1}
		e.Type = rapid.SampledFrom([]Type{Dir, Dir, File, Whiteout}).Draw(t, "type")
		if e.Type == File {
			e.Digest = digest.FromString(path)
		}
		e.Opaque = e.Type == Dir && rapid.IntRange(0, 3).Draw(t, "opaque") == 0
		ok := have[path] == 0
		for p := Parent(path); ok; p = Parent(p) {
			ok = have[p] == 0 || have[p] == Dir
			if p == "" {
				break
			}
		}
		if !ok {
			continue
		}
		for p := path; p != ""; p = Parent(p) {
			have[p] = Dir
		}
		have[path] = e.Type
		entries = append(entries, e)
	}
	x, err := NewChecked(entries)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// treeOnly hides that a View knows a shorter way to its digest.
type treeOnly struct{ Tree }

func checkDigests(t *rapid.T, v *View, want map[string]Entry) {
	for path, e := range want {
		short, err := Digest(v, path)
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := Digest(treeOnly{v}, path); err != nil || plain != short {
			t.Fatalf("Digest(%q) of %v = %s, by definition %s, %v", path, e, short, plain, err)
		}
	}
	// The same files in one layer.
	flat := New(slices.Collect(maps.Values(want)))
	a, aerr := Digest(Merge(flat), "")
	b, berr := Digest(v, "")
	if a != b || aerr != nil || berr != nil {
		t.Fatalf("digest %s in one layer, %s in several (%v, %v)", a, b, aerr, berr)
	}
}

func TestViewIsWhatOverlayShows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var layers []*Index
		want := map[string]Entry{}
		for n := range rapid.IntRange(1, 4).Draw(t, "layers") {
			x := drawLayer(t, n)
			layers = append(layers, x)
			apply(want, x)
		}
		v := Merge(layers...)
		got := map[string]Entry{}
		last := ""
		err := Walk(v, "", func(e Entry) error {
			if e.Path != "" && Compare(last, e.Path) >= 0 {
				return fmt.Errorf("%q after %q", e.Path, last)
			}
			last = e.Path
			got[e.Path] = e
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		checkDigests(t, v, want)
		for _, path := range []string{"a", "b", "a-", "a/a", "a/b", "a-/a", "a/a/a", "b/a/b", "a/a-/b"} {
			e, ok := v.Lookup(path)
			if w, wok := want[path]; ok != wok || !cmp.Equal(e, w) {
				t.Fatalf("Lookup(%q) = %v, %v; want %v, %v", path, e, ok, w, wok)
			}
			i, ok := v.Layer(path)
			if ok {
				e, _ = layers[i].Lookup(path)
				if e.Mode != want[path].Mode {
					t.Fatalf("Layer(%q) = %d", path, i)
				}
			}
		}
	})
}
