// SPDX-License-Identifier: Apache-2.0

// Package fsys is the seam between the store and the file system it lives on: the few calls by which blobs, layers,
// snapshots and records reach the disk, and no others. Production has OS. Tests have cachetest/faultfs, which fails any of
// them, and remembers what a power cut would cost. Reading goes past it: a read changes nothing.
package fsys

import (
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// FS is how the store writes. Paths are absolute or relative to the working directory. Errors are those of package os.
type FS interface {
	// OpenFile opens a file for writing, as os.OpenFile does.
	OpenFile(path string, flag int, perm fs.FileMode) (File, error)
	Mkdir(path string, perm fs.FileMode) error
	Rename(from, to string) error
	Link(from, to string) error
	// RemoveAll removes a file, or a directory with everything in it. What is not there is no error.
	RemoveAll(path string) error
	// Sync makes the names in a directory durable.
	Sync(dir string) error
	// SyncFS makes everything on the file system of an open directory durable.
	SyncFS(dir *os.File) error
	// Free says how many bytes may still be written to the file system of path.
	Free(path string) (int64, error)
}

// Watcher is an FS that wants to know of changes which are made without it: those relative to an open directory, which have no
// path. An error is to be taken as that of the call, which is not made then.
type Watcher interface {
	Before(op, path string) error
}

// Before asks fs about a change that is made without it. path is for the error only.
func Before(fs FS, op, path string) error {
	if w, ok := fs.(Watcher); ok {
		return w.Before(op, path)
	}
	return nil
}

// File is a file open for writing.
type File interface {
	io.Writer
	// Sync makes what was written durable.
	Sync() error
	Close() error
}

// OS is the real file system.
var OS FS = osFS{}

type osFS struct{}

func (osFS) OpenFile(path string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(path, flag, perm)
	if err != nil {
		return nil, err // not a File that holds a nil pointer
	}
	return f, nil
}

func (osFS) Mkdir(path string, perm fs.FileMode) error { return os.Mkdir(path, perm) }

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }

func (osFS) Link(from, to string) error { return os.Link(from, to) }

func (osFS) RemoveAll(path string) error { return os.RemoveAll(path) }

func (osFS) Sync(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (osFS) SyncFS(dir *os.File) error {
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: dir.Name(), Err: err}
	}
	return nil
}

func (osFS) Free(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// WriteFile makes a new file of b, which is on disk when WriteFile returns if durable is set. After an error
// there may be a part of it.
func WriteFile(fsys FS, path string, b []byte, perm fs.FileMode, durable bool) error {
	f, err := fsys.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		f.Close()
		return err
	}
	if durable {
		if err := f.Sync(); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}
