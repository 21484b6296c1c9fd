// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"

	"github.com/moby/buildkit/client/llb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
	"github.com/seed-68981b69/slipway/solver/source/local"
)

// copyGroup is COPY as a build does it: through the solver, from a directory of the client on this host.
var copyGroup = group{
	name: "copy", heavy: true,
	prepare: func(ctx context.Context, b *bench) error {
		_, err := b.tree()
		return err
	},
	round: func(ctx context.Context, b *bench) error {
		if err := b.floorCopy("copy", "copy-layer"); err != nil {
			return err
		}
		if err := b.syncDisk(); err != nil {
			return err
		}
		w, err := newWorld(ctx, b.path("copy"))
		if err != nil {
			return err
		}
		if err := b.ours("copy", func() error { return w.copyContext(ctx, b.path("tree")) }); err != nil {
			return errors.Join(err, w.Close())
		}
		if err := errors.Join(w.Close(), b.moveAway(b.path("copy")), b.syncDisk()); err != nil {
			return err
		}
		return b.commitDraft(ctx)
	},
}

// world is a store with a solver over it, as the engine puts them together.
type world struct {
	*cache.Store
	solver *solver.Solver
	builds int
}

func newWorld(ctx context.Context, dir string) (*world, error) {
	st, err := cache.Open(ctx, dir)
	if err != nil {
		return nil, err
	}
	newOp := op.New(op.Deps{
		Snapshots: st.Snapshots,
		Layers:    st.Layers,
		Sources:   map[string]op.SourceFunc{local.Scheme: local.New(local.Deps{Layers: st.Layers})},
		CacheDir:  filepath.Join(dir, "mounts"),
		TempDir:   filepath.Join(dir, "tmp"),
	})
	return &world{Store: st, solver: solver.New(solver.Options{
		Layers: st.Layers, Records: st.Records, Blobs: st.Blobs, NewOp: newOp,
	})}, nil
}

// copyContext builds "FROM scratch; COPY . /" with dir as the context.
func (w *world) copyContext(ctx context.Context, dir string) error {
	state := llb.Scratch().File(llb.Copy(llb.Local("context"), "/", "/", &llb.CopyInfo{CopyDirContentsOnly: true}))
	def, err := state.Marshal(ctx)
	if err != nil {
		return err
	}
	w.builds++
	build := w.solver.NewBuild(solver.BuildOptions{ID: strconv.Itoa(w.builds), Session: session{dir}})
	defer build.Close()
	edge, err := build.Load(def.ToPB())
	if err != nil {
		return err
	}
	snap, err := build.Result(ctx, edge)
	if err != nil {
		return err
	}
	if len(snap) != 1 {
		return fmt.Errorf("COPY made %d layers", len(snap))
	}
	return nil
}

// session is a client on this host with one directory.
type session struct{ dir string }

func (s session) Local(context.Context, solver.LocalRequest) (solver.LocalDir, error) {
	return solver.LocalDir{Path: s.dir}, nil
}

func (session) Secret(context.Context, string) ([]byte, error) { return nil, solver.ErrNotFound }

func (session) SSHAgent(context.Context, string) (string, func(), error) {
	return "", nil, solver.ErrNotFound
}

func (session) Credentials(context.Context, string) (string, string, error) { return "", "", nil }

// commitDraft writes the tree as a layer, with the digests known.
func (b *bench) commitDraft(ctx context.Context) error {
	root := b.path("tree")
	store, err := layer.Open(b.path("draft"), layer.Options{})
	if err != nil {
		return err
	}
	draft := store.NewDraft(nil)
	for _, f := range treeFiles(b.seed) {
		full := filepath.Join(root, f.path)
		raw, err := os.ReadFile(full)
		if err != nil {
			return err
		}
		draft.Put(index.Entry{
			Path: f.path, Type: index.File, Mode: 0o644, Size: int64(f.size), ModTime: inputTime.UnixNano(),
			Digest: digest.FromBytes(raw), Offset: -1,
		}, func() (io.ReadCloser, error) { return os.Open(full) })
	}
	if err := b.syncDisk(); err != nil {
		return err
	}
	var id layer.ID
	err = b.ours("copy-layer", func() (err error) {
		id, err = draft.Commit(ctx)
		return err
	})
	if err == nil {
		_, err = store.Stat(ctx, id)
	}
	return errors.Join(err, store.Close(), b.moveAway(b.path("draft")))
}

// floorCopy reads and hashes all files in parallel and writes their bytes to one file.
func (b *bench) floorCopy(rows ...string) error {
	root := b.path("tree")
	files := treeFiles(b.seed)
	out := b.path("floor-copy")
	took, cpu, err := timed(func() error { return readAndWrite(root, files, out) })
	if err != nil {
		return err
	}
	for _, row := range rows {
		s := b.of(row)
		s.floor, s.floorCPU = append(s.floor, took), append(s.floorCPU, cpu)
	}
	return b.moveAway(out)
}

func readAndWrite(root string, files []inputFile, out string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	const block = 1 << 20
	workers := runtime.GOMAXPROCS(0)
	blocks := make(chan []byte, 2*workers)
	free := make(chan []byte, 4*workers)
	for range cap(free) {
		free <- make([]byte, 0, block)
	}
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			buf := <-free
			for i := w; i < len(files) && errs[w] == nil; i += workers {
				if len(buf)+files[i].size > cap(buf) {
					blocks <- buf
					buf = <-free
				}
				n := len(buf)
				buf = buf[:n+files[i].size]
				errs[w] = readWhole(dir, files[i].path, buf[n:])
				sha256.Sum256(buf[n:])
			}
			blocks <- buf
		})
	}
	written := make(chan error, 1)
	go func() {
		var werr error
		for b := range blocks {
			if werr == nil {
				_, werr = f.Write(b)
			}
			free <- b[:0]
		}
		written <- werr
	}()
	wg.Wait()
	close(blocks)
	return errors.Join(append(errs, <-written, f.Sync())...)
}

// readWhole fills buf from a file, with as few system calls as possible.
func readWhole(dir int, path string, buf []byte) error {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for len(buf) > 0 {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		buf = buf[n:]
	}
	return nil
}

// contextGroup is a build whose context has not changed, by an engine that has seen it.
var contextGroup = group{
	name: "context",
	prepare: func(ctx context.Context, b *bench) error {
		if _, err := b.tree(); err != nil {
			return err
		}
		w, err := newWorld(ctx, b.path("context"))
		if err != nil {
			return err
		}
		b.context = w
		return w.copyContext(ctx, b.path("tree"))
	},
	round: func(ctx context.Context, b *bench) error {
		err := b.floor("context", func() error {
			n, err := walk(b.path("tree"))
			if err == nil && n < treeDirs*treeFilesPerDir {
				err = fmt.Errorf("the walk found %d entries", n)
			}
			return err
		})
		if err != nil {
			return err
		}
		return b.ours("context", func() error { return b.context.copyContext(ctx, b.path("tree")) })
	},
	finish: func(b *bench) error { return closeAll(nil, b.context) },
}

// walk stats everything below dir and returns how many entries that is.
func walk(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 64<<10)
	return walkDir(fd, buf)
}

func walkDir(fd int, buf []byte) (total int, err error) {
	defer unix.Close(fd)
	var names []string
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return 0, err
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return 0, err
		}
		total++
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		n, err := walkDir(sub, buf)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
