// SPDX-License-Identifier: Apache-2.0

// Package layer keeps immutable file trees, each a difference to what lies below it.
//
// A layer has one of two forms, and may have both. In tar form it is one uncompressed tar beside a small EROFS
// image that holds only metadata and points into the tar; the kernel mounts the pair as it is, so nothing is ever
// unpacked. In tree form it is a directory: what a step left in its overlay upper directory, taken over by
// rename. Every layer has an index.Index. A layer may also be remote: known, with its bytes elsewhere until somebody needs
// them (remote.go). A fourth state, held, exists only in memory (Draft.Hold).
//
// On disk, below the store's directory:
//
//	<id>/info.json    what Stat says, and what the layer was made of
//	<id>/index        the encoded index.Index
//	<id>/layer.tar    the tar, byte for byte as its diff ID says
//	<id>/layer.erofs  metadata of the tar form, made from the index
//	<id>/tree         the directory of the tree form
//	<id>/more-dirs    which directories of the tree the index was made without
//	mnt/<id>          where the tar form is mounted
//	uppers/<random>   upper and work directories of running steps
//	tmp/<random>      layers being written or deleted; emptied by Open
//	synced            which committed trees and remote layers are known to be on disk
//
// A layer becomes visible by the rename of its finished directory. The tar form is synced to disk before that. A
// committed tree is not, nor what is known of a remote layer: after a reboot they do not exist, unless Sync was called (durable.go). The order of all writes, and why it
// is safe, is in docs/store.md.
package layer

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// ID names a layer in this store. It is opaque and safe as a file name.
type ID string

// ErrNotFound is what errors about a layer that the store does not have wrap.
var ErrNotFound = errors.New("no such layer")

// The values of Info.Form.
const (
	FormTar  = "tar"
	FormTree = "tree"
	FormHeld = "held"
	// FormRemote is a layer whose bytes are elsewhere: Mount and all others that need them bring it here.
	FormRemote = "remote"
)

// Info describes a layer.
type Info struct {
	ID ID
	// DiffID is the digest of the layer's tar; "" as long as it has none.
	DiffID digest.Digest
	// TarSize is the length of that tar in bytes; 0 as long as it has none, or it is remote and nobody has said.
	TarSize int64
	// Content is the digest of the layer's index: what is in it, whatever its form (index.Index.Digest); "" for a remote
	// layer without one.
	Content digest.Digest
	// Size is what the layer occupies on disk, in bytes; 0 for a held one.
	Size int64
	// Form is how the layer is mounted: FormTar, FormTree or FormHeld; or FormRemote.
	Form string
	// Where says, of a remote layer, how to bring it here; nil for any other.
	Where *Where
}

// Where says how a remote layer can be brought here.
type Where struct {
	// Origins are where its bytes are, as AddRemote was told, the latest first.
	Origins []string
	// Below is what it lies on: it is needed too.
	Below []ID
}

// Files is a Tree whose regular files can be read.
type Files interface {
	index.Tree
	// OpenFile opens the regular file at path, without following symlinks.
	OpenFile(ctx context.Context, path string) (io.ReadCloser, error)
}

// Options of a Store.
type Options struct {
	// NoEROFS makes the store use trees only, as it does by itself where EROFS cannot be mounted.
	NoEROFS bool
	// Log takes what is worth knowing but no error of any call. nil means slog.Default().
	Log *slog.Logger
	// FS is how the store writes; nil means fsys.OS.
	FS fsys.FS
	// BootID is the boot of the machine; "" asks the kernel.
	BootID string
	// Quarantine is where damaged layers go; without one they are removed.
	Quarantine string
}

// Store is a directory of layers, used by one process at a time. Its methods may be called concurrently.
type Store struct {
	dir string
	opt Options
	log *slog.Logger
	fs  fsys.FS

	probe func() StoreInfo
	used  func(ID)          // see OnUse
	added func(bytes int64) // see OnAdd
	fetch map[string]Fetch  // by scheme; see OnFetch
	slots chan struct{}     // full when no more tars may arrive at once

	mu     sync.Mutex
	metas  map[ID]*meta
	held   map[ID]*heldLayer
	mounts map[ID]string // where a layer in tar form is mounted
	// indexing has the trees whose index is being made, and those of which it could not be.
	indexing map[ID]*indexing
	// treeUses counts, for a layer in tree form, the Mounts without their Unmount.
	treeUses map[ID]int
	hopeless map[ID]error // layers whose info is lost
	fetches  map[ID]*fetching
	all      bool // metas has every layer on disk
	gone     int  // deletions so far
	closed   bool

	boot    boot
	indexes indexCache
	locks   idLocks        // one mount, pack, write or deletion of a layer at a time
	healing idLocks        // one repair of an index or info at a time; taken inside locks, if both are
	work    sync.WaitGroup // deletions, and the making of indexes, in the background
}

// meta is what info.json holds.
type meta struct {
	ID      ID            `json:"id"`
	DiffID  digest.Digest `json:"diffID,omitempty"`
	Content digest.Digest `json:"content,omitempty"`
	Size    int64         `json:"size"`
	// Tar and Tree say which forms are there. A layer with both is mounted as a tree.
	Tar  bool `json:"tar,omitempty"`
	Tree bool `json:"tree,omitempty"`
	// TarSize is the length of layer.tar.
	TarSize int64 `json:"tarSize,omitempty"`
	// Remote says that no form is there. Chain is what the layer lies on, Origins where its bytes are. There is an index if Content
	// is set.
	Remote  bool     `json:"remote,omitempty"`
	Chain   []ID     `json:"chain,omitempty"`
	Origins []string `json:"origins,omitempty"`
	// Extracted is what the directory beside a tar occupies that was extracted because the tar could not be mounted.
	Extracted int64 `json:"extracted,omitempty"`
	// Below is what the layers below answered while the tar was read: the same tar over other answers makes
	// another layer. See belowReader.
	Below map[string]string `json:"below,omitempty"`
	// Boot and Number are set while the layer, but for its tar, may not be on disk yet: see durable.go.
	Boot   string `json:"boot,omitempty"`
	Number uint64 `json:"number,omitempty"`
	// Unfinished says that there is no index yet: then it is no layer, unless it is in Store.indexing.
	Unfinished bool `json:"unfinished,omitempty"`
	// verified says that this process has seen that the tar is that of its diff ID: it has written or read all of it.
	verified bool
	// MoreDirs says that the tree has directories that the index does not have, because nothing has changed in them.
	MoreDirs bool `json:"moreDirs,omitempty"`
}

func (m *meta) info() Info {
	form := FormTree
	var where *Where
	switch {
	case m.Remote:
		form, where = FormRemote, &Where{Origins: m.Origins, Below: m.Chain}
	case m.Tar && !m.Tree:
		form = FormTar
	}
	return Info{
		ID: m.ID, DiffID: m.DiffID, TarSize: m.TarSize, Content: m.Content, Size: m.Size + m.Extracted, Form: form, Where: where,
	}
}

const (
	infoFile  = "info.json"
	indexFile = "index"
	tarFile   = "layer.tar"
	erofsFile = "layer.erofs"
	treeDir   = "tree"
)

// Open opens the store in dir, which is created when missing. What a killed process left behind (mounts, files
// that were being written, upper directories) is taken away. The caller must hold the lock of the state directory.
func Open(dir string, opt Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	s := &Store{
		dir: dir, opt: opt, log: opt.Log, fs: opt.FS,
		metas: map[ID]*meta{}, held: map[ID]*heldLayer{}, mounts: map[ID]string{}, treeUses: map[ID]int{}, hopeless: map[ID]error{},
		indexing: map[ID]*indexing{}, fetches: map[ID]*fetching{}, fetch: map[string]Fetch{}, slots: make(chan struct{}, fetchSlots),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.fs == nil {
		s.fs = fsys.OS
	}
	s.probe = s.probeOnce()
	s.indexes.limit = 1 << 19
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	if err := s.openBoot(); err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	// Mounts first: a sweep must never reach into one.
	if err := s.unmountLeftovers(); err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	for _, sub := range []string{"tmp", "uppers", "mnt"} {
		if err := s.sweep(sub); err != nil {
			return nil, fmt.Errorf("layer store: sweep: %w", err)
		}
	}
	return s, nil
}

// sweep empties a directory of things that do not outlive a process, in the background.
func (s *Store) sweep(sub string) error {
	path := filepath.Join(s.dir, sub)
	entries, err := os.ReadDir(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	for _, e := range entries {
		old := filepath.Join(path, e.Name())
		if sub == "mnt" {
			// Plain remove: on a mount point that could not be unmounted it fails instead of emptying the layer.
			if err := os.Remove(old); err != nil {
				return err
			}
			continue
		}
		s.removeAll(old)
	}
	return nil
}

// removeAll removes a directory tree in the background. Close waits for it.
func (s *Store) removeAll(path string) {
	s.work.Go(func() {
		if err := s.fs.RemoveAll(path); err != nil {
			s.log.Warn("layer store: remove", "path", path, "err", err)
		}
	})
}

// Close unmounts every layer that this store has mounted and waits for deletions and for indexes that are being made. Held
// layers are gone.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, f := range s.fetches {
		f.cancel(errors.New("the store is being closed"))
	}
	mounts := s.mounts
	s.mounts = map[ID]string{}
	s.mu.Unlock()
	var errs []error
	for id, dir := range mounts {
		if err := unmount(dir); err != nil {
			errs = append(errs, fmt.Errorf("layer %s: %w", id, err))
		}
	}
	s.work.Wait()
	errs = append(errs, s.boot.close())
	return errors.Join(errs...)
}

// valid says whether id has the form of an ID: only those ever become part of a path.
func (id ID) valid() bool {
	if len(id) < 2 || len(id) > 128 || !strings.ContainsRune("dthr", rune(id[0])) {
		return false
	}
	for _, c := range id[1:] {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c == '-') {
			return false
		}
	}
	return true
}

func (s *Store) path(id ID, name string) string {
	return filepath.Join(s.dir, string(id), name)
}

// Exists reports whether a layer is on disk or held. Unlike Stat it does not count as a use. A layer that cannot be read just
// now exists: whoever asks may be about to forget what names it.
func (s *Store) Exists(id ID) bool {
	s.mu.Lock()
	held := s.held[id] != nil
	s.mu.Unlock()
	if held || s.isIndexing(id) {
		return true
	}
	_, err := s.load(id)
	return err == nil || !isGone(err)
}

// load returns what info.json of a layer on disk says. A layer whose info is missing or damaged does not exist: the error wraps
// ErrNotFound. Any other error (too many open files) says that nobody knows; see isGone.
func (s *Store) load(id ID) (*meta, error) {
	if !id.valid() {
		return nil, fmt.Errorf("layer %q: %w", id, ErrNotFound)
	}
	s.mu.Lock()
	m, gone := s.metas[id], s.gone
	s.mu.Unlock()
	if m != nil {
		return m, nil
	}
	m, err := readMeta(s.path(id, infoFile), id)
	if err != nil && isDamage(err) {
		m, err = s.healInfo(id, err)
	}
	switch {
	case err == nil:
	case !isDamage(err):
		return nil, fmt.Errorf("layer %s: %w", id, err)
	case errors.Is(err, unix.EIO):
		s.log.Warn("layer store: unreadable layer counts as missing", "layer", id, "err", err)
		return nil, fmt.Errorf("layer %s: %w: %w", id, ErrNotFound, err)
	default:
		if !errors.Is(err, os.ErrNotExist) {
			s.log.Warn("layer store: damaged layer counts as missing", "layer", id, "err", err)
		}
		return nil, fmt.Errorf("layer %s: %w", id, ErrNotFound)
	}
	if m.Unfinished {
		return nil, fmt.Errorf("layer %s: %w", id, ErrNotFound)
	}
	if !s.boot.trusts(m) {
		if !m.Tar {
			s.log.Info("layer store: a layer that was not on disk when the machine went down counts as missing", "layer", id)
			return nil, fmt.Errorf("layer %s: %w", id, ErrNotFound)
		}
		m.Tree = false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := s.metas[id]; have != nil {
		return have, nil
	}
	if s.gone != gone {
		// What was read may have been deleted meanwhile.
		if _, err := os.Lstat(s.path(id, infoFile)); err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, ErrNotFound)
		}
	}
	s.metas[id] = m
	return m, nil
}

func (s *Store) heldLayer(id ID) *heldLayer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[id]
}

// Stat describes a layer. The error wraps ErrNotFound when there is none.
func (s *Store) Stat(ctx context.Context, id ID) (Info, error) {
	if err := s.indexed(ctx, id); err != nil {
		return Info{}, err
	}
	m, err := s.meta(id)
	if err == nil {
		return m.info(), nil
	}
	if h := s.heldLayer(id); h != nil {
		return Info{ID: id, Content: h.index.Digest(), Form: FormHeld}, nil
	}
	return Info{}, err
}

// Index returns a layer's table of contents. One that is missing or damaged, or of another version, is made again from the
// layer's files (heal.go).
func (s *Store) Index(ctx context.Context, id ID) (*index.Index, error) {
	if x := s.indexes.get(id); x != nil {
		return x, nil
	}
	if h := s.heldLayer(id); h != nil {
		return h.index, nil
	}
	if err := s.indexed(ctx, id); err != nil {
		return nil, err
	}
	m, err := s.meta(id)
	if err != nil {
		return nil, err
	}
	if m.Remote {
		if x := s.remoteIndex(m); x != nil {
			s.cacheIndex(m, x)
			return x, nil
		}
		if m, err = s.here(ctx, id); err != nil {
			return nil, err
		}
	}
	b, err := os.ReadFile(s.path(id, indexFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	var x *index.Index
	if err == nil {
		x, err = index.Decode(b)
	}
	if err != nil {
		return s.healIndex(ctx, id, err)
	}
	s.cacheIndex(m, x)
	return x, nil
}

// cacheIndex keeps the index of m in memory, unless m is something else by now: a remote layer that has come has another one,
// which says where in the tar the bytes are.
func (s *Store) cacheIndex(m *meta, x *index.Index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.metas[m.ID]; now != nil && now.Remote == m.Remote {
		s.indexes.put(m.ID, x)
	}
}

// OpenFile opens the regular file at path in a layer; nothing is mounted for it. A path that is missing or no
// regular file is an error that wraps os.ErrNotExist.
func (s *Store) OpenFile(ctx context.Context, id ID, path string) (io.ReadCloser, error) {
	if h := s.heldLayer(id); h != nil {
		return h.open(path)
	}
	if err := s.indexed(ctx, id); err != nil {
		return nil, err
	}
	m, err := s.here(ctx, id)
	if err != nil {
		return nil, err
	}
	x, err := s.Index(ctx, id)
	if err != nil {
		return nil, err
	}
	e, ok := x.Lookup(path)
	if !ok || e.Type != index.File {
		return nil, fmt.Errorf("layer %s: open %q: %w", id, path, os.ErrNotExist)
	}
	switch {
	case e.Size == 0:
		return io.NopCloser(eof{}), nil
	case m.Tree:
		root, err := os.OpenRoot(s.path(id, treeDir))
		if errors.Is(err, os.ErrNotExist) {
			if now, merr := s.meta(id); merr == nil && !now.Tree { // the tree has gone a moment ago
				return s.OpenFile(ctx, id, path)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		defer root.Close()
		f, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
		if errors.Is(err, os.ErrNotExist) {
			if now, merr := s.meta(id); merr == nil && !now.Tree { // it went after the root was opened
				return s.OpenFile(ctx, id, path)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		return f, nil
	default:
		f, err := os.Open(s.path(id, tarFile))
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		return &section{SectionReader: io.NewSectionReader(f, e.Offset, e.Size), f: f}, nil
	}
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// section is a part of a file that closes the file.
type section struct {
	*io.SectionReader
	f *os.File
}

func (s *section) Close() error { return s.f.Close() }

// Delete removes a layer, unmounting it first. Its bytes go in the background. Nobody may be using it; a layer
// that does not exist is no error.
func (s *Store) Delete(ctx context.Context, id ID) error {
	if !id.valid() {
		return nil
	}
	s.cancelIndexing(id)
	s.cancelFetch(id)
	defer s.locks.lock(id)()
	trash, _, err := s.vanish(id, func(ID) bool { return true })
	if trash != "" {
		s.removeAll(trash)
	}
	if err != nil {
		return fmt.Errorf("delete layer %s: %w", id, err)
	}
	return nil
}

// Walk calls fn for every layer, held ones included, in no particular order, until fn returns an error. Trees whose index is
// being made are left out. A layer that cannot be read, though it is not damaged, is an error.
func (s *Store) Walk(ctx context.Context, fn func(Info) error) error {
	if err := s.loadAll(); err != nil {
		return err
	}
	s.mu.Lock()
	infos := make([]Info, 0, len(s.metas)+len(s.held))
	for _, m := range s.metas {
		infos = append(infos, m.info())
	}
	for id, h := range s.held {
		if s.metas[id] == nil {
			infos = append(infos, Info{ID: id, Content: h.index.Digest(), Form: FormHeld})
		}
	}
	s.mu.Unlock()
	for _, info := range infos {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// errUnread is what the error of loadAll wraps when all layers are known but those that cannot be read just now.
var errUnread = errors.New("a layer cannot be read now, so that nobody knows what is in use ('slipway cache fsck' says more)")

// loadAll reads the info of every layer on disk once.
func (s *Store) loadAll() error {
	s.mu.Lock()
	done := s.all
	s.mu.Unlock()
	if done {
		return nil
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("layer store: %w", err)
	}
	var unread error
	for _, e := range entries {
		if id := ID(e.Name()); id.valid() {
			if _, err := s.load(id); err != nil && !isGone(err) { // a damaged one has been logged
				unread = err
			}
		}
	}
	if unread != nil {
		return fmt.Errorf("layer store: %w: %w", errUnread, unread) // and the next one tries again
	}
	s.mu.Lock()
	s.all = true
	s.mu.Unlock()
	s.dropTrees()
	return nil
}

// tmpName returns a fresh name below tmp.
func (s *Store) tmpName() string {
	return filepath.Join(s.dir, "tmp", randomName())
}

func randomName() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// newTmp makes a directory for a layer to be put together in.
func (s *Store) newTmp() (string, error) {
	dir := s.tmpName()
	return dir, s.fs.Mkdir(dir, 0o700)
}

// install makes the layer in tmp visible under m.ID. If there is one of that ID already, tmp is dropped and that
// one counts. durable says that the files have been synced and the rename must be too.
func (s *Store) install(tmp string, m *meta, x *index.Index, durable bool) error {
	s.use(m.ID)
	if durable {
		if err := s.fs.Sync(tmp); err != nil {
			return err
		}
	}
	err := s.show(tmp, m)
	for errors.Is(err, syscall.EEXIST) || errors.Is(err, syscall.ENOTEMPTY) {
		if _, merr := s.meta(m.ID); merr == nil {
			s.removeAll(tmp)
			return nil
		} else if !errors.Is(merr, ErrNotFound) {
			return merr
		}
		// What is there is damaged: out of the way with it. Or it is just being deleted, and gone by now.
		trash := s.tmpName()
		if err := s.fs.Rename(s.path(m.ID, ""), trash); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		} else if err == nil {
			s.removeAll(trash)
		}
		err = s.show(tmp, m)
	}
	if err != nil {
		return err
	}
	if durable {
		if err := s.fs.Sync(s.dir); err != nil {
			return err
		}
	}
	if x != nil { // of a remote layer it may not be known
		s.indexes.put(m.ID, x)
	}
	return nil
}

// show gives a finished layer its name, and makes it known in the same moment: whoever takes a broken layer away under that
// name (removeBroken) does not take this one.
func (s *Store) show(tmp string, m *meta) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.fs.Rename(tmp, s.path(m.ID, "")); err != nil {
		return err
	}
	s.metas[m.ID] = m
	return nil
}

// writeFile writes a small file, synced if durable.
func (s *Store) writeFile(path string, b []byte, durable bool) error {
	return fsys.WriteFile(s.fs, path, b, 0o600, durable)
}

func (s *Store) writeMeta(path string, m *meta, durable bool) error {
	b, err := encodeMeta(m)
	if err != nil {
		return err
	}
	return s.writeFile(path, b, durable)
}

func encodeMeta(m *meta) ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "\t")
	return append(b, '\n'), err
}

// diskUsage returns what the files right inside dir occupy.
func diskUsage(dir string) int64 {
	var total int64
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(dir, e.Name()), &st) == nil {
			total += st.Blocks * 512
		}
	}
	return total
}

// treeUsage returns what the files in dir, at any depth, occupy. What vanishes meanwhile counts nothing.
func treeUsage(dir string) int64 {
	var total int64
	linked := map[uint64]bool{}
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || unix.Lstat(path, &st) != nil || st.Nlink > 1 && linked[st.Ino] {
			return nil
		}
		linked[st.Ino] = true
		total += st.Blocks * 512
		return nil
	})
	return total
}

// idLocks is a lock for each ID that is being worked on.
type idLocks struct {
	mu   sync.Mutex // guards byID and the counts in it
	byID map[ID]*idLock
}

type idLock struct {
	sync.Mutex
	users int
}

// lock takes the lock of id and returns what gives it back.
func (l *idLocks) lock(id ID) (unlock func()) {
	l.mu.Lock()
	one := l.byID[id]
	if one == nil {
		defer l.mu.Unlock()
		return l.take(id)
	}
	one.users++
	l.mu.Unlock()
	one.Lock()
	return func() { l.unlock(id, one) }
}

// take takes a lock that nobody has. mu is held.
func (l *idLocks) take(id ID) (unlock func()) {
	if l.byID == nil {
		l.byID = map[ID]*idLock{}
	}
	one := &idLock{users: 1}
	one.Lock() // nobody else knows it
	l.byID[id] = one
	return func() { l.unlock(id, one) }
}

func (l *idLocks) unlock(id ID, one *idLock) {
	one.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.users--; one.users == 0 {
		delete(l.byID, id)
	}
}
