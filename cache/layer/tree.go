// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// NewUpper returns a new directory with the empty directories "upper" and "work" for an overlay mount, on the file
// system of the layers. Whoever asked for it removes it, after CommitTree too; what a crash leaves, Open removes.
func (s *Store) NewUpper(ctx context.Context) (dir string, err error) {
	dir = filepath.Join(s.dir, "uppers", randomName())
	for _, d := range []string{dir, filepath.Join(dir, "upper"), filepath.Join(dir, "work")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", fmt.Errorf("upper directory: %w", err)
		}
	}
	// Whatever the umask: this becomes the mode of "/".
	if err := os.Chmod(filepath.Join(dir, "upper"), 0o755); err != nil {
		return "", fmt.Errorf("upper directory: %w", err)
	}
	return dir, nil
}

// CommitTree makes a layer in tree form of an upper directory, one that NewUpper has returned or any directory that
// can be renamed into the store, in overlayfs's form. It is indexed and renamed, not copied, so nothing may write to
// it any more. An upper directory that holds nothing, and is 0755 0:0 itself, gives the ID "" and stays.
// The layer's ID is random.
func (s *Store) CommitTree(ctx context.Context, upper string) (ID, error) {
	plainRoot := index.Entry{Type: index.Dir, Mode: 0o755}
	return s.CommitTreeOver(ctx, upper, plainRoot)
}

// CommitTreeOver is CommitTree for an upper directory that was given the metadata of root before it was mounted:
// it gives no layer if nothing is in it and its mode, owner and xattrs are still those.
func (s *Store) CommitTreeOver(ctx context.Context, upper string, root index.Entry) (ID, error) {
	if filepath.Dir(upper) == filepath.Join(s.dir, "uppers") {
		upper = filepath.Join(upper, "upper")
	}
	x, size, err := scanTree(ctx, upper)
	if err != nil {
		return "", fmt.Errorf("commit %s: %w", upper, err)
	}
	if x.Len() == 1 && sameRoot(x.At(0), root) {
		return "", nil
	}
	id, err := s.commitTree(upper, x, size)
	if err != nil {
		return "", fmt.Errorf("commit %s: %w", upper, err)
	}
	return id, nil
}

func sameRoot(a, b index.Entry) bool {
	if a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || len(a.Xattrs) != len(b.Xattrs) {
		return false
	}
	for name, value := range a.Xattrs {
		if b.Xattrs[name] != value {
			return false
		}
	}
	return true
}

func (s *Store) commitTree(upper string, x *index.Index, size int64) (ID, error) {
	tmp, err := s.newTmp()
	if err != nil {
		return "", err
	}
	m := &meta{ID: ID("t" + randomName()), Tree: true, Content: x.Digest(), Size: size}
	err = writeFile(filepath.Join(tmp, indexFile), x.Encode(), false)
	if err == nil {
		err = writeMeta(filepath.Join(tmp, infoFile), m, false)
	}
	if err == nil {
		err = os.Rename(upper, filepath.Join(tmp, treeDir))
	}
	if err != nil {
		s.removeAll(tmp)
		return "", err
	}
	if err := s.install(tmp, m, x, false); err != nil {
		return "", err
	}
	return m.ID, nil
}

// scanTree makes the index of a directory in overlayfs's form, and says what its files occupy on disk.
func scanTree(ctx context.Context, dir string) (*index.Index, int64, error) {
	sc := &treeScan{dir: dir, links: map[inode]int{}}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, 0, &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, 0, &os.PathError{Op: "index", Path: dir, Err: syscall.ENOTDIR}
	}
	if err := sc.entry("", &st); err != nil {
		return nil, 0, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	if err := sc.walk(ctx, "", os.NewFile(uintptr(fd), dir)); err != nil {
		return nil, 0, err
	}
	if err := sc.hash(ctx); err != nil {
		return nil, 0, err
	}
	// The walk is in Compare order, so the first name of a hard link came first.
	for i := range sc.entries {
		if e := &sc.entries[i]; e.HardLink != "" {
			e.Digest = sc.entries[sc.first[i]].Digest
		}
	}
	x, err := index.NewChecked(sc.entries)
	return x, sc.bytes, err
}

type treeScan struct {
	dir     string
	entries []index.Entry
	links   map[inode]int // the entry that is the first name of a file with several
	first   map[int]int   // and for each later name, the number of that entry
	bytes   int64
}

type inode struct{ dev, ino uint64 }

// walk takes what is in a directory, which it closes.
func (sc *treeScan) walk(ctx context.Context, path string, dir *os.File) error {
	defer dir.Close()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		var st unix.Stat_t
		fd := int(dir.Fd())
		child := index.Join(path, name)
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "lstat", Path: child, Err: err}
		}
		if err := sc.entryAt(fd, name, child, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: child, Err: err}
		}
		if err := sc.walk(ctx, child, os.NewFile(uintptr(sub), child)); err != nil {
			return err
		}
	}
	return nil
}

func (sc *treeScan) entry(path string, st *unix.Stat_t) error {
	return sc.take(filepath.Join(sc.dir, path), path, st, func() (string, error) {
		return os.Readlink(filepath.Join(sc.dir, path))
	})
}

// entryAt is entry for a name in an open directory, however deep that is.
func (sc *treeScan) entryAt(dirfd int, name, path string, st *unix.Stat_t) error {
	full := "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
	return sc.take(full, path, st, func() (string, error) { return os.Readlink(full) })
}

func (sc *treeScan) take(full, path string, st *unix.Stat_t, readlink func() (string, error)) error {
	e := index.Entry{
		Path: path, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Offset: -1,
		ModTime: st.Mtim.Nano(),
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Type = index.Dir
	case unix.S_IFREG:
		e.Type = index.File
		e.Size = st.Size
	case unix.S_IFLNK:
		e.Type = index.Symlink
		e.Mode = 0o777
		target, err := readlink()
		if err != nil {
			return &os.PathError{Op: "readlink", Path: path, Err: err}
		}
		e.Target = target
	case unix.S_IFCHR:
		if major == 0 && minor == 0 {
			sc.entries = append(sc.entries, index.Entry{Path: path, Type: index.Whiteout, Offset: -1})
			return nil
		}
		e.Type, e.Major, e.Minor = index.CharDevice, major, minor
	case unix.S_IFBLK:
		e.Type, e.Major, e.Minor = index.BlockDevice, major, minor
	case unix.S_IFIFO:
		e.Type = index.Fifo
	default:
		return nil // a socket: meaningless without the process that made it
	}
	own, err := readXattrs(full)
	if err != nil {
		return fmt.Errorf("xattrs of %q: %w", path, err)
	}
	for name, value := range own {
		if !isOverlayXattr(name) {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = value
			continue
		}
		switch name {
		case xattrOpaque, xattrUserOpaque:
			// "x" means that there are whiteouts in it which are xattrs, not that it is opaque.
			e.Opaque = e.Type == index.Dir && value == "y" && path != ""
		case xattrWhiteout, xattrUserWhiteout:
			if e.Type == index.File && e.Size == 0 {
				sc.entries = append(sc.entries, index.Entry{Path: path, Type: index.Whiteout, Offset: -1})
				return nil
			}
		}
	}
	if e.Type != index.Dir && st.Nlink > 1 {
		key := inode{uint64(st.Dev), st.Ino}
		if i, ok := sc.links[key]; ok {
			if sc.first == nil {
				sc.first = map[int]int{}
			}
			sc.first[len(sc.entries)] = i
			e.HardLink = sc.entries[i].Path
			sc.entries = append(sc.entries, e)
			return nil
		}
		sc.links[key] = len(sc.entries)
	}
	sc.bytes += st.Blocks * 512
	sc.entries = append(sc.entries, e)
	return nil
}

// readXattrs returns all xattrs of a path that is not followed.
func readXattrs(path string) (map[string]string, error) {
	list, err := growing(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		return nil, err
	}
	var out map[string]string
	for name := range strings.SplitSeq(string(list), "\x00") {
		if name == "" {
			continue
		}
		value, err := growing(func(buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) })
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = string(value)
	}
	return out, nil
}

// growing calls a system call that fills a buffer, with larger ones until it fits.
func growing(call func([]byte) (int, error)) ([]byte, error) {
	var small [512]byte
	n, err := call(small[:])
	if err == nil {
		return slices.Clone(small[:n]), nil
	}
	for size := 4096; errors.Is(err, unix.ERANGE) && size <= 1<<20; size *= 4 {
		buf := make([]byte, size)
		if n, err = call(buf); err == nil {
			return buf[:n], nil
		}
	}
	return nil, err
}

// hash fills in the digests of regular files, on all cores.
func (sc *treeScan) hash(ctx context.Context) error {
	root, err := os.OpenRoot(sc.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan int, 64)
	var wg sync.WaitGroup
	for range readAheadWorkers {
		wg.Go(func() {
			buf := make([]byte, chunkSize)
			for i := range work {
				if ctx.Err() != nil {
					continue
				}
				sum, err := hashFile(root, &sc.entries[i], buf)
				if err != nil {
					cancel(fmt.Errorf("hash %q: %w", sc.entries[i].Path, err))
					continue
				}
				sc.entries[i].Digest = sum
			}
		})
	}
	for i := range sc.entries {
		if e := &sc.entries[i]; e.Type == index.File && e.HardLink == "" {
			work <- i
		}
	}
	close(work)
	wg.Wait()
	return context.Cause(ctx)
}

func hashFile(root *os.Root, e *index.Entry, buf []byte) (digest.Digest, error) {
	if e.Size == 0 {
		return emptyDigest, nil
	}
	f, err := root.OpenFile(e.Path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(h, onlyReader{f}, buf)
	if err != nil {
		return "", err
	}
	if n != e.Size {
		return "", ErrChanged
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// Pack makes sure that the layer has a tar, and so a diff ID. The tar of a tree has whole seconds where the tree has
// nanoseconds. The layer keeps its ID, and its tree: it goes on being mounted as such.
func (s *Store) Pack(ctx context.Context, id ID) (Info, error) {
	if err := s.Ensure(ctx, id); err != nil {
		return Info{}, err
	}
	m, err := s.meta(id)
	if err != nil || m.Tar {
		return infoOrNone(m), err
	}
	defer s.locks.lock(id)()
	if m, err = s.meta(id); err != nil || m.Tar {
		return infoOrNone(m), err
	}
	packed, err := s.pack(ctx, m)
	if err != nil {
		return Info{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	return packed.info(), nil
}

func infoOrNone(m *meta) Info {
	if m == nil {
		return Info{}
	}
	return m.info()
}

func (s *Store) pack(ctx context.Context, old *meta) (*meta, error) {
	x, err := s.Index(ctx, old.ID)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(s.path(old.ID, treeDir))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	items := make([]tarItem, x.Len())
	mtimes := make([]int64, x.Len())
	for i := range items {
		e := x.At(i)
		mtimes[i] = e.ModTime
		items[i] = tarItem{entry: e, open: func() (io.ReadCloser, error) {
			return root.OpenFile(e.Path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
		}}
	}
	tmp, err := s.newTmp()
	if err != nil {
		return nil, err
	}
	defer s.removeAll(tmp)
	writeRoot := rootInTar(&items[0].entry)
	m := *old
	m.Tar = true
	m.TarSize, m.DiffID, err = writeTar(ctx, filepath.Join(tmp, tarFile), items, writeRoot)
	if err != nil {
		return nil, err
	}
	m.Size += m.TarSize
	if !writeRoot {
		m.Below = map[string]string{belowKey(belowStat, ""): ""}
	}
	// The tree stays and shows nanoseconds, so the index does.
	for i := range items {
		items[i].entry.ModTime = mtimes[i]
	}
	packed, err := indexOf(items)
	if err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(tmp, indexFile), packed.Encode(), true); err != nil {
		return nil, err
	}
	if err := writeMeta(filepath.Join(tmp, infoFile), &m, true); err != nil {
		return nil, err
	}
	// The info last: only it says that there is a tar.
	for _, name := range []string{tarFile, indexFile, infoFile} {
		if err := os.Rename(filepath.Join(tmp, name), s.path(old.ID, name)); err != nil {
			return nil, err
		}
	}
	if err := syncPath(s.path(old.ID, "")); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.metas[m.ID] = &m
	s.mu.Unlock()
	s.indexes.put(m.ID, packed)
	return &m, nil
}

// OpenTar opens the layer's tar and says how long it is. A layer that has none yet is packed first.
func (s *Store) OpenTar(ctx context.Context, id ID) (io.ReadSeekCloser, int64, error) {
	if _, err := s.Pack(ctx, id); err != nil {
		return nil, 0, err
	}
	m, err := s.meta(id)
	if err != nil {
		return nil, 0, err
	}
	f, err := os.Open(s.path(id, tarFile))
	if err != nil {
		return nil, 0, fmt.Errorf("layer %s: %w", id, err)
	}
	return f, m.TarSize, nil
}
