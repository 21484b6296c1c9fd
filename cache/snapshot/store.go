// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// ErrClosed is returned for a mount after Close.
var ErrClosed = errors.New("the snapshot store is closed")

// Store mounts snapshots below one directory. Its methods may be called concurrently.
type Store struct {
	dir    string
	layers Layers
	fs     fsys.FS
	probe  func() Info

	teardowns sync.WaitGroup // the goroutines of mounts

	mu     sync.Mutex
	closed bool
	next   int
	// mounts are those not yet released or committed.
	mounts map[*Mount]bool
	// leaving has, for a layer that was an upper directory, the mount that still has it as such: overlay does not
	// like to see it as a lower directory of another mount before that one is gone.
	leaving map[layer.ID]*Mount
}

// Options of a Store.
type Options struct {
	// Copy makes the store mount copies, as it does by itself where overlay is not to be had.
	Copy bool
	// FS is how the store makes and removes directories; nil means fsys.OS.
	FS fsys.FS
}

// Open makes a store in dir. Mounts that a killed engine has left there are detached.
func Open(dir string, layers Layers) (*Store, error) { return OpenWith(dir, layers, Options{}) }

// OpenWith is Open with options.
func OpenWith(dir string, layers Layers, opt Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open snapshot store: %w", err)
	}
	s := &Store{dir: dir, layers: layers, fs: opt.FS, mounts: map[*Mount]bool{}, leaving: map[layer.ID]*Mount{}}
	if s.fs == nil {
		s.fs = fsys.OS
	}
	s.probe = s.probeOnce()
	if opt.Copy {
		s.probe = func() Info { return Info{Driver: DriverCopy, Reason: "asked for"} }
	}
	for _, d := range []string{s.empty(0), s.empty(1), s.mountpoints()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("open snapshot store: %w", err)
		}
	}
	if err := Clean(dir); err != nil {
		return nil, fmt.Errorf("open snapshot store: %w", err)
	}
	return s, nil
}

// empty returns one of two empty directories: overlay wants two different lower directories, or one and an upper.
func (s *Store) empty(i int) string { return filepath.Join(s.dir, "empty", strconv.Itoa(i)) }

func (s *Store) mountpoints() string { return mountpoints(s.dir) }

func mountpoints(dir string) string { return filepath.Join(dir, "mnt") }

// Clean detaches every mount that a killed engine has left in the store of dir, which nobody may have open.
// Whoever still uses one (a container) keeps it. Having nothing to do is no error, nor is a dir that does not exist.
func Clean(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	left, err := mountsBelow(mountpoints(dir))
	if err != nil {
		return err
	}
	for _, path := range slices.Backward(left) { // later mounts may be on top of earlier ones
		slog.Debug("detaching a mount left by an earlier engine", "path", path)
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "unmount what an earlier engine left at", Path: path, Err: err}
		}
	}
	points, err := os.ReadDir(mountpoints(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, p := range points {
		// Remove, never RemoveAll: if something were still mounted there, its files would go.
		if err := os.Remove(filepath.Join(mountpoints(dir), p.Name())); err != nil {
			return fmt.Errorf("remove old mount point: %w", err)
		}
	}
	return nil
}

// Close releases the mounts that are left (which is a bug of whoever made them, and logged) and waits until nothing
// is mounted.
func (s *Store) Close() {
	s.mu.Lock()
	s.closed = true
	var left []*Mount
	for m := range s.mounts {
		left = append(left, m)
	}
	s.mu.Unlock()
	for _, m := range left {
		slog.Warn("a snapshot is still mounted when the store closes", "path", m.path)
		m.Release()
	}
	s.teardowns.Wait()
}

// InUse returns the layers of the snapshots that are mounted now.
func (s *Store) InUse() map[layer.ID]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := map[layer.ID]bool{}
	for m := range s.mounts {
		for _, id := range m.snap {
			ids[id] = true
		}
	}
	return ids
}

// MountOptions say how a snapshot is mounted.
type MountOptions struct {
	// Writable gives the mount an upper directory, which Commit makes a layer. Writes are not synced to disk, whatever
	// the writer asks for.
	Writable bool
	// Above is a directory that the mount shows above the snapshot and below what is written; "" is none. It stays as it is until
	// the mount has been committed or released. What is written over it becomes a layer of the snapshot alone: Finish, called by Commit with the
	// upper directory before that, sets right what cannot stay so. Overlay only.
	Above  string
	Finish func(upper string) error
}

// Mount is a mounted snapshot. Its methods may be called concurrently. Every mount ends with Release or Commit;
// Release after Commit does nothing, so that it can be deferred.
type Mount struct {
	s     *Store
	snap  Snapshot
	path  string
	upper string     // as layers.NewUpper gave it; "" for a read-only overlay
	lower []layer.ID // the layers that are mounted for it
	// below is the view of snap, for Commit; nil for a read-only overlay. It is made while the mount is being used.
	below func() (*View, error)

	finish   func(upper string) error // may be nil
	writable bool
	copy     string       // where the files are, if they are a copy
	before   *index.Index // what was in a writable copy at the beginning

	gone chan struct{} // closed when it is unmounted

	mu    sync.Mutex
	state mountState
}

// mountState goes forward only, in the order of the constants.
type mountState int

const (
	mounted   mountState = iota
	committed            // Commit has the upper directory, whether it succeeds or not
	released             // the upper directory is thrown away
)

// Mount mounts snap.
func (s *Store) Mount(ctx context.Context, snap Snapshot, o MountOptions) (*Mount, error) {
	m := &Mount{s: s, snap: slices.Clone(snap), writable: o.Writable, finish: o.Finish, gone: make(chan struct{})}
	// Registered before it is there, so that InUse holds the layers while they are looked for.
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, ErrClosed
	}
	s.next++
	m.path = filepath.Join(s.mountpoints(), strconv.Itoa(s.next))
	s.mounts[m] = true
	s.teardowns.Add(1)
	s.mu.Unlock()

	if err := m.mount(ctx, o); err != nil {
		m.forget()
		m.unmountLayers()
		m.removeDirs()
		s.teardowns.Done()
		return nil, fmt.Errorf("mount snapshot: %w", err)
	}
	return m, nil
}

func (m *Mount) mount(ctx context.Context, o MountOptions) error {
	if err := m.s.layers.Materialise(ctx, m.snap...); err != nil {
		return err
	}
	if m.s.probe().Driver == DriverCopy {
		if o.Above != "" {
			return errors.New("a copy cannot have a directory above it")
		}
		return m.mountCopy(ctx, o)
	}
	return m.mountOverlay(ctx, o)
}

func (m *Mount) mountOverlay(ctx context.Context, o MountOptions) error {
	var ov overlay
	if o.Above != "" {
		ov.lowers = append(ov.lowers, o.Above)
	}
	seen := map[layer.ID]bool{}
	for _, id := range slices.Backward(m.snap) {
		// Overlay refuses a directory twice (ELOOP). The lower one of two equal layers shows nothing and hides
		// nothing that the upper one does not.
		if seen[id] {
			continue
		}
		seen[id] = true
		if err := m.s.left(ctx, id); err != nil {
			return err
		}
		dir, err := m.s.layers.Mount(ctx, id)
		if err != nil {
			return err
		}
		m.lower = append(m.lower, id)
		ov.lowers = append(ov.lowers, dir)
	}
	if o.Writable {
		dir, err := m.s.layers.NewUpper(ctx)
		if err != nil {
			return err
		}
		m.upper = dir
		ov.upper, ov.work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
		if err := m.copyRoot(ctx, ov.upper); err != nil {
			return err
		}
		m.below = sync.OnceValues(func() (*View, error) { return m.s.View(context.WithoutCancel(ctx), m.snap) })
		m.s.teardowns.Go(func() { _, _ = m.below() })
	}
	if len(ov.lowers) > maxLowers {
		return fmt.Errorf("%d layers: overlay takes at most %d", len(ov.lowers), maxLowers)
	}
	// One layer alone is not bound as it is, for it would show its whiteouts.
	for i := 0; len(ov.lowers) == 0 || ov.upper == "" && len(ov.lowers) < 2; i++ {
		ov.lowers = append(ov.lowers, m.s.empty(i))
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := m.s.fs.Mkdir(m.path, 0o700); err != nil {
		return err
	}
	return ov.mount(m.path)
}

// copyRoot gives the upper directory the mode, owner and time of the snapshot's root: the merged root directory
// has them from the highest layer, and a step must not find another "/" than the step before has left.
func (m *Mount) copyRoot(ctx context.Context, upper string) error {
	root := index.Entry{Mode: 0o755}
	if n := len(m.snap); n > 0 {
		var err error
		if root, err = m.s.layers.Root(ctx, m.snap[n-1]); err != nil {
			return err
		}
	}
	for name, value := range root.Xattrs {
		if err := unix.Lsetxattr(upper, name, []byte(value), 0); err != nil && !(layer.UserXattrs() && errors.Is(err, unix.EPERM)) {
			return &os.PathError{Op: "set " + name + " of", Path: upper, Err: err}
		}
	}
	// An owner that the user namespace does not have stays root.
	if err := os.Lchown(upper, int(root.UID), int(root.GID)); err != nil && !(layer.UserXattrs() && errors.Is(err, unix.EINVAL)) {
		return err
	}
	if err := unix.Chmod(upper, root.Mode); err != nil {
		return &os.PathError{Op: "chmod", Path: upper, Err: err}
	}
	mtime := unix.NsecToTimespec(root.ModTime)
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, upper, []unix.Timespec{mtime, mtime}, 0); err != nil {
		return &os.PathError{Op: "utimensat", Path: upper, Err: err}
	}
	return nil
}

// left waits until id is no longer in use as an upper directory.
func (s *Store) left(ctx context.Context, id layer.ID) error {
	s.mu.Lock()
	m := s.leaving[id]
	s.mu.Unlock()
	if m == nil {
		return nil
	}
	select {
	case <-m.gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Path is where the snapshot is mounted.
func (m *Mount) Path() string { return m.path }

// Snapshot is what is mounted: not what was written since.
func (m *Mount) Snapshot() Snapshot { return slices.Clone(m.snap) }

// Commit makes a layer of what was written and returns the snapshot with it on top; the snapshot itself when
// nothing was written. No process may use the mount any more. The mount is gone, also after an error.
func (m *Mount) Commit(ctx context.Context) (Snapshot, error) {
	if !m.writable {
		return nil, errors.New("commit snapshot: it is mounted read-only")
	}
	if !m.advance(committed) {
		return nil, errors.New("commit snapshot: it was committed or released already")
	}
	defer m.forget()
	// Overlay keeps nothing of its own to write back: the upper directory is complete when the last writer has gone, so
	// that it can be read and renamed while the unmount is still under way.
	keepUpper := make(chan struct{})
	go m.teardown(keepUpper)
	var id layer.ID
	var err error
	if m.copy != "" {
		err = m.copyChanges(ctx)
	}
	if err == nil && m.finish != nil {
		err = m.finish(filepath.Join(m.upper, "upper"))
	}
	if err == nil {
		id, err = m.s.layers.CommitTreeOver(ctx, m.upper, func(context.Context) (index.Tree, error) { return m.below() })
	}
	if err == nil && id != "" && m.copy == "" {
		m.s.setLeaving(id, m)
	}
	close(keepUpper)
	if err != nil {
		return nil, fmt.Errorf("commit snapshot: %w", err)
	}
	if id == "" {
		return slices.Clone(m.snap), nil
	}
	return append(slices.Clone(m.snap), id), nil
}

// setLeaving notes that id is the upper directory of m, unless that is gone already.
func (s *Store) setLeaving(id layer.ID, m *Mount) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-m.gone:
	default:
		s.leaving[id] = m
	}
}

// Release unmounts and throws away what was written. It returns at once, but on a disk that is nearly full only when what was
// written is gone: whoever comes next needs the room. Trouble is logged. After Commit or another Release it does nothing.
func (m *Mount) Release() error {
	if !m.advance(released) {
		return nil
	}
	m.forget()
	now := make(chan struct{})
	close(now)
	if free, err := m.s.fs.Free(m.s.dir); m.upper != "" && err == nil && free < scarce {
		m.teardown(now)
		return nil
	}
	go m.teardown(now)
	return nil
}

// scarce is how many bytes free are too few to let deletions wait.
const scarce = 256 << 20

// advance is the only place where a mount's state changes. It says whether the change was from mounted.
func (m *Mount) advance(to mountState) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != mounted {
		return false
	}
	m.state = to
	return true
}

// forget takes m out of the mounts in use.
func (m *Mount) forget() {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	delete(m.s.mounts, m)
}

// teardown unmounts m and, once done says that nobody needs the upper directory any more, removes what is left of it.
func (m *Mount) teardown(done <-chan struct{}) {
	defer m.s.teardowns.Done()
	if err := unix.Unmount(m.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		slog.Error("unmount snapshot", "path", m.path, "error", err)
	} else {
		m.unmountLayers()
	}
	m.s.mu.Lock()
	close(m.gone)
	for id, o := range m.s.leaving {
		if o == m {
			delete(m.s.leaving, id)
		}
	}
	m.s.mu.Unlock()
	<-done
	m.removeDirs()
}

func (m *Mount) unmountLayers() {
	for _, id := range m.lower {
		m.s.layers.Unmount(id)
	}
}

// removeDirs removes the mount point and what is left of the upper and work directories.
func (m *Mount) removeDirs() {
	if err := os.Remove(m.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		slog.Error("remove mount point", "path", m.path, "error", err)
	}
	if m.upper == "" {
		return
	}
	if err := m.s.fs.RemoveAll(m.upper); err != nil {
		slog.Error("remove upper directory", "path", m.upper, "error", err)
	}
}
