// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// extract makes the files of x in dir, an empty directory that only this process writes to, as overlayfs wants
// them. Every path is made by name in the descriptor of its parent, which extract has itself just made as a
// directory; no symlink is ever followed, wherever the entries come from. fs is told before each of them (fsys.Before).
func extract(ctx context.Context, fs fsys.FS, dir string, x *index.Index, open func(index.Entry) (io.ReadCloser, error)) error {
	w := extractor{open: open, root: os.Geteuid() == 0, partial: UserXattrs()}
	defer w.closeAll()
	for i := range x.Len() {
		e := x.At(i)
		if i%64 == 0 {
			if err := context.Cause(ctx); err != nil {
				return err
			}
		}
		if err := w.leave(e.Path); err != nil {
			return err
		}
		err := fsys.Before(fs, "extract", e.Path)
		switch {
		case err != nil:
		case i == 0:
			err = w.enterRoot(dir, e)
		default:
			err = w.add(e)
		}
		if err != nil {
			return fmt.Errorf("extract %q: %w", e.Path, err)
		}
	}
	return w.leaveAll()
}

type extractor struct {
	open func(index.Entry) (io.ReadCloser, error)
	root bool // may change owners
	// partial says that some things cannot be had: owners that the user namespace does not have, devices, xattrs for root of the
	// host. Index and tar have them; the tree, which only mounts show, does without.
	partial bool
	stack   []openDir // from the root to the directory at hand
}

type openDir struct {
	entry index.Entry
	fd    int
}

func (w *extractor) enterRoot(dir string, e index.Entry) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	w.stack = append(w.stack, openDir{e, fd})
	return nil
}

// leave finishes the directories that path is not in.
func (w *extractor) leave(path string) error {
	for len(w.stack) > 0 && !index.Within(path, w.stack[len(w.stack)-1].entry.Path) {
		if err := w.pop(); err != nil {
			return err
		}
	}
	return nil
}

func (w *extractor) leaveAll() error {
	for len(w.stack) > 0 {
		if err := w.pop(); err != nil {
			return err
		}
	}
	return nil
}

// pop sets a directory's metadata, which had to wait for its content.
func (w *extractor) pop() error {
	d := w.stack[len(w.stack)-1]
	w.stack = w.stack[:len(w.stack)-1]
	defer unix.Close(d.fd)
	if err := w.setMetadata(d.fd, ".", d.entry); err != nil {
		return fmt.Errorf("extract %q: %w", d.entry.Path, err)
	}
	return nil
}

func (w *extractor) closeAll() {
	for _, d := range w.stack {
		unix.Close(d.fd)
	}
	w.stack = nil
}

func (w *extractor) add(e index.Entry) error {
	parent := w.stack[len(w.stack)-1].fd
	name := index.Base(e.Path)
	if e.HardLink != "" {
		return unix.Linkat(w.stack[0].fd, e.HardLink, parent, name, 0)
	}
	var err error
	switch e.Type {
	case index.Dir:
		if err := unix.Mkdirat(parent, name, 0o700); err != nil {
			return err
		}
		fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		w.stack = append(w.stack, openDir{e, fd})
		return nil
	case index.File:
		err = w.file(parent, name, e)
	case index.Symlink:
		err = unix.Symlinkat(e.Target, parent, name)
	case index.Whiteout:
		err := unix.Mknodat(parent, name, unix.S_IFCHR, 0)
		if errors.Is(err, unix.EPERM) {
			return w.xattrWhiteout(parent, name)
		}
		return err
	case index.CharDevice:
		err = unix.Mknodat(parent, name, unix.S_IFCHR|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	case index.BlockDevice:
		err = unix.Mknodat(parent, name, unix.S_IFBLK|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	case index.Fifo:
		err = unix.Mknodat(parent, name, unix.S_IFIFO|0o600, 0)
	default:
		err = fmt.Errorf("unknown type %d", e.Type)
	}
	if errors.Is(err, unix.EPERM) && w.partial && (e.Type == index.CharDevice || e.Type == index.BlockDevice) {
		err = unix.Mknodat(parent, name, unix.S_IFREG|0o600, 0) // so that the name is taken, and can have other names
	}
	if err != nil {
		return err
	}
	return w.setMetadata(parent, name, e)
}

// xattrWhiteout makes a whiteout where there can be no device 0:0: on an overlay, which keeps those to itself. It is an empty
// file with an xattr, in a directory that says that it has such files (Linux 6.7).
func (w *extractor) xattrWhiteout(parent int, name string) error {
	fd, err := unix.Openat(parent, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, attr := range []string{xattrWhiteout, xattrUserWhiteout} {
		if err = unix.Fsetxattr(fd, attr, []byte("y"), 0); err == nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("mark as a whiteout: %w", err)
	}
	_ = unix.Fsetxattr(parent, OpaqueXattr(), []byte("x"), 0) // for the kernel; we look at the file
	return nil
}

func (w *extractor) file(parent int, name string, e index.Entry) error {
	fd, err := unix.Openat(parent, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), e.Path)
	defer f.Close()
	if e.Size > 0 {
		r, err := w.open(e)
		if err != nil {
			return err
		}
		defer r.Close()
		n, err := io.Copy(f, r)
		if err != nil {
			return err
		}
		if n != e.Size {
			return fmt.Errorf("%d bytes instead of %d", n, e.Size)
		}
	}
	return f.Close()
}

// setMetadata sets owner, xattrs, mode and times, in the order in which none undoes another.
func (w *extractor) setMetadata(dirfd int, name string, e index.Entry) error {
	if w.root {
		if err := unix.Fchownat(dirfd, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil && !(w.partial && errors.Is(err, unix.EINVAL)) {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if e.Type != index.Symlink {
		// No O_NOFOLLOW for fchmodat before Linux 6.6; name is what this process has just made, and no symlink.
		if err := unix.Fchmodat(dirfd, name, e.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if len(e.Xattrs) > 0 || e.Opaque {
		path := "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
		for attr, value := range e.Xattrs {
			err := unix.Lsetxattr(path, attr, []byte(value), 0)
			// What this file system or user cannot have is left out, as docker does.
			if err != nil && !errors.Is(err, unix.ENOTSUP) && !(errors.Is(err, unix.EPERM) && (w.partial || e.Type != index.File)) {
				return fmt.Errorf("set xattr %q: %w", attr, err)
			}
		}
		if e.Opaque {
			err := unix.Lsetxattr(path, OpaqueXattr(), []byte("y"), 0)
			if errors.Is(err, unix.EPERM) { // root of a user namespace
				err = unix.Lsetxattr(path, xattrUserOpaque, []byte("y"), 0)
			}
			if err != nil {
				return fmt.Errorf("mark opaque: %w", err)
			}
		}
	}
	sec, nsec := splitTime(e.ModTime)
	ts := []unix.Timespec{{Sec: sec, Nsec: nsec}, {Sec: sec, Nsec: nsec}}
	if err := unix.UtimesNanoAt(dirfd, name, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// CopyTree makes the files of tree in dir, an empty directory that only this process writes to. It copies: nothing in dir
// shares an inode with a layer, though it may share blocks where the file system can (copy_file_range).
func (s *Store) CopyTree(ctx context.Context, tree Files, dir string) error {
	var entries []index.Entry
	err := index.Walk(tree, "", func(e index.Entry) error {
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return fmt.Errorf("copy layers: %w", err)
	}
	x, err := index.NewChecked(entries)
	if err == nil {
		err = extract(ctx, s.fs, dir, x, func(e index.Entry) (io.ReadCloser, error) { return tree.OpenFile(ctx, e.Path) })
	}
	if err != nil {
		return fmt.Errorf("copy layers: %w", err)
	}
	return nil
}

// IndexTree returns the index of a directory, every file hashed.
func (s *Store) IndexTree(ctx context.Context, dir string) (*index.Index, error) {
	x, err := scanIndex(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", dir, err)
	}
	return x, nil
}

// CopyEntries makes the entries of x in dir, which is empty, whiteouts as overlayfs wants them. The bytes of files come from
// the same paths below from.
func (s *Store) CopyEntries(ctx context.Context, x *index.Index, from, dir string) error {
	root, err := os.OpenRoot(from)
	if err != nil {
		return fmt.Errorf("copy changes: %w", err)
	}
	defer root.Close()
	if err := extract(ctx, s.fs, dir, x, func(e index.Entry) (io.ReadCloser, error) {
		return root.OpenFile(e.Path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	}); err != nil {
		return fmt.Errorf("copy changes: %w", err)
	}
	return nil
}
