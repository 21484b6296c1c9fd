// SPDX-License-Identifier: Apache-2.0

package layer

// The index and the info of a layer can be made again from what else is there: the tar, the EROFS image, the tree. So a
// missing or damaged one, or an index that another version of this program has written, costs a read of the layer and
// nothing more. What was made again counts only if it is proven: an index by the content digest in the info, an info by the
// index (which has a checksum, and the digest of every file) and by the layer's ID. If that fails the layer is missing
// from then on, and is pulled or made again: without an index it goes into quarantine, without an info the next sweep
// removes it, for that is also what a power cut leaves of a tree.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// errUnproven is why something that was made again does not count.
var errUnproven = errors.New("what else there is of the layer does not agree with it")

// healIndex makes the index of a layer again after reading it has failed with cause. A layer for which that is impossible
// is missing from now on.
func (s *Store) healIndex(ctx context.Context, id ID, cause error) (*index.Index, error) {
	defer s.healing.lock(id)()
	if x := s.indexes.get(id); x != nil {
		return x, nil // somebody else has
	}
	s.mu.Lock()
	m := s.metas[id]
	s.mu.Unlock()
	if m == nil {
		return nil, fmt.Errorf("layer %s: %w", id, ErrNotFound) // deleted meanwhile
	}
	raw, err := os.ReadFile(s.path(id, indexFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	x, err := s.remakeIndex(ctx, m)
	if err == nil && x.Digest() != m.Content && !otherVersion(raw) {
		err = errUnproven
	}
	if err != nil {
		if !isDamage(err) || ctx.Err() != nil {
			return nil, fmt.Errorf("layer %s: %w; made again from its files: %w", id, cause, err)
		}
		s.setAside(id, m, fmt.Errorf("%w; made again from its files: %w", cause, err))
		return nil, fmt.Errorf("layer %s: %w: it was damaged (%w) and is in quarantine; build or pull again what needs it", id, ErrNotFound, cause)
	}
	s.log.Warn("layer store: an index was made again", "layer", id, "reason", cause)
	s.writeHealed(id, m, x)
	s.indexes.put(id, x)
	return x, nil
}

// writeHealed puts a healed index where it belongs. Failing that it is good for this process. The info comes first: as long
// as the index beside it is the old one, that will be healed again.
func (s *Store) writeHealed(id ID, m *meta, x *index.Index) {
	if content := x.Digest(); content != m.Content { // of another version
		now := *m
		now.Content = content
		if err := s.replaceInfo(&now); err != nil {
			s.log.Warn("layer store: write the info of a layer", "layer", id, "err", err)
			return
		}
		s.mu.Lock()
		if s.metas[id] != nil {
			s.metas[id] = &now
		}
		s.mu.Unlock()
	}
	if err := s.replaceFile(id, indexFile, x.Encode()); err != nil {
		s.log.Warn("layer store: write the index of a layer", "layer", id, "err", err)
	}
}

// otherVersion says that b begins as an index does, but as one of another version.
func otherVersion(b []byte) bool {
	const kind = "slipway index "
	ours, _, _ := bytes.Cut(index.New(nil).Encode(), []byte("\n"))
	theirs, _, ok := bytes.Cut(b, []byte("\n"))
	return ok && len(theirs) <= len(kind)+8 && bytes.HasPrefix(theirs, []byte(kind)) && !bytes.Equal(ours, theirs)
}

// passing are the errors of reading that say nothing about what is on the disk, wherever they come in a chain of errors.
var passing = []error{
	unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EINTR, unix.EAGAIN, unix.EBUSY, unix.EACCES, unix.EPERM,
	unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.ESTALE, unix.ETIMEDOUT,
}

// isDamage says that an error is about what is on the disk, not about reading it: then reading it again is of no use.
func isDamage(err error) bool {
	if slices.ContainsFunc(passing, func(e error) bool { return errors.Is(err, e) }) {
		return false
	}
	var path *os.PathError
	return !errors.As(err, &path) || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EIO)
}

// isGone says of an error of load that there is no such layer for sure. One that the disk fails to read (EIO) counts as missing
// for whoever wants to use it, but it may be read again tomorrow: nothing is deleted because of that.
func isGone(err error) bool { return errors.Is(err, ErrNotFound) && !errors.Is(err, unix.EIO) }

// remakeIndex makes the index of a layer from its tar and from what shows its files.
func (s *Store) remakeIndex(ctx context.Context, m *meta) (*index.Index, error) {
	shown, err := s.shown(ctx, m)
	if !m.Tar {
		return shown, err
	}
	if err != nil && m.Tree {
		return nil, err
	}
	// An EROFS image or an extracted tree that is not there is only missed if the tar has asked something.
	t, err := s.reread(ctx, m.ID, recalled{answers: m.Below, shown: shown})
	if err != nil {
		return nil, err
	}
	if t.diffID != m.DiffID {
		return nil, fmt.Errorf("%w: the tar's is %s", ErrDigest, t.diffID)
	}
	if shown == nil || m.ID[0] != 't' {
		return t.x, nil
	}
	// A packed tree has whole seconds in its tar, and nanoseconds in its index.
	entries := make([]index.Entry, t.x.Len())
	for i := range entries {
		entries[i] = t.x.At(i)
		if e, ok := shown.Lookup(entries[i].Path); ok && e.Type != index.Whiteout {
			entries[i].ModTime = e.ModTime
		}
	}
	return index.NewChecked(entries)
}

// shown is the index, without offsets, of what the layer shows: its tree, what was extracted, or its EROFS image; nil when
// there is none of them.
func (s *Store) shown(ctx context.Context, m *meta) (*index.Index, error) {
	if m.Tree {
		x, err := scanIndex(ctx, s.path(m.ID, treeDir))
		if err != nil || !m.MoreDirs {
			return x, err
		}
		return s.withoutMoreDirs(m.ID, x)
	}
	if _, err := os.Lstat(s.path(m.ID, extractedDir)); err == nil {
		return scanIndex(ctx, s.path(m.ID, extractedDir))
	}
	if _, err := os.Lstat(s.path(m.ID, erofsFile)); err != nil || !s.probe().EROFS {
		return nil, nil
	}
	mnt, err := openEROFS(s.path(m.ID, erofsFile), s.path(m.ID, tarFile))
	if err != nil {
		return nil, err
	}
	defer unix.Close(mnt)
	return scanIndex(ctx, fmt.Sprintf("/proc/self/fd/%d/.", mnt))
}

// moreDirsFile has the directories of a tree that its index was made without (meta.MoreDirs): their paths, each with a NUL byte.
// Nothing but the index would say which they are.
const moreDirsFile = "more-dirs"

func encodeMoreDirs(x *index.Index, dirs map[int]bool) []byte {
	var b []byte
	for i := range x.Len() {
		if dirs[i] {
			b = append(append(b, x.Path(i)...), 0)
		}
	}
	return b
}

// withoutMoreDirs returns x, the index of a whole tree, without the directories that the layer's index does not have. Whether
// the list is right is for the content digest to say; an older store has none.
func (s *Store) withoutMoreDirs(id ID, x *index.Index) (*index.Index, error) {
	list, err := os.ReadFile(s.path(id, moreDirsFile))
	if err != nil {
		return nil, err
	}
	more := map[int]bool{}
	for path := range strings.SplitSeq(string(list), "\x00") {
		if i, ok := x.Pos(path); ok && i > 0 {
			more[i] = true
		}
	}
	return without(x, more)
}

// rereadTar is what a tar says when it is read once more.
type rereadTar struct {
	x       *index.Index
	answers map[string]string
	size    int64
	diffID  digest.Digest
}

// reread reads the tar of a layer as Unpack would, over below, and keeps nothing of it.
func (s *Store) reread(ctx context.Context, id ID, below Files) (*rereadTar, error) {
	f, err := os.Open(s.path(id, tarFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	u := newUnpacker(below)
	t := &rereadTar{answers: u.answers}
	if t.size, t.diffID, err = u.copy(ctx, f, io.Discard); err != nil {
		return nil, err
	}
	items, err := u.items()
	if err != nil {
		return nil, err
	}
	t.x, err = indexOf(items)
	return t, err
}

// recalled stands for the layers below one whose tar is read once more: it answers what those have answered, as far as the
// layer shows that or its info has kept it. What it makes up is found out by the digest of the index.
type recalled struct {
	answers map[string]string
	shown   *index.Index // nil if nobody knows
}

// Lookup says what was at path.
func (r recalled) Lookup(path string) (index.Entry, bool) {
	hidden := index.Entry{Path: path, Type: index.File, Offset: -1}
	if r.shown == nil {
		return hidden, r.answers[belowKey(belowHas, path)] == ""
	}
	if e, ok := r.shown.Lookup(path); ok {
		if e.Type == index.Whiteout {
			return hidden, true
		}
		return e, true
	}
	// The file below that a hard link points to: its other name is here.
	want := r.answers[belowKey(belowLink, path)]
	for i := 0; want != "" && i < r.shown.Len(); i++ {
		if e := r.shown.At(i); e.Type == index.File {
			if got, err := belowAnswer(one{e}, belowKey(belowLink, path)); err == nil && got == want {
				return e, true
			}
		}
	}
	return index.Entry{}, false
}

// ReadDir lists what was in the root directory, for a tar that hides all of it.
func (r recalled) ReadDir(string) []index.Entry {
	if r.shown == nil {
		return nil
	}
	var out []index.Entry
	for _, e := range r.shown.ReadDir("") {
		if e.Type == index.Whiteout || e.Opaque {
			out = append(out, e)
		}
	}
	return out
}

// OpenFile is not needed: nothing is extracted.
func (recalled) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	return nil, fmt.Errorf("open %q: %w", path, os.ErrNotExist)
}

// one is a Tree that has the same entry everywhere.
type one struct{ e index.Entry }

func (o one) Lookup(string) (index.Entry, bool) { return o.e, true }
func (o one) ReadDir(string) []index.Entry      { return nil }

// healInfo makes the info of a layer again after reading it has failed with cause. It returns an error if the layer is
// missing from now on, or was never there.
func (s *Store) healInfo(id ID, cause error) (*meta, error) {
	if _, err := os.Lstat(s.path(id, "")); err != nil {
		return nil, err
	}
	defer s.healing.lock(id)()
	if m, err := readMeta(s.path(id, infoFile), id); err == nil {
		return m, nil // somebody else has
	}
	s.mu.Lock()
	before := s.hopeless[id]
	s.mu.Unlock()
	if before != nil {
		return nil, before
	}
	// Whoever asks for a layer has no context to give: a layer is no more than some gigabytes.
	ctx := context.Background()
	m, err := s.remakeInfo(ctx, id)
	if err == nil && m.Tree {
		err = s.Sync(ctx) // the info notes no boot: what it names is on disk
	}
	if err == nil {
		err = s.replaceInfo(m)
	}
	if err != nil {
		err = fmt.Errorf("%w; made again from its files: %w", cause, err)
		if isDamage(err) {
			s.mu.Lock()
			s.hopeless[id] = err
			s.mu.Unlock()
		}
		return nil, err
	}
	s.log.Warn("layer store: the info of a layer was made again", "layer", id, "reason", cause)
	return m, nil
}

// remakeInfo makes the info of a layer from its index, which must be good, and from the forms that agree with it.
func (s *Store) remakeInfo(ctx context.Context, id ID) (*meta, error) {
	raw, err := os.ReadFile(s.path(id, indexFile))
	if err != nil {
		return nil, err
	}
	x, err := index.Decode(raw)
	if err != nil {
		return nil, err
	}
	m := &meta{ID: id, Content: x.Digest()}
	_, err = os.Lstat(s.path(id, moreDirsFile))
	moreDirs := err == nil
	treeErr := checkTree(ctx, s.path(id, treeDir), x, moreDirs)
	m.Tree = treeErr == nil
	m.MoreDirs = m.Tree && moreDirs
	t, tarErr := s.reread(ctx, id, recalled{shown: x})
	if tarErr == nil && t.x.Digest() == m.Content && id.fits(t) {
		m.Tar, m.DiffID, m.TarSize, m.Below = true, t.diffID, t.size, t.answers
	}
	for i := 0; i < x.Len() && m.Tar && !m.Tree; i++ {
		if e := x.At(i); e.Type == index.File && e.Size > 0 && e.Offset < 0 {
			m.Tar = false // its bytes are in the tree
		}
	}
	switch {
	case id[0] != 't' && id[0] != 'h' && !m.Tar, !m.Tar && !m.Tree:
		return nil, fmt.Errorf("%w: tree: %w; tar: %w", errUnproven, treeErr, tarErr)
	case id[0] == 't' && m.Tree:
		// Whether the tar is of this tree cannot be known: it is made again when somebody wants it.
		m.Tar, m.DiffID, m.TarSize, m.Below = false, "", 0, nil
	}
	m.Size, m.Extracted = diskUsage(s.path(id, "")), treeUsage(s.path(id, extractedDir))
	if m.Tree {
		m.Size += treeUsage(s.path(id, treeDir))
	}
	return m, nil
}

// fits says whether the ID can be that of the tar, as far as it names one.
func (id ID) fits(t *rereadTar) bool {
	switch id[0] {
	case 'd':
		return string(id) == "d"+t.diffID.Encoded()+belowVariant(t.answers)
	case 'r':
		return strings.HasPrefix(string(id), "r"+t.diffID.Encoded()+"-")
	}
	return true
}

// replaceInfo puts a synced info in the place of the one that is there.
func (s *Store) replaceInfo(m *meta) error {
	b, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return err
	}
	if err := s.replaceFile(m.ID, infoFile, append(b, '\n')); err != nil {
		return err
	}
	return s.fs.Sync(s.path(m.ID, ""))
}

// setAside makes a damaged layer missing, unless it is not m any more. Its files go to the quarantine, for whoever
// wants to know why. Mounts of it live on.
func (s *Store) setAside(id ID, m *meta, reason error) {
	s.log.Error("layer store: a damaged layer is put into quarantine", "layer", id, "err", reason)
	to := s.tmpName()
	if s.opt.Quarantine != "" {
		if err := os.MkdirAll(s.opt.Quarantine, 0o700); err != nil {
			s.log.Warn("layer store: quarantine", "err", err)
		} else {
			to = freeName(filepath.Join(s.opt.Quarantine, string(id)))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.metas[id] != m {
		return
	}
	delete(s.metas, id)
	s.gone++
	s.indexes.drop(id)
	// The next layer of this ID is another one: nobody may get this one's mount for it, nor count as its user.
	mounted := s.mounts[id]
	delete(s.mounts, id)
	delete(s.treeUses, id)
	if mounted != "" {
		if err := unmount(mounted); err != nil {
			s.log.Warn("layer store: quarantine", "layer", id, "err", err)
		}
	}
	if err := s.fs.Rename(s.path(id, ""), to); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("layer store: quarantine", "layer", id, "err", err)
		return
	}
	if s.opt.Quarantine == "" {
		s.removeAll(to)
	}
}

// freeName returns path, or a name like it if that is taken.
func freeName(path string) string {
	if _, err := os.Lstat(path); err == nil {
		return path + "." + randomName()[:8]
	}
	return path
}
