// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// ErrDigest is what the error of a tar that is not the one it should be wraps.
var ErrDigest = errors.New("digest does not match")

// FindDiffID returns the layer that Unpack would make of the tar with this diff ID over below, if it is there already.
func (s *Store) FindDiffID(ctx context.Context, diffID digest.Digest, below index.Tree) (ID, bool) {
	found, err := s.withDiffID(diffID)
	if err != nil {
		s.log.Warn("layer store: look for layer", "diffID", diffID, "err", err)
		return "", false
	}
	for _, m := range found {
		if sameBelow(m.Below, below) {
			return m.ID, true
		}
	}
	return "", false
}

// withDiffID returns the layers, by ID, that are the tar with this diff ID, but for remote ones.
func (s *Store) withDiffID(diffID digest.Digest) ([]*meta, error) {
	if err := s.loadAll(); err != nil && !errors.Is(err, errUnread) {
		return nil, err
	}
	s.mu.Lock()
	var found []*meta
	for _, m := range s.metas {
		if m.DiffID == diffID && !m.Remote {
			found = append(found, m)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(found, func(a, b *meta) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return slices.DeleteFunc(found, func(m *meta) bool {
		_, err := s.meta(m.ID) // it may have been deleted meanwhile
		return err != nil
	}), nil
}

// Unpack takes over the uncompressed tar r, byte for byte, as a layer over below (nil for nothing). diffID is
// verified before the layer becomes visible; "" takes any. Directories that the tar does not name look as in below.
//
// The tar is not trusted. Absolute names count from the root of the layer; symlinks of the layer in the directory
// part of a name are followed inside it; a later entry replaces an earlier one of the same name. Refused by name
// are: names and hard links that leave the root, entries below something that is no directory, hard links to
// nothing or to directories, unknown types. Files whose bytes do not stand in the tar in one piece (sparse ones;
// hard links to files of below, which must be a Files for that) are kept in an extracted tree.
func (s *Store) Unpack(ctx context.Context, r io.Reader, diffID digest.Digest, below index.Tree) (ID, error) {
	id, err := s.unpack(ctx, r, diffID, below)
	if err != nil {
		if diffID != "" {
			return "", fmt.Errorf("unpack layer %s: %w", diffID, err)
		}
		return "", fmt.Errorf("unpack layer: %w", err)
	}
	return id, nil
}

func (s *Store) unpack(ctx context.Context, r io.Reader, diffID digest.Digest, below index.Tree) (_ ID, err error) {
	tmp, err := s.newTmp()
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			s.removeAll(tmp)
		}
	}()
	u := newUnpacker(below)
	u.fs = s.fs
	m := &meta{Tar: true, verified: true}
	if m.TarSize, m.DiffID, err = u.take(ctx, s.fs, r, tmp+"/"+tarFile); err != nil {
		return "", err
	}
	if diffID != "" && m.DiffID != diffID {
		return "", fmt.Errorf("%w: the tar's is %s", ErrDigest, m.DiffID)
	}
	items, err := u.items()
	if err != nil {
		return "", err
	}
	x, err := indexOf(items)
	if err != nil {
		return "", err
	}
	m.ID = ID("d" + m.DiffID.Encoded() + belowVariant(u.answers))
	if err := s.completeTar(ctx, u, tmp, m, x); err != nil {
		return "", err
	}
	return m.ID, s.install(tmp, m, x, true)
}

// completeTar makes in tmp what belongs to a layer whose tar is there and has been read by u.
func (s *Store) completeTar(ctx context.Context, u *unpacker, tmp string, m *meta, x *index.Index) error {
	m.Below = u.answers
	if u.scattered {
		m.Tree = true
		if err := u.extract(ctx, tmp, x); err != nil {
			return err
		}
		m.Size = u.treeBytes
		if err := s.Sync(ctx); err != nil {
			return err
		}
	}
	if err := s.finishTar(tmp, m, x); err != nil {
		return err
	}
	s.add(m.Size)
	return nil
}

// unpacker is the tree that a tar describes, as far as it has been read.
type unpacker struct {
	fs      fsys.FS // only to extract
	below   index.Tree
	answers map[string]string
	root    *unpackNode
	entries int
	memory  budget
	// scattered says that the bytes of some file are not in the tar in one piece.
	scattered bool
	treeBytes int64
	// suspicious has a tar that cannot be read hashed to its end: it may not be the one that it should be.
	suspicious bool
}

func newUnpacker(below index.Tree) *unpacker {
	return &unpacker{below: below, answers: map[string]string{}, root: &unpackNode{implicit: true, file: &unpackFile{
		entry: index.Entry{Type: index.Dir, Mode: 0o755, Offset: -1},
	}}}
}

type unpackNode struct {
	file     *unpackFile
	children map[string]*unpackNode // of a directory
	implicit bool                   // a directory that the tar has not named (yet)
	// anew says that the directory of the layers below was hidden by name: this one has nothing of it, not even its mode. (An
	// opaque mark inside hides what is in it only.)
	anew bool
	// copiedUp is a file of the layers below that is here because a hard link points to it: the names of one file must be in
	// one layer to be one file. It goes if what it was copied from is hidden.
	copiedUp bool
}

// unpackFile is what the names of one file share.
type unpackFile struct {
	entry index.Entry
	// header is the number of the tar entry with the bytes of a file that are not in one piece; they have to be read
	// with archive/tar. 0 is none: the numbers start at 1.
	header int
	// belowPath is where the bytes are in the layers below; "" is nowhere.
	belowPath string
}

func (n *unpackNode) typ() index.Type { return n.file.entry.Type }

// take copies r to the file at path, hashing it, while it reads what is in it.
func (u *unpacker) take(ctx context.Context, fs fsys.FS, r io.Reader, path string) (size int64, diffID digest.Digest, err error) {
	f, err := fs.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	if size, diffID, err = u.copy(ctx, r, f); err != nil {
		return size, diffID, err
	}
	if err := f.Sync(); err != nil {
		return 0, "", err
	}
	return size, diffID, f.Close()
}

// copy copies r to w, hashing it, while it reads what is in it. The digest is that of all of r unless that could not be read, or
// need not be, because of an error.
func (u *unpacker) copy(ctx context.Context, r io.Reader, w io.Writer) (size int64, diffID digest.Digest, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := startPump(ctx, cancel, r, w)
	err = u.read(p)
	if err != nil && !u.suspicious {
		cancel(err)
	}
	// What follows the end of the archive is part of the blob.
	_, rest := io.Copy(io.Discard, p)
	size, diffID, werr := p.wait()
	switch {
	case rest != nil && (err == nil || u.suspicious):
		return 0, "", rest
	case err == nil && werr != nil:
		return 0, "", werr
	}
	return size, diffID, err
}

// read reads the whole archive.
func (u *unpacker) read(p *pump) error {
	tr := tar.NewReader(p)
	buf := make([]byte, 256<<10)
	for number := 1; ; number++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if u.entries++; u.entries > maxEntries {
			return fmt.Errorf("more than %d entries", maxEntries)
		}
		if err := u.memory.take(h.Name, h.Linkname, h.PAXRecords); err != nil {
			return err
		}
		offset := p.read
		var sum digest.Digest
		if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeGNUSparse || h.Typeflag == tar.TypeCont {
			if h.Size > maxSparse && isSparse(h) {
				// A few bytes of tar can promise any number of zeros, and all of them have to be hashed.
				return fmt.Errorf("entry %q: a sparse file of %d bytes is too large", shown(h.Name), h.Size)
			}
			hash := sha256.New()
			n, err := io.CopyBuffer(hash, onlyReader{tr}, buf)
			if err != nil {
				return fmt.Errorf("entry %q: %w", shown(h.Name), err)
			}
			if n != h.Size {
				return fmt.Errorf("entry %q: %d bytes instead of %d", shown(h.Name), n, h.Size)
			}
			sum = digest.NewDigest(digest.SHA256, hash)
		}
		file := &unpackFile{}
		if sum != "" && h.Size > 0 && (p.read-offset != h.Size || offset%erofsBlock != 0) {
			offset = -1
			file.header = number
			u.scattered = true
		}
		if err := u.add(h, file, offset, sum); err != nil {
			return fmt.Errorf("entry %q: %w", shown(h.Name), err)
		}
	}
}

// maxSparse is the largest sparse file that is taken, in bytes.
const maxSparse = 64 << 30

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// onlyReader hides WriteTo, which archive/tar has and which does not use the buffer.
type onlyReader struct{ io.Reader }

// cleanName makes the name of an entry a path: relative to the root, without "." and "..".
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("NUL byte in name")
	}
	if !strings.HasPrefix(name, "/") {
		if clean := path.Clean(name); clean == ".." || strings.HasPrefix(clean, "../") {
			return "", fmt.Errorf("%q is outside the root", name)
		}
	}
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	if err := index.CheckLength(clean); err != nil {
		return "", err
	}
	for part := range strings.SplitSeq(clean, "/") {
		if len(part) > maxNameLen {
			return "", errors.New("file name too long")
		}
	}
	return clean, nil
}

// add takes one entry of the archive.
func (u *unpacker) add(h *tar.Header, file *unpackFile, offset int64, sum digest.Digest) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	base := index.Base(name)
	if whiteout, ok := strings.CutPrefix(base, whPrefix); ok {
		return u.whiteout(index.Parent(name), base, whiteout)
	}
	if file.entry, err = entryOf(h); err != nil {
		return err
	}
	if file.entry.Type == index.File {
		file.entry.Offset, file.entry.Digest = offset, sum
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return errors.New("the root must be a directory")
		}
		file.entry.Opaque = u.root.file.entry.Opaque
		u.root.file, u.root.implicit = file, false
		return nil
	}
	parent, err := u.directory(index.Parent(name))
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		if file, err = u.linked(h.Linkname); err != nil {
			return fmt.Errorf("hard link to %q: %w", shown(h.Linkname), err)
		}
	}
	if file.entry.Type == index.Whiteout { // as a device 0:0, in overlayfs's way
		parent.hide(base)
		return nil
	}
	old := parent.children[base]
	if file.entry.Type == index.Dir && old != nil {
		switch old.typ() {
		case index.Dir:
			file.entry.Opaque = old.file.entry.Opaque
			old.file, old.implicit = file, false
			return nil
		case index.Whiteout:
			file.entry.Opaque = true
		}
	}
	parent.put(base, &unpackNode{file: file})
	return nil
}

func (n *unpackNode) put(name string, child *unpackNode) {
	if n.children == nil {
		n.children = map[string]*unpackNode{}
	}
	n.children[name] = child
}

// hide keeps what the layers below have at name from showing. What this layer has there itself stays.
func (n *unpackNode) hide(name string) {
	switch old := n.children[name]; {
	case old == nil || old.copiedUp:
		n.put(name, &unpackNode{file: &unpackFile{entry: index.Entry{Type: index.Whiteout, Offset: -1}}})
	case old.typ() == index.Dir:
		old.file.entry.Opaque, old.anew = true, true
	}
}

func (u *unpacker) whiteout(dir, base, hidden string) error {
	if base != whOpaque && strings.HasPrefix(base, whMeta) {
		return nil
	}
	if hidden == "" || hidden == "." || hidden == ".." {
		return errors.New("whiteout of nothing")
	}
	parent, err := u.directory(dir)
	if err != nil {
		return err
	}
	if base == whOpaque {
		parent.file.entry.Opaque = true
		return nil
	}
	parent.hide(hidden)
	return nil
}

// directory returns the node of the directory that path leads to, through symlinks of this layer, making what is
// missing. It never leaves the root.
func (u *unpacker) directory(path string) (*unpackNode, error) {
	resolved, err := index.Resolve(u, path, true)
	if err != nil {
		return nil, err
	}
	n := u.root
	done := ""
	for rest := resolved; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		done = index.Join(done, name)
		child := n.children[name]
		switch {
		case child == nil || child.typ() == index.Whiteout:
			if len(name) > maxNameLen {
				return nil, errors.New("file name too long")
			}
			if err := u.memory.take(done, "", nil); err != nil {
				return nil, err
			}
			fresh := &unpackNode{implicit: true, file: &unpackFile{entry: index.Entry{Type: index.Dir, Mode: 0o755, Offset: -1}}}
			fresh.file.entry.Opaque, fresh.anew = child != nil, child != nil
			n.put(name, fresh)
			child = fresh
		case child.typ() != index.Dir:
			return nil, fmt.Errorf("%q is not a directory", done)
		}
		n = child
	}
	return n, nil
}

// find returns the node at path, of which no part is followed.
func (u *unpacker) find(path string) *unpackNode {
	n := u.root
	for rest := path; rest != "" && n != nil; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		n = n.children[name]
	}
	return n
}

// Lookup and ReadDir make the unpacker a Tree for index.Resolve.
func (u *unpacker) Lookup(path string) (index.Entry, bool) {
	n := u.find(path)
	if n == nil {
		return index.Entry{}, false
	}
	return n.file.entry, true
}

// ReadDir is not needed for resolving.
func (u *unpacker) ReadDir(string) []index.Entry { return nil }

// linked returns the file that a hard link points to.
func (u *unpacker) linked(target string) (*unpackFile, error) {
	name, err := cleanName(target)
	if err != nil {
		return nil, err
	}
	dir, err := index.Resolve(u, index.Parent(name), true)
	if err != nil {
		return nil, err
	}
	name = index.Join(dir, index.Base(name))
	if n := u.find(name); n != nil {
		switch n.typ() {
		case index.Dir:
			return nil, errors.New("it is a directory")
		case index.Whiteout:
			return nil, errors.New("there is no such file")
		}
		return n.file, nil
	}
	below, _ := u.below.(Files)
	if below == nil {
		return nil, errors.New("there is no such file")
	}
	e, ok := below.Lookup(name)
	if !ok || e.Type != index.File {
		return nil, errors.New("there is no such file")
	}
	if _, err := u.ask(belowLink, name); err != nil {
		return nil, err
	}
	file := &unpackFile{entry: e, belowPath: name}
	file.entry.HardLink, file.entry.Offset, file.entry.Opaque = "", -1, false
	if e.Size > 0 {
		u.scattered = true
	}
	parent, err := u.directory(index.Parent(name))
	if err != nil {
		return nil, err
	}
	parent.put(index.Base(name), &unpackNode{file: file, copiedUp: true})
	return file, nil
}

// ask puts a question to the layers below and remembers the answer.
func (u *unpacker) ask(kind, path string) (string, error) {
	key := belowKey(kind, path)
	answer, err := belowAnswer(u.below, key)
	if err == nil {
		u.answers[key] = answer
	}
	return answer, err
}

// entryOf returns the metadata in a header.
func entryOf(h *tar.Header) (index.Entry, error) {
	e := index.Entry{Mode: uint32(h.Mode & 0o7777), ModTime: h.ModTime.UnixNano(), Offset: -1}
	if h.Uid < 0 || int64(h.Uid) > math.MaxUint32 || h.Gid < 0 || int64(h.Gid) > math.MaxUint32 {
		return e, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	e.UID, e.GID = uint32(h.Uid), uint32(h.Gid)
	switch h.Typeflag {
	case tar.TypeDir:
		e.Type = index.Dir
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		e.Type = index.File
		e.Size = h.Size
	case tar.TypeLink:
		return e, nil
	case tar.TypeSymlink:
		e.Type = index.Symlink
		e.Mode = 0o777
		e.Target = h.Linkname
		if e.Target == "" || len(e.Target) > maxSymlinkTarget || strings.IndexByte(e.Target, 0) >= 0 {
			return e, fmt.Errorf("symlink to %q", e.Target)
		}
	case tar.TypeChar, tar.TypeBlock:
		e.Type = index.CharDevice
		if h.Typeflag == tar.TypeBlock {
			e.Type = index.BlockDevice
		}
		// What fits into the 32 bits that file systems keep.
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return e, fmt.Errorf("device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		if e.Type == index.CharDevice && e.Major == 0 && e.Minor == 0 {
			return index.Entry{Type: index.Whiteout, Offset: -1}, nil
		}
	case tar.TypeFifo:
		e.Type = index.Fifo
	default:
		return e, fmt.Errorf("unknown type %q", h.Typeflag)
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, xattrPaxPrefix); ok && !isOverlayXattr(name) {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = value
		}
	}
	return e, nil
}

// items returns the tree as entries in Compare order, with what only the layers below can say.
func (u *unpacker) items() ([]tarItem, error) {
	if u.root.file.entry.Opaque {
		if err := u.spellOutOpaqueRoot(); err != nil {
			return nil, err
		}
	}
	var items []tarItem
	var files []*unpackFile
	var add func(path string, n *unpackNode, hidden bool) error
	add = func(path string, n *unpackNode, hidden bool) error {
		if n.implicit && !hidden && !n.anew {
			if _, err := u.ask(belowStat, path); err != nil {
				return err
			}
			if u.below != nil {
				if e, ok := u.below.Lookup(path); ok && e.Type == index.Dir {
					e.Offset, e.Opaque = -1, n.file.entry.Opaque
					n.file.entry = e
				}
			}
		}
		hidden = hidden || n.file.entry.Opaque
		e := n.file.entry
		e.Path = path
		items = append(items, tarItem{entry: e})
		files = append(files, n.file)
		names := make([]string, 0, len(n.children))
		for name := range n.children {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			child := n.children[name]
			if child.copiedUp && hidden {
				continue
			}
			if child.typ() == index.Whiteout {
				// One that hides nothing must go: in a directory that only one layer has, overlayfs lists it.
				needed, err := u.hides(index.Join(path, name), hidden)
				if err != nil {
					return err
				}
				if !needed {
					continue
				}
			}
			if err := add(index.Join(path, name), child, hidden); err != nil {
				return err
			}
		}
		return nil
	}
	if err := add("", u.root, false); err != nil {
		return nil, err
	}
	canonicalLinks(items, func(i int) any {
		if t := items[i].entry.Type; t == index.Dir || t == index.Whiteout {
			return nil
		}
		return files[i]
	})
	return items, nil
}

// hides says whether a whiteout at path has something to hide.
func (u *unpacker) hides(path string, hidden bool) (bool, error) {
	if hidden {
		return false, nil
	}
	answer, err := u.ask(belowHas, path)
	return answer == "", err
}

// spellOutOpaqueRoot hides each name of the layers below by itself: overlayfs does not look at the mark on the root
// of a layer.
func (u *unpacker) spellOutOpaqueRoot() error {
	u.root.file.entry.Opaque = false
	if _, err := u.ask(belowList, ""); err != nil {
		return err
	}
	if u.below == nil {
		return nil
	}
	for _, e := range u.below.ReadDir("") {
		u.root.hide(index.Base(e.Path))
	}
	return nil
}

// extract makes the layer's tree beside its tar in dir.
func (u *unpacker) extract(ctx context.Context, dir string, x *index.Index) error {
	f, err := os.Open(dir + "/" + tarFile)
	if err != nil {
		return err
	}
	defer f.Close()
	spool, err := u.spool(f, dir)
	if err != nil {
		return err
	}
	defer u.fs.RemoveAll(dir + "/spool")
	tree := dir + "/" + treeDir
	if err := u.fs.Mkdir(tree, 0o755); err != nil {
		return err
	}
	return extract(ctx, u.fs, tree, x, func(e index.Entry) (io.ReadCloser, error) {
		u.treeBytes += e.Size
		if e.Offset >= 0 {
			return io.NopCloser(io.NewSectionReader(f, e.Offset, e.Size)), nil
		}
		file := u.find(e.Path).file
		if file.belowPath != "" {
			r, err := u.below.(Files).OpenFile(ctx, file.belowPath)
			if err != nil {
				return nil, err
			}
			return verified(r, e), nil
		}
		return os.Open(spool(file.header))
	})
}

// verified reads r and complains at its end if it was not e's file.
func verified(r io.ReadCloser, e index.Entry) io.ReadCloser {
	h := sha256.New()
	return &verifiedReader{Reader: io.TeeReader(r, h), Closer: r, check: func() error {
		if e.Digest != "" && digest.NewDigest(digest.SHA256, h) != e.Digest {
			return ErrChanged
		}
		return nil
	}}
}

type verifiedReader struct {
	io.Reader
	io.Closer
	check func() error
}

func (v *verifiedReader) Read(p []byte) (int, error) {
	n, err := v.Reader.Read(p)
	if err == io.EOF {
		if cerr := v.check(); cerr != nil {
			return n, cerr
		}
	}
	return n, err
}

// spool writes the files whose bytes are not in one piece to files of their own, and returns where each is.
func (u *unpacker) spool(f *os.File, dir string) (func(header int) string, error) {
	at := func(header int) string { return fmt.Sprintf("%s/spool/%d", dir, header) }
	if err := u.fs.Mkdir(dir+"/spool", 0o700); err != nil {
		return nil, err
	}
	wanted := map[int]bool{}
	var collect func(n *unpackNode)
	collect = func(n *unpackNode) {
		if n.file.header != 0 {
			wanted[n.file.header] = true
		}
		for _, child := range n.children {
			collect(child)
		}
	}
	collect(u.root)
	if len(wanted) == 0 {
		return at, nil
	}
	tr := tar.NewReader(f)
	for number := 1; ; number++ {
		_, err := tr.Next()
		if err == io.EOF {
			return at, nil
		}
		if err != nil {
			return nil, err
		}
		if !wanted[number] {
			continue
		}
		if err := spoolOne(u.fs, at(number), tr); err != nil {
			return nil, err
		}
	}
}

func spoolOne(fs fsys.FS, path string, r io.Reader) error {
	f, err := fs.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, onlyReader{r}); err != nil {
		return err
	}
	return f.Close()
}

// pump reads a stream in one goroutine, writes and hashes it in another, and hands it out to whoever reads the pump.
type pump struct {
	read int64 // bytes handed out

	current *chunk
	pos     int
	chunks  chan *chunk
	err     error // of the source; set before chunks is closed

	wg     sync.WaitGroup
	size   int64
	digest digest.Digest
	werr   error
}

// chunk is a piece of the stream that two goroutines use.
type chunk struct {
	b     []byte
	users atomic.Int32
}

const chunkSize = 256 << 10

var chunkPool = sync.Pool{New: func() any { return &chunk{b: make([]byte, chunkSize)} }}

func (c *chunk) release() {
	if c.users.Add(-1) == 0 {
		c.b = c.b[:cap(c.b)]
		chunkPool.Put(c)
	}
}

func startPump(ctx context.Context, cancel context.CancelCauseFunc, r io.Reader, w io.Writer) *pump {
	p := &pump{chunks: make(chan *chunk, 8)}
	toDisk := make(chan *chunk, 8)
	p.wg.Go(func() {
		defer close(p.chunks)
		defer close(toDisk)
		for {
			if ctx.Err() != nil {
				p.err = context.Cause(ctx)
				return
			}
			c := chunkPool.Get().(*chunk)
			n, err := io.ReadFull(r, c.b)
			c.b = c.b[:n]
			if n > 0 {
				c.users.Store(2)
				toDisk <- c // always drained
				p.chunks <- c
			}
			if err != nil {
				if err != io.EOF && err != io.ErrUnexpectedEOF {
					p.err = err
				}
				return
			}
		}
	})
	p.wg.Go(func() {
		h := sha256.New()
		for c := range toDisk {
			if p.werr == nil {
				h.Write(c.b)
				p.size += int64(len(c.b))
				if _, p.werr = w.Write(c.b); p.werr != nil {
					cancel(p.werr)
				}
			}
			c.release()
		}
		p.digest = digest.NewDigest(digest.SHA256, h)
	})
	return p
}

// Read hands out the stream. The error is the source's.
func (p *pump) Read(b []byte) (int, error) {
	for p.current == nil {
		c, ok := <-p.chunks
		if !ok {
			if p.err != nil {
				return 0, p.err
			}
			return 0, io.EOF
		}
		p.current, p.pos = c, 0
	}
	n := copy(b, p.current.b[p.pos:])
	p.pos += n
	p.read += int64(n)
	if p.pos == len(p.current.b) {
		p.current.release()
		p.current = nil
	}
	return n, nil
}

// wait returns what has been written, after everything has been read.
func (p *pump) wait() (int64, digest.Digest, error) {
	p.wg.Wait()
	return p.size, p.digest, p.werr
}
