// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/index"
)

// How a remote layer comes here. Those who want it at the same time wait for one fetch, which ends when nobody waits any more.
// The tar is written, hashed and read while it arrives; what only the layers below can say is asked at the end, so that any
// number of layers of a stack come at once. The parts are put together in a directory below tmp, synced, and renamed into the
// layer's own: tar, EROFS image and tree, then the index, and last the info, which alone says that they are there.

// Fetch opens the uncompressed tar of a remote layer at origin, one of info.Where.Origins. The bytes are verified by the store. An
// error of the stream that wraps ErrDigest says that it was wrong on the way: it is asked for once more. ctx has the values of
// the one who asked first, so that credentials can be carried by it; it is good until the stream is closed.
type Fetch func(ctx context.Context, info Info, origin string) (io.ReadCloser, error)

// Accepter is a stream that wants to know, before it is closed, that it was the tar that was asked for.
type Accepter interface{ Accept() error }

// OnFetch sets the function that fetches from origins which begin with scheme and a colon. Call it before the store is used.
func (s *Store) OnFetch(scheme string, fn Fetch) { s.fetch[scheme] = fn }

// fetchSlots is how many tars arrive at once: enough for the wire and for every processor.
var fetchSlots = max(4, runtime.GOMAXPROCS(0))

// fetching is a layer that is coming.
type fetching struct {
	waiting int // guarded by Store.mu
	cancel  context.CancelCauseFunc
	done    chan struct{}
	err     error // good once done is closed
}

// Materialise brings the remote ones among the layers here, several at once, lowest first; of others it only says whether they
// exist. An error that wraps ErrUnavailable is one of fetching; one that wraps ErrFalseIndex says that the layer is gone. The
// others are brought to their end, unless ctx ends.
func (s *Store) Materialise(ctx context.Context, ids ...ID) error {
	var group errgroup.Group
	for _, id := range ids {
		if remote, err := s.isRemote(id); err != nil {
			return errors.Join(err, group.Wait())
		} else if remote {
			group.Go(func() error { return s.bring(ctx, id) })
		}
	}
	return group.Wait()
}

// isRemote says whether the bytes of a layer are elsewhere.
func (s *Store) isRemote(id ID) (bool, error) {
	m, err := s.meta(id)
	if err != nil {
		if s.heldLayer(id) != nil || s.isIndexing(id) {
			return false, nil
		}
		return false, err
	}
	return m.Remote, nil
}

// here is meta for somebody who needs the bytes: it brings a remote layer here first.
func (s *Store) here(ctx context.Context, id ID) (*meta, error) {
	m, err := s.meta(id)
	if err != nil || !m.Remote {
		return m, err
	}
	if err := s.bring(ctx, id); err != nil {
		return nil, err
	}
	m, err = s.meta(id)
	if err == nil && m.Remote {
		return nil, fmt.Errorf("layer %s: %w: it was deleted a moment ago", id, ErrNotFound)
	}
	return m, err
}

// bring waits for a remote layer to come, and starts that if nobody has.
func (s *Store) bring(ctx context.Context, id ID) error {
	for {
		if remote, err := s.isRemote(id); err != nil || !remote {
			return err
		}
		f, joined, err := s.join(ctx, id)
		if err != nil {
			return err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			s.leave(f, context.Cause(ctx))
			return context.Cause(ctx)
		}
		// What somebody else was refused, or gave up, may be given to us.
		if f.err == nil || !joined || errors.Is(f.err, ErrFalseIndex) {
			return f.err
		}
	}
}

// join returns the fetch of a layer, which it starts when there is none.
func (s *Store) join(ctx context.Context, id ID) (f *fetching, joined bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, fmt.Errorf("layer %s: the store is closed", id)
	}
	if f := s.fetches[id]; f != nil {
		f.waiting++
		return f, true, nil
	}
	run, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f = &fetching{waiting: 1, cancel: cancel, done: make(chan struct{})}
	s.fetches[id] = f
	s.work.Go(func() {
		defer close(f.done)
		err := s.materialise(run, id)
		cancel(err)
		s.mu.Lock()
		defer s.mu.Unlock()
		f.err = err
		if s.fetches[id] == f {
			delete(s.fetches, id)
		}
	})
	return f, false, nil
}

// leave takes one away from those who wait. The last one stops the fetch and waits until it has stopped.
func (s *Store) leave(f *fetching, cause error) {
	s.mu.Lock()
	f.waiting--
	last := f.waiting == 0
	if last {
		f.cancel(cause)
		for id, other := range s.fetches {
			if other == f {
				delete(s.fetches, id) // who comes now begins anew
			}
		}
	}
	s.mu.Unlock()
	if last {
		<-f.done
	}
}

// cancelFetch stops the fetch of a layer that is to be deleted.
func (s *Store) cancelFetch(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.fetches[id]; f != nil {
		f.cancel(errDeleted)
	}
}

// materialise makes a tar layer of a remote one.
func (s *Store) materialise(ctx context.Context, id ID) error {
	m, err := s.meta(id)
	if err != nil || !m.Remote {
		return err
	}
	err = s.fromAny(ctx, m)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if errors.Is(err, ErrFalseIndex) {
		s.log.Warn("layer store: a layer is refused", "layer", id, "err", err)
		err = errors.Join(err, s.Forget(context.WithoutCancel(ctx), id))
	}
	if err != nil {
		return fmt.Errorf("fetch layer %s: %w", id, err)
	}
	return nil
}

// fromAny brings a layer here from the first of its origins that gives it.
func (s *Store) fromAny(ctx context.Context, m *meta) error {
	var failed []error
	for _, origin := range m.Origins {
		err := s.from(ctx, m, origin)
		if errors.Is(err, ErrDigest) && ctx.Err() == nil {
			s.log.Info("layer store: a layer that came damaged is fetched once more", "layer", m.ID, "err", err)
			err = s.from(ctx, m, origin)
		}
		var bad *originError
		if err == nil || !errors.As(err, &bad) || ctx.Err() != nil {
			return err
		}
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return fmt.Errorf("%w: nobody has said where it is", ErrUnavailable)
	}
	return errors.Join(failed...)
}

// originError is that of an origin: another one may do better.
type originError struct{ cause error }

func (e *originError) Error() string   { return fmt.Sprintf("%v: %v", ErrUnavailable, e.cause) }
func (e *originError) Unwrap() []error { return []error{ErrUnavailable, e.cause} }

// from brings a layer here from one place.
func (s *Store) from(ctx context.Context, m *meta, origin string) error {
	tmp, err := s.newTmp()
	if err != nil {
		return err
	}
	defer s.removeAll(tmp)
	below := &awaited{need: func() (Files, error) { return s.belowRemote(ctx, m) }}
	u := newUnpacker(nil)
	if len(m.Chain) > 0 {
		u.below = below
	}
	u.fs, u.suspicious = s.fs, true
	now := &meta{ID: m.ID, Tar: true, DiffID: m.DiffID, verified: true}
	if now.TarSize, err = s.takeRemote(ctx, m, origin, u, tmp, below); err != nil {
		return err
	}
	items, err := u.items()
	if err := cmp.Or(below.failed(), err); err != nil {
		return err
	}
	x, err := indexOf(items)
	if err != nil {
		return err
	}
	if given := s.remoteIndex(m); given != nil {
		if path, ok := sameFiles(given, x); !ok {
			return fmt.Errorf("%w: %q", ErrFalseIndex, "/"+path)
		}
	}
	if err := s.completeTar(ctx, u, tmp, now, x); err != nil {
		return err
	}
	return s.arrive(tmp, now, x)
}

// takeRemote copies the tar of a remote layer to tmp while it arrives.
func (s *Store) takeRemote(ctx context.Context, m *meta, origin string, u *unpacker, tmp string, below *awaited) (size int64, err error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	// Whoever waits for another layer must not keep it from coming.
	below.release = sync.OnceFunc(func() { <-s.slots })
	defer below.release()
	scheme, _, _ := strings.Cut(origin, ":")
	fetch := s.fetch[scheme]
	if fetch == nil {
		return 0, &originError{fmt.Errorf("nobody can fetch from %q", origin)}
	}
	rc, err := fetch(ctx, m.info(), origin)
	if err != nil {
		return 0, &originError{err}
	}
	// To be closed is to be through with everything: an origin may keep what it has sent.
	defer func() {
		if cerr := rc.Close(); err == nil && cerr != nil {
			err = &originError{cerr}
		}
	}()
	var r io.Reader = arriving{rc}
	if m.TarSize > 0 {
		r = io.LimitReader(r, m.TarSize+1)
	}
	size, diffID, err := u.take(ctx, s.fs, r, filepath.Join(tmp, tarFile))
	if below.failed() != nil {
		return 0, below.failed()
	}
	if diffID != "" && diffID != m.DiffID {
		return 0, &originError{fmt.Errorf("%w: the tar's is %s, of %d bytes", ErrDigest, diffID, size)}
	}
	if a, ok := rc.(Accepter); ok && err == nil {
		err = a.Accept()
	}
	return size, err
}

// arriving says of the errors of a stream that they are those of fetching.
type arriving struct{ io.Reader }

func (a arriving) Read(p []byte) (int, error) {
	n, err := a.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = &originError{err}
	}
	return n, err
}

// belowRemote returns what a remote layer lies on. Where its index is known, that of the others is good enough: what comes of it
// is compared. Otherwise they have to come too.
func (s *Store) belowRemote(ctx context.Context, m *meta) (Files, error) {
	if m.Content == "" {
		if err := s.Materialise(ctx, m.Chain...); err != nil {
			return nil, fmt.Errorf("what it lies on: %w", err)
		}
	}
	stack, err := s.stack(ctx, m.Chain)
	if err != nil {
		return nil, fmt.Errorf("what it lies on: %w", err)
	}
	return stack, nil
}

// awaited is a tree that is got when somebody looks at it.
type awaited struct {
	need    func() (Files, error)
	release func() // called before anybody waits

	mu   sync.Mutex // guards what follows
	tree Files      // nil as long as nobody has looked
	err  error
}

func (a *awaited) get() Files {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.tree == nil {
		a.release()
		if a.tree, a.err = a.need(); a.err != nil {
			a.tree = nothing{index.Merge()}
		}
	}
	return a.tree
}

// failed returns why the tree could not be had, if anybody has looked.
func (a *awaited) failed() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// Lookup, ReadDir and OpenFile are those of the tree.
func (a *awaited) Lookup(path string) (index.Entry, bool) { return a.get().Lookup(path) }

func (a *awaited) ReadDir(path string) []index.Entry { return a.get().ReadDir(path) }

func (a *awaited) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	return a.get().OpenFile(ctx, path)
}

// arrive makes the finished parts in tmp those of a remote layer, which is one no more.
func (s *Store) arrive(tmp string, m *meta, x *index.Index) (err error) {
	defer s.locks.lock(m.ID)()
	old, err := s.meta(m.ID)
	if err != nil || !old.Remote {
		return err // deleted meanwhile, or here
	}
	shown := false
	defer func() {
		if err != nil && !shown {
			for _, name := range []string{tarFile, erofsFile, treeDir} {
				s.removeAll(s.path(m.ID, name))
			}
		}
	}()
	if err := s.dropLeftover(m.ID); err != nil { // of a process that was killed here
		return err
	}
	for _, name := range []string{tarFile, erofsFile, treeDir, indexFile, infoFile} {
		err := s.fs.Rename(filepath.Join(tmp, name), s.path(m.ID, name))
		if err != nil && !(errors.Is(err, os.ErrNotExist) && (name == erofsFile || name == treeDir)) {
			return err
		}
	}
	shown = true
	s.mu.Lock()
	if s.metas[m.ID] != nil {
		s.metas[m.ID] = m
		s.indexes.put(m.ID, x)
	}
	s.mu.Unlock()
	if err := s.fs.Sync(s.path(m.ID, "")); err != nil || s.boot.covers(old) {
		return err
	}
	return s.fs.Sync(s.dir) // what was remote may not have its name on disk yet
}

// sameFiles says whether two indexes are of the same files, and if not, names a path where they differ. Times below a second
// count only if both have them (a tree has them, its tar does not); those of directories do not, for a tar need not name
// them. Where the bytes stand in the tar is for the store to know.
func sameFiles(given, is *index.Index) (path string, ok bool) {
	for i := range min(given.Len(), is.Len()) {
		g, x := given.At(i), is.At(i)
		switch {
		case g.Path != x.Path, differs(&g, &x) != "":
			return x.Path, false
		case g.Type == index.Dir, g.Type == index.Whiteout, g.ModTime == x.ModTime:
			continue
		}
		if sec, _ := splitTime(g.ModTime); sec*1e9 != x.ModTime {
			return x.Path, false
		}
	}
	if given.Len() != is.Len() {
		longer := given
		if is.Len() > given.Len() {
			longer = is
		}
		return longer.Path(min(given.Len(), is.Len())), false
	}
	return "", given.Digest() == is.Digest()
}

// stacked is several layers on top of each other, lowest first.
type stacked struct {
	*index.View
	s   *Store
	ids []ID
}

func (s *Store) stack(ctx context.Context, ids []ID) (Files, error) {
	xs, err := s.Indexes(ctx, ids)
	if err != nil {
		return nil, err
	}
	return stacked{index.Merge(xs...), s, ids}, nil
}

// OpenFile opens the file that the stack shows at path.
func (t stacked) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	e, i, ok := t.Find(path)
	if !ok || e.Type != index.File {
		return nil, fmt.Errorf("open %q: %w", path, os.ErrNotExist)
	}
	return t.s.OpenFile(ctx, t.ids[i], path)
}

// Indexes is Index of several layers. Those that have to come here for it come at once.
func (s *Store) Indexes(ctx context.Context, ids []ID) ([]*index.Index, error) {
	var unknown []ID
	for _, id := range ids {
		if m, err := s.meta(id); err == nil && m.Remote && m.Content == "" {
			unknown = append(unknown, id)
		}
	}
	if err := s.Materialise(ctx, unknown...); err != nil {
		return nil, err
	}
	xs := make([]*index.Index, len(ids))
	for i, id := range ids {
		var err error
		if xs[i], err = s.Index(ctx, id); err != nil {
			return nil, err
		}
	}
	return xs, nil
}
