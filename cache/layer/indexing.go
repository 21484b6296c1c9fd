// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// To commit a large tree takes as long as to read it, but nobody has to wait for that before the next step can start on
// top of it. So a tree that is not small is renamed into the store as it is, beside an info that says "unfinished", and its
// index is made in the background. Until that is done the layer
//
//   - can be mounted (Mount) and asked for its root directory (Root): nothing else;
//   - is waited for by whoever wants to know more: Stat, Index, Ensure, OpenFile, Pack … return what has gone wrong, too;
//   - is not listed by Walk, so that no collection sees it, and is locked, so that none could delete it. Delete cancels it.
//
// At the end its index and then its real info are renamed over: the info comes last, with its number (durable.go), and
// makes it a layer like any other. An unfinished info that a killed process has left is no layer; RemoveBroken removes it.
// That loses nothing, as Ensure comes before the record or the image that names a layer.

// A tree that holds no more than this is committed at once, because it may turn out to hold no change at all: then there
// is no layer. Reading it costs less than the calls that make a layer.
const (
	smallEntries = 64
	smallBytes   = 256 << 10
)

// indexing is a committed tree whose index is being made.
type indexing struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error // why there will be no index; good once done is closed
}

// errDeleted ends the making of an index.
var errDeleted = errors.New("the layer was deleted")

// isSmall says whether the tree at dir is to be committed at once. Directories alone do not make it large: they may all be
// unchanged.
func isSmall(dir string) (bool, error) {
	count := treeCount{}
	err := count.add(unix.AT_FDCWD, dir)
	if errors.Is(err, fs.SkipAll) {
		return false, nil
	}
	return true, err
}

type treeCount struct {
	entries, changes int
	bytes            int64
}

// add counts what is in a directory. It returns fs.SkipAll when that is certainly not small.
func (c *treeCount) add(at int, name string) error {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	for {
		list, err := dir.ReadDir(smallEntries)
		for _, e := range list {
			c.entries++
			switch {
			case e.IsDir():
				if err := c.add(fd, e.Name()); err != nil {
					return err
				}
			case e.Type().IsRegular():
				var st unix.Stat_t
				if err := unix.Fstatat(fd, e.Name(), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					return &os.PathError{Op: "lstat", Path: e.Name(), Err: err}
				}
				c.bytes += st.Size
				c.changes++
			default:
				c.changes++
			}
			if c.bytes > smallBytes || c.entries > smallEntries && c.changes > 0 {
				return fs.SkipAll
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// commitUnfinished renames upper into the store and starts to make its index.
func (s *Store) commitUnfinished(ctx context.Context, upper string, below Below) (ID, error) {
	tmp, err := s.newTmp()
	if err != nil {
		return "", err
	}
	m := &meta{ID: ID("t" + randomName()), Tree: true, Unfinished: true}
	err = s.writeMeta(filepath.Join(tmp, infoFile), m, false)
	if err == nil {
		err = s.fs.Rename(upper, filepath.Join(tmp, treeDir))
	}
	if err != nil {
		s.removeAll(tmp)
		return "", err
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	p := &indexing{cancel: cancel, done: make(chan struct{})}
	s.use(m.ID)
	unlock := s.locks.lock(m.ID)
	s.mu.Lock()
	s.indexing[m.ID] = p
	s.mu.Unlock()
	if err := s.fs.Rename(tmp, s.path(m.ID, "")); err != nil {
		s.mu.Lock()
		delete(s.indexing, m.ID)
		s.mu.Unlock()
		unlock()
		cancel(err)
		s.removeAll(tmp)
		return "", err
	}
	s.work.Go(func() {
		defer unlock()
		defer close(p.done)
		err := s.finish(ctx, m.ID, below)
		cancel(err)
		if err != nil {
			p.err = fmt.Errorf("index of layer %s: %w", m.ID, err)
			s.log.Debug("layer store: a committed tree gets no index", "layer", m.ID, "err", err)
			s.discardUnfinished(m.ID)
			return // s.indexing keeps p, for those who will ask for it
		}
		s.mu.Lock()
		delete(s.indexing, m.ID)
		s.mu.Unlock()
	})
	return m.ID, nil
}

// finish makes the index of a tree that is in the store, and a layer of it. The caller holds the lock of id.
func (s *Store) finish(ctx context.Context, id ID, below Below) error {
	scan, err := scanTree(ctx, s.path(id, treeDir))
	if err != nil {
		return err
	}
	tree, err := below(ctx)
	if err != nil {
		return err
	}
	// The tree may be mounted: what is unchanged stays in it, where it shows nothing else than what is below it.
	gone, _, err := unchangedDirs(scan.index, tree, func(path string) (bool, error) { return !scan.unindexed[path], nil })
	if err != nil {
		return err
	}
	x, err := without(scan.index, gone)
	if err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	m := &meta{ID: id, Tree: true, Content: x.Digest(), Size: scan.bytes, MoreDirs: len(gone) > 0}
	if m.MoreDirs {
		if err := s.putFile(id, moreDirsFile, encodeMoreDirs(scan.index, gone)); err != nil {
			return err
		}
	}
	if err := s.putFile(id, indexFile, x.Encode()); err != nil {
		return err
	}
	s.use(id)
	s.add(m.Size)
	defer s.boot.begin(m)() // now: no sync that has begun covers the tree
	info, err := encodeMeta(m)
	if err != nil {
		return err
	}
	if err := s.putFile(id, infoFile, info); err != nil {
		return err
	}
	s.indexes.put(id, x)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metas[id] = m
	return nil
}

// putFile puts a file, not synced, in its place in a layer.
func (s *Store) putFile(id ID, name string, b []byte) error {
	tmp := s.tmpName()
	err := s.writeFile(tmp, b, false)
	if err == nil {
		err = s.fs.Rename(tmp, s.path(id, name))
	}
	if err != nil {
		s.removeAll(tmp)
	}
	return err
}

// discardUnfinished takes away a tree that will not become a layer. What it cannot take away RemoveBroken will.
func (s *Store) discardUnfinished(id ID) {
	trash := s.tmpName()
	if err := s.fs.Rename(s.path(id, ""), trash); err != nil {
		s.log.Warn("layer store: remove an unfinished layer", "layer", id, "err", err)
		return
	}
	s.removeAll(trash)
}

// indexed waits until the index of a layer is made, if that is under way, and returns why it could not be.
func (s *Store) indexed(ctx context.Context, id ID) error {
	s.mu.Lock()
	p := s.indexing[id]
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	s.use(id)
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// isIndexing says that the index of a layer is being made.
func (s *Store) isIndexing(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.indexing[id]
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// cancelIndexing stops the making of an index; whoever has the layer's lock next knows how it has ended.
func (s *Store) cancelIndexing(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.indexing[id]; p != nil {
		p.cancel(errDeleted)
	}
}

// mountUnfinished is Mount for a tree whose index is being made; "" if there is no such.
func (s *Store) mountUnfinished(id ID) (dir string, err error) {
	s.use(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.indexing[id]
	if p == nil {
		return "", nil
	}
	select {
	case <-p.done:
		return "", p.err // nil if it has been finished this very moment
	default:
		s.treeUses[id]++
		return s.path(id, treeDir), nil
	}
}

// Root returns the entry of the layer's root directory, whose Path is "". It does not wait for an index that is being made.
func (s *Store) Root(ctx context.Context, id ID) (index.Entry, error) {
	if s.isIndexing(id) {
		if e, err := scanRoot(s.path(id, treeDir)); err == nil {
			return e, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return index.Entry{}, fmt.Errorf("layer %s: %w", id, err)
		}
		// It was deleted, or could not be finished: Index says so.
	}
	x, err := s.Index(ctx, id)
	if err != nil {
		return index.Entry{}, err
	}
	return x.At(0), nil
}
