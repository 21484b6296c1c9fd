// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// TestLongPaths makes layers of paths that are longer than any that an index takes.
func TestLongPaths(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	name := strings.Repeat("n", 250)
	t.Run("tree", func(t *testing.T) {
		dir, err := s.NewUpper(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		fd, err := unix.Open(filepath.Join(dir, "upper"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		for n := 0; n < index.MaxPath/len(name)+1 && err == nil; n++ {
			if err = unix.Mkdirat(fd, name, 0o755); err != nil {
				break
			}
			above := fd
			fd, err = unix.Openat(above, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			unix.Close(above)
		}
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		id, err := s.CommitTree(t.Context(), dir)
		if err == nil {
			err = s.Ensure(t.Context(), id)
		}
		if !errors.Is(err, syscall.ENAMETOOLONG) {
			t.Errorf("%q, %v", id, err)
		}
	})
	t.Run("draft", func(t *testing.T) {
		d := s.NewDraft(nil)
		d.Put(index.Entry{Path: strings.Repeat("d/", index.MaxPath/2) + "f", Type: index.Dir, Mode: 0o755}, nil)
		if id, err := d.Commit(t.Context()); !errors.Is(err, syscall.ENAMETOOLONG) {
			t.Errorf("%s, %v", id, err)
		}
	})
}

func TestDraftRefusesDevices(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	for _, e := range []index.Entry{
		{Type: index.CharDevice},
		{Type: index.CharDevice, Major: 1 << 12, Minor: 1},
		{Type: index.BlockDevice, Major: 8, Minor: 1 << 20},
	} {
		e.Path, e.Mode = "dev", 0o600
		d := s.NewDraft(nil)
		d.Put(e, nil)
		if id, err := d.Commit(t.Context()); err == nil {
			t.Errorf("%d:%d was taken: %s", e.Major, e.Minor, id)
		}
	}
}

func TestBudget(t *testing.T) {
	var b budget
	value := strings.Repeat("x", 1<<20)
	err := error(nil)
	n := 0
	for ; err == nil && n < 10_000; n++ {
		err = b.take("name", "", map[string]string{"SCHILY.xattr.user.x": value})
	}
	if err == nil || n > maxMetadata>>20 {
		t.Errorf("%d attributes of a megabyte: %v", n, err)
	}
	if least := unsafe.Sizeof(unpackNode{}) + unsafe.Sizeof(unpackFile{}); entryMemory < least {
		t.Errorf("an entry takes %d bytes at least, and %d are counted", least, entryMemory)
	}
}
