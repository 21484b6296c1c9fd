// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/seed-68981b69/slipway/cache/index"
)

// TestDerived checks on random stacks of layers that a flat one shows what they show, alone and over the rest, and that
// clamped ones differ by their times only.
func TestDerived(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	ctx := t.Context()
	limit := time.Unix(1e9-1, 0) // a second before the files of drawChanges
	rapid.Check(t, func(rt *rapid.T) {
		m := model{"": dir("")}
		var ids []ID
		var base Files
		for range rapid.IntRange(1, 4).Draw(rt, "layers") {
			d := s.NewDraft(base)
			drawChanges(rt, d, m)
			if d.Empty() {
				continue
			}
			id, err := d.Commit(ctx)
			if err != nil {
				rt.Fatal(err)
			}
			ids = append(ids, id)
			base = newStack(t, s, ids...)
		}
		if len(ids) == 0 {
			return
		}
		want := m.shapes()
		for from := range ids {
			var below index.Tree
			if from > 0 {
				below = newStack(t, s, ids[:from]...)
			}
			flat, err := s.Flatten(ctx, ids[from:], below)
			if err != nil {
				rt.Fatal(err)
			}
			over := append(slices.Clone(ids[:from]), flat)
			if diff := cmp.Diff(want, shapes(rt, newStack(t, s, over...))); diff != "" {
				rt.Fatalf("%d layers as one over %d show (+), should (-):\n%s", len(ids)-from, from, diff)
			}
			x, _ := s.Index(ctx, flat)
			for e := range x.All() {
				if from == 0 && (e.Type == index.Whiteout || e.Opaque) {
					rt.Fatalf("over nothing the layer hides %q", e.Path)
				}
			}
			info, err := s.Stat(ctx, flat)
			if err != nil {
				rt.Fatal(err)
			}
			r, _, err := s.OpenTar(ctx, flat)
			if err != nil {
				rt.Fatal(err)
			}
			again, err := s.Unpack(ctx, r, info.DiffID, below)
			r.Close()
			if err != nil {
				rt.Fatal(err)
			}
			y, _ := s.Index(ctx, again)
			if diff := cmp.Diff(slices.Collect(x.All()), slices.Collect(y.All()), cmpopts.EquateEmpty()); diff != "" {
				rt.Fatalf("written (-), unpacked (+):\n%s", diff)
			}
		}
		clamped := make([]ID, len(ids))
		for i, id := range ids {
			var err error
			if clamped[i], err = s.Clamp(ctx, id, limit); err != nil {
				rt.Fatal(err)
			}
			if again, err := s.Clamp(ctx, clamped[i], limit); err != nil || again != clamped[i] {
				rt.Fatalf("clamped twice: %s, %v", again, err)
			}
			if same, err := s.Clamp(ctx, id, limit.Add(time.Second)); err != nil || same != id {
				rt.Fatalf("with nothing to clamp: %s instead of %s, %v", same, id, err)
			}
		}
		for p, e := range m {
			e.ModTime = min(e.ModTime, limit.UnixNano())
			m[p] = e
		}
		if diff := cmp.Diff(m.shapes(), shapes(rt, newStack(t, s, clamped...))); diff != "" {
			rt.Fatalf("clamped layers show (+), should (-):\n%s", diff)
		}
	})
}

// TestClampTree clamps what a step has left: with nanoseconds, and hard links.
func TestClampTree(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		var clamped []ID
		for i := range 2 { // at two times
			upper, err := s.NewUpper(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(upper, "upper")
			now := time.Unix(1700000000+int64(i), 123456789)
			for _, name := range []string{"late", "early"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(filepath.Join(dir, name), now, now); err != nil {
					t.Fatal(err)
				}
				now = time.Unix(5, 999)
			}
			if err := os.Link(filepath.Join(dir, "late"), filepath.Join(dir, "link")); err != nil {
				t.Fatal(err)
			}
			id, err := s.CommitTree(t.Context(), filepath.Join(upper, "upper"))
			if err != nil {
				t.Fatal(err)
			}
			c, err := s.Clamp(t.Context(), id, time.Unix(7, 0))
			if err != nil {
				t.Fatal(err)
			}
			clamped = append(clamped, c)
		}
		if clamped[0] != clamped[1] {
			t.Errorf("the same files at two times: %s and %s", clamped[0], clamped[1])
		}
		r, _, err := s.OpenTar(t.Context(), clamped[0])
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		want := map[string]int64{"early": 5, "late": 7, "link": 7}
		got := map[string]int64{}
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got[h.Name] = h.ModTime.UnixNano() / 1e9
			if h.ModTime.Nanosecond() != 0 {
				t.Errorf("%s: %v", h.Name, h.ModTime)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}
