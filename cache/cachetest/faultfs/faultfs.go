// SPDX-License-Identifier: Apache-2.0

// Package faultfs is a file system for tests of the store: it fails any chosen call of fsys.FS (Fault), and it
// remembers what has not reached the disk, so that a test can take that away as a power cut would (Volatile).
package faultfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// ErrInjected is wrapped by every error that Fault makes up.
var ErrInjected = errors.New("injected fault")

// Fault passes calls on to another file system and fails some of them: the At-th (from 1), or, when Sticky, that and all
// that follow, as a disk that has died. A failing Write has written half. Its methods may be called concurrently.
type Fault struct {
	FS fsys.FS
	// At is 0 for never.
	At     int
	Sticky bool

	mu     sync.Mutex // guards what follows
	calls  int
	failed string
}

// Calls says how many calls there were.
func (f *Fault) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Failed names the first call that was failed; "" when none was.
func (f *Fault) Failed() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}

func (f *Fault) call(op, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.At == 0 || f.calls < f.At || f.calls > f.At && !f.Sticky {
		return nil
	}
	if f.failed == "" {
		f.failed = fmt.Sprintf("call %d: %s %s", f.calls, op, path)
	}
	return &fs.PathError{Op: op, Path: path, Err: ErrInjected}
}

func (f *Fault) OpenFile(path string, flag int, perm fs.FileMode) (fsys.File, error) {
	if err := f.call("open", path); err != nil {
		return nil, err
	}
	file, err := f.FS.OpenFile(path, flag, perm)
	if err != nil {
		return nil, err
	}
	return &faultFile{file, f, path}, nil
}

func (f *Fault) Mkdir(path string, perm fs.FileMode) error {
	if err := f.call("mkdir", path); err != nil {
		return err
	}
	return f.FS.Mkdir(path, perm)
}

func (f *Fault) Rename(from, to string) error {
	if err := f.call("rename", to); err != nil {
		return err
	}
	return f.FS.Rename(from, to)
}

func (f *Fault) Link(from, to string) error {
	if err := f.call("link", to); err != nil {
		return err
	}
	return f.FS.Link(from, to)
}

func (f *Fault) RemoveAll(path string) error {
	if err := f.call("remove", path); err != nil {
		return err
	}
	return f.FS.RemoveAll(path)
}

func (f *Fault) Sync(dir string) error {
	if err := f.call("fsync", dir); err != nil {
		return err
	}
	return f.FS.Sync(dir)
}

func (f *Fault) SyncFS(dir *os.File) error {
	if err := f.call("syncfs", dir.Name()); err != nil {
		return err
	}
	return f.FS.SyncFS(dir)
}

func (f *Fault) Free(path string) (int64, error) {
	if err := f.call("statfs", path); err != nil {
		return 0, err
	}
	return f.FS.Free(path)
}

// Before implements fsys.Watcher.
func (f *Fault) Before(op, path string) error { return f.call(op, path) }

type faultFile struct {
	fsys.File
	f    *Fault
	path string
}

func (w *faultFile) Write(p []byte) (int, error) {
	if err := w.f.call("write", w.path); err != nil {
		n, _ := w.File.Write(p[:len(p)/2])
		return n, err
	}
	return w.File.Write(p)
}

func (w *faultFile) Sync() error {
	if err := w.f.call("fsync", w.path); err != nil {
		return err
	}
	return w.File.Sync()
}

// Close closes in any case: a test must not run out of descriptors.
func (w *faultFile) Close() error {
	return errors.Join(w.f.call("close", w.path), w.File.Close())
}
