// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// scanned is an entry that is being exported, with what tells whether it changes meanwhile.
type scanned struct {
	entry
	state state
	// gone is set on what is left out after all.
	gone bool
}

// state is what changes when a file does.
type state struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func stateOf(st *unix.Stat_t) state {
	return state{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// scanner lists a tree that others may be changing. Nothing is followed: every directory is opened by its name in the one above it.
type scanner struct {
	ctx     context.Context
	entries []scanned
	first   map[[2]uint64]int // of files with several names, the entry of the first one
	left    int
}

// scan returns the entries of the tree at root, an open directory, in the order of their paths. Sockets, devices and pipes are left out, and so is
// what goes away meanwhile.
func scan(ctx context.Context, root int) (*scanner, error) {
	s := &scanner{ctx: ctx, first: map[[2]uint64]int{}}
	fd, err := unix.Openat(root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return s, s.dir(fd, "", &st)
}

// dir takes a directory and what is in it. It closes fd.
func (s *scanner) dir(fd int, path string, st *unix.Stat_t) error {
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	xattrs, err := readXattrs(fd)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	e := newScanned(path, typeDir, st)
	e.Xattrs = xattrs
	s.entries = append(s.entries, e)
	names, err := f.Readdirnames(-1)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%q: %w", path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := s.name(fd, path, name); err != nil {
			return err
		}
	}
	return nil
}

func (s *scanner) name(dirfd int, dir, name string) error {
	path := index.Join(dir, name)
	var st unix.Stat_t
	err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	} else if err != nil {
		return fmt.Errorf("stat %q: %w", path, err)
	}
	if len(path) > maxPathBytes {
		s.left++
		return nil
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR {
		fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return nil
		} else if err != nil {
			return fmt.Errorf("open %q: %w", path, err)
		}
		return s.dir(fd, path, &st)
	}
	if kind != unix.S_IFREG && kind != unix.S_IFLNK {
		s.left++
		return nil
	}
	if st.Nlink > 1 {
		id := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := s.first[id]; ok {
			s.entries = append(s.entries, scanned{entry: entry{Path: path, Type: typeHardLink, Link: first}})
			return nil
		}
		s.first[id] = len(s.entries)
	}
	if kind == unix.S_IFREG {
		s.entries = append(s.entries, newScanned(path, typeFile, &st)) // its xattrs are read with it
		return nil
	}
	var target [maxPathBytes]byte
	n, err := unix.Readlinkat(dirfd, name, target[:])
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return nil
	} else if err != nil {
		return fmt.Errorf("readlink %q: %w", path, err)
	}
	e := newScanned(path, typeSymlink, &st)
	e.Target = string(target[:n])
	s.entries = append(s.entries, e)
	return nil
}

func newScanned(path string, t entryType, st *unix.Stat_t) scanned {
	e := scanned{entry: entry{Path: path, Type: t, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, ModTime: st.Mtim.Nano()}, state: stateOf(st)}
	if t == typeFile {
		e.Size = st.Size
		e.Used = max(0, max(st.Mtim.Sec, st.Atim.Sec)/3600)
	}
	return e
}

// readXattrs returns the extended attributes of an open file that travel, by name.
func readXattrs(fd int) ([]xattr, error) {
	names := make([]byte, maxXattrs)
	n, err := unix.Flistxattr(fd, names[:0:0])
	if n == 0 || errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err == nil {
		n, err = unix.Flistxattr(fd, names)
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var out []xattr
	for rest := names[:n]; len(rest) > 0; {
		end := slices.Index(rest, 0)
		if end < 0 {
			break
		}
		name := string(rest[:end])
		rest = rest[end+1:]
		if !keepXattr(name) {
			continue
		}
		value := make([]byte, maxXattrs)
		k, err := unix.Fgetxattr(fd, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		out = append(out, xattr{name, string(value[:k])})
	}
	slices.SortFunc(out, func(a, b xattr) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out, nil
}
