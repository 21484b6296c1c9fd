// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// flip changes one byte in the middle of the first file that matches pattern.
func flip(t *testing.T, pattern string) {
	t.Helper()
	flipAt(t, pattern, -1)
}

func flipAt(t *testing.T, pattern string, at int) {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	b, err := os.ReadFile(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	if at < 0 {
		at = len(b) / 2
	}
	b[at] ^= 1
	if err := os.WriteFile(paths[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCheck damages one thing of each kind in a store: Check names it, a repair puts it away, and what made it
// makes it again, the same as before.
func TestCheck(t *testing.T) {
	ctx := context.Background()
	type world struct {
		tar, tree layer.ID
		log       ocispec.Descriptor
	}
	// fill does what builds and pulls do: nothing twice that is there.
	fill := func(t *testing.T, s *Store) world {
		t.Helper()
		var w world
		w.tar = s.unpack(t, "tar")
		w.log = s.blob(t, "text/plain", "what a step has printed")
		s.image(t, "app", snapshot.Snapshot{w.tar}, s.blob(t, "x", "packed"))
		rec, ok, err := s.Records.Get(ctx, "step")
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			if _, err := s.Layers.Stat(ctx, rec.Outputs[0][0]); err == nil {
				w.tree = rec.Outputs[0][0]
				return w
			}
		}
		dir, err := s.Layers.NewUpper(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "upper", "made"), bytes.Repeat([]byte("by the step "), 1000), 0o644); err != nil {
			t.Fatal(err)
		}
		if w.tree, err = s.Layers.CommitTree(ctx, dir); err != nil {
			t.Fatal(err)
		}
		var parts []record.Part
		for i := range 50 { // so that the middle of the database's table is a record
			parts = append(parts, record.Part{Name: fmt.Sprint("part ", i), Value: strings.Repeat("v", 100)})
		}
		if err := s.Records.Put(ctx, &record.Record{Outputs: []snapshot.Snapshot{{w.tree}}, Log: w.log.Digest, Parts: parts}, "step"); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		return w
	}
	content := func(t *testing.T, s *Store, w world) string {
		t.Helper()
		d, err := s.Snapshots.Content(ctx, snapshot.Snapshot{w.tar, w.tree})
		if err != nil {
			t.Fatal(err)
		}
		return d.String()
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string, w world)
		want   []string // kind, with the part of a layer
		// kept says that a repair cannot put everything right by itself.
		kept bool
	}{
		{"nothing", func(*testing.T, string, world) {}, nil, false},
		{"blob", func(t *testing.T, dir string, w world) {
			flip(t, filepath.Join(dir, "content/blobs/sha256", w.log.Digest.Encoded()))
		}, []string{"blob"}, false},
		{
			"tar", func(t *testing.T, dir string, w world) {
				flip(t, filepath.Join(dir, "layers", string(w.tar), "layer.tar"))
			},
			[]string{"image", "layer layer.tar"},
			true,
		},
		{
			"index", func(t *testing.T, dir string, w world) { flip(t, filepath.Join(dir, "layers", string(w.tar), "index")) },
			[]string{"layer index"},
			false,
		},
		{
			"erofs", func(t *testing.T, dir string, w world) {
				flip(t, filepath.Join(dir, "layers", string(w.tar), "layer.erofs"))
			},
			[]string{"layer layer.erofs"},
			false,
		},
		{"info", func(t *testing.T, dir string, w world) {
			if err := os.Truncate(filepath.Join(dir, "layers", string(w.tree), "info.json"), 10); err != nil {
				t.Fatal(err)
			}
		}, []string{"layer info.json"}, false},
		{"info and index of a tree", func(t *testing.T, dir string, w world) {
			for _, name := range []string{"info.json", "index"} {
				if err := os.Truncate(filepath.Join(dir, "layers", string(w.tree), name), 10); err != nil {
					t.Fatal(err)
				}
			}
		}, []string{"layer info.json", "orphan", "record"}, false},
		{
			"tree", func(t *testing.T, dir string, w world) {
				flip(t, filepath.Join(dir, "layers", string(w.tree), "tree/made"))
			},
			[]string{"layer tree", "record"},
			false,
		},
		{"layer gone", func(t *testing.T, dir string, w world) {
			if err := os.RemoveAll(filepath.Join(dir, "layers", string(w.tree))); err != nil {
				t.Fatal(err)
			}
		}, []string{"orphan", "record"}, false},
		{
			"database", func(t *testing.T, dir string, _ world) { flip(t, filepath.Join(dir, "records/*.sst")) },
			[]string{"database"},
			false,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			w := fill(t, s)
			want := content(t, s, w)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			c.damage(t, dir, w)

			kinds := func(ps []Problem) []string {
				var out []string
				for _, p := range ps {
					out = append(out, strings.TrimSpace(p.Kind+" "+p.Part))
				}
				slices.Sort(out)
				return slices.Compact(out)
			}
			s = open(t, dir)
			found, err := s.Check(ctx, CheckOptions{})
			if err != nil || !slices.Equal(kinds(found), c.want) {
				t.Fatalf("found %+v, %v; want %v", found, err, c.want)
			}
			again, err := s.Check(ctx, CheckOptions{})
			if c.name == "info" {
				c.want = nil // looking for the layer has made it again
			}
			if err != nil || !slices.Equal(kinds(again), c.want) {
				t.Errorf("a check has changed something: %+v, %v", again, err)
			}
			found, err = s.Check(ctx, CheckOptions{Repair: true})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range found {
				if p.Repair == "" && p.Kind != ProblemImage && p.Kind != ProblemOrphan {
					t.Errorf("not repaired: %+v", p)
				}
			}
			w = fill(t, s)
			if got := content(t, s, w); got != want {
				t.Errorf("made again: %s, want %s", got, want)
			}
			if found, err = s.Check(ctx, CheckOptions{}); err != nil || slices.ContainsFunc(found, func(p Problem) bool { return p.Kind != ProblemOrphan }) {
				t.Errorf("after the repair: %+v, %v", found, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCheckOfLostDatabase: one that cannot even be opened is put aside by Open, and named by Check.
func TestCheckOfLostDatabase(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	s.image(t, "app", nil, s.blob(t, "x", "packed"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "records/MANIFEST"), []byte("no manifest"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	found, err := s.Check(t.Context(), CheckOptions{Repair: true})
	if err != nil || len(found) == 0 || found[0].Kind != ProblemDatabase || found[0].Repair != RepairQuarantined {
		t.Errorf("found %+v, %v", found, err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || slices.ContainsFunc(found, func(p Problem) bool { return p.Kind != ProblemOrphan }) {
		t.Errorf("after the repair: %+v, %v", found, err)
	}
}

// TestDamagedBlock flips a byte in a database that is one block, which Badger refuses to open: only the value that has the
// byte is lost.
func TestDamagedBlock(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	const n = 20
	for i := range n {
		s.image(t, fmt.Sprint("app", i), nil, s.blob(t, "x", "packed"))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	flipAt(t, filepath.Join(dir, "records/*.sst"), 200)
	s = open(t, dir)
	images, err := s.Images.List(t.Context())
	if err != nil || len(images) < n-1 {
		t.Errorf("%d images are left, %v", len(images), err)
	}
	if swept, err := s.Sweep(t.Context()); err != nil || len(swept.Blobs) > 3 {
		t.Errorf("swept %+v, %v", swept, err)
	}
}
