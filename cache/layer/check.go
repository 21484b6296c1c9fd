// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Damage is one part of a layer that is not what it was.
type Damage struct {
	// Part is the file or directory of the layer: "info.json", "layer.tar", "tree" …
	Part string
	Err  error
	// Derived parts can be made again from the others: Repair removes them. Other damage costs the layer.
	Derived bool
}

// IDs returns every layer that has a directory in the store, those included that are damaged beyond being found. Sorted.
func (s *Store) IDs() ([]ID, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	var ids []ID
	for _, e := range entries {
		if id := ID(e.Name()); id.valid() {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// Check reads everything of a layer from the disk and compares: the tar with its diff ID, the index with its checksum and
// the content digest, every file of a tree with the index, the EROFS image with what the index gives. It changes
// nothing. An index or info that can be made again from the rest is Derived. A layer that was never made durable before a
// reboot has the damage of its info; one whose index was never made is none, so that the error wraps ErrNotFound.
func (s *Store) Check(ctx context.Context, id ID) ([]Damage, error) {
	if !id.valid() {
		return nil, fmt.Errorf("layer %q: %w", id, ErrNotFound)
	}
	defer s.locks.lock(id)()
	if _, err := os.Lstat(s.path(id, "")); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNotFound
		}
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	var found []Damage
	bad := func(part string, derived bool, err error) {
		if err != nil && ctx.Err() == nil {
			found = append(found, Damage{Part: part, Err: err, Derived: derived})
		}
	}
	m, err := readMeta(s.path(id, infoFile), id)
	if err == nil && m.Unfinished {
		return nil, fmt.Errorf("layer %s: %w: the process has ended before it had an index", id, ErrNotFound)
	}
	if err == nil && !s.boot.trusts(m) && !m.Tar {
		err = errors.New("the layer was not on disk when the machine went down")
	}
	if err != nil {
		again, herr := s.remakeInfo(ctx, id)
		bad(infoFile, m == nil && herr == nil, err)
		if m != nil || herr != nil {
			return found, context.Cause(ctx)
		}
		m = again
	}
	if m.Remote {
		if m.Content != "" {
			_, err := checkIndex(s.path(id, indexFile), m)
			bad(indexFile, true, err) // the bytes give another one
		}
		return found, context.Cause(ctx)
	}
	x, err := checkIndex(s.path(id, indexFile), m)
	if err != nil {
		raw, _ := os.ReadFile(s.path(id, indexFile))
		again, herr := s.remakeIndex(ctx, m)
		other := herr == nil && otherVersion(raw) // it is made again when it is read: no damage
		good := herr == nil && again.Digest() == m.Content
		if !other {
			bad(indexFile, good, err)
		}
		if x = nil; other || good {
			x = again
		}
	}
	if m.Tar {
		bad(tarFile, false, checkTar(ctx, s.path(id, tarFile), m))
	}
	if x != nil {
		if img, err := os.ReadFile(s.path(id, erofsFile)); err == nil {
			want, err := encodeEROFS(x, m.TarSize)
			if err == nil && !bytes.Equal(img, want) {
				err = errors.New("it is not the image that the index gives")
			}
			bad(erofsFile, true, err)
		} else if !errors.Is(err, os.ErrNotExist) {
			bad(erofsFile, true, err)
		}
		if m.Tree && s.boot.trusts(m) {
			bad(treeDir, false, checkTree(ctx, s.path(id, treeDir), x, m.MoreDirs))
		}
		if _, err := os.Lstat(s.path(id, extractedDir)); err == nil {
			bad(extractedDir, true, checkTree(ctx, s.path(id, extractedDir), x, false))
		}
	}
	return found, context.Cause(ctx)
}

const extractedDir = "extracted"

// readMeta reads an info file.
func readMeta(path string, id ID) (*meta, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := &meta{}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, err
	}
	switch {
	case m.ID != id:
		return nil, fmt.Errorf("it is about layer %s", m.ID)
	case !m.Tar && !m.Tree && !m.Remote:
		return nil, errors.New("it names neither a tar nor a tree")
	}
	return m, nil
}

func checkIndex(path string, m *meta) (*index.Index, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	x, err := index.Decode(b)
	if err != nil {
		return nil, err
	}
	if got := x.Digest(); got != m.Content {
		return nil, fmt.Errorf("its content digest is %s, should be %s", got, m.Content)
	}
	return x, nil
}

func checkTar(ctx context.Context, path string, m *meta) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := m.DiffID.Algorithm().Hash()
	var size int64
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(h, f, 8<<20)
		size += n
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if size != m.TarSize {
		return fmt.Errorf("%d bytes instead of %d", size, m.TarSize)
	}
	if got := digest.NewDigest(m.DiffID.Algorithm(), h); got != m.DiffID {
		return fmt.Errorf("%w: it is %s instead of %s", ErrDigest, got, m.DiffID)
	}
	return nil
}

// checkTree compares a directory with the index that describes it. moreDirs says that it may have directories that the index
// does not have.
func checkTree(ctx context.Context, dir string, want *index.Index, moreDirs bool) error {
	scan, err := scanTree(ctx, dir)
	if err != nil {
		return err
	}
	got := scan.index
	for i := range want.Len() {
		w := want.At(i)
		g, ok := got.Lookup(w.Path)
		if !ok {
			return fmt.Errorf("%q is missing", w.Path)
		}
		if what := differs(&w, &g); what != "" {
			return fmt.Errorf("%q: its %s is not what it was", w.Path, what)
		}
	}
	if got.Len() != want.Len() {
		for e := range got.All() {
			if _, ok := want.Lookup(e.Path); !ok && !(moreDirs && e.Type == index.Dir) {
				return fmt.Errorf("%q was not there", e.Path)
			}
		}
	}
	return nil
}

// differs says in what two entries differ, "" for nothing. What an ordinary user's tree may not be able to show is not compared.
func differs(a, b *index.Entry) string {
	switch {
	case a.Type != b.Type:
		return "type"
	case a.Type == index.Whiteout:
		return ""
	case a.Size != b.Size:
		return "size"
	case a.Digest != b.Digest:
		return "content"
	case a.Target != b.Target:
		return "target"
	case a.Mode != b.Mode && a.Type != index.Symlink:
		return "mode"
	case !UserXattrs() && (a.UID != b.UID || a.GID != b.GID):
		return "owner"
	case a.Major != b.Major || a.Minor != b.Minor:
		return "device number"
	case a.HardLink != b.HardLink:
		return "hard link"
	case a.Opaque != b.Opaque:
		return "opaqueness"
	case !UserXattrs() && !maps.Equal(a.Xattrs, b.Xattrs):
		return "xattrs"
	}
	return ""
}

// Repair removes the derived parts among what Check has found (index and info are made again), and moves the layer to the folder quarantine when
// something else was damaged: then it is missing, and gets pulled or made again. Nobody may be using the layer.
func (s *Store) Repair(ctx context.Context, id ID, found []Damage, quarantine string) error {
	if !id.valid() || len(found) == 0 {
		return nil
	}
	if slices.ContainsFunc(found, func(d Damage) bool { return !d.Derived }) {
		return s.quarantine(id, quarantine)
	}
	if err := s.unmountLayer(id); err != nil {
		return fmt.Errorf("repair layer %s: %w", id, err)
	}
	defer s.locks.lock(id)()
	for _, d := range found {
		if err := s.fs.RemoveAll(s.path(id, d.Part)); err != nil {
			return fmt.Errorf("repair layer %s: %w", id, err)
		}
	}
	if slices.ContainsFunc(found, func(d Damage) bool { return d.Part == extractedDir }) {
		s.noteExtracted(id, 0)
	}
	// The parts without which the layer is of no use are made again now.
	s.indexes.drop(id)
	s.mu.Lock()
	delete(s.metas, id)
	s.mu.Unlock()
	m, err := s.load(id)
	if err != nil {
		return fmt.Errorf("repair layer %s: %w", id, err)
	}
	if m.Remote {
		return nil
	}
	if _, err := s.Index(ctx, id); err != nil {
		return fmt.Errorf("repair layer %s: %w", id, err)
	}
	return nil
}

// unmountLayer takes away the mount of a layer that nobody is using.
func (s *Store) unmountLayer(id ID) error {
	s.mu.Lock()
	mounted := s.mounts[id]
	delete(s.mounts, id)
	s.mu.Unlock()
	if mounted == "" {
		return nil
	}
	return unmount(mounted)
}

func (s *Store) quarantine(id ID, dir string) error {
	if err := s.unmountLayer(id); err != nil {
		return fmt.Errorf("quarantine layer %s: %w", id, err)
	}
	defer s.locks.lock(id)()
	s.mu.Lock()
	delete(s.metas, id)
	s.gone++
	s.mu.Unlock()
	s.indexes.drop(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("quarantine layer %s: %w", id, err)
	}
	if err := s.fs.Rename(s.path(id, ""), freeName(filepath.Join(dir, string(id)))); err != nil {
		return fmt.Errorf("quarantine layer %s: %w", id, err)
	}
	return nil
}

// RemoveBroken removes the layers that can never be found: their info is missing or damaged, they were not on disk when
// the machine went down, or the process has ended before they had an index. It says how many there were.
func (s *Store) RemoveBroken(ctx context.Context) (int, error) {
	ids, err := s.IDs()
	if err != nil {
		return 0, err
	}
	n := 0
	for _, id := range ids {
		if err := context.Cause(ctx); err != nil {
			return n, err
		}
		if _, err := s.load(id); err == nil || !isGone(err) || s.isIndexing(id) {
			continue
		}
		removed, err := s.removeBroken(id)
		if err != nil {
			return n, err
		}
		if removed {
			n++
		}
	}
	return n, nil
}

func (s *Store) removeBroken(id ID) (bool, error) {
	unlock, ok := s.locks.tryLock(id)
	if !ok {
		return false, nil // it is just being written anew, perhaps by somebody who waits for us
	}
	defer unlock()
	// With the store locked: somebody may be writing the layer anew, and must not lose that.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.metas[id] != nil {
		return false, nil
	}
	m, err := readMeta(s.path(id, infoFile), id)
	var path *os.PathError
	switch {
	case err == nil && !m.Unfinished && (m.Tar || s.boot.trusts(m)):
		return false, nil
	case errors.As(err, &path) && !errors.Is(err, os.ErrNotExist):
		return false, nil // too many open files, say: nobody knows whether it is damaged
	}
	trash := s.tmpName()
	if err := s.fs.Rename(s.path(id, ""), trash); errors.Is(err, os.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("remove damaged layer %s: %w", id, err)
	}
	s.removeAll(trash)
	return true, nil
}
