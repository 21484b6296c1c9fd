// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// layersToHeal makes a layer of each kind that there is.
func layersToHeal(t *testing.T, s *Store) map[string]ID {
	t.Helper()
	ctx := t.Context()
	must := func(id ID, err error) ID {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	odd := dir("opt")
	odd.Mode, odd.UID = 0o2750, 33
	d := s.NewDraft(nil)
	d.Put(odd, nil)
	d.Put(file("opt/hidden", "x"), text("x"))
	d.Put(file("opt/linked", "the bytes of it"), text("the bytes of it"))
	d.Put(file("gone", "x"), text("x"))
	base := must(d.Commit(ctx))
	below := newStack(t, s, base)

	out := map[string]ID{"base": base, "draft": must(zoo(s, nil).Commit(ctx))}
	// Implicit parents as below, a whiteout that hides something and one that does not, and one of a directory made anew.
	over := makeTar(t, reg("opt/new", "new"), reg("opt/.wh.hidden", ""), reg("opt/.wh.nothing", ""), reg("a/b/implicit", "y"))
	out["over"] = must(s.Unpack(ctx, bytes.NewReader(over), "", below))
	out["link below"] = must(s.Unpack(ctx, bytes.NewReader(makeTar(t, hardlink("name", "opt/linked"), reg("plain", "plain"))), "", below))
	out["opaque root"] = must(s.Unpack(ctx, bytes.NewReader(makeTar(t, reg(".wh..wh..opq", ""), mkdir("opt/"), reg("opt/only", "z"))), "", below))

	tree := func() ID {
		upper, err := s.NewUpper(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(upper)
		made := filepath.Join(upper, "upper", "dir")
		if err := os.Mkdir(made, 0o711); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"one", "two"} {
			if err := os.WriteFile(filepath.Join(made, name), bytes.Repeat([]byte(name), 3000), 0o640); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Link(filepath.Join(made, "one"), filepath.Join(upper, "upper", "z-link")); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mknod(filepath.Join(upper, "upper", "gone"), unix.S_IFCHR, 0); err != nil {
			t.Fatal(err)
		}
		setTime(t, filepath.Join(made, "one"), 1_234_567_890_123_456_789)
		return must(s.CommitTree(ctx, upper))
	}
	out["tree"] = tree()
	packed := tree()
	if _, err := s.Mount(ctx, packed); err != nil { // so that its tree stays
		t.Fatal(err)
	}
	lean := tree()
	for _, id := range []ID{packed, lean} {
		if _, err := s.Pack(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	s.work.Wait()
	out["packed tree"], out["packed tree without its tree"] = packed, lean
	return out
}

// TestHeal takes the index or the info of every kind of layer away, or damages it: it is made again, the same.
func TestHeal(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		layers := layersToHeal(t, s)
		for name, id := range layers {
			infoBefore, err := s.load(id)
			if err != nil {
				t.Fatal(err)
			}
			x, err := s.Index(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			before := slices.Collect(x.All())
			if _, err := s.Mount(ctx, id); err != nil { // extracts it where there is no EROFS image to ask
				t.Fatal(err)
			}
			for _, c := range []struct {
				damage string
				do     func() error
				// cannot names the layers that are lost with that.
				cannot []string
			}{
				{"index missing", func() error { return os.Remove(s.path(id, indexFile)) }, nil},
				{"index flipped", func() error { return flipByte(s.path(id, indexFile)) }, nil},
				{"index of another version", func() error { return olderIndex(s, id) }, nil},
				{"info missing", func() error { return os.Remove(s.path(id, infoFile)) }, []string{"link below", "opaque root"}},
				{"info cut", func() error { return os.Truncate(s.path(id, infoFile), 10) }, []string{"link below", "opaque root"}},
			} {
				if slices.Contains(c.cannot, name) {
					continue
				}
				t.Run(name+"/"+c.damage, func(t *testing.T) {
					if err := c.do(); err != nil {
						t.Fatal(err)
					}
					s.indexes.drop(id)
					s.mu.Lock()
					delete(s.metas, id)
					s.mu.Unlock()
					found, err := s.Check(ctx, id)
					if err != nil || slices.ContainsFunc(found, func(d Damage) bool { return !d.Derived }) {
						t.Errorf("Check: %+v, %v", found, err)
					}
					healed, err := s.Index(ctx, id)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(before, slices.Collect(healed.All())); diff != "" {
						t.Errorf("the index made again differs (+):\n%s", diff)
					}
					m, err := readMeta(s.path(id, infoFile), id)
					if err != nil || m.Content != infoBefore.Content {
						t.Errorf("info: %+v, %v; content was %s", m, err, infoBefore.Content)
					}
					if id[0] == 'd' && (m.DiffID != infoBefore.DiffID || m.TarSize != infoBefore.TarSize || m.Tree != infoBefore.Tree) {
						t.Errorf("info: %+v; was %+v", m, infoBefore)
					}
					if found, err := s.Check(ctx, id); err != nil || len(found) > 0 {
						t.Errorf("Check after healing: %+v, %v", found, err)
					}
					if name == "base" {
						checkMount(t, s, id)
					} else {
						checkMount(t, s, layers["base"], id)
					}
				})
			}
		}
	})
}

// TestHealingRefuses: what does not fit together is not made up, but missing from then on, and kept in quarantine.
func TestHealingRefuses(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	for _, part := range []string{tarFile, treeDir + "/f"} {
		t.Run(part, func(t *testing.T) {
			quarantine := t.TempDir()
			s := openStore(t, Options{Quarantine: quarantine})
			var id ID
			var err error
			if part == tarFile {
				id, err = s.Unpack(ctx, bytes.NewReader(makeTar(t, reg("f", "content"))), "", nil)
			} else {
				upper := t.TempDir()
				if err := os.WriteFile(filepath.Join(upper, "f"), []byte("content"), 0o644); err != nil {
					t.Fatal(err)
				}
				id, err = s.CommitTree(ctx, upper)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(flipByte(s.path(id, part)), flipByte(s.path(id, indexFile))); err != nil {
				t.Fatal(err)
			}
			s.indexes.drop(id)
			if _, err := s.Index(ctx, id); !errors.Is(err, ErrNotFound) {
				t.Errorf("Index: %v", err)
			}
			if s.Exists(id) {
				t.Error("the layer is still there")
			}
			if left, _ := os.ReadDir(quarantine); len(left) != 1 || left[0].Name() != string(id) {
				t.Errorf("in quarantine: %v", left)
			}
		})
	}
}

// TestMountOfQuarantinedLayer: a layer that takes the ID of one that was put into quarantine is not shown by the mount of
// that one.
func TestMountOfQuarantinedLayer(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	s := openStore(t, Options{Quarantine: t.TempDir()})
	if info := s.Info(); !info.EROFS {
		t.Skip("SKIPPED: tars are not mounted here: " + info.Reason)
	}
	raw := makeTar(t, reg("f", "content"))
	unpack := func() (ID, string) {
		t.Helper()
		id, err := s.Unpack(ctx, bytes.NewReader(raw), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		mnt, err := s.Mount(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return id, mnt
	}
	id, _ := unpack()
	x, err := s.Index(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	f, _ := x.Lookup("f")
	tar, err := os.OpenFile(s.path(id, tarFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tar.WriteAt([]byte("damaged"), f.Offset)
	if err := errors.Join(err, tar.Close(), flipByte(s.path(id, indexFile))); err != nil {
		t.Fatal(err)
	}
	s.indexes.drop(id)
	if _, err := s.Index(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Fatalf("Index: %v", err)
	}
	again, mnt := unpack()
	if got, err := os.ReadFile(filepath.Join(mnt, "f")); again != id || string(got) != "content" {
		t.Errorf("layer %s (was %s) shows %q, %v", again, id, got, err)
	}
}

// TestPassingErrorsAreNoDamage: an error that another attempt may not meet costs no layer, wherever it stands in a chain.
func TestPassingErrorsAreNoDamage(t *testing.T) {
	missing := &os.PathError{Op: "open", Path: "layer.tar", Err: unix.ENOENT}
	for _, c := range []struct {
		err    error
		damage bool
	}{
		{missing, true},
		{&os.PathError{Op: "read", Path: "index", Err: unix.EIO}, true},
		{fmt.Errorf("mount erofs: %w", unix.EUCLEAN), true},
		{errUnproven, true},
		{&os.PathError{Op: "open", Path: "index", Err: unix.EMFILE}, false},
		{fmt.Errorf("hash %q: %w", "file", unix.EMFILE), false},
		{fmt.Errorf("%w: tar: %w; tree: %w", errUnproven, missing, unix.ENFILE), false},
	} {
		if got := isDamage(c.err); got != c.damage {
			t.Errorf("%v: damage is %v", c.err, got)
		}
	}
}

// flipByte changes a byte in the middle of a file.
func flipByte(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	return os.WriteFile(path, b, 0o600)
}

// olderIndex makes a layer's index look as if a program with another format had written it, with its idea of a content
// digest.
func olderIndex(s *Store, id ID) error {
	b, err := os.ReadFile(s.path(id, indexFile))
	if err != nil {
		return err
	}
	_, rest, _ := bytes.Cut(b, []byte("\n"))
	if err := os.WriteFile(s.path(id, indexFile), append([]byte("slipway index 1\n"), rest...), 0o600); err != nil {
		return err
	}
	m, err := readMeta(s.path(id, infoFile), id)
	if err != nil {
		return err
	}
	m.Content = emptyDigest
	return s.replaceInfo(m)
}

var _ index.Tree = recalled{}
