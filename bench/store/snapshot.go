// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

const mountLayers = 30

// stack is a layer store with a snapshot of several layers.
type stack struct {
	layers    *layer.Store
	snapshots *snapshot.Store
	snap      snapshot.Snapshot
	dirs      []string // where the layers are mounted, lowest first
}

func newStack(ctx context.Context, dir string, n int) (*stack, error) {
	s := &stack{}
	var err error
	if s.layers, err = layer.Open(filepath.Join(dir, "layers"), layer.Options{}); err != nil {
		return nil, err
	}
	if s.snapshots, err = snapshot.Open(filepath.Join(dir, "snapshots"), s.layers); err != nil {
		return nil, errors.Join(err, s.layers.Close())
	}
	for i := range n {
		draft := s.layers.NewDraft(nil)
		for j := range 100 {
			draft.Put(index.Entry{Path: fmt.Sprintf("opt/dir%02d/layer%02d-%02d", j%10, i, j), Type: index.File, Mode: 0o644, Offset: -1}, nil)
		}
		id, err := draft.Commit(ctx)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		at, err := s.layers.Mount(ctx, id)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.snap = append(s.snap, id)
		s.dirs = append(s.dirs, at)
	}
	return s, nil
}

func (s *stack) Close() error {
	s.snapshots.Close()
	return s.layers.Close()
}

// mountGroup mounts and releases, as every step does. One step before has warmed up what is warm in a build.
var mountGroup = group{
	name: "mount",
	prepare: func(ctx context.Context, b *bench) (err error) {
		if b.stack, err = newStack(ctx, b.path("mount"), mountLayers); err != nil {
			return err
		}
		m, err := b.stack.snapshots.Mount(ctx, b.stack.snap, snapshot.MountOptions{Writable: true})
		if err != nil {
			return err
		}
		return m.Release()
	},
	round: func(ctx context.Context, b *bench) error {
		for i := range 4 { // a round is cheap
			if err := b.mountOnce(ctx, i); err != nil {
				return err
			}
		}
		return nil
	},
	finish: func(b *bench) error { return b.stack.Close() },
}

func (b *bench) mountOnce(ctx context.Context, i int) error {
	target := b.path("mount", "floor")
	dir := b.path("mount", fmt.Sprintf("floor-%d-%d", len(b.of("mount").floor), i))
	if err := os.MkdirAll(target, 0o700); err != nil {
		return err
	}
	err := b.floor("mount", func() error {
		for _, d := range []string{dir, dir + "/upper", dir + "/work"} {
			if err := unix.Mkdir(d, 0o755); err != nil {
				return err
			}
		}
		return bareOverlay(b.stack.dirs, dir+"/upper", dir+"/work", target)
	})
	if err != nil {
		return err
	}
	err = b.floor("unmount", func() error { return unix.Unmount(target, unix.MNT_DETACH) })
	if err != nil {
		return err
	}
	var m *snapshot.Mount
	err = b.ours("mount", func() (err error) {
		m, err = b.stack.snapshots.Mount(ctx, b.stack.snap, snapshot.MountOptions{Writable: true})
		return err
	})
	if err != nil {
		return err
	}
	return b.ours("unmount", m.Release)
}

// bareOverlay mounts an overlay with nothing around it.
func bareOverlay(lowers []string, upper, work, target string) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fsfd)
	for i := len(lowers) - 1; i >= 0; i-- {
		if err := unix.FsconfigSetString(fsfd, "lowerdir+", lowers[i]); err != nil {
			return err
		}
	}
	for _, kv := range [][2]string{{"upperdir", upper}, {"workdir", work}} {
		if err := unix.FsconfigSetString(fsfd, kv[0], kv[1]); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetFlag(fsfd, "volatile"); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return err
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(mfd)
	return unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

var commitSizes = []int{10, 1000, 20_000}

// commitGroup makes layers of what steps have written.
var commitGroup = group{
	name: "commit",
	prepare: func(ctx context.Context, b *bench) (err error) {
		b.stack, err = newStack(ctx, b.path("commit"), 1)
		return err
	},
	round: func(ctx context.Context, b *bench) error {
		for _, n := range commitSizes {
			row := fmt.Sprint("commit-", n)
			plain := b.path("commit", fmt.Sprintf("plain-%d-%d", n, len(b.of(row).floor)))
			if err := writeFiles(plain, n); err != nil {
				return err
			}
			m, err := b.stack.snapshots.Mount(ctx, b.stack.snap, snapshot.MountOptions{Writable: true})
			if err != nil {
				return err
			}
			if err := writeFiles(filepath.Join(m.Path(), "work"), n); err != nil {
				return errors.Join(err, m.Release())
			}
			if err := b.floor(row, func() error { return hashAndRename(plain, plain+".done") }); err != nil {
				return errors.Join(err, m.Release())
			}
			var after snapshot.Snapshot
			err = b.ours(row, func() (err error) {
				after, err = m.Commit(ctx)
				return err
			})
			if err != nil {
				return err
			}
			// A large tree gets its index after that; a record of it has to wait.
			indexed := b.of(row + "-indexed")
			indexed.floor = slices.Clone(b.of(row).floor)
			start := time.Now()
			if err := b.stack.layers.Ensure(ctx, after...); err != nil {
				return err
			}
			commits := b.of(row).ours
			indexed.ours = append(indexed.ours, commits[len(commits)-1]+time.Since(start))
			if len(after) != len(b.stack.snap)+1 {
				return fmt.Errorf("commit made %d layers of %d", len(after), len(b.stack.snap))
			}
		}
		return nil
	},
	finish: func(b *bench) error { return b.stack.Close() },
}

// writeFiles writes n files of 2 KB, a hundred in a directory.
func writeFiles(dir string, n int) error {
	content := []byte(strings.Repeat("what a step writes\n", 108))
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprintf("d%03d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(fmt.Sprintf("%s/f%02d", sub, i%100), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func hashAndRename(dir, to string) error {
	buf := make([]byte, 64<<10)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		for {
			n, err := f.Read(buf)
			h.Write(buf[:n])
			if n == 0 || err != nil {
				h.Sum(nil)
				return nil
			}
		}
	})
	if err != nil {
		return err
	}
	return os.Rename(dir, to)
}
