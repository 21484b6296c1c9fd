// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// largeUpper makes an upper directory with more in it than a small tree has.
func largeUpper(t *testing.T, s *Store) string {
	t.Helper()
	dir, err := s.NewUpper(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fillLarge(t, filepath.Join(dir, "upper"))
	return dir
}

func fillLarge(t *testing.T, upper string) {
	t.Helper()
	for i := range 2 * smallEntries {
		path := filepath.Join(upper, fmt.Sprintf("bulk/%d/file%d", i%3, i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(path), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// gate is a file system that lets nobody put an index in its place before it is open.
type gate struct {
	fsys.FS
	open    chan struct{}
	reached chan struct{}
	once    sync.Once
}

func newGate() *gate {
	return &gate{FS: fsys.OS, open: make(chan struct{}), reached: make(chan struct{})}
}

func (g *gate) Rename(from, to string) error {
	if filepath.Base(to) == indexFile {
		g.once.Do(func() { close(g.reached) })
		<-g.open
	}
	return g.FS.Rename(from, to)
}

// TestCommitIsNotIndexing stops the world between the commit of a large tree and its index: the layer can be mounted and has a
// root, nobody can delete it, and a process that dies there leaves nothing that counts, and nothing after a sweep.
func TestCommitIsNotIndexing(t *testing.T) {
	ctx := t.Context()
	g := newGate()
	dir := t.TempDir()
	s, err := Open(dir, Options{FS: g, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	var used []ID
	var mu sync.Mutex
	s.OnUse(func(id ID) {
		mu.Lock()
		defer mu.Unlock()
		used = append(used, id)
	})
	id, err := s.CommitTree(ctx, largeUpper(t, s))
	if err != nil {
		t.Fatal(err)
	}
	<-g.reached
	mu.Lock()
	if !slices.Contains(used, id) {
		t.Error("the layer is not announced as used")
	}
	mu.Unlock()
	if _, err := os.Lstat(s.path(id, indexFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("index: %v", err)
	}
	at, err := s.Mount(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(at, "bulk/0/file0")); err != nil {
		t.Error(err)
	}
	if e, err := s.Root(ctx, id); err != nil || e.Type != index.Dir || e.Mode != 0o755 || e.Path != "" {
		t.Errorf("root: %+v, %v", e, err)
	}
	if !s.Exists(id) {
		t.Error("it does not exist")
	}
	if err := s.Walk(ctx, func(i Info) error { return fmt.Errorf("Walk lists %s", i.ID) }); err != nil {
		t.Error(err)
	}
	if gone, err := s.DeleteUnused(ctx, []ID{id}, func(ID) bool { return true }); len(gone) > 0 || err != nil {
		t.Errorf("deleted: %v, %v", gone, err)
	}
	if n, err := s.RemoveBroken(ctx); n != 0 || err != nil {
		t.Errorf("removed as broken: %d, %v", n, err)
	}
	if err := s.Sync(ctx); err != nil {
		t.Error(err)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	for name, ask := range map[string]func() error{
		"Stat":     func() error { _, err := s.Stat(short, id); return err },
		"Index":    func() error { _, err := s.Index(short, id); return err },
		"Ensure":   func() error { return s.Ensure(short, id) },
		"Pack":     func() error { _, err := s.Pack(short, id); return err },
		"OpenFile": func() error { _, err := s.OpenFile(short, id, "bulk/0/file0"); return err },
	} {
		if err := ask(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s does not wait: %v", name, err)
		}
	}

	// What a killed process leaves.
	killed := t.TempDir()
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	after, err := Open(killed, Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	for name, ask := range map[string]func() error{
		"Stat":  func() error { _, err := after.Stat(ctx, id); return err },
		"Mount": func() error { _, err := after.Mount(ctx, id); return err },
		"Check": func() error { _, err := after.Check(ctx, id); return err },
	} {
		if err := ask(); !errors.Is(err, ErrNotFound) {
			t.Errorf("after a kill, %s: %v", name, err)
		}
	}
	if n, err := after.RemoveBroken(ctx); n != 1 || err != nil {
		t.Errorf("after a kill, the sweep removes %d, %v", n, err)
	}
	if ids, err := after.IDs(); len(ids) > 0 || err != nil {
		t.Errorf("after the sweep there are %v, %v", ids, err)
	}

	close(g.open)
	if err := s.Ensure(ctx, id); err != nil {
		t.Fatal(err)
	}
	info, err := s.Stat(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	scan, err := scanTree(ctx, at)
	if err != nil {
		t.Fatal(err)
	}
	if want := scan.index.Digest(); info.Content != want || info.Size < scan.bytes {
		t.Errorf("%+v, want content %s", info, want)
	}
	if err := s.Walk(ctx, func(i Info) error {
		if i.ID != id {
			t.Errorf("Walk lists %s", i.ID)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	checkAll(t, s, "indexed")
	s.Unmount(id)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir, Options{Log: quiet}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if again, err := s.Stat(ctx, id); err != nil || again != info {
		t.Errorf("opened again: %+v, %v", again, err)
	}
}

// TestNumberComesWithInfo syncs while an index is being made: that does not cover the layer, the sync after it does.
func TestNumberComesWithInfo(t *testing.T) {
	ctx := t.Context()
	for _, synced := range []bool{false, true} {
		g := newGate()
		dir := t.TempDir()
		s, err := Open(dir, Options{FS: g, Log: quiet, BootID: "first"})
		if err != nil {
			t.Fatal(err)
		}
		id, err := s.CommitTree(ctx, largeUpper(t, s))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		close(g.open)
		if err := s.Ensure(ctx, id); err != nil {
			t.Fatal(err)
		}
		if synced {
			if err := s.Sync(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err = Open(dir, Options{Log: quiet, BootID: "second"}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Stat(ctx, id); (err == nil) != synced {
			t.Errorf("synced %v: after a power cut: %v", synced, err)
		}
		s.Close()
	}
}

// TestFailedIndex makes the index of a layer fail: everybody who asks for it learns why, and the tree goes.
func TestFailedIndex(t *testing.T) {
	ctx := t.Context()
	s, err := Open(t.TempDir(), Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	broken := errors.New("what lies below is gone")
	asked := make(chan struct{})
	id, err := s.CommitTreeOver(ctx, largeUpper(t, s), func(context.Context) (index.Tree, error) {
		<-asked
		return nil, broken
	})
	if err != nil {
		t.Fatal(err)
	}
	close(asked)
	if err := s.Ensure(ctx, id); !errors.Is(err, broken) {
		t.Errorf("Ensure: %v", err)
	}
	for name, ask := range map[string]func() error{
		"Stat":  func() error { _, err := s.Stat(ctx, id); return err },
		"Index": func() error { _, err := s.Index(ctx, id); return err },
		"Root":  func() error { _, err := s.Root(ctx, id); return err },
		"Mount": func() error { _, err := s.Mount(ctx, id); return err },
		"Pack":  func() error { _, err := s.Pack(ctx, id); return err },
	} {
		if err := ask(); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s.Exists(id) {
		t.Error("it exists")
	}
	if ids, err := s.IDs(); len(ids) > 0 || err != nil {
		t.Errorf("left: %v, %v", ids, err)
	}
	if err := s.Delete(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// TestDeleteCancelsIndexing deletes a layer of which the index will never be made.
func TestDeleteCancelsIndexing(t *testing.T) {
	ctx := t.Context()
	s, err := Open(t.TempDir(), Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id, err := s.CommitTreeOver(ctx, largeUpper(t, s), func(ctx context.Context) (index.Tree, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	if ids, err := s.IDs(); len(ids) > 0 || err != nil {
		t.Errorf("left: %v, %v", ids, err)
	}
}

// TestLargeTreeWithUnchangedDirectories leaves out of the index what a small commit would remove from the tree, which
// may be mounted by then. Check, Pack and healing agree with that.
func TestLargeTreeWithUnchangedDirectories(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers below with 0:0 as their owner")
	}
	ctx := t.Context()
	s, err := Open(t.TempDir(), Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	below := index.Merge(index.New([]index.Entry{
		{Path: "etc", Type: index.Dir, Mode: 0o755, ModTime: 1e18 + 5, Offset: -1},
		{Path: "etc/deep", Type: index.Dir, Mode: 0o700, ModTime: 1e18 + 6, Offset: -1},
		{Path: "run", Type: index.Dir, Mode: 0o755, ModTime: 1e18 + 7, Offset: -1},
		{Path: "var", Type: index.Dir, Mode: 0o755, ModTime: 1e18 + 8, Offset: -1},
	}))
	dir := largeUpper(t, s)
	upper := filepath.Join(dir, "upper")
	for _, path := range []string{"etc", "etc/deep", "run", "var"} {
		e, _ := below.Lookup(path)
		if err := os.Mkdir(filepath.Join(upper, path), os.FileMode(e.Mode)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(upper, "var", "new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"etc/deep", "etc", "run", "var"} {
		e, _ := below.Lookup(path)
		setTime(t, filepath.Join(upper, path), e.ModTime)
	}
	id, err := s.CommitTreeOver(ctx, dir, func(context.Context) (index.Tree, error) { return below, nil })
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.Index(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{"etc": false, "etc/deep": false, "run": false, "var": true, "var/new": true, "bulk/0/file0": true} {
		if _, ok := x.Lookup(path); ok != want {
			t.Errorf("%s in the index: %v", path, ok)
		}
		if _, err := os.Lstat(filepath.Join(s.path(id, treeDir), path)); err != nil {
			t.Errorf("the tree has changed: %v", err)
		}
	}
	checkAll(t, s, "committed")
	// A file too many is damage all the same.
	more := filepath.Join(s.path(id, treeDir), "etc", "more")
	if err := os.WriteFile(more, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Check(ctx, id); err != nil || len(found) != 1 || !strings.Contains(found[0].Err.Error(), "was not there") {
		t.Errorf("%+v, %v", found, err)
	}
	if err := os.Remove(more); err != nil {
		t.Fatal(err)
	}
	// Without its index, or its info, it is not lost.
	for _, name := range []string{indexFile, infoFile} {
		if err := os.Truncate(s.path(id, name), 10); err != nil {
			t.Fatal(err)
		}
		s.indexes.drop(id)
		s.mu.Lock()
		delete(s.metas, id)
		s.mu.Unlock()
		again, err := s.Index(ctx, id)
		if err != nil || again.Digest() != x.Digest() {
			t.Fatalf("after damage to %s: %v, %v", name, again, err)
		}
		checkAll(t, s, "after damage to "+name)
	}
	if _, err := s.Mount(ctx, id); err != nil { // so that the tree stays when it is packed
		t.Fatal(err)
	}
	if _, err := s.Pack(ctx, id); err != nil {
		t.Fatal(err)
	}
	checkAll(t, s, "packed")
	s.Unmount(id)
	s.work.Wait()
	checkAll(t, s, "without the tree")
}

// TestIsSmall tells trees that are committed at once from others.
func TestIsSmall(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, dir string)
		want bool
	}{
		"nothing": {func(*testing.T, string) {}, true},
		"many directories": {func(t *testing.T, dir string) {
			for i := range 3 * smallEntries {
				if err := os.MkdirAll(fmt.Sprintf("%s/%d/%d", dir, i%7, i), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}, true},
		"many files": {fillLarge, false},
		"one large file": {func(t *testing.T, dir string) {
			if err := os.MkdirAll(dir+"/a/b", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir+"/a/b/c", make([]byte, smallBytes+1), 0o644); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.make(t, dir)
			if got, err := isSmall(dir); got != c.want || err != nil {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}
