// SPDX-License-Identifier: Apache-2.0

package index

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"
)

func changes(a, b *Index) []string {
	var out []string
	for _, c := range Diff(a.All(), b.All()) {
		switch {
		case c.Before == nil:
			out = append(out, "+"+c.Path)
		case c.After == nil:
			out = append(out, "-"+c.Path)
		default:
			out = append(out, c.Path+": "+strings.Join(c.Fields(), ","))
		}
	}
	return out
}

func TestDiff(t *testing.T) {
	base := []Entry{
		{Path: "", Type: Dir, Mode: 0o755},
		{Path: "a", Type: Dir, Mode: 0o755},
		{Path: "a/b", Type: File, Mode: 0o644, Size: 1, Digest: digest.FromString("x"), ModTime: 1, Offset: 512},
		{Path: "a!", Type: Symlink, Target: "a"},
		{Path: "c", Type: CharDevice, Major: 1, Minor: 3},
		{Path: "gone", Type: Whiteout},
	}
	for _, c := range []struct {
		name string
		edit func(e []Entry) []Entry
		want string
	}{
		{"nothing", func(e []Entry) []Entry { return e }, ""},
		{"time and place", func(e []Entry) []Entry { e[2].ModTime, e[2].Offset = 2, 1024; return e }, ""},
		{"bytes", func(e []Entry) []Entry { e[2].Digest = digest.FromString("y"); return e }, "a/b: bytes"},
		{"size", func(e []Entry) []Entry { e[2].Digest, e[2].Size = digest.FromString("xy"), 2; return e }, "a/b: bytes,size"},
		{"mode", func(e []Entry) []Entry { e[1].Mode = 0o700; return e }, "a: mode"},
		{"root", func(e []Entry) []Entry { e[0].Mode = 0o700; return e }, ": mode"},
		{"owner", func(e []Entry) []Entry { e[2].GID = 7; return e }, "a/b: owner"},
		{"link", func(e []Entry) []Entry { e[3].Target = "c"; return e }, "a!: link"},
		{"device", func(e []Entry) []Entry { e[4].Minor = 5; return e }, "c: device"},
		{"xattr", func(e []Entry) []Entry { e[2].Xattrs = map[string]string{"user.a": "1"}; return e }, "a/b: xattr"},
		{"opaque", func(e []Entry) []Entry { e[1].Opaque = true; return e }, "a: opaque"},
		{"type", func(e []Entry) []Entry { e[3] = Entry{Path: "a!", Type: File}; return e }, "a!: type,link"},
		{"whiteout gone", func(e []Entry) []Entry { return e[:5] }, "-gone"},
		{"first gone and one new", func(e []Entry) []Entry { return append(slices.Delete(e, 2, 3), Entry{Path: "z", Type: Fifo}) }, "-a/b +z"},
		{"new in the middle", func(e []Entry) []Entry { return append(e, Entry{Path: "a/a", Type: Fifo}) }, "+a/a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := strings.Join(changes(New(slices.Clone(base)), New(c.edit(slices.Clone(base)))), " ")
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestDiffIsWhatTheDigestSees: two layers differ somewhere exactly when their digests do.
func TestDiffIsWhatTheDigestSees(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func() *Index {
			var e []Entry
			for i := range rapid.IntRange(0, 4).Draw(t, "entries") {
				f := Entry{
					Path: fmt.Sprint(i % 3), Type: rapid.SampledFrom([]Type{File, Whiteout, Fifo}).Draw(t, "type"),
					Mode: uint32(rapid.IntRange(0, 1).Draw(t, "mode")), UID: uint32(rapid.IntRange(0, 1).Draw(t, "uid")),
					ModTime: rapid.Int64Range(0, 3).Draw(t, "time"),
				}
				if f.Type == File {
					f.Digest = digest.FromString(rapid.SampledFrom([]string{"a", "b"}).Draw(t, "bytes"))
				}
				e = append(e, f)
			}
			return New(e)
		}
		a, b := draw(), draw()
		if differs := len(Diff(a.All(), b.All())) > 0; differs != (a.Digest() != b.Digest()) {
			t.Fatalf("differences %v, digests %s and %s", changes(a, b), a.Digest(), b.Digest())
		}
	})
}
