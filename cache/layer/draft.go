// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// Draft is a new layer being put together in memory, over a base tree. It implements Files: what it shows is the
// base with the changes made so far, so that a later change can be worked out on it. Its methods may be called
// concurrently, but Put and Remove of a path and its parents need an order of their own.
type Draft struct {
	s    *Store
	base Files // never nil

	mu   sync.Mutex // guards what follows
	root *draftNode
	err  error // the first change that could not be made; Commit returns it
	// memory is what the changes take.
	memory budget
}

// draftNode is a path that the layer may have an entry for.
type draftNode struct {
	file *draftFile
	// children of a directory, by name, as far as the layer has them.
	children map[string]*draftNode
	// merged says that this directory shows the base's directory of the same path too.
	merged bool
	// implied says that the node is only there because of what is in it: it looks as in the base, and is no
	// change if there is nothing in it.
	implied bool
}

// draftFile is what the names of one file share.
type draftFile struct {
	entry index.Entry // its Path is of no meaning
	open  func() (io.ReadCloser, error)
}

func (n *draftNode) isDir() bool { return n.file.entry.Type == index.Dir }

func (n *draftNode) at(path string) index.Entry {
	e := n.file.entry
	e.Path = path
	return e
}

// nothing is the base of a layer from scratch.
type nothing struct{ *index.View }

func (nothing) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	return nil, fmt.Errorf("open %q: %w", path, os.ErrNotExist)
}

// NewDraft starts a layer over base; nil means nothing ("scratch").
func (s *Store) NewDraft(base Files) *Draft {
	if base == nil {
		base = nothing{index.Merge()}
	}
	d := &Draft{s: s, base: base}
	root, ok := base.Lookup("")
	if !ok {
		root = index.Entry{Type: index.Dir, Mode: 0o755}
	}
	d.root = &draftNode{file: &draftFile{entry: plain(root)}, merged: true, implied: true}
	return d
}

// plain returns e as an entry of a new layer, alone: times in whole seconds, no link, no place.
func plain(e index.Entry) index.Entry {
	sec, _ := splitTime(e.ModTime)
	e.ModTime = sec * 1e9
	e.Offset = -1
	e.HardLink = ""
	e.Opaque = false
	if e.Type == index.Symlink {
		e.Mode = 0o777
	}
	if e.Type != index.File {
		e.Size, e.Digest = 0, ""
	}
	if len(e.Xattrs) > 0 {
		xattrs := make(map[string]string, len(e.Xattrs))
		for name, value := range e.Xattrs {
			if !isOverlayXattr(name) {
				xattrs[name] = value
			}
		}
		e.Xattrs = xattrs
	}
	if len(e.Xattrs) == 0 {
		e.Xattrs = nil
	}
	return e
}

// Lookup returns the entry at path in the base with the changes.
func (d *Draft) Lookup(path string) (index.Entry, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lookup(path)
}

func (d *Draft) lookup(path string) (index.Entry, bool) {
	n, fromBase := d.find(path)
	switch {
	case n != nil && n.file.entry.Type == index.Whiteout:
		return index.Entry{}, false
	case n != nil:
		e := n.at(path)
		e.Opaque = false
		return e, true
	case fromBase:
		e, ok := d.base.Lookup(path)
		return d.baseEntry(e), ok
	}
	return index.Entry{}, false
}

// baseEntry takes the hard link off an entry of the base if the name it points to is another file now.
func (d *Draft) baseEntry(e index.Entry) index.Entry {
	if e.HardLink != "" {
		if n, fromBase := d.find(e.HardLink); n != nil || !fromBase {
			e.HardLink = ""
		}
	}
	return e
}

// find returns the node at path if there is one, and otherwise whether the base shows through there.
func (d *Draft) find(path string) (n *draftNode, fromBase bool) {
	n = d.root
	for rest := path; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if !n.isDir() {
			return nil, false
		}
		child := n.children[name]
		if child == nil {
			return nil, n.merged
		}
		n = child
	}
	return n, false
}

// ReadDir returns what the directory at path holds in the base with the changes.
func (d *Draft) ReadDir(path string) []index.Entry {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.readDir(path)
}

func (d *Draft) readDir(path string) []index.Entry {
	n, fromBase := d.find(path)
	if n == nil {
		if !fromBase {
			return nil
		}
		out := d.base.ReadDir(path)
		for i := range out {
			if out[i].HardLink != "" {
				out = slices.Clone(out)
				for j := range out {
					out[j] = d.baseEntry(out[j])
				}
				break
			}
		}
		return out
	}
	if !n.isDir() {
		return nil
	}
	out := []index.Entry{}
	if n.merged {
		for _, e := range d.base.ReadDir(path) {
			if n.children[index.Base(e.Path)] == nil {
				out = append(out, d.baseEntry(e))
			}
		}
	}
	for name, child := range n.children {
		if child.file.entry.Type != index.Whiteout {
			e := child.at(index.Join(path, name))
			e.Opaque = false
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b index.Entry) int { return strings.Compare(a.Path, b.Path) })
	return out
}

// OpenFile opens the regular file at path in the base with the changes.
func (d *Draft) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	d.mu.Lock()
	n, fromBase := d.find(path)
	d.mu.Unlock()
	switch {
	case n != nil && n.file.entry.Type == index.File:
		return n.file.reader()
	case fromBase:
		return d.base.OpenFile(ctx, path)
	}
	return nil, fmt.Errorf("open %q: %w", path, os.ErrNotExist)
}

func (f *draftFile) reader() (io.ReadCloser, error) {
	if f.entry.Size == 0 {
		return io.NopCloser(eof{}), nil
	}
	if f.open == nil {
		return nil, errors.New("its bytes are not available")
	}
	return f.open()
}

// Put adds e, or replaces what is at e.Path, as a write through overlayfs would: a directory over a directory
// changes its metadata and keeps what is in it; anything else replaces, and a new directory hides what the base has
// below. Missing parents are made, 0755 0:0. open gives the bytes of a File, and may be called later and more than
// once, from other goroutines; it may be nil when Size is 0. If e.HardLink is set, e becomes another name of the
// file there, which gets copied into the layer if only the base has it; without such a file e is put as one of its
// own. A directory with Opaque set replaces the one that is there, content and all. Times are cut to whole seconds.
// What cannot be done at all makes Commit and Hold fail.
func (d *Draft) Put(e index.Entry, open func() (io.ReadCloser, error)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := checkEntry(&e); err != nil {
		d.fail(err)
		return
	}
	if err := d.memory.take(e.Path, e.Target, e.Xattrs); err != nil {
		d.fail(err)
		return
	}
	if e.Type == index.Whiteout {
		d.remove(e.Path)
		return
	}
	if e.Path == "" {
		if e.Type != index.Dir {
			d.fail(errors.New("the root directory cannot be replaced by something else"))
			return
		}
		if e.Opaque {
			d.remove("")
		}
		d.root.file = &draftFile{entry: plain(e)}
		d.root.implied = false
		return
	}
	file := d.linked(e)
	if file == nil {
		file = &draftFile{entry: plain(e), open: open}
	}
	parent := d.directory(index.Parent(e.Path))
	name := index.Base(e.Path)
	old := parent.children[name]
	if e.Type == index.Dir && !e.Opaque && old != nil && old.isDir() {
		file.entry.Opaque = old.file.entry.Opaque
		old.file, old.implied = file, false
		return
	}
	n := &draftNode{file: file}
	if e.Type == index.Dir {
		below, ok := index.Entry{}, false
		if parent.merged {
			below, ok = d.base.Lookup(e.Path)
		}
		n.merged = ok && below.Type == index.Dir && old == nil && !e.Opaque
		n.file.entry.Opaque = ok && !n.merged
	}
	parent.put(name, n)
}

func (n *draftNode) put(name string, child *draftNode) {
	if n.children == nil {
		n.children = map[string]*draftNode{}
	}
	n.children[name] = child
}

// linked returns the file that e is to be another name of; nil if it is none or there is no such file. A file that
// only the base has is taken into the layer.
func (d *Draft) linked(e index.Entry) *draftFile {
	if e.HardLink == "" || e.HardLink == e.Path || e.Type != index.File {
		return nil
	}
	n, fromBase := d.find(e.HardLink)
	if n != nil {
		if n.file.entry.Type != index.File {
			return nil
		}
		return n.file
	}
	if !fromBase {
		return nil
	}
	below, ok := d.base.Lookup(e.HardLink)
	if !ok || below.Type != index.File {
		return nil
	}
	base, path := d.base, e.HardLink
	file := &draftFile{entry: plain(below), open: func() (io.ReadCloser, error) {
		return base.OpenFile(context.Background(), path)
	}}
	d.directory(index.Parent(path)).put(index.Base(path), &draftNode{file: file})
	return file
}

// directory returns the node of the directory at path, making it and its parents as far as they are missing.
func (d *Draft) directory(path string) *draftNode {
	if path == "" {
		return d.root
	}
	parent := d.directory(index.Parent(path))
	name := index.Base(path)
	n := parent.children[name]
	if n != nil && n.isDir() {
		return n
	}
	if err := d.memory.take(path, "", nil); err != nil {
		d.fail(err)
	}
	fresh := &draftNode{file: &draftFile{entry: index.Entry{Type: index.Dir, Mode: 0o755, Offset: -1}}}
	if parent.merged {
		if below, ok := d.base.Lookup(path); ok {
			if below.Type == index.Dir && n == nil {
				fresh.file.entry = plain(below)
				fresh.merged, fresh.implied = true, true
			} else {
				fresh.file.entry.Opaque = true
			}
		}
	}
	parent.put(name, fresh)
	return fresh
}

// Remove takes path away, with everything in it; of the root, everything in it. A path that is not there is no
// change.
func (d *Draft) Remove(path string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := index.CheckPath(path); err != nil {
		d.fail(err)
		return
	}
	d.remove(path)
}

func (d *Draft) remove(path string) {
	if path == "" {
		for _, e := range d.readDir("") {
			d.remove(e.Path)
		}
		return
	}
	if _, ok := d.lookup(path); !ok {
		return
	}
	parent := d.directory(index.Parent(path))
	name := index.Base(path)
	if parent.merged {
		if _, ok := d.base.Lookup(path); ok {
			parent.put(name, &draftNode{file: &draftFile{entry: index.Entry{Type: index.Whiteout, Offset: -1}}})
			return
		}
	}
	delete(parent.children, name)
}

func (d *Draft) fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

// checkEntry refuses entries that no layer can have.
func checkEntry(e *index.Entry) error {
	if err := errors.Join(index.CheckLength(e.Path), index.CheckPath(e.Path)); err != nil {
		return err
	}
	for rest := e.Path; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if len(name) > maxNameLen {
			return fmt.Errorf("%q: file name too long", e.Path)
		}
		if strings.HasPrefix(name, whPrefix) {
			return fmt.Errorf("%q: names that begin with %s are reserved in image layers", e.Path, whPrefix)
		}
	}
	switch {
	case e.Type < index.Dir || e.Type > index.Whiteout:
		return fmt.Errorf("%q: unknown type %d", e.Path, e.Type)
	case (e.Type == index.CharDevice || e.Type == index.BlockDevice) && (e.Major >= 1<<12 || e.Minor >= 1<<20):
		return fmt.Errorf("%q: device %d:%d is out of range", e.Path, e.Major, e.Minor)
	case e.Type == index.CharDevice && e.Major == 0 && e.Minor == 0:
		return fmt.Errorf("%q: a character device 0:0 is a mark of the file system that hides a file, and cannot be in an image", e.Path)
	case e.Size < 0:
		return fmt.Errorf("%q: size %d", e.Path, e.Size)
	case e.Type == index.Symlink && (e.Target == "" || len(e.Target) > maxSymlinkTarget || strings.Contains(e.Target, "\x00")):
		return fmt.Errorf("%q: symlink to %q", e.Path, e.Target)
	}
	return nil
}

// Empty says whether there is no change, not even one that failed.
func (d *Draft) Empty() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err == nil && !d.root.changed()
}

// changed says whether the layer has an entry for n: for itself, or for something in it.
func (n *draftNode) changed() bool {
	if !n.implied {
		return true
	}
	for _, child := range n.children {
		if child.changed() {
			return true
		}
	}
	return false
}

// items returns the entries of the layer in Compare order, and whether the root is to be written to the tar.
func (d *Draft) items() (items []tarItem, writeRoot bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, false, d.err
	}
	var files []*draftFile // beside items
	var add func(path string, n *draftNode)
	add = func(path string, n *draftNode) {
		items = append(items, tarItem{entry: n.at(path), open: n.file.open})
		files = append(files, n.file)
		names := make([]string, 0, len(n.children))
		for name, child := range n.children {
			if child.changed() {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			add(index.Join(path, name), n.children[name])
		}
	}
	add("", d.root)
	canonicalLinks(items, func(i int) any {
		if items[i].entry.Type != index.File {
			return nil
		}
		return files[i]
	})
	root := &items[0].entry
	return items, !d.root.implied || rootInTar(root), nil
}

// Commit writes the layer in tar form and returns its ID, which depends on its content only: equal drafts make one
// layer. Every file is read once; a Digest that its entry had is verified. An empty draft gives a layer without
// entries. The draft can be used further, but what is put later is not in the layer.
func (d *Draft) Commit(ctx context.Context) (ID, error) {
	items, writeRoot, err := d.items()
	if err != nil {
		return "", fmt.Errorf("write layer: %w", err)
	}
	id, err := d.s.commitTar(ctx, "", items, writeRoot)
	if err != nil {
		return "", fmt.Errorf("write layer: %w", err)
	}
	return id, nil
}

// commitTar writes a layer in tar form. Without an id it gets the one of its diff ID.
func (s *Store) commitTar(ctx context.Context, id ID, items []tarItem, writeRoot bool) (_ ID, err error) {
	tmp, err := s.newTmp()
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			s.removeAll(tmp)
		}
	}()
	m := &meta{ID: id, Tar: true, verified: true}
	var f fsys.File
	f, m.TarSize, m.DiffID, err = createTar(ctx, s.fs, tmp+"/"+tarFile, items, writeRoot)
	if err != nil {
		return "", err
	}
	// While that is brought to the disk, which is the disk's work, the rest is made, which is the processor's.
	synced := make(chan error, 1)
	go func() { synced <- syncAll(f) }()
	if m.ID == "" {
		m.ID = ID("d" + m.DiffID.Encoded())
	}
	if !writeRoot {
		m.Below = map[string]string{belowKey(belowStat, ""): ""}
	}
	x, err := indexOf(items)
	if err == nil {
		err = s.finishTar(tmp, m, x)
	}
	if err := errors.Join(<-synced, err); err != nil {
		return "", err
	}
	s.add(m.Size)
	return m.ID, s.install(tmp, m, x, true)
}

// finishTar writes what stands beside a finished layer.tar in tmp, synced: the index, the EROFS image and the info.
func (s *Store) finishTar(tmp string, m *meta, x *index.Index) error {
	files, err := s.writeBeside(tmp, m, x)
	return errors.Join(err, syncAll(files...))
}

// writeBeside is finishTar without the sync. It returns the open files, after an error too.
func (s *Store) writeBeside(tmp string, m *meta, x *index.Index) (files []fsys.File, err error) {
	write := func(name string, b []byte) error {
		f, err := s.fs.OpenFile(tmp+"/"+name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		files = append(files, f)
		_, err = f.Write(b)
		return err
	}
	m.Content = x.Digest()
	if err := write(indexFile, x.Encode()); err != nil {
		return files, err
	}
	if !s.opt.NoEROFS && !m.Tree {
		img, err := encodeEROFS(x, m.TarSize)
		var no *errNoEROFS
		if err != nil && !errors.As(err, &no) {
			return files, err
		}
		if err == nil {
			if err := write(erofsFile, img); err != nil {
				return files, err
			}
		}
	}
	m.Size += diskUsage(tmp)
	info, err := encodeMeta(m)
	if err != nil {
		return files, err
	}
	return files, write(infoFile, info)
}

// heldLayer is a layer that is only in memory, until someone needs it on disk.
type heldLayer struct {
	index     *index.Index
	items     []tarItem // beside the index's entries; nil when openPath opens them
	openPath  func(path string) (io.ReadCloser, error)
	writeRoot bool
}

func (h *heldLayer) open(path string) (io.ReadCloser, error) {
	e, ok := h.index.Lookup(path)
	if !ok || e.Type != index.File {
		return nil, fmt.Errorf("open %q: %w", path, os.ErrNotExist)
	}
	if e.HardLink != "" {
		path = e.HardLink
	}
	f := draftFile{entry: e}
	if h.openPath != nil {
		f.open = func() (io.ReadCloser, error) { return h.openPath(path) }
	} else {
		i, _ := h.index.Pos(path)
		f.open = h.items[i].open
	}
	return f.reader()
}

// Hold keeps the layer in memory only, under an ID made from its content. Index, Stat and OpenFile work at once;
// Mount, Pack, OpenTar and Ensure write it to disk. The open functions of its files must stay good until then. A
// file without a Digest is an error.
func (d *Draft) Hold(ctx context.Context) (ID, error) {
	items, writeRoot, err := d.items()
	if err != nil {
		return "", fmt.Errorf("hold layer: %w", err)
	}
	for i := range items {
		e := &items[i].entry
		if e.Type == index.File && e.Size == 0 {
			e.Digest = emptyDigest
		}
		if e.Type == index.File && e.Digest == "" {
			return "", fmt.Errorf("hold layer: file %q has not been hashed", e.Path)
		}
	}
	x, err := indexOf(items)
	if err != nil {
		return "", fmt.Errorf("hold layer: %w", err)
	}
	sum := sha256.Sum256(x.Encode())
	id := ID("h" + hex.EncodeToString(sum[:]))
	if _, err := d.s.meta(id); err == nil {
		return id, nil
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	// The newest takes the place of an equal one: the files of an older one may be gone (a directory that a client sent
	// for one build), those of the newest are there now.
	d.s.held[id] = &heldLayer{index: x, items: items, writeRoot: writeRoot}
	return id, nil
}

// Ensure writes the held ones among the layers to disk, and waits for the indexes of those that were just committed: when it
// has returned, a record may name them. An ID that does not exist is an error that wraps ErrNotFound.
func (s *Store) Ensure(ctx context.Context, ids ...ID) error {
	for _, id := range ids {
		if err := s.indexed(ctx, id); err != nil {
			return err
		}
		if _, err := s.meta(id); err == nil {
			continue
		}
		if err := s.ensure(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) ensure(ctx context.Context, id ID) error {
	defer s.locks.lock(id)()
	if _, err := s.meta(id); err == nil {
		return nil
	}
	h := s.heldLayer(id)
	if h == nil {
		return fmt.Errorf("layer %s: %w", id, ErrNotFound)
	}
	if _, err := s.commitTar(ctx, id, h.tarItems(), h.writeRoot); err != nil {
		return fmt.Errorf("write layer %s: %w", id, err)
	}
	s.mu.Lock()
	delete(s.held, id)
	s.mu.Unlock()
	return nil
}
