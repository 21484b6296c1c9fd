// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Restore writes a tree to dir, an empty directory that nobody else writes to. On an error dir has a part of it, which the
// caller removes. Errors about what came from the place wrap ErrCorrupt.
//
// The access time of a file is when it was used last as far as the exporter knew, so that the first use here is seen. Owners and attributes that this user or file
// system cannot have are left out.
func Restore(ctx context.Context, b Blobs, ref Ref, dir string) (Stats, error) {
	stats, err := restore(ctx, b, ref, dir)
	if err != nil {
		return stats, fmt.Errorf("restore tree %s: %w", ref.Manifest.Digest, err)
	}
	return stats, nil
}

func restore(ctx context.Context, b Blobs, ref Ref, dir string) (Stats, error) {
	m, err := load(ctx, b, ref)
	if err != nil {
		return Stats{}, err
	}
	if m.Kind != kindTree {
		return Stats{}, fmt.Errorf("%w: it is not of a tree", ErrCorrupt)
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return Stats{}, fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(root)
	t := &treeWriter{m: m, root: root, owner: os.Geteuid() == 0}
	if err := t.checkSpace(); err != nil {
		return Stats{}, err
	}
	r, err := newReader(b, m)
	if err != nil {
		return Stats{}, err
	}
	defer r.close()
	if err := t.directories(); err != nil {
		return Stats{}, err
	}
	if err := t.contents(ctx, r); err != nil {
		return Stats{}, err
	}
	if err := t.links(); err != nil {
		return Stats{}, err
	}
	return Stats{Files: len(t.files), Bytes: m.length(), Chunks: len(m.Stream), Packs: len(m.Packs)}, t.finishDirectories()
}

// treeWriter makes the files of a tree. Directories come first, then files, then links: so nothing is ever reached through a symlink, and every path is
// resolved by the kernel with that forbidden besides.
type treeWriter struct {
	m     *manifest
	root  int
	owner bool // may change owners
	files []*restoring
}

// restoring is a file that is being written, by more than one window if it is large.
type restoring struct {
	*entry
	missing atomic.Int64 // bytes
	open    sync.Once
	fd      int
	err     error // of open
}

func (t *treeWriter) checkSpace() error {
	var need int64
	for i := range t.m.Entries {
		need += t.m.Entries[i].Size
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(t.root, &fs); err != nil {
		return fmt.Errorf("free space: %w", err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; need > free {
		return fmt.Errorf("it takes %d bytes, and %d are free: free some, or export with mounts-max-size", need, free)
	}
	return nil
}

// parent opens the directory that path is in.
func (t *treeWriter) parent(path string) (int, error) {
	dir := index.Parent(path)
	if dir == "" {
		dir = "."
	}
	return t.open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

func (t *treeWriter) open(path string, flags int, mode uint32) (int, error) {
	return unix.Openat2(t.root, path, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Mode:    uint64(mode),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
}

// inParents calls fn for the entries of the types, with the descriptor of the directory that each is in.
func (t *treeWriter) inParents(types string, fn func(dirfd int, name string, e *entry) error) error {
	at, dirfd := "\x00", -1 // no path
	defer func() {
		if dirfd >= 0 {
			unix.Close(dirfd)
		}
	}()
	for i := range t.m.Entries {
		e := &t.m.Entries[i]
		if i == 0 || !slices.Contains([]byte(types), byte(e.Type)) {
			continue
		}
		if p := index.Parent(e.Path); p != at {
			fd, err := t.parent(e.Path)
			if err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
			if dirfd >= 0 {
				unix.Close(dirfd)
			}
			at, dirfd = p, fd
		}
		if err := fn(dirfd, index.Base(e.Path), e); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

func (t *treeWriter) directories() error {
	return t.inParents(string(typeDir), func(dirfd int, name string, _ *entry) error {
		return unix.Mkdirat(dirfd, name, 0o700)
	})
}

// links makes symlinks, and then hard links, which may be to symlinks.
func (t *treeWriter) links() error {
	err := t.inParents(string(typeSymlink), func(dirfd int, name string, e *entry) error {
		if err := unix.Symlinkat(e.Target, dirfd, name); err != nil {
			return err
		}
		if t.owner {
			if err := unix.Fchownat(dirfd, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
		}
		ts := unix.NsecToTimespec(e.ModTime)
		return unix.UtimesNanoAt(dirfd, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		return err
	}
	return t.inParents(string(typeHardLink), func(dirfd int, name string, e *entry) error {
		first := &t.m.Entries[e.Link]
		from, err := t.parent(first.Path)
		if err != nil {
			return err
		}
		defer unix.Close(from)
		return unix.Linkat(from, index.Base(first.Path), dirfd, name, 0)
	})
}

// finishDirectories gives directories their metadata, which had to wait for what is in them.
func (t *treeWriter) finishDirectories() error {
	for i := range slices.Backward(t.m.Entries) {
		e := &t.m.Entries[i]
		if e.Type != typeDir {
			continue
		}
		fd, err := t.open(cmp.Or(e.Path, "."), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err == nil {
			err = t.setMetadata(fd, e)
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

// contents writes all files, several windows of the stream at once.
func (t *treeWriter) contents(ctx context.Context, r *reader) error {
	for i := range t.m.Entries {
		if e := &t.m.Entries[i]; e.Type == typeFile {
			f := &restoring{entry: e}
			f.missing.Store(e.Size)
			t.files = append(t.files, f)
		}
	}
	slices.SortStableFunc(t.files, func(a, b *restoring) int { return cmp.Compare(a.offset, b.offset) })
	starts := t.m.locate()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(windowsAhead)
	next := 0
	for from := 0; from < len(t.m.Stream) && ctx.Err() == nil; {
		to := from + 1
		for to < len(t.m.Stream) && starts[to+1]-starts[from] <= windowBytes {
			to++
		}
		end := starts[to]
		first := next
		for next < len(t.files) && t.files[next].offset < end {
			next++
		}
		w := treeWindow{files: t.files[first:next], starts: starts[from : to+1], chunks: t.m.Stream[from:to]}
		if next > first && t.files[next-1].offset+t.files[next-1].Size > end {
			next-- // it goes on in the next window
		}
		g.Go(func() error {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			have, err := r.load(ctx, w.chunks)
			if err != nil {
				return err
			}
			return t.write(&w, have)
		})
		from = to
	}
	err := g.Wait()
	for ; err == nil && next < len(t.files); next++ { // what has no bytes, behind all that have some
		err = t.writePart(t.files[next], nil, 0)
	}
	t.abandon()
	return err
}

// treeWindow is a stretch of the stream, and the files that have something of it.
type treeWindow struct {
	files  []*restoring
	starts []int64 // where its chunks begin, and where the last one ends
	chunks []int
}

// write writes what a window has of files.
func (t *treeWriter) write(w *treeWindow, have map[int][]byte) error {
	for _, f := range w.files {
		lo := max(f.offset, w.starts[0])
		hi := min(f.offset+f.Size, w.starts[len(w.starts)-1])
		if f.Size == 0 {
			if err := t.writePart(f, nil, 0); err != nil {
				return err
			}
			continue
		}
		if lo >= hi { // it ended where the window begins
			continue
		}
		from, to := within(w.starts, span{lo, hi - lo})
		for i := from; i < to; i++ {
			b := have[w.chunks[i]]
			begin := max(0, lo-w.starts[i])
			stop := min(int64(len(b)), hi-w.starts[i])
			if err := t.writePart(f, b[begin:stop], w.starts[i]+begin-f.offset); err != nil {
				return err
			}
		}
	}
	return nil
}

// writePart writes bytes of a file at a place in it, and finishes it when it has all.
func (t *treeWriter) writePart(f *restoring, b []byte, at int64) error {
	f.open.Do(func() {
		f.fd, f.err = t.openFile(f.Path)
	})
	if f.err != nil {
		return fmt.Errorf("%q: %w", f.Path, f.err)
	}
	for rest := b; len(rest) > 0; {
		n, err := unix.Pwrite(f.fd, rest, at)
		if err != nil {
			return fmt.Errorf("%q: %w", f.Path, err)
		}
		rest, at = rest[n:], at+int64(n)
	}
	if f.missing.Add(-int64(len(b))) > 0 {
		return nil
	}
	err := t.setMetadata(f.fd, f.entry)
	if cerr := unix.Close(f.fd); err == nil {
		err = cerr
	}
	f.fd = -1
	if err != nil {
		return fmt.Errorf("%q: %w", f.Path, err)
	}
	return nil
}

func (t *treeWriter) openFile(path string) (int, error) {
	fd, err := t.open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// abandon closes what an error has left open.
func (t *treeWriter) abandon() {
	for _, f := range t.files {
		f.open.Do(func() { f.fd = -1 })
		if f.fd >= 0 {
			unix.Close(f.fd)
		}
	}
}

// setMetadata sets owner, mode, xattrs and times of an open file or directory, in the order in which none undoes another.
func (t *treeWriter) setMetadata(fd int, e *entry) error {
	if t.owner {
		if err := unix.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if err := unix.Fchmod(fd, e.Mode); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	for _, x := range e.Xattrs {
		if err := unix.Fsetxattr(fd, x.Name, []byte(x.Value), 0); err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("set extended attribute %q: %w", x.Name, err)
		}
	}
	mtime, atime := unix.NsecToTimespec(e.ModTime), unix.NsecToTimespec(e.ModTime)
	if e.Type == typeFile && e.Used*3600 > mtime.Sec {
		atime = unix.Timespec{Sec: e.Used * 3600}
	}
	// No AT_EMPTY_PATH for utimensat in older kernels; the descriptor's own name leads to nothing else.
	err := unix.UtimesNanoAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), []unix.Timespec{atime, mtime}, 0)
	if err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}
