// SPDX-License-Identifier: Apache-2.0

// Package local is the source of a client's directories: the build context above all. When the engine may read the
// directory itself nothing is copied: the directory is walked, files are hashed, and what comes out is a layer that
// exists as an index only and opens the client's files when their bytes are needed. A file that changes between
// being hashed and being used fails the build.
package local

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Scheme is the scheme of the identifiers: local://NAME.
const Scheme = "local"

// Deps is what the source works with.
type Deps struct {
	Layers *layer.Store
}

// New returns the function that makes sources of vertices. The sources share what they remember about files.
func New(deps Deps) func(*solver.Vertex) (solver.Source, error) {
	known := &hashes{}
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		name, ok := strings.CutPrefix(op.GetIdentifier(), Scheme+"://")
		if !ok || name == "" {
			return nil, fmt.Errorf("local source %q has no name", op.GetIdentifier())
		}
		s := &source{deps: deps, known: known, req: solver.LocalRequest{Name: name}}
		for key, value := range op.Attrs {
			if err := s.attr(key, value); err != nil {
				return nil, fmt.Errorf("source %s: attribute %s: %w", op.Identifier, key, err)
			}
		}
		return s, nil
	}
}

type source struct {
	deps  Deps
	known *hashes
	req   solver.LocalRequest
}

func (s *source) attr(key, value string) error {
	list := func(to *[]string) error { return json.Unmarshal([]byte(value), to) }
	switch key {
	case pb.AttrIncludePatterns:
		return list(&s.req.IncludePatterns)
	case pb.AttrExcludePatterns:
		return list(&s.req.ExcludePatterns)
	case pb.AttrFollowPaths:
		return list(&s.req.FollowPaths)
	case pb.AttrSharedKeyHint:
		s.req.SharedKey = value
	case pb.AttrLocalUniqueID:
		// Its only effect is another digest of the vertex.
	case pb.AttrLocalSessionID:
		// A build has one session here. "PREFIX:ID" renames the directory, as in BuildKit.
		if prefix, _, ok := strings.Cut(value, ":"); ok {
			s.req.Name = prefix + "-" + s.req.Name
		}
	case pb.AttrLocalDiffer:
		// How a transfer finds out what the engine has already. Everything is compared by content here, which is
		// right for both.
		if value != "" && value != pb.AttrLocalDifferMetadata && value != pb.AttrLocalDifferNone {
			return fmt.Errorf("not supported yet: %s", value)
		}
	case pb.AttrMetadataTransfer:
		only, err := strconv.ParseBool(value)
		if err != nil {
			return err
		}
		if only {
			return fmt.Errorf("not supported yet: %s", value)
		}
	case pb.AttrMetadataTransferExclude:
		var exceptions []string
		if err := list(&exceptions); err != nil {
			return err
		}
		if len(exceptions) > 0 {
			return fmt.Errorf("not supported yet: %s", value)
		}
	default:
		return fmt.Errorf("not supported yet: %s", value)
	}
	return nil
}

// Parts names the directory and what is asked of it.
func (s *source) Parts() []record.Part {
	parts := []record.Part{{Name: "op", Value: "local directory"}, {Name: "name", Value: s.req.Name}}
	for _, l := range []struct {
		name   string
		values []string
	}{{"include", s.req.IncludePatterns}, {"exclude", s.req.ExcludePatterns}, {"follow", s.req.FollowPaths}} {
		for i, v := range l.values {
			parts = append(parts, record.Part{Name: fmt.Sprintf("%s[%d]", l.name, i), Value: v})
		}
	}
	return parts
}

// Pin says that only the content tells what a directory is.
func (s *source) Pin(context.Context, *solver.Env) (solver.Pin, error) {
	return solver.Pin{Parts: s.Parts(), ByContent: true}, nil
}

// InputDigest is never asked: a source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("a local directory has no inputs")
}

// Run reads the directory and returns a snapshot of one held layer, or of none when it is empty.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	if env.Session == nil {
		return nil, fmt.Errorf("directory %q: the build has no client that could give it", s.req.Name)
	}
	dir, err := env.Session.Local(ctx, s.req)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	files, root, err := scan(ctx, dir, s.req)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	status := "transferring " + s.req.Name + ":"
	n, err := root.hash(ctx, files, s.known, func(n int64) { env.Progress.Status(status, n, 0, false) })
	env.Progress.Status(status, n, 0, true)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	draft := s.deps.Layers.NewDraft(nil)
	for i := range files {
		f := &files[i]
		var open func() (io.ReadCloser, error)
		if f.entry.Type == index.File {
			open = func() (io.ReadCloser, error) { return root.open(f.entry.Path) }
		}
		draft.Put(f.entry, open)
	}
	if draft.Empty() {
		return []snapshot.Snapshot{nil}, nil
	}
	id, err := draft.Hold(ctx)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	return []snapshot.Snapshot{{id}}, nil
}

// file is one entry of a directory and, for a regular file, what its stat said.
type file struct {
	entry index.Entry
	id    fileID
}

// scan lists what dir has of what was asked for, in the order of the walk.
func scan(ctx context.Context, dir solver.LocalDir, req solver.LocalRequest) ([]file, *root, error) {
	fs, err := fsutil.NewFS(dir.Path)
	if err != nil {
		return nil, nil, err
	}
	fs = contextFS{fs}
	if !dir.Filtered && len(req.IncludePatterns)+len(req.ExcludePatterns)+len(req.FollowPaths) > 0 {
		fs, err = fsutil.NewFilterFS(fs, &fsutil.FilterOpt{
			IncludePatterns: req.IncludePatterns,
			ExcludePatterns: req.ExcludePatterns,
			FollowPaths:     req.FollowPaths,
		})
		if err != nil {
			return nil, nil, err
		}
	}
	r, err := openRoot(dir.Path)
	if err != nil {
		return nil, nil, err
	}
	var files []file
	first := map[string]string{} // first name of a file, as the walk has it → its first name of those asked for
	err = fs.Walk(ctx, "", func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*types.Stat)
		if !ok {
			return fmt.Errorf("%s: no stat data", path)
		}
		f, err := newFile(filepath.ToSlash(path), st)
		if err != nil {
			return err
		}
		if f.entry.Type == index.File {
			name := f.entry.Path
			if st.Linkname != "" {
				name = filepath.ToSlash(st.Linkname)
			}
			if to, seen := first[name]; seen && st.Linkname != "" {
				f.entry.HardLink = to
			} else {
				first[name] = f.entry.Path
			}
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return files, r, nil
}

// contextFS leaves out what a context does not have: sockets, which fsutil's stat takes for files, and devices.
type contextFS struct{ fsutil.FS }

func (c contextFS) Walk(ctx context.Context, dir string, fn iofs.WalkDirFunc) error {
	return c.FS.Walk(ctx, dir, func(path string, d iofs.DirEntry, err error) error {
		if err == nil && d.Type()&(iofs.ModeSocket|iofs.ModeDevice) != 0 {
			return nil
		}
		return fn(path, d, err)
	})
}

// newFile is the entry for one stat.
func newFile(path string, st *types.Stat) (file, error) {
	mode := os.FileMode(st.Mode)
	e := index.Entry{Path: path, ModTime: st.ModTime, Offset: -1, Mode: uint32(mode.Perm())}
	for _, bit := range []struct {
		mode os.FileMode
		bit  uint32
	}{{os.ModeSetuid, 0o4000}, {os.ModeSetgid, 0o2000}, {os.ModeSticky, 0o1000}} {
		if mode&bit.mode != 0 {
			e.Mode |= bit.bit
		}
	}
	switch {
	case mode.IsDir():
		e.Type = index.Dir
	case mode.IsRegular():
		e.Type = index.File
		e.Size = st.Size
	case mode&os.ModeSymlink != 0:
		e.Type = index.Symlink
		e.Mode = 0o777
		e.Target = st.Linkname
	case mode&os.ModeNamedPipe != 0:
		e.Type = index.Fifo
	default:
		return file{}, fmt.Errorf("%s: unknown type %v", path, mode.Type())
	}
	for k, v := range st.Xattrs {
		if strings.HasPrefix(k, "trusted.overlay.") || strings.HasPrefix(k, "user.overlay.") || k == "security.selinux" {
			continue // about this host's file systems, not about the file
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[k] = string(v)
	}
	return file{entry: e}, nil
}

// root is the directory, kept open: paths are resolved inside it and without following symlinks, whatever happens
// to the directory meanwhile.
type root struct {
	path string
	dir  *os.File
}

func openRoot(path string) (*root, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &root{path, d}, nil
}

func (r *root) open(path string) (*os.File, error) {
	fd, err := unix.Openat2(int(r.dir.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	runtime.KeepAlive(r)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(r.path, path), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(r.path, path)), nil
}

// ChangedError is a file that was written to while it was being read.
type ChangedError struct{ Path string }

func (e *ChangedError) Error() string {
	return fmt.Sprintf("changed while it was being copied: %s; run the build again", e.Path)
}

// hash fills in size, time and digest of all regular files, several at once, and returns how many bytes they have.
func (r *root) hash(ctx context.Context, files []file, known *hashes, progress func(int64)) (int64, error) {
	var next, total, shown atomic.Int64
	eg, ctx := errgroup.WithContext(ctx)
	for range runtime.GOMAXPROCS(0) {
		eg.Go(func() error {
			buf := make([]byte, 128<<10)
			for {
				i := next.Add(1) - 1
				if i >= int64(len(files)) {
					return nil
				}
				f := &files[i]
				if f.entry.Type != index.File {
					continue
				}
				if err := context.Cause(ctx); err != nil {
					return err
				}
				if err := r.hashFile(f, known, buf); err != nil {
					return err
				}
				n := total.Add(f.entry.Size)
				if last := shown.Load(); n-last >= 16<<20 && shown.CompareAndSwap(last, n) {
					progress(n)
				}
			}
		})
	}
	err := eg.Wait()
	if err == nil {
		fixLinks(files)
	}
	return total.Load(), err
}

// fixLinks makes the later names of a file equal to its first, whatever happened between the two.
func fixLinks(files []file) {
	if !slices.ContainsFunc(files, func(f file) bool { return f.entry.HardLink != "" }) {
		return
	}
	byPath := map[string]*file{}
	for i := range files {
		if f := &files[i]; f.entry.Type == index.File && f.entry.HardLink == "" {
			byPath[f.entry.Path] = f
		}
	}
	for i := range files {
		f := &files[i]
		if f.entry.HardLink == "" {
			continue
		}
		if first := byPath[f.entry.HardLink]; first == nil || first.id != f.id {
			f.entry.HardLink = ""
		}
	}
}

func (r *root) hashFile(f *file, known *hashes, buf []byte) error {
	if id, err := r.stat(f.entry.Path); err == nil {
		if d, ok := known.get(id); ok {
			f.set(id, d)
			return nil
		}
	}
	h, err := r.open(f.entry.Path)
	if err != nil {
		return err
	}
	defer h.Close()
	before, err := statFile(h)
	if err != nil {
		return err
	}
	read := time.Now()
	sum := digest.Canonical.Digester()
	n, err := io.CopyBuffer(sum.Hash(), struct{ io.Reader }{h}, buf)
	if err != nil {
		return err
	}
	after, err := statFile(h)
	if err != nil {
		return err
	}
	if after != before || n != before.size {
		return &ChangedError{f.entry.Path}
	}
	f.set(before, sum.Digest())
	known.put(before, read, f.entry.Digest)
	return nil
}

// set describes the file as it was when it was read. The walk was a moment ago: a file that has changed since is
// taken as it is now.
func (f *file) set(id fileID, d digest.Digest) {
	f.id = id
	f.entry.Size, f.entry.ModTime, f.entry.Digest = id.size, id.mtime, d
}

// fileID is what a stat says about the bytes of a file: equal means, unless the file was written to just now, that
// the bytes are equal.
type fileID struct {
	dev, ino           uint64
	size, mtime, ctime int64
}

func statFile(f *os.File) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return idOf(&st, f.Name())
}

// stat is statFile without opening the file. What it says is only good for finding a digest: the bytes are read
// through open.
func (r *root) stat(path string) (fileID, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(r.dir.Fd()), path, &st, unix.AT_SYMLINK_NOFOLLOW)
	runtime.KeepAlive(r)
	if err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: filepath.Join(r.path, path), Err: err}
	}
	return idOf(&st, path)
}

func idOf(st *unix.Stat_t, name string) (fileID, error) {
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileID{}, &ChangedError{name}
	}
	return fileID{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, nil
}

// hashes remembers the digests of files that have not changed since. Safe for concurrent use.
type hashes struct {
	mu sync.Mutex
	m  map[fileID]digest.Digest
}

const (
	// maxHashes bounds the memory: some 150 bytes each.
	maxHashes = 400_000
	// racyMargin is how much older than its reading a file's last change must be. A change right after the reading
	// may carry the same time, as file systems' clocks are coarse (4 ms on ext4; 2 s on the worst).
	racyMargin = 2 * time.Second
)

func (h *hashes) get(id fileID) (digest.Digest, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d, ok := h.m[id]
	return d, ok
}

func (h *hashes) put(id fileID, read time.Time, d digest.Digest) {
	if max(id.mtime, id.ctime) > read.Add(-racyMargin).UnixNano() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.m == nil || len(h.m) >= maxHashes {
		h.m = map[fileID]digest.Digest{}
	}
	h.m[id] = d
}
