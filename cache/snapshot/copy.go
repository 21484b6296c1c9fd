// SPDX-License-Identifier: Apache-2.0

package snapshot

// The driver for file systems and users that overlay refuses. A mount is a copy of what the snapshot shows, bound to the
// mount point. Before anybody can write to it, it is indexed, file by file; Commit indexes it again and makes a layer, in
// overlay's form, of what is not as it was. Every byte is hashed both times: file times and inode numbers can be the same
// after a change, digests cannot. It is slow, and always right.

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// mountCopy mounts a copy of m.snap. Layers are read, not mounted.
func (m *Mount) mountCopy(ctx context.Context, o MountOptions) error {
	v, err := m.s.View(ctx, m.snap)
	if err != nil {
		return err
	}
	dir, err := m.s.layers.NewUpper(ctx)
	if err != nil {
		return err
	}
	m.upper, m.below = dir, func() (*View, error) { return v, nil }
	m.copy = filepath.Join(dir, "work", "root")
	if err := m.s.fs.Mkdir(m.copy, 0o755); err != nil {
		return err
	}
	if err := m.s.layers.CopyTree(ctx, v, m.copy); err != nil {
		return err
	}
	if o.Writable {
		if m.before, err = m.s.layers.IndexTree(ctx, m.copy); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := m.s.fs.Mkdir(m.path, 0o700); err != nil {
		return err
	}
	return bind(m.copy, m.path, !o.Writable)
}

// bind mounts a directory at another place.
func bind(dir, target string, readOnly bool) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return &os.PathError{Op: "mount_setattr", Path: dir, Err: err}
		}
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// copyChanges fills the upper directory with what has changed in the copy, in overlay's form.
func (m *Mount) copyChanges(ctx context.Context) error {
	after, err := m.s.layers.IndexTree(ctx, m.copy)
	if err != nil {
		return err
	}
	changed, err := index.NewChecked(changes(m.before, after))
	if err != nil {
		return err
	}
	return m.s.layers.CopyEntries(ctx, changed, m.copy, filepath.Join(m.upper, "upper"))
}

// changes returns the entries of a layer that makes after of before: what is new or different, with the directories that
// hold it, and whiteouts. No directory needs to be opaque: what is gone from one is named.
func changes(before, after *index.Index) []index.Entry {
	// Names of one file are one thing: if one is new or different, or they were not one file before, all of them count. And so
	// do those that were one file and are several now, all but the first.
	first := func(e *index.Entry) string {
		if e.HardLink != "" {
			return e.HardLink
		}
		return e.Path
	}
	type file struct {
		was     string
		changed bool
	}
	files := map[string]file{}
	stays := map[string]string{} // by first name before: the file, by first name now, that is still the same one
	for e := range after.All() {
		old, ok := before.Lookup(e.Path)
		f, seen := files[first(&e)]
		f.changed = f.changed || !ok || differ(&old, &e) || seen && f.was != first(&old)
		f.was = first(&old)
		if is, claimed := stays[f.was]; ok && !claimed {
			stays[f.was] = first(&e)
		} else if ok && is != first(&e) {
			f.changed = true
		}
		files[first(&e)] = f
	}
	taken := map[string]index.Entry{}
	take := func(e index.Entry) {
		taken[e.Path] = e
		for path := e.Path; path != ""; {
			path = index.Parent(path)
			if _, ok := taken[path]; ok {
				return
			}
			taken[path], _ = after.Lookup(path)
		}
	}
	root, _ := after.Lookup("")
	take(root)
	for e := range after.All() {
		if files[first(&e)].changed {
			take(e)
		}
	}
	for e := range before.All() {
		if _, ok := after.Lookup(e.Path); ok {
			continue
		}
		if dir, ok := after.Lookup(index.Parent(e.Path)); ok && dir.Type == index.Dir {
			take(index.Entry{Path: e.Path, Type: index.Whiteout, Offset: -1})
		}
	}
	return slices.SortedFunc(maps.Values(taken), func(a, b index.Entry) int { return index.Compare(a.Path, b.Path) })
}

// differ says whether anything but the names of a file has changed.
func differ(a, b *index.Entry) bool {
	return a.Type != b.Type || a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || a.Size != b.Size ||
		a.ModTime != b.ModTime || a.Target != b.Target || a.Major != b.Major || a.Minor != b.Minor ||
		a.Digest != b.Digest || !maps.Equal(a.Xattrs, b.Xattrs)
}
