// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// A layer that was committed as a tree and has been packed has its bytes on disk twice. The tree goes as soon as no
// mount shows it: right after Pack, at the last Unmount, or, after a restart, when the layers are read. The order is: the EROFS
// image, then the info that no longer names the tree, then the tree itself. A crash in between leaves a layer in tar form,
// with a tree that nothing names until the layers are read again.

// Unmount says that a directory which Mount has returned for id is no longer in use, once for each call of Mount. It
// never fails and never waits. A layer in tar form stays mounted.
func (s *Store) Unmount(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.treeUses[id] == 0 {
		return
	}
	s.treeUses[id]--
	if s.treeUses[id] > 0 {
		return
	}
	delete(s.treeUses, id)
	if m := s.metas[id]; m != nil && m.Tar && !s.closed {
		s.dropTreeSoon(id)
	}
}

// useTree notes that Mount has returned the tree of a layer.
func (s *Store) useTree(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.treeUses[id]++
}

// dropTreeSoon drops a tree in the background.
func (s *Store) dropTreeSoon(id ID) {
	s.work.Go(func() { s.dropTreeNow(id) })
}

func (s *Store) dropTreeNow(id ID) {
	defer s.locks.lock(id)()
	if err := s.dropTree(id); err != nil {
		s.log.Warn("layer store: take the tree of a packed layer away", "layer", id, "err", err)
	}
}

// droppable says whether a layer has a tree that it does not need. A tree beside a tar that was unpacked has files
// which the tar does not have in one piece.
func (m *meta) droppable() bool { return m.Tar && m.Tree && m.ID[0] == 't' }

// dropTree takes the tree away if the layer can do without it and nothing has it mounted. The caller holds the lock of id.
func (s *Store) dropTree(id ID) error {
	m, err := s.load(id)
	if err != nil {
		return nil // deleted meanwhile
	}
	if m.Tar && !m.Tree {
		return s.dropLeftover(id)
	}
	if !m.droppable() || s.treeInUse(id) || !s.probe().EROFS {
		return nil
	}
	x, err := s.Index(context.Background(), id)
	if err != nil {
		return err
	}
	img, err := encodeEROFS(x, m.TarSize)
	if err != nil {
		var no *errNoEROFS
		if errors.As(err, &no) {
			return nil
		}
		return err
	}
	lean := *m
	lean.Content = x.Digest() // another than m's if the index was of another version
	lean.Tree, lean.MoreDirs, lean.Boot, lean.Number = false, false, "", 0
	lean.Size = m.TarSize + int64(len(img)+len(x.Encode()))
	if err := s.replaceFile(id, erofsFile, img); err != nil {
		return err
	}
	info, err := encodeMeta(&lean)
	if err != nil {
		return err
	}
	if err := s.replaceFile(id, infoFile, info); err != nil {
		return err
	}
	if err := s.fs.Sync(s.path(id, "")); err != nil {
		return err
	}
	s.mu.Lock()
	if s.metas[id] != nil {
		s.metas[id] = &lean
	}
	s.mu.Unlock()
	return s.dropLeftover(id)
}

func (s *Store) treeInUse(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.treeUses[id] > 0
}

// replaceFile puts a synced file in the place of one of a layer's.
func (s *Store) replaceFile(id ID, name string, b []byte) error {
	tmp := s.tmpName()
	err := s.writeFile(tmp, b, true)
	if err == nil {
		err = s.fs.Rename(tmp, s.path(id, name))
	}
	if err != nil {
		s.removeAll(tmp)
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// dropLeftover removes a tree that the info does not name.
func (s *Store) dropLeftover(id ID) error {
	trash := s.tmpName()
	err := s.fs.Rename(s.path(id, treeDir), trash)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		s.removeAll(trash)
	}
	return err
}

// dropTrees takes away, in the background, what the last process has left of trees that are not needed.
func (s *Store) dropTrees() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []ID
	for id, m := range s.metas {
		if id[0] == 't' && m.Tar {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 || s.closed {
		return
	}
	s.work.Go(func() {
		for _, id := range ids {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if closed {
				return
			}
			s.dropTreeNow(id)
		}
	})
}
