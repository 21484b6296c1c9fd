// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/image"
)

// View opens a finished snapshot for reading.
type View func(ctx context.Context, ref exporter.Ref) (layer.Files, error)

// Tree is the files of a result as fsutil has them: paths in their order, hard links after the file that they are links to.
// It needs no mount. It may be used by one export at a time.
type Tree struct {
	fsutil.FS
	parts []*part

	mu  sync.Mutex // guards err
	err error      // the first file that could not be read
}

// part is a directory of one platform's root file system.
type part struct {
	ctx   context.Context // of the export, for Open, which fsutil calls without one
	files layer.Files
	root  string     // clean path in files
	epoch *time.Time // the time of everything; nil leaves the times as they are
}

// NewTree returns the files of r. ctx must live as long as it is used.
func NewTree(ctx context.Context, r exporter.Result, view View, o Options) (*Tree, error) {
	if len(r.Refs) == 0 {
		return nil, errors.New("the build has no result")
	}
	t := &Tree{}
	var dirs []fsutil.Dir
	for _, ref := range r.Refs {
		p, err := newPart(ctx, r, ref, view, o)
		if err != nil {
			return nil, err
		}
		t.parts = append(t.parts, p)
		stat := &types.Stat{Mode: uint32(os.ModeDir | 0o755), Path: PlatformDir(ref.ID)}
		if p.epoch != nil {
			stat.ModTime = p.epoch.UnixNano()
		}
		files, err := attested(ctx, p, ref, o, r.MultiPlatform && !o.split(r))
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, fsutil.Dir{FS: files, Stat: stat})
	}
	if o.split(r) {
		var err error
		t.FS, err = fsutil.SubDirFS(dirs)
		return t, err
	}
	if err := t.merge(r, dirs); err != nil {
		return nil, err
	}
	return t, nil
}

// merge puts all platforms into one directory, which works if no two have the same file.
func (t *Tree) merge(r exporter.Result, dirs []fsutil.Dir) error {
	t.FS = dirs[0].FS
	if len(t.parts) == 1 {
		return nil
	}
	owner := map[string]string{}
	for i, p := range t.parts {
		if i > 0 {
			t.FS = staticfs.NewMergeFS(t.FS, dirs[i].FS)
		}
		err := p.walk(p.root, func(e index.Entry) error {
			name := p.name(e.Path)
			if first, ok := owner[name]; ok && (first != "" || e.Type != index.Dir) {
				return fmt.Errorf("%s is in the results for %s and %s: use platform-split=true", name, first, r.Refs[i].ID)
			}
			if e.Type == index.Dir {
				owner[name] = ""
			} else {
				owner[name] = r.Refs[i].ID
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Open implements fsutil.FS.
func (t *Tree) Open(name string) (io.ReadCloser, error) {
	f, err := t.FS.Open(name)
	if err != nil {
		return nil, t.fail(fmt.Errorf("read %s: %w", name, err))
	}
	return &watched{f, t, name}, nil
}

// Err is why a file could not be read. fsutil sends such a file as an empty one, so who has sent a tree must ask.
func (t *Tree) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

func (t *Tree) fail(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	return err
}

// watched tells the tree about errors.
type watched struct {
	io.ReadCloser
	tree *Tree
	name string
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.ReadCloser.Read(b)
	if err != nil && err != io.EOF {
		err = w.tree.fail(fmt.Errorf("read %s: %w", w.name, err))
	}
	return n, err
}

func newPart(ctx context.Context, r exporter.Result, ref exporter.Ref, view View, o Options) (*part, error) {
	files, err := view(ctx, ref)
	if err != nil {
		return nil, err
	}
	p := &part{ctx: ctx, files: files}
	if p.epoch, err = image.Epoch(r, ref.ID, o.Epoch, o.EpochSet); err != nil {
		return nil, err
	}
	if o.Source == "" {
		return p, nil
	}
	if p.root, err = index.Resolve(files, o.Source, true); err != nil {
		return nil, fmt.Errorf("src=%s: %w", o.Source, err)
	}
	switch e, ok := files.Lookup(p.root); {
	case !ok:
		return nil, fmt.Errorf("src=%s: %w", o.Source, syscall.ENOENT)
	case e.Type != index.Dir:
		return nil, fmt.Errorf("src=%s: %w", o.Source, syscall.ENOTDIR)
	}
	return p, nil
}

// name is a path of files as seen from the part's root.
func (p *part) name(path string) string {
	return strings.TrimPrefix(strings.TrimPrefix(path, p.root), "/")
}

// path is a name seen from the part's root as a path of files.
func (p *part) path(name string) string {
	if name = strings.Trim(path.Clean("/"+name), "/"); name == "" {
		return p.root
	}
	return index.Join(p.root, name)
}

// walk calls fn for everything below start but the root of the part.
func (p *part) walk(start string, fn func(index.Entry) error) error {
	return index.Walk(p.files, start, func(e index.Entry) error {
		if e.Path == p.root {
			return nil
		}
		return fn(e)
	})
}

// Walk implements fsutil.FS.
func (p *part) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	start := p.path(target)
	// The first name of a file in this order is the file, the others are links to it, whichever came first in the layer.
	first := map[string]string{}
	return p.walk(start, func(e index.Entry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name := p.name(e.Path)
		st := stat(e, name)
		if p.epoch != nil {
			st.ModTime = p.epoch.UnixNano()
		}
		if e.Type != index.Dir && e.Type != index.Symlink {
			file := e.Path
			if e.HardLink != "" {
				file = e.HardLink
			}
			if to, ok := first[file]; ok {
				st.Linkname, st.Size = to, 0
			} else {
				first[file] = name
			}
		}
		return fn(name, &fsutil.DirEntryInfo{Stat: st}, nil)
	})
}

// Open implements fsutil.FS.
func (p *part) Open(name string) (io.ReadCloser, error) {
	name = p.path(name)
	f, err := p.files.OpenFile(p.ctx, name)
	if err != nil {
		return nil, err
	}
	e, _ := p.files.Lookup(name)
	return &sized{f, e.Size}, nil
}

// sized fails if a file does not have the size that its entry says.
type sized struct {
	io.ReadCloser
	rest int64
}

func (s *sized) Read(b []byte) (int, error) {
	n, err := s.ReadCloser.Read(b)
	s.rest -= int64(n)
	if s.rest < 0 || err == io.EOF && s.rest != 0 {
		return n, errors.New("the layer is damaged: the file has another size")
	}
	return n, err
}

// stat is an entry as fsutil sends it.
func stat(e index.Entry, name string) *types.Stat {
	mode := os.FileMode(e.Mode & 0o777)
	for _, bit := range []struct {
		unix uint32
		mode os.FileMode
	}{{0o4000, os.ModeSetuid}, {0o2000, os.ModeSetgid}, {0o1000, os.ModeSticky}} {
		if e.Mode&bit.unix != 0 {
			mode |= bit.mode
		}
	}
	st := &types.Stat{Path: name, Uid: e.UID, Gid: e.GID, ModTime: e.ModTime}
	switch e.Type {
	case index.Dir:
		mode |= os.ModeDir
	case index.File:
		st.Size = e.Size
	case index.Symlink:
		mode |= os.ModeSymlink
		st.Linkname, st.Size = e.Target, int64(len(e.Target))
	case index.CharDevice:
		mode |= os.ModeDevice | os.ModeCharDevice
	case index.BlockDevice:
		mode |= os.ModeDevice
	case index.Fifo:
		mode |= os.ModeNamedPipe
	}
	if e.Type == index.CharDevice || e.Type == index.BlockDevice {
		st.Devmajor, st.Devminor = int64(e.Major), int64(e.Minor)
	}
	st.Mode = uint32(mode)
	if len(e.Xattrs) > 0 {
		st.Xattrs = make(map[string][]byte, len(e.Xattrs))
		for name, value := range e.Xattrs {
			st.Xattrs[name] = []byte(value)
		}
	}
	return st
}

// PlatformDir is the directory for a platform's files when platforms are split.
func PlatformDir(id string) string {
	dir := strings.NewReplacer("/", "_", `\`, "_", ":", "_").Replace(id)
	if dir == "." || dir == ".." {
		return strings.Repeat("_", len(dir))
	}
	return dir
}
