// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// A scan lists a directory and reads what has changed in it since earlier scans. Its work is a stack of tasks, one for
// each directory and for each handful of files to read, which a few workers take from. What is open at a time is one
// directory or file for each worker: every path is opened from the root, by the kernel's own rule that nothing in it
// is a symlink and that it stays below the root, whatever happens to the directory meanwhile.
//
// When a directory is found to be just as the scan before has found it, its tree is that of the scan before: the
// usual case makes nothing new at all.
type scan struct {
	root     *root
	patterns patterns
	now      func() time.Time
	// progress is told now and then how many bytes were read.
	progress func(int64)

	started     time.Time
	read, shown atomic.Int64
	failed      atomic.Bool

	mu     sync.Mutex // guards what follows
	ready  *sync.Cond
	tasks  []func(*worker) error
	active int // tasks under way
	idle   int // workers that wait for one
	err    error

	workers int
	running sync.WaitGroup
}

// maxWorkers is how many workers a large directory gets. More than there are processors: they wait for the disk as well.
var maxWorkers = max(4, 2*runtime.GOMAXPROCS(0))

// racyMargin is how much older than its reading a file's last change must be. A change right after the reading may
// carry the same time, as file systems' clocks are coarse (4 ms on ext4; 2 s on the worst).
const racyMargin = 2 * time.Second

// ChangedError is a file that was written to while it was being read.
type ChangedError struct{ Path string }

func (e *ChangedError) Error() string {
	return fmt.Sprintf("changed while it was being copied: %s; run the build again", e.Path)
}

// directory is one directory in a scan.
type directory struct {
	path  string
	above verdict // of the directory itself: what the patterns say about it
	// old is what the scan before with the same patterns has found here, and others what those with other patterns
	// have; nil when they have been elsewhere.
	old    *tree
	others []*tree
	state  nodeState
	// node is this directory's own, when it belongs to this scan and its attributes have to be read.
	node *node

	found *tree // old if nothing is different in the directory itself
	kids  []kid
}

type kid struct {
	at  int // its node in found
	dir *directory
}

// run scans the root and returns its tree, and whether it makes another layer than old.
func (s *scan) run(ctx context.Context, old *tree, others []*tree) (_ *tree, changed bool, err error) {
	if ctx.Err() != nil { // a small directory could be done before anybody looks
		return nil, false, context.Cause(ctx)
	}
	s.started = s.now()
	s.ready = sync.NewCond(&s.mu)
	top := &directory{old: old, others: others}
	s.push(func(w *worker) error { return w.list(top) })
	stop := context.AfterFunc(ctx, func() { s.fail(context.Cause(ctx)) })
	defer stop()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, false, s.err
	}
	t, changed := top.finish()
	return t, changed, nil
}

// finish puts the trees of a directory and of those below it together.
func (d *directory) finish() (t *tree, changed bool) {
	t = d.found
	if t != d.old {
		changed = !sameEntries(t.list(), d.old.list())
	}
	for _, k := range d.kids {
		below, other := k.dir.finish()
		changed = changed || other
		if below == t.nodes[k.at].below {
			continue
		}
		if t == d.old {
			t = &tree{nodes: slices.Clone(t.nodes)}
		}
		t.nodes[k.at].below = below
	}
	return t, changed
}

func (t *tree) list() []node {
	if t == nil {
		return nil
	}
	return t.nodes
}

// push adds tasks, and workers as far as there are too few.
func (s *scan) push(tasks ...func(*worker) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks = append(s.tasks, tasks...)
	for range min(len(tasks), s.idle) {
		s.ready.Signal()
	}
	for n := len(s.tasks) - s.idle; n > 0 && s.workers < maxWorkers && s.err == nil; n-- {
		s.workers++
		s.running.Go(func() { (&worker{scan: s}).work() })
	}
}

// fail ends the scan: no task is begun any more.
func (s *scan) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	s.failed.Store(true)
	s.ready.Broadcast()
}

// worker does one task after the other.
type worker struct {
	*scan
	filter *filter
	buf    []byte // for names or bytes of files
	names  []byte // of the directory at hand, each with a NUL byte
	found  []found
	hash   hash.Hash
}

// workers' buffers, which scans of small directories would spend most of their time to clear.
var buffers = sync.Pool{New: func() any { return new([128 << 10]byte) }}

func (w *worker) work() {
	s := w.scan
	buf := buffers.Get().(*[128 << 10]byte)
	defer buffers.Put(buf)
	w.buf = buf[:]
	var err error
	if w.filter, err = s.patterns.filter(); err != nil {
		s.fail(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for len(s.tasks) == 0 && s.active > 0 && s.err == nil {
			s.idle++
			s.ready.Wait()
			s.idle--
		}
		if len(s.tasks) == 0 || s.err != nil {
			return
		}
		task := s.tasks[len(s.tasks)-1]
		s.tasks[len(s.tasks)-1] = nil
		s.tasks = s.tasks[:len(s.tasks)-1]
		s.active++
		s.mu.Unlock()
		err := task(w)
		s.mu.Lock()
		s.active--
		if err != nil && s.err == nil {
			s.err = err
		}
		if s.err != nil || s.active == 0 && len(s.tasks) == 0 {
			s.ready.Broadcast()
		}
	}
}

// found is a name in the directory at hand.
type found struct {
	name    string // its bytes are the worker's: they do not outlive the task
	unknown bool   // the directory does not say what it is
	isDir   bool
	typ     index.Type
	state   nodeState
	self    verdict
	stat    stat
	old     *node // what is known of it, when that still holds
}

// list reads a directory.
func (w *worker) list(d *directory) error {
	fd, err := w.root.open(d.path, unix.O_DIRECTORY)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			d.found = &tree{} // it was there a moment ago
			return nil
		}
		if errors.Is(err, unix.EACCES) && d.state == way {
			d.found = &tree{}
			return nil
		}
		return err
	}
	defer unix.Close(fd)
	if d.node != nil {
		if d.node.xattrs, err = fileXattrs(fd); err != nil {
			return &os.PathError{Op: "read attributes", Path: w.root.abs(d.path), Err: err}
		}
	}
	if err := w.readNames(fd, d); err != nil {
		return &os.PathError{Op: "read directory", Path: w.root.abs(d.path), Err: err}
	}
	same, err := w.look(fd, d)
	if err != nil {
		return err
	}
	if same {
		d.found = d.old
		w.descend(d, nil)
		return nil
	}
	t := &tree{nodes: make([]node, len(w.found))}
	for i := range w.found {
		f, n := &w.found[i], &t.nodes[i]
		if f.old != nil {
			*n = *f.old
			n.state = f.state
			n.below = nil
			continue
		}
		*n = node{name: strings.Clone(f.name), state: f.state, typ: f.typ, stat: f.stat, sure: w.sure(&f.stat, w.started)}
		if f.state != left && f.typ != index.File && f.typ != index.Dir {
			if err := w.readSpecial(fd, d, n); err != nil {
				return err
			}
		}
	}
	d.found = t
	w.descend(d, t)
	w.readFiles(d, t)
	return nil
}

// readNames fills w.found with the names in a directory, in order.
func (w *worker) readNames(fd int, d *directory) error {
	w.names, w.found = w.names[:0], w.found[:0]
	for {
		n, err := unix.Getdents(fd, w.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		for b := w.buf[:n]; len(b) > 0; {
			// struct linux_dirent64: inode, offset, record length, type, name.
			reclen := int(binary.NativeEndian.Uint16(b[16:]))
			kind, raw := b[18], b[19:reclen]
			b = b[reclen:]
			end := 0
			for raw[end] != 0 {
				end++
			}
			if raw = raw[:end]; string(raw) == "." || string(raw) == ".." {
				continue
			}
			f := found{}
			switch kind {
			case unix.DT_DIR:
				f.isDir, f.typ = true, index.Dir
			case unix.DT_REG:
				f.typ = index.File
			case unix.DT_LNK:
				f.typ = index.Symlink
			case unix.DT_FIFO:
				f.typ = index.Fifo
			case unix.DT_UNKNOWN:
				f.unknown = true
			}
			if len(w.names)+len(raw) > cap(w.names) {
				// The names found so far keep the old memory.
				w.names = make([]byte, 0, max(64<<10, 2*cap(w.names)))
			}
			from := len(w.names)
			w.names = append(w.names, raw...)
			f.name = unsafe.String(unsafe.SliceData(w.names[from:]), len(raw))
			w.found = append(w.found, f)
		}
	}
	slices.SortFunc(w.found, func(a, b found) int { return strings.Compare(a.name, b.name) })
	return nil
}

// look finds out about every name in w.found, and whether all is as it was: then there is nothing to read here.
func (w *worker) look(fd int, d *directory) (same bool, err error) {
	old := d.old.list()
	same = d.old != nil
	j, kept := 0, 0
	prefix := ""
	if d.path != "" {
		prefix = d.path + "/"
	}
	for i := range w.found {
		f := &w.found[i]
		for j < len(old) && old[j].name < f.name {
			j++
			same = false
		}
		var before *node
		if j < len(old) && old[j].name == f.name {
			before = &old[j]
			j++
		}
		if f.unknown {
			if ok, err := w.stat(fd, d, f); err != nil {
				return false, err
			} else if !ok {
				same = same && before == nil
				continue
			}
			f.isDir = f.typ == index.Dir
		}
		switch {
		case f.typ == 0: // a socket or a device: no context has them
			f.state = left
		case before != nil && !f.isDir && before.typ != index.Dir && before.typ != 0:
			f.state = before.state // the patterns are the same
		default:
			in, pruned, self, err := w.filter.match(prefix+f.name, f.isDir, d.above)
			if err != nil {
				return false, err
			}
			f.self = self
			switch {
			case in:
				f.state = taken
			case f.isDir && !pruned:
				f.state = way
			}
		}
		if f.state == left {
			if before != nil && before.state == left && before.typ == f.typ {
				f.old = before
			}
		} else {
			if !f.unknown {
				was := f.typ
				if ok, err := w.stat(fd, d, f); err != nil {
					return false, err
				} else if !ok {
					same = same && before == nil
					continue
				}
				if f.typ != was {
					return false, &ChangedError{prefix + f.name}
				}
			}
			switch {
			case before != nil && before.state == f.state && before.typ == f.typ && before.stat == f.stat && before.sure:
				f.old = before
			default:
				for _, o := range d.others {
					n := o.find(f.name)
					if n != nil && n.state != left && n.typ == f.typ && n.stat == f.stat && n.sure {
						f.old = n
						break
					}
				}
			}
		}
		same = same && f.old != nil && f.old == before
		w.found[kept] = *f
		kept++
	}
	clear(w.found[kept:])
	w.found = w.found[:kept]
	return same && j == len(old), nil
}

// stat asks about a name; ok says that it is (still) there.
func (w *worker) stat(fd int, d *directory, f *found) (ok bool, err error) {
	var st unix.Stat_t
	for {
		err = unix.Fstatat(fd, f.name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			break
		}
	}
	switch {
	case err == unix.ENOENT:
		return false, nil
	case err != nil:
		return false, &os.PathError{Op: "stat", Path: w.root.abs(index.Join(d.path, f.name)), Err: err}
	}
	f.stat, f.typ = statOf(&st), typeOf(uint32(st.Mode))
	return true, nil
}

func statOf(st *unix.Stat_t) stat {
	return stat{
		dev: uint64(st.Dev), ino: st.Ino, mode: uint32(st.Mode), nlink: uint32(st.Nlink),
		size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(),
	}
}

// typeOf is the type of an entry; 0 of what a context does not have.
func typeOf(mode uint32) index.Type {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return index.Dir
	case unix.S_IFREG:
		return index.File
	case unix.S_IFLNK:
		return index.Symlink
	case unix.S_IFIFO:
		return index.Fifo
	}
	return 0
}

// sure says whether what is read at a time holds as long as the file's stat says the same.
func (s *scan) sure(st *stat, read time.Time) bool {
	return max(st.mtime, st.ctime) <= read.Add(-racyMargin).UnixNano()
}

// writable says that somebody has a file open for writing, or mapped: a mapping's first write to a page changes the file's times, and
// those that follow do not, until the page has been on disk. So what is read of such a file may be old though its times say
// nothing. Nobody gets a read lease of it, which is given back at once. Where there are no leases nobody knows.
func writable(fd int) bool {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return err == unix.EAGAIN
	}
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	return false
}

// descend has the directories below d scanned. t has their nodes when they are new.
func (w *worker) descend(d *directory, t *tree) {
	var tasks []func(*worker) error
	for i := range w.found {
		f := &w.found[i]
		if f.typ != index.Dir || f.state == left {
			continue
		}
		name := d.found.nodes[i].name
		sub := &directory{path: index.Join(d.path, name), state: f.state, above: f.self, others: make([]*tree, 0, len(d.others))}
		if n := d.old.find(name); n != nil {
			sub.old = n.below
		}
		for _, o := range d.others {
			if n := o.find(name); n != nil && n.below != nil {
				sub.others = append(sub.others, n.below)
			}
		}
		if t != nil && f.old == nil {
			sub.node = &t.nodes[i]
		}
		d.kids = append(d.kids, kid{i, sub})
		tasks = append(tasks, func(w *worker) error { return w.list(sub) })
	}
	if len(tasks) > 0 {
		slices.Reverse(tasks) // the first on top of the stack
		w.push(tasks...)
	}
}

// readFiles has the files of d read whose bytes are not known, a handful at a time.
func (w *worker) readFiles(d *directory, t *tree) {
	const handful, handfulBytes = 32, 1 << 20
	var batch []*node
	var bytes int64
	flush := func() {
		if nodes := batch; len(nodes) > 0 {
			w.push(func(w *worker) error { return w.readAll(d, nodes) })
		}
		batch, bytes = nil, 0
	}
	for i := range w.found {
		if n := &t.nodes[i]; w.found[i].old == nil && n.typ == index.File && n.state == taken {
			batch = append(batch, n)
			if bytes += n.stat.size; len(batch) >= handful || bytes >= handfulBytes {
				flush()
			}
		}
	}
	flush()
}

func (w *worker) readAll(d *directory, nodes []*node) error {
	for _, n := range nodes {
		if err := w.readFile(index.Join(d.path, n.name), n); err != nil {
			return err
		}
		total := w.read.Add(n.stat.size)
		if last := w.shown.Load(); total-last >= 16<<20 && w.shown.CompareAndSwap(last, total) {
			w.progress(total)
		}
	}
	return nil
}

// readFile fills in what a file holds. A file that has changed since it was listed is taken as it is now.
func (w *worker) readFile(path string, n *node) error {
	fd, err := w.root.open(path, unix.O_NONBLOCK)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return &ChangedError{path}
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	before := n.stat
	for range 3 {
		now := w.now()
		sure := w.sure(&before, now) && !writable(fd)
		d, size, err := w.digest(fd, before.size)
		if err != nil {
			return &os.PathError{Op: "read", Path: w.root.abs(path), Err: err}
		}
		if n.xattrs, err = fileXattrs(fd); err != nil {
			return &os.PathError{Op: "read attributes", Path: w.root.abs(path), Err: err}
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return &os.PathError{Op: "stat", Path: w.root.abs(path), Err: err}
		}
		after := statOf(&st)
		if typeOf(after.mode) != index.File {
			return &ChangedError{path}
		}
		if after == before && size == after.size {
			n.stat, n.digest, n.sure = after, d, sure
			return nil
		}
		before = after
		if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
			return &os.PathError{Op: "seek", Path: w.root.abs(path), Err: err}
		}
	}
	return &ChangedError{path}
}

// digest hashes a file to its end, or as far as expected: the caller sees by its stat whether that is the end.
func (w *worker) digest(fd int, expected int64) (digest.Digest, int64, error) {
	if w.hash == nil {
		w.hash = sha256.New()
	}
	w.hash.Reset()
	var size int64
	for size < expected || expected == 0 {
		n, err := unix.Read(fd, w.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", 0, err
		}
		if n == 0 {
			break
		}
		size += int64(n)
		w.hash.Write(w.buf[:n])
		if w.failed.Load() { // in the middle of a large file
			return "", 0, errors.New("the scan has failed elsewhere")
		}
	}
	var sum [sha256.Size]byte
	text := [7 + 2*sha256.Size]byte{'s', 'h', 'a', '2', '5', '6', ':'}
	hex.Encode(text[7:], w.hash.Sum(sum[:0]))
	return digest.Digest(text[:]), size, nil
}

// readSpecial fills in what a node has that is neither file nor directory. Its directory is open as fd.
func (w *worker) readSpecial(fd int, d *directory, n *node) (err error) {
	if n.typ == index.Symlink {
		if n.target, err = readlink(fd, n.name); err != nil {
			return &os.PathError{Op: "readlink", Path: w.root.abs(index.Join(d.path, n.name)), Err: err}
		}
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", fd, n.name)
	n.xattrs, err = xattrs(
		func(b []byte) (int, error) { return unix.Llistxattr(at, b) },
		func(name string, b []byte) (int, error) { return unix.Lgetxattr(at, name, b) },
	)
	if err != nil {
		return &os.PathError{Op: "read attributes", Path: w.root.abs(index.Join(d.path, n.name)), Err: err}
	}
	return nil
}

func readlink(fd int, name string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, name, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

func fileXattrs(fd int) (map[string]string, error) {
	return xattrs(
		func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) },
	)
}

// xattrs returns the extended attributes that belong to the file and not to this host's file systems.
func xattrs(list func([]byte) (int, error), get func(string, []byte) (int, error)) (map[string]string, error) {
	var small [512]byte
	names, err := sized(small[:], list)
	if err == unix.ENOTSUP || err == unix.EPERM || err == unix.ENOENT {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		switch {
		case name == "", name == "security.selinux", strings.HasPrefix(name, "trusted.overlay."),
			strings.HasPrefix(name, "user.overlay."), strings.HasPrefix(name, "com.apple."):
			continue
		}
		var small [512]byte
		value, err := sized(small[:], func(b []byte) (int, error) { return get(name, b) })
		if err != nil {
			continue // gone, or not for us to read: as if it were not there
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = string(value)
	}
	return out, nil
}

// sized calls read with a buffer that is large enough.
func sized(b []byte, read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(b)
		if err != unix.ERANGE {
			return b[:max(n, 0)], err
		}
		if n, err = read(nil); err != nil {
			return nil, err
		}
		b = make([]byte, n+64)
	}
}

// root is a directory that is kept open: paths are resolved inside it and without following symlinks.
type root struct {
	path string
	dir  *os.File
	fd   int // of dir: to ask dir for it is a system call
}

func openRoot(path string) (*root, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &root{path, d, int(d.Fd())}, nil
}

func (r *root) abs(path string) string { return filepath.Join(r.path, path) }

func (r *root) open(path string, flags uint64) (int, error) {
	if path == "" {
		path = "."
	}
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err := unix.Openat2(r.fd, path, &how)
		runtime.KeepAlive(r)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: a rename somewhere in the tree got in between
			continue
		}
		return -1, &os.PathError{Op: "open", Path: r.abs(path), Err: err}
	}
}

// opener returns a function that opens files for those who read the layer that t makes.
func (r *root) opener(t *tree) func(path string) (io.ReadCloser, error) {
	return func(path string) (io.ReadCloser, error) {
		fd, err := r.open(path, unix.O_NONBLOCK)
		if err != nil {
			return nil, err
		}
		return &file{fd: fd, root: r, path: path, node: t.lookup(path)}, nil
	}
}

// file is a regular file that is read from start to end. An os.File would try to have it polled first. It implements
// layer.Hashed.
type file struct {
	fd   int
	root *root
	path string
	node *node // what the scan has found there
}

func (f *file) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(f.fd, b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, &os.PathError{Op: "read", Path: f.root.abs(f.path), Err: err}
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Digest returns the digest of the file's bytes if its stat is that of the scan, and was old enough then to tell.
func (f *file) Digest() (digest.Digest, bool) {
	if f.node == nil || f.node.typ != index.File || !f.node.sure {
		return "", false
	}
	var st unix.Stat_t
	if unix.Fstat(f.fd, &st) != nil || statOf(&st) != f.node.stat {
		return "", false
	}
	return f.node.digest, true
}

func (f *file) Close() error { return unix.Close(f.fd) }
