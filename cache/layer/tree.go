// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// NewUpper returns a new directory with the empty directories "upper" and "work" for an overlay mount, on the file
// system of the layers. Whoever asked for it removes it, after CommitTree too; what a crash leaves, Open removes.
func (s *Store) NewUpper(ctx context.Context) (dir string, err error) {
	dir = filepath.Join(s.dir, "uppers", randomName())
	for _, d := range []string{dir, filepath.Join(dir, "upper"), filepath.Join(dir, "work")} {
		if err := s.fs.Mkdir(d, 0o755); err != nil {
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
// can be renamed into the store, in overlayfs's form. It is renamed and indexed, not copied, so nothing may write to
// it any more. An upper directory that holds nothing, and is 0755 0:0 itself, gives the ID "" and stays.
// The layer's ID is random.
//
// The index of all but small trees is made in the background (indexing.go): the layer can be mounted at once, Ensure says
// when it is complete, and until then nothing may name it that outlives the process.
func (s *Store) CommitTree(ctx context.Context, upper string) (ID, error) {
	return s.CommitTreeOver(ctx, upper, func(context.Context) (index.Tree, error) { return index.Merge(), nil })
}

// Below gives the tree that an upper directory was mounted over. It may be called later, from another goroutine.
type Below func(context.Context) (index.Tree, error)

// CommitTreeOver is CommitTree for an upper directory that was mounted over below and had been given the metadata of its
// root. Directories that overlayfs has copied up, but in which nothing has changed (a file was made there and removed
// again), are left out of the layer; if nothing else is in a small one, and its mode, owner and xattrs are those of below's
// root, there is no layer.
func (s *Store) CommitTreeOver(ctx context.Context, upper string, below Below) (ID, error) {
	if filepath.Dir(upper) == filepath.Join(s.dir, "uppers") {
		upper = filepath.Join(upper, "upper")
	}
	small, err := isSmall(upper)
	var id ID
	switch {
	case err != nil:
	case small:
		id, err = s.commitSmall(ctx, upper, below)
	default:
		id, err = s.commitUnfinished(ctx, upper, below)
	}
	if err != nil {
		return "", fmt.Errorf("commit %s: %w", upper, err)
	}
	return id, nil
}

// commitSmall commits a tree with all that belongs to it; "" if nothing has changed in it.
func (s *Store) commitSmall(ctx context.Context, upper string, below Below) (ID, error) {
	scan, err := scanSmallTree(ctx, upper)
	if err != nil {
		return "", err
	}
	tree, err := below(ctx)
	if err != nil {
		return "", err
	}
	x, err := removeUnchanged(upper, scan.index, tree)
	if err != nil {
		return "", err
	}
	if root, _ := tree.Lookup(""); x.Len() == 1 && sameMeta(x.At(0), root) {
		return "", nil
	}
	return s.commitTree(upper, x, scan.bytes)
}

// removeUnchanged removes the directories of upper that add nothing to below, and returns the index without them.
func removeUnchanged(upper string, x *index.Index, below index.Tree) (*index.Index, error) {
	gone, touched, err := unchangedDirs(x, below, func(path string) (bool, error) {
		err := unix.Rmdir(filepath.Join(upper, path))
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return false, nil // a socket, which the index does not have
		}
		if err != nil {
			return false, &os.PathError{Op: "remove unchanged", Path: path, Err: err}
		}
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	for i := range touched {
		e := x.At(i)
		mtime := unix.NsecToTimespec(e.ModTime)
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(upper, e.Path), []unix.Timespec{{Nsec: unix.UTIME_OMIT}, mtime}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, &os.PathError{Op: "utimensat", Path: e.Path, Err: err}
		}
	}
	return without(x, gone)
}

// unchangedDirs returns the numbers of the directories in x that add nothing to below and that remove, which is asked about
// what is deepest first, agrees to; and of those that had one of these in them, and stay.
func unchangedDirs(x *index.Index, below index.Tree, remove func(path string) (bool, error)) (gone, touched map[int]bool, err error) {
	gone, touched = map[int]bool{}, map[int]bool{}
	// Backwards, so that what is in a directory comes before it.
	for i := x.Len() - 1; i > 0; i-- {
		if !x.IsDir(i) || slices.ContainsFunc(slices.Collect(x.Children(i)), func(j int) bool { return !gone[j] }) {
			continue
		}
		e := x.At(i)
		old, ok := below.Lookup(e.Path)
		if e.Opaque || !ok || old.Type != index.Dir || old.ModTime != e.ModTime || !sameMeta(e, old) {
			continue
		}
		ok, err := remove(e.Path)
		if err != nil {
			return nil, nil, err
		}
		if ok {
			gone[i], touched[x.ParentPos(i)] = true, true
			delete(touched, i)
		}
	}
	return gone, touched, nil
}

// without returns x without the entries of those numbers.
func without(x *index.Index, gone map[int]bool) (*index.Index, error) {
	if len(gone) == 0 {
		return x, nil
	}
	entries := make([]index.Entry, 0, x.Len())
	for i := range x.Len() {
		if !gone[i] {
			entries = append(entries, x.At(i))
		}
	}
	return index.NewChecked(entries)
}

// sameMeta says whether two directories look alike, but for their times.
func sameMeta(a, b index.Entry) bool {
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
	s.add(m.Size)
	defer s.boot.begin(m)()
	err = s.writeFile(filepath.Join(tmp, indexFile), x.Encode(), false)
	if err == nil {
		err = s.writeMeta(filepath.Join(tmp, infoFile), m, false)
	}
	if err == nil {
		err = s.fs.Rename(upper, filepath.Join(tmp, treeDir))
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

// scanned is what a directory in overlayfs's form holds.
type scanned struct {
	index *index.Index
	bytes int64 // what its files occupy on disk
	// unindexed are the directories with something in them that no index has: a socket.
	unindexed map[string]bool
}

// scanTree reads a directory in overlayfs's form.
func scanTree(ctx context.Context, dir string) (*scanned, error) {
	return (&treeScan{dir: dir}).scan(ctx)
}

// scanIndex is the index of scanTree.
func scanIndex(ctx context.Context, dir string) (*index.Index, error) {
	scan, err := scanTree(ctx, dir)
	if err != nil {
		return nil, err
	}
	return scan.index, nil
}

// scanSmallTree is scanTree without goroutines, whose start and end would take longer than to hash a small tree.
func scanSmallTree(ctx context.Context, dir string) (*scanned, error) {
	return (&treeScan{dir: dir, alone: true}).scan(ctx)
}

func (sc *treeScan) scan(ctx context.Context) (*scanned, error) {
	sc.links, sc.unindexed = map[inode]int{}, map[string]bool{}
	dir := sc.dir
	if err := sc.takeRoot(); err != nil {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := sc.startHashing(ctx); err != nil {
		unix.Close(fd)
		return nil, err
	}
	err = sc.walk(ctx, "", os.NewFile(uintptr(fd), dir))
	if err != nil {
		cancel(err) // what the hashing finds is of no interest any more
	}
	if herr := sc.endHashing(); err == nil {
		err = herr
	}
	if err != nil {
		return nil, err
	}
	// The walk is in Compare order, so the first name of a hard link came first.
	for i := range sc.entries {
		if e := &sc.entries[i]; e.HardLink != "" {
			e.Digest = sc.entries[sc.first[i]].Digest
		}
	}
	x, err := index.NewChecked(sc.entries)
	if err != nil {
		return nil, err
	}
	return &scanned{index: x, bytes: sc.bytes, unindexed: sc.unindexed}, nil
}

// scanRoot returns the entry of the directory itself.
func scanRoot(dir string) (index.Entry, error) {
	sc := &treeScan{dir: dir}
	if err := sc.takeRoot(); err != nil {
		return index.Entry{}, err
	}
	return sc.entries[0], nil
}

type treeScan struct {
	dir     string
	entries []index.Entry
	links   map[inode]int // the entry that is the first name of a file with several
	first   map[int]int   // and for each later name, the number of that entry
	bytes   int64

	unindexed map[string]bool

	// The files are hashed while the walk goes on, unless alone says that there is only one goroutine.
	alone   bool
	buf     []byte // for hashing alone
	root    int    // descriptor of dir
	jobs    chan *hashJob
	files   []*hashJob
	hashing sync.WaitGroup
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
		if err := index.CheckLength(child); err != nil {
			return err
		}
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

// takeRoot takes the directory itself.
func (sc *treeScan) takeRoot() error {
	var st unix.Stat_t
	if err := unix.Lstat(sc.dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: sc.dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return &os.PathError{Op: "index", Path: sc.dir, Err: syscall.ENOTDIR}
	}
	return sc.take("", &st, nil, func() (map[string]string, error) { return readXattrs(sc.dir) })
}

// entryAt takes a name in an open directory, however deep that is.
func (sc *treeScan) entryAt(dirfd int, name, path string, st *unix.Stat_t) error {
	full := func() string { return "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name }
	return sc.take(path, st, func() (string, error) { return os.Readlink(full()) }, func() (map[string]string, error) {
		if hasNoXattrs(dirfd, name) {
			return nil, nil
		}
		return readXattrs(full())
	})
}

func (sc *treeScan) take(path string, st *unix.Stat_t, readlink func() (string, error), xattrs func() (map[string]string, error)) error {
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
		// A socket: meaningless without the process that made it.
		sc.unindexed[index.Parent(path)] = true
		return nil
	}
	own, err := xattrs()
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
		switch {
		case isOpaqueXattr(name):
			// "x" means that there are whiteouts in it which are xattrs, not that it is opaque.
			e.Opaque = e.Type == index.Dir && value == "y" && path != ""
		case isWhiteoutXattr(name):
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
	if e.Type == index.File && e.Size == 0 {
		e.Digest = emptyDigest
	} else if e.Type == index.File {
		j := &hashJob{entry: len(sc.entries), path: path, size: e.Size}
		sc.files = append(sc.files, j)
		if sc.alone {
			j.sum, j.err = hashFile(sc.root, j.path, j.size, sc.buf)
		} else {
			sc.jobs <- j
		}
	}
	sc.bytes += st.Blocks * 512
	sc.entries = append(sc.entries, e)
	return nil
}

// hasNoXattrs says that a file certainly has none, by listxattrat(2) of Linux 6.13.
func hasNoXattrs(dirfd int, name string) bool {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return false
	}
	n, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(p)), unix.AT_SYMLINK_NOFOLLOW, 0, 0, 0)
	return errno == 0 && n == 0
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

// hashJob is a regular file whose digest is wanted.
type hashJob struct {
	entry int
	path  string
	size  int64
	sum   digest.Digest
	err   error
}

// startHashing hashes, on all cores, the files that are sent to sc.jobs, until that is closed; alone, it only gets ready.
func (sc *treeScan) startHashing(ctx context.Context) error {
	root, err := unix.Open(sc.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: sc.dir, Err: err}
	}
	sc.root = root
	if sc.alone {
		sc.buf = make([]byte, smallBytes)
		return nil
	}
	sc.jobs = make(chan *hashJob, 256)
	for range readAheadWorkers {
		sc.hashing.Go(func() {
			var buf []byte // most steps write no file
			for j := range sc.jobs {
				if buf == nil {
					buf = make([]byte, chunkSize)
				}
				if j.err = context.Cause(ctx); j.err == nil {
					j.sum, j.err = hashFile(root, j.path, j.size, buf)
				}
			}
		})
	}
	return nil
}

// endHashing waits for the digests and puts them into the entries.
func (sc *treeScan) endHashing() error {
	if !sc.alone {
		close(sc.jobs)
		sc.hashing.Wait()
	}
	unix.Close(sc.root)
	for _, j := range sc.files {
		if j.err != nil {
			return fmt.Errorf("hash %q: %w", j.path, j.err)
		}
		sc.entries[j.entry].Digest = j.sum
	}
	return nil
}

// hashFile hashes the regular file at path below root, of which no part is followed.
func hashFile(root int, path string, size int64, buf []byte) (digest.Digest, error) {
	fd, err := openBelow(root, path)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var h hash.Hash
	for total := int64(0); ; {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", err
		}
		total += int64(n)
		switch {
		case total > size || n == 0 && total < size:
			return "", ErrChanged
		case h == nil && total == size && n < len(buf):
			sum := sha256.Sum256(buf[:n]) // all of it at once
			return digest.NewDigestFromBytes(digest.SHA256, sum[:]), nil
		case n == 0:
			return digest.NewDigest(digest.SHA256, h), nil
		case h == nil:
			h = sha256.New()
		}
		h.Write(buf[:n])
	}
}

// openBelow opens a file in a directory, however long its path, without following anything.
func openBelow(root int, path string) (int, error) {
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if !errors.Is(err, unix.ENAMETOOLONG) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fd, err
	}
	at, err := unix.Dup(root)
	for rest := path; err == nil; {
		name, after, more := strings.Cut(rest, "/")
		flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		if more {
			flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		fd, err = unix.Openat(at, name, flags, 0)
		unix.Close(at)
		if !more {
			return fd, err
		}
		at, rest = fd, after
	}
	return -1, err
}

// Pack makes sure that the layer has a tar, and so a diff ID. The tar of a tree has whole seconds where the tree has
// nanoseconds. The layer keeps its ID. Its tree goes when no mount has it any more, where the tar can be mounted instead:
// see droptree.go.
func (s *Store) Pack(ctx context.Context, id ID) (Info, error) {
	if err := s.Ensure(ctx, id); err != nil {
		return Info{}, err
	}
	m, err := s.here(ctx, id)
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
	if !s.treeInUse(id) {
		s.dropTreeSoon(id)
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
	m.Tar, m.verified = true, true
	m.TarSize, m.DiffID, err = writeTar(ctx, s.fs, filepath.Join(tmp, tarFile), items, writeRoot)
	if err != nil {
		return nil, err
	}
	m.Size += m.TarSize
	s.add(m.TarSize)
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
	m.Content = packed.Digest() // another than old's if the index was of another version
	if err := s.writeFile(filepath.Join(tmp, indexFile), packed.Encode(), true); err != nil {
		return nil, err
	}
	if err := s.writeMeta(filepath.Join(tmp, infoFile), &m, true); err != nil {
		return nil, err
	}
	// The info last: only it says that there is a tar.
	for _, name := range []string{tarFile, indexFile, infoFile} {
		if err := s.fs.Rename(filepath.Join(tmp, name), s.path(old.ID, name)); err != nil {
			return nil, err
		}
	}
	if err := s.fs.Sync(s.path(old.ID, "")); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.metas[m.ID] = &m
	s.mu.Unlock()
	s.indexes.put(m.ID, packed)
	return &m, nil
}

// OpenTar opens the layer's tar and says how long it is. A layer that has none yet is packed first.
func (s *Store) OpenTar(ctx context.Context, id ID) (*os.File, int64, error) {
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
