// SPDX-License-Identifier: Apache-2.0

// Package cache is everything that lasts: blobs, layers, snapshots, records and images in one directory, owned by one
// process at a time.
//
//	lock        held while the store is open; has the process ID of its owner
//	version     the version of this layout
//	content/    blobs, as an OCI image layout (package blob)
//	layers/     file trees (package layer)
//	snapshots/  mount points (package snapshot)
//	records/    the action cache, image names and other facts (package record)
//	failed/     what failed steps have left, one file each that names the layers
//	quarantine/ what was found damaged (Check), for whoever wants to know why; nothing reads it
//
// What names what: images and records name layers and blobs; nothing that is named is deleted. Work that is
// under way holds a Lease, which keeps what it touches and makes.
package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// layoutVersion is what the version file says. It changes when an older program must not touch the directory.
const layoutVersion = 1

// Store is an open state directory. Its methods, and those of its parts, may be called concurrently.
type Store struct {
	// Dir is the absolute path of the directory.
	Dir       string
	Blobs     *blob.Store
	Layers    *layer.Store
	Snapshots *snapshot.Store
	Records   *record.Store
	Images    *image.Store

	lock *os.File

	now     func() time.Time
	uses    *uses
	sources []Source
	onGrow  atomic.Pointer[func(bytes int64)]

	sweeping sync.Mutex     // one collection at a time
	sweeps   sync.WaitGroup // what goes on in the background

	mu sync.Mutex // guards what follows
	// sweepDue says that something was left for the next sweep because of a lease.
	sweepDue bool
	closed   bool
}

// Open opens the store in dir, which is created when it is missing; nobody but its owner may enter it. It fails with an error that wraps
// ErrLocked while another process has it open. What a killed process has left half done is cleaned up.
func Open(ctx context.Context, dir string) (*Store, error) { return OpenWith(ctx, dir, Options{}) }

// Options of a Store. They are for tests of what a crash does.
type Options struct {
	// FS is how the store reaches the disk; nil means fsys.OS.
	FS fsys.FS
	// BootID is the boot of the machine; "" asks the kernel.
	BootID string
}

// OpenWith is Open with options.
func OpenWith(ctx context.Context, dir string, opt Options) (_ *Store, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{Dir: dir, now: time.Now, uses: newUses()}
	if s.lock, err = lock(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer func() {
		if err != nil {
			s.closeParts()
		}
	}()
	if err := restrict(dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := checkVersion(opt.FS, dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	// Overlays before the layers that they are made of.
	if err := snapshot.Clean(s.path("snapshots")); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.Blobs, err = blob.OpenWith(s.path("content"), blob.Options{FS: opt.FS, Quarantine: s.path("quarantine", "blobs")}); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.Layers, err = layer.Open(s.path("layers"), layer.Options{FS: opt.FS, BootID: opt.BootID, Quarantine: s.path("quarantine", "layers")}); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.Snapshots, err = snapshot.OpenWith(s.path("snapshots"), s.Layers, snapshot.Options{FS: opt.FS}); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.Records, err = record.OpenWith(s.path("records"), record.Options{FS: opt.FS, BootID: opt.BootID}); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.Images, err = image.Open(s.Records, s.Blobs, s.holdBlob); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.Layers.OnUse(s.uses.noteLayer)
	s.Blobs.OnUse(s.uses.noteBlob)
	s.Records.OnUse(s.uses.noteRecord)
	grow := func(bytes int64) {
		if fn := s.onGrow.Load(); fn != nil {
			(*fn)(bytes)
		}
	}
	s.Layers.OnAdd(grow)
	s.Blobs.OnAdd(grow)
	return s, nil
}

func (s *Store) path(names ...string) string {
	return filepath.Join(append([]string{s.Dir}, names...)...)
}

// Sync makes every record that was put so far durable, with what it names (record.Store.Sync). Until then a power
// cut, though not the death of the process, costs them. It may take long; call it in the background after a build.
func (s *Store) Sync(ctx context.Context) error {
	return s.Records.SyncWith(ctx, s.Layers.Sync)
}

// Close unmounts everything and lets another process open the store. Nobody may be using it any more. It does not
// call Sync.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.sweeps.Wait()
	return s.closeParts()
}

// closeParts closes what Open has opened, in the opposite order: mounts before the layers in them, and the lock last.
func (s *Store) closeParts() error {
	var errs []error
	if s.Records != nil {
		errs = append(errs, s.Records.Close())
	}
	if s.Snapshots != nil {
		s.Snapshots.Close()
	}
	if s.Layers != nil {
		errs = append(errs, s.Layers.Close())
	}
	errs = append(errs, unlock(s.lock))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// restrict takes the rights of others on dir away: set-user-ID programs and secrets lie below. A directory that
// is not a store, nor empty but for our lock, is somebody's choice and stays as it is.
func restrict(dir string) error {
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm()&0o077 == 0 {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "version")); errors.Is(err, os.ErrNotExist) {
		if names, err := os.ReadDir(dir); err != nil || len(names) > 1 {
			return err
		}
	}
	return os.Chmod(dir, 0o700)
}

// checkVersion compares the version file of dir with what this program knows, and writes it in a new store.
func checkVersion(fs fsys.FS, dir string) error {
	path := filepath.Join(dir, "version")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return writeVersion(fs, path)
	}
	if err != nil {
		return err
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b)))
	switch {
	case err != nil:
		return fmt.Errorf("%s: %q is no layout version; if %s is a slipway store, write %d there", path, b, dir, layoutVersion)
	case v < layoutVersion:
		// There is none yet. Whoever makes a second layout converts the first here, or says this.
		return fmt.Errorf("%s was written by an older slipway (layout version %d, this program knows %d), and nothing in it was touched: use another directory, or move this one away and build anew", dir, v, layoutVersion)
	case v > layoutVersion:
		return fmt.Errorf("%s was written by a newer slipway (layout version %d, this program knows %d): use that one, or another directory", dir, v, layoutVersion)
	}
	return nil
}

func writeVersion(fs fsys.FS, path string) error {
	if fs == nil {
		fs = fsys.OS
	}
	tmp := path + ".tmp"
	if err := fs.RemoveAll(tmp); err != nil { // of a process that was killed
		return err
	}
	if err := fsys.WriteFile(fs, tmp, fmt.Appendln(nil, layoutVersion), 0o600, true); err != nil {
		return err
	}
	if err := fs.Rename(tmp, path); err != nil {
		return err
	}
	return fs.Sync(filepath.Dir(path))
}
