// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// How a layer can be deleted while builds run: everybody who wants a layer announces it (use) before looking for it,
// and DeleteUnused asks its caller whether anybody has announced it in the same critical section in which the layer
// vanishes. So whoever announced it first finds it and keeps it, and whoever comes later finds that it has gone.

// OnUse sets the function that is called with the ID of every layer that is looked for, before it is, and of every
// layer that becomes visible, before it does. It must not call the store. Call OnUse before the store is used.
func (s *Store) OnUse(fn func(ID)) { s.used = fn }

// OnAdd sets the function that is called with the size in bytes of every layer, or form of one, that is about to become
// visible. It may take its time, to delete other layers for instance, but must not wait for this one. Call OnAdd before the
// store is used.
func (s *Store) OnAdd(fn func(bytes int64)) { s.added = fn }

func (s *Store) add(bytes int64) {
	if s.added != nil {
		s.added(bytes)
	}
}

func (s *Store) use(id ID) {
	if s.used != nil {
		s.used(id)
	}
}

// meta is load for somebody who is going to use the layer.
func (s *Store) meta(id ID) (*meta, error) {
	s.use(id)
	return s.load(id)
}

// DeleteUnused removes layers as Delete does, but for those that are being worked on (indexed, packed, mounted) and those of
// which unused says no. unused is called with the store locked; if it says yes, the layer is not found any more when
// the store is unlocked. It returns what was deleted.
func (s *Store) DeleteUnused(ctx context.Context, ids []ID, unused func(ID) bool) (deleted []ID, err error) {
	// All names first and the files after: what a build could wait for is quick then, whatever the number of files.
	var trash []string
	defer func() { s.discard(trash) }()
	var errs []error
	for _, id := range ids {
		if ctx.Err() != nil {
			return deleted, errors.Join(append(errs, context.Cause(ctx))...)
		}
		unlock, ok := s.locks.tryLock(id)
		if !ok || !id.valid() {
			continue
		}
		dir, ok, err := s.vanish(id, unused)
		unlock()
		if dir != "" {
			trash = append(trash, dir)
		}
		if ok {
			deleted = append(deleted, id)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("delete layer %s: %w", id, err))
		}
	}
	return deleted, errors.Join(errs...)
}

// vanish makes a layer disappear if unused says so, and returns where its files are now. The caller holds the lock of id.
func (s *Store) vanish(id ID, unused func(ID) bool) (trash string, ok bool, err error) {
	trash = s.tmpName()
	s.mu.Lock()
	if !unused(id) {
		s.mu.Unlock()
		return "", false, nil
	}
	s.gone++
	delete(s.held, id)
	delete(s.indexing, id)
	delete(s.metas, id)
	mounted := s.mounts[id]
	delete(s.mounts, id)
	delete(s.treeUses, id)
	err = s.fs.Rename(s.path(id, ""), trash)
	s.mu.Unlock()
	s.indexes.drop(id)
	if err != nil {
		trash = ""
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if mounted != "" {
		err = errors.Join(err, unmount(mounted)) // it has the files open: they may have gone
	}
	return trash, err == nil, err
}

// discard removes directories in the background, a few at a time. Close waits for it.
func (s *Store) discard(dirs []string) {
	next := make(chan string, len(dirs))
	for _, dir := range dirs {
		next <- dir
	}
	close(next)
	for range min(len(dirs), discarders) {
		s.work.Go(func() {
			for dir := range next {
				if err := s.fs.RemoveAll(dir); err != nil {
					s.log.Warn("layer store: remove", "path", dir, "err", err)
				}
			}
		})
	}
}

// discarders is how many directories are removed at once: more only wait for the same journal.
const discarders = 2

// tryLock is lock that gives up when somebody has the lock, or waits for it. It never waits.
func (l *idLocks) tryLock(id ID) (unlock func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID[id] != nil {
		return nil, false
	}
	return l.take(id), true
}
