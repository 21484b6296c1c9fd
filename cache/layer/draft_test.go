// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/seed-68981b69/slipway/cache/index"
)

// model is a file tree as a map, changed as plainly as possible.
type model map[string]index.Entry

func (m model) remove(path string) {
	maps.DeleteFunc(m, func(p string, _ index.Entry) bool { return p != "" && index.Within(p, path) })
}

func (m model) put(e index.Entry) {
	var parents []string // from the top
	for p := index.Parent(e.Path); p != ""; p = index.Parent(p) {
		parents = append([]string{p}, parents...)
	}
	for _, p := range parents {
		if have, ok := m[p]; !ok || have.Type != index.Dir {
			m.remove(p)
			m[p] = dir(p)
		}
	}
	if have, ok := m[e.Path]; ok && (e.Type != index.Dir || have.Type != index.Dir || e.Opaque) {
		m.remove(e.Path)
	}
	e.Opaque = false
	m[e.Path] = e
}

// shape is what of an entry counts here.
func shape(e index.Entry) string {
	s := fmt.Sprintf("%d %o %d %s %d", e.Type, e.Mode, e.Size, e.Target, e.ModTime)
	if e.Type == index.File {
		s += " " + string(e.Digest)
	}
	return s
}

func shapes(t interface{ Fatal(...any) }, tree index.Tree) map[string]string {
	out := map[string]string{}
	if err := index.Walk(tree, "", func(e index.Entry) error {
		out[e.Path] = shape(e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// drawChanges makes random changes to a draft and to the model of its base.
func drawChanges(t *rapid.T, d *Draft, m model) {
	path := rapid.Custom(func(t *rapid.T) string {
		names := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "a", "b", "a-"}), 1, 3).Draw(t, "names")
		return strings.Join(names, "/")
	})
	for i := range rapid.IntRange(0, 16).Draw(t, "changes") {
		p := path.Draw(t, "path")
		switch kind := rapid.SampledFrom([]string{"file", "file", "dir", "opaque", "symlink", "remove", "remove", "link", "root"}).Draw(t, "kind"); kind {
		case "remove":
			d.Remove(p)
			m.remove(p)
		case "link":
			to := path.Draw(t, "to")
			e, ok := m[to]
			if !ok || e.Type != index.File || index.Within(to, p) || index.Within(p, to) {
				continue
			}
			d.Put(index.Entry{Path: p, Type: index.File, HardLink: to}, nil)
			e.Path = p
			m.put(e)
		case "root":
			e := dir("")
			e.Mode = uint32(0o700 + i)
			d.Put(e, nil)
			m.put(e)
		default:
			content := fmt.Sprint(p, i)
			e := file(p, content)
			e.Digest = digest.FromString(content)
			switch kind {
			case "dir", "opaque":
				e = dir(p)
				e.Mode = uint32(0o700 + i)
				e.Opaque = kind == "opaque"
			case "symlink":
				e = symlink(p, content)
			}
			d.Put(e, text(content))
			m.put(e)
		}
	}
}

func (m model) shapes() map[string]string {
	out := map[string]string{}
	for p, e := range m {
		out[p] = shape(e)
	}
	return out
}

// TestDraftIsOverlay checks three times that a draft is what a sequence of plain changes makes of its base: as
// the draft shows itself, as its layer merged over the base shows, and as its tar unpacked elsewhere shows.
func TestDraftIsOverlay(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	ctx := t.Context()
	rapid.Check(t, func(rt *rapid.T) {
		m := model{"": dir("")}
		var ids []ID
		var base Files
		for range rapid.IntRange(1, 3).Draw(rt, "layers") {
			d := s.NewDraft(base)
			before := m.shapes()
			drawChanges(rt, d, m)
			want := m.shapes()
			if diff := cmp.Diff(want, shapes(rt, d)); diff != "" {
				rt.Fatalf("the draft shows (+), should (-):\n%s", diff)
			}
			for p, e := range m {
				if got, ok := d.Lookup(p); !ok || shape(got) != shape(e) {
					rt.Fatalf("Lookup(%q) = %+v, %v", p, got, ok)
				}
			}
			if d.Empty() {
				if diff := cmp.Diff(before, want); diff != "" {
					rt.Fatalf("the draft says that it is empty, but changes:\n%s", diff)
				}
				continue
			}
			id, err := d.Commit(ctx)
			if err != nil {
				rt.Fatal(err)
			}
			ids = append(ids, id)
			merged := newStack(t, s, ids...)
			if diff := cmp.Diff(want, shapes(rt, merged)); diff != "" {
				x, _ := s.Index(ctx, id)
				rt.Fatalf("layer over base shows (+), should (-):\n%s\n%s", diff, strings.Join(describe(x), "\n"))
			}
			r, _, err := s.OpenTar(ctx, id)
			if err != nil {
				rt.Fatal(err)
			}
			info, err := s.Stat(ctx, id)
			if err != nil {
				rt.Fatal(err)
			}
			again, err := s.Unpack(ctx, r, info.DiffID, base)
			r.Close()
			if err != nil {
				rt.Fatal(err)
			}
			x, _ := s.Index(ctx, id)
			y, _ := s.Index(ctx, again)
			if diff := cmp.Diff(slices.Collect(x.All()), slices.Collect(y.All()), cmpopts.EquateEmpty()); diff != "" {
				rt.Fatalf("written (-), unpacked (+):\n%s", diff)
			}
			base = merged
		}
	})
}

// TestDraftIsWhatTheKernelShows is the same for a few cases with the real overlayfs, in both forms.
func TestDraftIsWhatTheKernelShows(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		for seed := range 8 {
			var ids []ID
			var base Files
			m := model{"": dir("")}
			for layer := range 3 {
				rapid.Custom(func(rt *rapid.T) int {
					d := s.NewDraft(base)
					drawChanges(rt, d, m)
					if d.Empty() {
						return 0
					}
					id, err := d.Commit(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					ids = append(ids, id)
					return 0
				}).Example(seed*10 + layer)
				if len(ids) > 0 {
					base = newStack(t, s, ids...)
				}
			}
			if len(ids) > 0 {
				checkMount(t, s, ids...)
				if diff := cmp.Diff(m.shapes(), shapes(t, base)); diff != "" {
					t.Error(diff)
				}
			}
		}
	})
}

func TestDraftFilesCanBeRead(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	d := s.NewDraft(nil)
	d.Put(file("a", "base"), text("base"))
	d.Put(file("b", "base b"), text("base b"))
	id, err := d.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d = s.NewDraft(newStack(t, s, id))
	d.Put(file("a", "new"), text("new"))
	d.Put(index.Entry{Path: "c", Type: index.File, HardLink: "b"}, nil)
	for path, want := range map[string]string{"a": "new", "b": "base b", "c": "base b", "d": ""} {
		r, err := d.OpenFile(t.Context(), path)
		if want == "" {
			if err == nil {
				t.Errorf("%s: no error", path)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		sum, _ := digest.FromReader(r)
		r.Close()
		if sum != digest.FromString(want) {
			t.Errorf("%s reads wrong", path)
		}
	}
}
