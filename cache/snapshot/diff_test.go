// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/seed-68981b69/slipway/cache/layer"
)

func TestDiff(t *testing.T) {
	f := newFixture(t)
	base, other := f.untar("d/", "d/a=1", "b=2"), f.untar("d/", "d/a=1", "b=3")
	tree := f.step(Snapshot{base}, func(root string) {
		if err := os.Remove(filepath.Join(root, "b")); err != nil {
			t.Fatal(err)
		}
		write(t, root, "new", "x")
	})
	again := f.step(Snapshot{base}, func(root string) {
		if err := os.Remove(filepath.Join(root, "b")); err != nil {
			t.Fatal(err)
		}
		write(t, root, "new", "x")
	})
	if tree[1] == again[1] {
		t.Fatal("two runs have made one layer")
	}
	for _, c := range []struct {
		name string
		a, b Snapshot
		want string
	}{
		{"equal", tree, tree, ""},
		{"equal content", tree, again, ""},
		{"both empty", nil, nil, ""},
		{"one file", Snapshot{base}, Snapshot{other}, "b"},
		{"below the last", Snapshot{base, tree[1]}, Snapshot{other, again[1]}, "b"},
		{"a layer more", Snapshot{base}, tree, " b new"}, // the first is the root directory
		{"a layer less", tree, Snapshot{base}, " b new"},
		{"split otherwise", Snapshot{base, other, tree[1]}, tree, ""},
		{"many against one", Snapshot{base, f.untar("c=1"), f.untar("e=1")}, Snapshot{base}, "c e"},
	} {
		t.Run(c.name, func(t *testing.T) {
			changes, err := f.Diff(t.Context(), c.a, c.b)
			if err != nil {
				t.Fatal(err)
			}
			var paths []string
			for _, change := range changes {
				paths = append(paths, change.Path)
			}
			if got := strings.Join(paths, " "); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	if _, err := f.Diff(t.Context(), tree, Snapshot{base, layer.ID("tabsent")}); err == nil {
		t.Error("no error for a layer that is not there")
	}
}
