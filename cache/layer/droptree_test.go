// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

func hasTree(t *testing.T, s *Store, id ID) bool {
	t.Helper()
	_, err := os.Lstat(s.path(id, treeDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func readLayerFile(t *testing.T, s *Store, id ID, path string) string {
	t.Helper()
	r, err := s.OpenFile(t.Context(), id, path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The tree of a packed layer goes, but not under a mount; what a process leaves undone the next one does.
func TestTreeGoesWhenPacked(t *testing.T) {
	dir := t.TempDir()
	open := func() *Store {
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	if !s.Info().EROFS {
		defer s.Close()
		t.Skip("trees stay where EROFS cannot be mounted: ", s.Info().Reason)
	}
	commit := func(content string) ID {
		upper, err := s.NewUpper(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(upper, "upper", "f"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		id, err := s.CommitTree(t.Context(), upper)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	pack := func(id ID) {
		if _, err := s.Pack(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	settled := func(id ID) {
		t.Helper()
		s.work.Wait()
		info, err := s.Stat(t.Context(), id)
		if err != nil || info.Form != FormTar || info.DiffID == "" || hasTree(t, s, id) {
			t.Fatalf("%+v, %v, tree there: %v", info, err, hasTree(t, s, id))
		}
		if got := readLayerFile(t, s, id, "f"); got != string(id) && got != "free" && got != "mounted" && got != "left" {
			t.Errorf("reads %q", got)
		}
		at, err := s.Mount(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(at, "f")); err != nil {
			t.Error(err)
		}
		if damage, err := s.Check(t.Context(), id); err != nil || len(damage) > 0 {
			t.Errorf("damage: %v, %v", damage, err)
		}
	}

	free := commit("free")
	pack(free)
	settled(free)

	mounted := commit("mounted")
	for range 2 {
		if _, err := s.Mount(t.Context(), mounted); err != nil {
			t.Fatal(err)
		}
	}
	pack(mounted)
	s.Unmount(mounted)
	s.work.Wait()
	if !hasTree(t, s, mounted) {
		t.Fatal("the tree has gone under a mount")
	}
	s.Unmount(mounted)
	settled(mounted)
	s.Unmount(mounted) // one too many does nothing

	left, orphan := commit("left"), commit("left")
	for _, id := range []ID{left, orphan} {
		if _, err := s.Mount(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		pack(id)
	}
	// A process that dies between the info and the removal leaves a tree that nothing names.
	s.mu.Lock()
	delete(s.treeUses, orphan)
	s.mu.Unlock()
	s.dropTreeSoon(orphan)
	s.work.Wait()
	if err := os.Mkdir(s.path(orphan, treeDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	if err := s.Walk(t.Context(), func(Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
	settled(left)
	settled(orphan)
}

// What overlayfs copied up and nobody changed makes no layer.
func TestCommitDropsUnchangedDirectories(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	below := index.Merge(index.New([]index.Entry{
		{Path: "etc", Type: index.Dir, Mode: 0o755, ModTime: 1e18 + 5, Offset: -1},
		{Path: "etc/deep", Type: index.Dir, Mode: 0o700, ModTime: 1e18 + 6, Offset: -1},
		{Path: "var", Type: index.Dir, Mode: 0o755, ModTime: 1e18 + 7, Offset: -1},
		{Path: "tmp", Type: index.Dir, Mode: 0o1777, ModTime: 1e18 + 8, Offset: -1},
	}))
	make := func(change func(upper string)) (string, *index.Index) {
		dir, err := s.NewUpper(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		upper := filepath.Join(dir, "upper")
		for _, path := range []string{"var", "etc", "etc/deep"} {
			e, _ := below.Lookup(path)
			if err := os.Mkdir(filepath.Join(upper, path), os.FileMode(e.Mode)); err != nil {
				t.Fatal(err)
			}
		}
		change(upper)
		for _, path := range []string{"etc/deep", "etc", "var"} {
			e, _ := below.Lookup(path)
			setTime(t, filepath.Join(upper, path), e.ModTime)
		}
		id, err := s.CommitTreeOver(t.Context(), dir, func(context.Context) (index.Tree, error) { return below, nil })
		if err != nil {
			t.Fatal(err)
		}
		if id == "" {
			return "", nil
		}
		x, err := s.Index(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if damage, err := s.Check(t.Context(), id); err != nil || len(damage) > 0 {
			t.Errorf("the tree is not what its index says: %v, %v", damage, err)
		}
		return "layer", x
	}
	if got, x := make(func(string) {}); got != "" {
		t.Errorf("unchanged directories make a layer of %d entries", x.Len())
	}
	for name, change := range map[string]func(upper string) error{
		"file":  func(u string) error { return os.WriteFile(u+"/etc/deep/f", nil, 0o644) },
		"mode":  func(u string) error { return os.Chmod(u+"/etc/deep", 0o711) },
		"owner": func(u string) error { return os.Chown(u+"/etc/deep", 1, 1) },
		"new":   func(u string) error { return os.Mkdir(u+"/etc/deep/new", 0o755) },
	} {
		got, x := make(func(u string) {
			if err := change(u); err != nil {
				t.Fatal(err)
			}
		})
		if got == "" {
			t.Errorf("%s: no layer", name)
			continue
		}
		if _, ok := x.Lookup("etc/deep"); !ok {
			t.Errorf("%s: etc/deep is not in the layer", name)
		}
		if _, ok := x.Lookup("var"); ok {
			t.Errorf("%s: var is in the layer", name)
		}
	}
}

func setTime(t *testing.T, path string, ns int64) {
	t.Helper()
	at := unix.NsecToTimespec(ns)
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, 0); err != nil {
		t.Fatal(err)
	}
}

// A path may be longer than a system call takes.
func TestCommitDeepTree(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	dir, err := s.NewUpper(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at, err := os.OpenRoot(filepath.Join(dir, "upper"))
	if err != nil {
		t.Fatal(err)
	}
	path := ""
	for range 30 {
		name := strings.Repeat("n", 200)
		path = index.Join(path, name)
		err := at.Mkdir(name, 0o755)
		next, oerr := at.OpenRoot(name)
		if err := errors.Join(err, oerr, at.Close()); err != nil {
			t.Fatal(err)
		}
		at = next
	}
	f, err := at.Create("f")
	if err == nil {
		_, err = f.WriteString("deep down")
	}
	if err := errors.Join(err, f.Close(), at.Close()); err != nil {
		t.Fatal(err)
	}
	id, err := s.CommitTree(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.Index(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if e, _ := x.Lookup(path + "/f"); e.Digest != digest.FromString("deep down") {
		t.Errorf("%d bytes, %s", e.Size, e.Digest)
	}
}
