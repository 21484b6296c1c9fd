// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
)

// CacheMounts are directories that outlive the steps which write to them. On disk:
//
//	DIR/<hash of the key>/mount.json   what the key was
//	DIR/<hash of the key>/<n>/         copy n; 0 is the only one unless private users came at the same time
//	DIR/<hash of the key>/<n>.json     when it was used
//	DIR/trash/                         copies that are being deleted
//
// A key is the mount's ID, and the content of its first files when it has some: another beginning is another cache.
type CacheMounts struct {
	dir string
	now func() time.Time

	mu  sync.Mutex              // guards what follows, and that a copy is made or deleted
	use map[string][]*cacheCopy // by key
	// sizes are those of copies that nobody has used since they were measured, by directory.
	sizes map[string]int64
	// reading counts those that export a copy, by directory: it is not deleted.
	reading map[string]int
	// freed is closed and replaced whenever a copy becomes free.
	freed chan struct{}
}

// cacheCopy is one directory of a key. It is free, used by one step, or by several that share it.
type cacheCopy struct {
	n      int
	users  int
	shared bool
	// taken counts the steps that have used it, and since is when it was free last.
	taken int
	since time.Time
	// making is held by the one who makes it.
	making sync.Mutex
}

type cacheMountInfo struct {
	ID   string `json:"id"`
	From string `json:"from,omitempty"` // content digest of the first files
}

func (i cacheMountInfo) key() string {
	sum := sha256.Sum256([]byte(strconv.Quote(i.ID) + i.From))
	return hex.EncodeToString(sum[:16])
}

// acquire returns a copy for one step and the function that gives it back. Locked waits for a free copy, private
// takes one of its own, shared joins those that share.
func (c *CacheMounts) acquire(ctx context.Context, key string, sharing pb.CacheSharingOpt, waiting func()) (int, func(), error) {
	for {
		n, release, freed := c.try(key, sharing)
		if release != nil {
			return n, release, nil
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return 0, nil, context.Cause(ctx)
		}
	}
}

func (c *CacheMounts) try(key string, sharing pb.CacheSharingOpt) (int, func(), <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.use == nil {
		c.use = map[string][]*cacheCopy{}
	}
	if c.freed == nil {
		c.freed = make(chan struct{})
	}
	var pick *cacheCopy
	for _, cp := range c.use[key] {
		if sharing == pb.CacheSharingOpt_SHARED && cp.shared && cp.users > 0 {
			pick = cp
			break
		}
		if cp.users == 0 && pick == nil {
			pick = cp
		}
	}
	if pick == nil {
		if sharing == pb.CacheSharingOpt_LOCKED && len(c.use[key]) > 0 {
			return 0, nil, c.freed
		}
		pick = &cacheCopy{n: len(c.use[key])}
		c.use[key] = append(c.use[key], pick)
	}
	if pick.users == 0 {
		pick.since = c.clock()
	}
	pick.users++
	pick.taken++
	pick.shared = sharing == pb.CacheSharingOpt_SHARED
	return pick.n, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.noteUse(key, pick.n)
		if pick.users--; pick.users == 0 {
			close(c.freed)
			c.freed = make(chan struct{})
		}
	}, nil
}

// open returns the directory of a copy that a step has acquired; fill makes what is in it the first time.
func (c *CacheMounts) open(info cacheMountInfo, n int, fill func(dir string) error) (string, error) {
	key := info.key()
	dir := c.copyDir(key, n)
	// Of two that share a new copy one makes it; others need not wait for them.
	c.mu.Lock()
	cp := c.use[key][n]
	c.mu.Unlock()
	cp.making.Lock()
	defer cp.making.Unlock()
	if _, err := os.Lstat(dir); err == nil {
		return dir, nil
	}
	// A copy that is there is a complete one: it gets its name last.
	tmp := dir + ".tmp"
	if err := c.begin(info, tmp); err != nil {
		return "", err
	}
	if fill != nil {
		if err := fill(tmp); err != nil {
			return "", errors.Join(fmt.Errorf("first content: %w", err), os.RemoveAll(tmp))
		}
	}
	return dir, os.Rename(tmp, dir)
}

// begin makes an empty directory for a copy, beside a note of what it is for. A key's directory that has something in it is not deleted.
func (c *CacheMounts) begin(info cacheMountInfo, tmp string) error {
	b, err := json.Marshal(info)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := os.MkdirAll(filepath.Dir(tmp), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(tmp), "mount.json"), b, 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	return os.Chmod(tmp, 0o755)
}

// cacheDirs takes the directories of all cache mounts of a step, by index of the mount. It takes them in the
// order of their keys, so that two steps which lock the same two never wait for each other.
func (s *step) cacheDirs(ctx context.Context) (map[int]string, error) {
	type want struct {
		info    cacheMountInfo
		sharing pb.CacheSharingOpt
		from    snapshot.Snapshot
		mounts  []int
	}
	wants := map[string]*want{}
	for i, m := range s.op.op.Mounts {
		if m.MountType != pb.MountType_CACHE {
			continue
		}
		info := cacheMountInfo{ID: m.CacheOpt.ID}
		from := s.input(m)
		if len(from) > 0 {
			d, err := s.op.deps.Snapshots.Content(ctx, from)
			if err != nil {
				return nil, err
			}
			info.From = d.String()
		}
		w := wants[info.key()]
		if w == nil {
			w = &want{info: info, sharing: m.CacheOpt.Sharing, from: from}
			wants[info.key()] = w
		}
		if w.sharing == pb.CacheSharingOpt_SHARED {
			w.sharing = m.CacheOpt.Sharing // the stricter of two for one cache
		}
		w.mounts = append(w.mounts, i)
	}
	dirs := map[int]string{}
	for _, key := range slices.Sorted(maps.Keys(wants)) {
		w := wants[key]
		n, release, err := s.op.caches.acquire(ctx, key, w.sharing, func() {
			s.env.Progress.Log(2, []byte(fmt.Sprintf("waiting for cache mount %s, which another step has locked\n", MountName(w.info.ID))))
		})
		if err != nil {
			return nil, err
		}
		s.later(func() error { release(); return nil })
		dir, err := s.op.caches.open(w.info, n, func(dir string) error {
			// Further copies begin as they do where the first one was made.
			if n == 0 {
				if ok, err := s.restoreMount(ctx, w.info, dir); ok || err != nil {
					return err
				}
			}
			if len(w.from) == 0 {
				return nil
			}
			view, err := s.op.deps.Snapshots.View(ctx, w.from)
			if err != nil {
				return err
			}
			return writeTree(ctx, view, dir)
		})
		if err != nil {
			return nil, fmt.Errorf("cache mount %s: %w", w.info.ID, err)
		}
		for _, i := range w.mounts {
			dirs[i] = dir
		}
	}
	return dirs, nil
}

// cacheMount mounts a cache's directory, or the part of it that the selector names.
func (s *step) cacheMount(m *pb.Mount, dir string) (executor.Mount, error) {
	s.output(m, nil)
	em := executor.Mount{Kind: executor.MountBind, Source: dir}
	if filepath.Join("/", m.Selector) == "/" {
		return em, nil
	}
	// Other steps may be writing to the cache at this moment, so the selector is resolved by the kernel, inside the
	// cache, and what it finds is pinned by a mount.
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return em, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, filepath.Join("/", m.Selector), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) {
		return em, &NotFoundError{m.Selector}
	} else if err != nil {
		return em, &os.PathError{Op: "open", Path: m.Selector, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return em, &os.PathError{Op: "stat", Path: m.Selector, Err: err}
	}
	pin := filepath.Join(s.op.deps.tempDir(), "pin-"+randomID())
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(pin, 0o700)
	} else {
		err = os.WriteFile(pin, nil, 0o600)
	}
	if err != nil {
		return em, err
	}
	s.later(func() error { return os.Remove(pin) })
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), pin, "", unix.MS_BIND, ""); err != nil {
		return em, &os.PathError{Op: "mount", Path: pin, Err: err}
	}
	s.later(func() error { return unmount(pin) })
	em.Source = pin
	return em, nil
}

// writeTree writes everything in t to dir, an empty directory that nobody else sees yet.
func writeTree(ctx context.Context, t layer.Files, dir string) error {
	var dirs []index.Entry
	err := index.Walk(t, "", func(e index.Entry) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if e.Type == index.Dir {
			dirs = append(dirs, e)
		}
		return writeEntry(ctx, t, e, dir)
	})
	for _, e := range slices.Backward(dirs) { // after what is in them has changed their times
		if err == nil {
			err = setTime(filepath.Join(dir, e.Path), e.ModTime)
		}
	}
	return err
}

func writeEntry(ctx context.Context, t layer.Files, e index.Entry, dir string) (err error) {
	p := filepath.Join(dir, e.Path)
	if e.HardLink != "" {
		return os.Link(filepath.Join(dir, e.HardLink), p)
	}
	switch e.Type {
	case index.Dir:
		if e.Path != "" {
			err = os.Mkdir(p, 0o700)
		}
	case index.File:
		err = writeBytes(ctx, t, e.Path, p)
	case index.Symlink:
		err = os.Symlink(e.Target, p)
	case index.CharDevice:
		err = unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	case index.BlockDevice:
		err = unix.Mknod(p, unix.S_IFBLK|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	case index.Fifo:
		err = unix.Mkfifo(p, 0o600)
	default:
		err = fmt.Errorf("%q has type %d", e.Path, e.Type)
	}
	if err != nil {
		return err
	}
	if err := os.Lchown(p, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	for k, v := range e.Xattrs {
		if err := unix.Lsetxattr(p, k, []byte(v), 0); err != nil {
			return &os.PathError{Op: "setxattr " + k, Path: p, Err: err}
		}
	}
	if e.Type != index.Symlink {
		if err := os.Chmod(p, fileMode(e.Mode)); err != nil {
			return err
		}
	}
	return setTime(p, e.ModTime)
}

func writeBytes(ctx context.Context, t layer.Files, name, p string) error {
	r, err := t.OpenFile(ctx, name)
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

func setTime(p string, ns int64) error {
	ts := unix.NsecToTimespec(ns)
	err := unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return &os.PathError{Op: "utimes", Path: p, Err: err}
	}
	return nil
}
