// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

var quiet = slog.New(slog.DiscardHandler)

// smallTar has a file with two names.
func smallTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "d/plain", Typeflag: tar.TypeReg, Mode: 0o644, Size: 3},
		{Name: "d/link", Typeflag: tar.TypeLink, Linkname: "d/plain"},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			io.WriteString(w, "abc")
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// indexOfTar is the index of the layer that raw makes.
func indexOfTar(t *testing.T, raw []byte) *index.Index {
	t.Helper()
	s := openStore(t, Options{NoEROFS: true})
	id, err := s.Unpack(t.Context(), bytes.NewReader(raw), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.Index(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestFaults fails every call of every way to change the store. Afterwards the store opens, has every layer that it had, nothing in
// it is damaged, the next attempt succeeds, and nothing is left over.
func TestFaults(t *testing.T) {
	raw, scattered := smallTar(t), scatteredTar(t)
	rawIndex := indexOfTar(t, raw)
	fetch := func(_ context.Context, info Info, _ string) (io.ReadCloser, error) {
		for _, b := range [][]byte{raw, scattered} {
			if digest.FromBytes(b) == info.DiffID {
				return io.NopCloser(bytes.NewReader(b)), nil
			}
		}
		return nil, errors.New("no such tar")
	}
	type world struct {
		s    *Store
		old  ID     // a tar
		tree ID     // a tree
		dir  string // an upper directory, as a step leaves it
	}
	put := func(d *Draft, path, content string) {
		d.Put(index.Entry{Path: path, Type: index.File, Mode: 0o644, Size: int64(len(content))}, func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(content)), nil
		})
	}
	fill := func(s *Store) (string, error) {
		dir, err := s.NewUpper(t.Context())
		if err != nil {
			return "", err
		}
		return dir, os.WriteFile(filepath.Join(dir, "upper", "made"), []byte("by a step"), 0o644)
	}
	for _, c := range []struct {
		name string
		op   func(w *world) error
		gone bool // the operation deletes old
	}{
		{"draft", func(w *world) error {
			d := w.s.NewDraft(nil)
			put(d, "a/b", "hello")
			_, err := d.Commit(t.Context())
			return err
		}, false},
		{"ensure", func(w *world) error {
			d := w.s.NewDraft(nil)
			content := "held"
			d.Put(index.Entry{Path: "h", Type: index.File, Mode: 0o644, Size: 4, Digest: digest.FromString(content)}, func() (io.ReadCloser, error) {
				return io.NopCloser(strings.NewReader(content)), nil
			})
			id, err := d.Hold(t.Context())
			if err != nil {
				return err
			}
			return w.s.Ensure(t.Context(), id)
		}, false},
		{"commit tree", func(w *world) error {
			dir, err := fill(w.s)
			if err != nil {
				return err
			}
			_, err = w.s.CommitTree(t.Context(), dir)
			return err
		}, false},
		{"commit large tree", func(w *world) error {
			dir, err := fill(w.s)
			if err != nil {
				return err
			}
			fillLarge(t, filepath.Join(dir, "upper"))
			id, err := w.s.CommitTree(t.Context(), dir)
			if err != nil {
				return err
			}
			return w.s.Ensure(t.Context(), id)
		}, false},
		{"unpack", func(w *world) error {
			_, err := w.s.Unpack(t.Context(), bytes.NewReader(raw), "", nil)
			return err
		}, false},
		{"unpack scattered", func(w *world) error {
			_, err := w.s.Unpack(t.Context(), bytes.NewReader(scattered), "", nil)
			return err
		}, false},
		{"mount", func(w *world) error { _, err := w.s.Mount(t.Context(), w.old); return err }, false},
		{"mount extracted", func(w *world) error {
			w.s.probe = func() StoreInfo { return StoreInfo{Reason: "the test says so"} }
			_, err := w.s.Mount(t.Context(), w.old)
			return err
		}, false},
		{"heal index", func(w *world) error {
			if err := os.Remove(w.s.path(w.old, indexFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			w.s.indexes.drop(w.old)
			_, err := w.s.Index(t.Context(), w.old)
			return err
		}, false},
		{"heal info", func(w *world) error {
			if err := os.Remove(w.s.path(w.tree, infoFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			w.s.mu.Lock()
			delete(w.s.metas, w.tree)
			w.s.mu.Unlock()
			_, err := w.s.load(w.tree)
			if err != nil && errors.Is(err, ErrNotFound) {
				return faultfs.ErrInjected // it is not told why
			}
			return err
		}, false},
		{"copy tree", func(w *world) error {
			dir, err := w.s.NewUpper(t.Context())
			if err != nil {
				return err
			}
			return w.s.CopyTree(t.Context(), newStack(t, w.s, w.old, w.tree), filepath.Join(dir, "upper"))
		}, false},
		{"pack", func(w *world) error { _, err := w.s.Pack(t.Context(), w.tree); return err }, false},
		{"remote", func(w *world) error {
			id, err := w.s.AddRemote(t.Context(), Remote{DiffID: digest.FromBytes(raw), Below: []ID{w.old}, Origin: "test:here"})
			if err != nil {
				return err
			}
			if _, err := w.s.AddRemote(t.Context(), Remote{DiffID: digest.FromBytes(raw), Below: []ID{w.old}, Index: rawIndex}); err != nil {
				return err
			}
			return w.s.Materialise(t.Context(), id)
		}, false},
		{"remote scattered", func(w *world) error {
			id, err := w.s.AddRemote(t.Context(), Remote{DiffID: digest.FromBytes(scattered), Origin: "test:here"})
			if err != nil {
				return err
			}
			return w.s.Materialise(t.Context(), id)
		}, false},
		{"forget", func(w *world) error {
			id, err := w.s.AddRemote(t.Context(), Remote{DiffID: digest.FromBytes(scattered), Origin: "test:here"})
			if err != nil {
				return err
			}
			return w.s.Forget(t.Context(), id)
		}, false},
		{"sync", func(w *world) error { return w.s.Sync(t.Context()) }, false},
		{"delete", func(w *world) error { return w.s.Delete(t.Context(), w.old) }, true},
	} {
		for _, sticky := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sticky=%v", c.name, sticky), func(t *testing.T) {
				ctx := context.WithoutCancel(t.Context())
				for k := 1; ; k++ {
					dir := faultfs.Dir(t)
					reopen := func(fs fsys.FS) *Store {
						t.Helper()
						s, err := Open(dir, Options{FS: fs, Log: quiet})
						if err != nil {
							t.Fatal(err)
						}
						s.OnFetch("test", fetch)
						return s
					}
					var w world
					w.s = reopen(fsys.OS)
					d := w.s.NewDraft(nil)
					put(d, "old", "was there before")
					var err error
					if w.old, err = d.Commit(ctx); err != nil {
						t.Fatal(err)
					}
					if w.dir, err = fill(w.s); err != nil {
						t.Fatal(err)
					}
					if w.tree, err = w.s.CommitTree(ctx, w.dir); err != nil {
						t.Fatal(err)
					}
					if err := w.s.Close(); err != nil {
						t.Fatal(err)
					}

					fault := &faultfs.Fault{FS: fsys.OS}
					w.s = reopen(fault)
					w.s.work.Wait()
					fault.At, fault.Sticky = fault.Calls()+k, sticky
					err = c.op(&w)
					w.s.work.Wait()
					where := fault.Failed()
					if err != nil && !errors.Is(err, faultfs.ErrInjected) {
						t.Errorf("%s: the error hides its cause: %v", where, err)
					}
					w.s.Close()

					w.s = reopen(fsys.OS)
					w.s.work.Wait() // the sweep
					for _, id := range []ID{w.old, w.tree} {
						if _, serr := w.s.Stat(ctx, id); serr != nil && !(c.gone && id == w.old) {
							t.Errorf("%s: lost: %v", where, serr)
						}
					}
					if _, err := w.s.Index(ctx, w.old); err != nil && !c.gone { // which heals it
						t.Errorf("%s: %v", where, err)
					}
					checkAll(t, w.s, where)
					for _, sub := range []string{"tmp", "uppers", "mnt"} {
						if left, _ := os.ReadDir(filepath.Join(dir, sub)); len(left) > 0 {
							t.Errorf("%s: %s is left in %s", where, left[0].Name(), sub)
						}
					}
					if where == "" {
						if err != nil {
							t.Errorf("without a fault: %v", err)
						}
						w.s.Close()
						return
					}
					if err := c.op(&w); err != nil {
						t.Errorf("%s: the next attempt: %v", where, err)
					}
					checkAll(t, w.s, where)
					if err := w.s.Close(); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

func checkAll(t *testing.T, s *Store, where string) {
	t.Helper()
	ids, err := s.IDs()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		found, err := s.Check(t.Context(), id)
		if errors.Is(err, ErrNotFound) {
			if n, err := s.RemoveBroken(t.Context()); n == 0 || err != nil {
				t.Errorf("%s: layer %s is none, but the sweep removes %d: %v", where, id, n, err)
			}
			s.work.Wait()
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", where, err)
		}
		for _, d := range found {
			t.Errorf("%s: layer %s: %s: %v", where, id, d.Part, d.Err)
		}
	}
}

// TestReboot takes away what was not synced: trees that no syncfs has covered are missing in the next boot, those that one has
// covered are there, and a packed one shows its tar.
func TestReboot(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s, err := Open(dir, Options{BootID: "first", Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	commit := func(name string) ID {
		t.Helper()
		upper, err := s.NewUpper(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(upper, "upper", name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		id, err := s.CommitTree(ctx, upper)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	synced := commit("synced")
	if err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	packed, lost := commit("packed"), commit("lost")
	if _, err := s.Mount(ctx, packed); err != nil { // so that its tree stays when it is packed
		t.Fatal(err)
	}
	if _, err := s.Pack(ctx, packed); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// The power cut.
	for id, name := range map[ID]string{packed: "packed", lost: "lost"} {
		if err := os.Truncate(filepath.Join(dir, string(id), treeDir, name), 0); err != nil {
			t.Fatal(err)
		}
	}
	// The process has died, the boot is the same: everything counts, whatever we have done to it.
	if s, err = Open(dir, Options{BootID: "first", Log: quiet}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []ID{synced, packed, lost} {
		if _, err := s.Stat(ctx, id); err != nil {
			t.Errorf("same boot: %v", err)
		}
	}
	s.Close()
	if s, err = Open(dir, Options{BootID: "second", Log: quiet}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for id, name := range map[ID]string{synced: "synced", packed: "packed"} {
		f, err := s.OpenFile(ctx, id, name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if b, err := io.ReadAll(f); err != nil || string(b) != name {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		f.Close()
	}
	if _, err := s.Stat(ctx, lost); !errors.Is(err, ErrNotFound) {
		t.Errorf("a tree that was never on disk: %v", err)
	}
	if os.Geteuid() == 0 {
		mnt, err := s.Mount(ctx, packed)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(mnt, "packed")); err != nil || string(b) != "packed" {
			t.Errorf("mounted: %q, %v", b, err)
		}
	}
	if n, err := s.RemoveBroken(ctx); n != 1 || err != nil {
		t.Errorf("removed %d damaged layers, %v", n, err)
	}
	checkAll(t, s, "after the sweep")
	if ids, _ := s.IDs(); len(ids) != 2 {
		t.Errorf("layers left: %v", ids)
	}
}

// TestCheckFindsDamage flips a byte of each part of a layer.
func TestCheckFindsDamage(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		part    string
		tree    bool
		derived bool
	}{
		{infoFile, false, true}, {indexFile, false, true}, {tarFile, false, false}, {erofsFile, false, true}, {treeDir + "/made", true, false},
	} {
		t.Run(c.part, func(t *testing.T) {
			dir, quarantine := t.TempDir(), t.TempDir()
			s, err := Open(dir, Options{Log: quiet})
			if err != nil {
				t.Fatal(err)
			}
			var id ID
			if c.tree {
				upper, err := s.NewUpper(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(upper, "upper", "made"), bytes.Repeat([]byte("x"), 5000), 0o644); err != nil {
					t.Fatal(err)
				}
				id, err = s.CommitTree(ctx, upper)
				if err != nil {
					t.Fatal(err)
				}
			} else if id, err = s.Unpack(ctx, bytes.NewReader(smallTar(t)), "", nil); err != nil {
				t.Fatal(err)
			}
			s.Close()
			path := filepath.Join(dir, string(id), c.part)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if c.part == infoFile {
				b = b[:len(b)/2]
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err = Open(dir, Options{Log: quiet}); err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			found, err := s.Check(ctx, id)
			if err != nil || len(found) != 1 || !strings.HasPrefix(c.part, found[0].Part) || found[0].Derived != c.derived {
				t.Fatalf("found %+v, %v", found, err)
			}
			if err := s.Repair(ctx, id, found, quarantine); err != nil {
				t.Fatal(err)
			}
			_, err = s.Stat(ctx, id)
			if gone := errors.Is(err, ErrNotFound); gone == c.derived {
				t.Errorf("after the repair: %v", err)
			}
			if left, _ := os.ReadDir(quarantine); len(left) != 1 != c.derived {
				t.Errorf("in quarantine: %v", left)
			}
			checkAll(t, s, "after the repair")
		})
	}
}
