// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// ErrChanged is what errors about a file that is not (or no longer) what its entry says wrap.
var ErrChanged = errors.New("changed while it was being copied")

// tarItem is one entry to be written, and where its bytes come from (a File with Size > 0 and no HardLink).
type tarItem struct {
	entry index.Entry
	open  func() (io.ReadCloser, error)
}

// rootInTar says whether a layer's tar names its root directory. Other tools leave the root out, and so do we
// unless it is something special.
func rootInTar(root *index.Entry) bool {
	return root.Mode != 0o755 || root.UID != 0 || root.GID != 0 || len(root.Xattrs) > 0
}

// tarHeader returns the header of an entry: the smallest that holds everything, the same bytes at any time on any
// machine. Times are whole seconds.
func tarHeader(e *index.Entry) (*tar.Header, error) {
	if strings.HasPrefix(index.Base(e.Path), whPrefix) {
		return nil, fmt.Errorf("%q: names that begin with %s are reserved in image layers", e.Path, whPrefix)
	}
	if e.Type == index.Whiteout {
		return &tar.Header{Typeflag: tar.TypeReg, Name: whiteoutName(e.Path), ModTime: time.Unix(0, 0)}, nil
	}
	sec, _ := splitTime(e.ModTime)
	h := &tar.Header{
		Name:    e.Path,
		Mode:    int64(e.Mode & 0o7777),
		Uid:     int(e.UID),
		Gid:     int(e.GID),
		ModTime: time.Unix(sec, 0),
	}
	if e.HardLink != "" {
		h.Typeflag = tar.TypeLink
		h.Linkname = e.HardLink
		return h, nil
	}
	switch e.Type {
	case index.Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if e.Path == "" {
			h.Name = "./"
		}
	case index.File:
		h.Typeflag = tar.TypeReg
		h.Size = e.Size
	case index.Symlink:
		h.Typeflag = tar.TypeSymlink
		h.Linkname = e.Target
	case index.CharDevice, index.BlockDevice:
		h.Typeflag = tar.TypeChar
		if e.Type == index.BlockDevice {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(e.Major), int64(e.Minor)
	case index.Fifo:
		h.Typeflag = tar.TypeFifo
	default:
		return nil, fmt.Errorf("%q: unknown type %d", e.Path, e.Type)
	}
	if len(e.Xattrs) > 0 {
		h.PAXRecords = make(map[string]string, len(e.Xattrs))
		for name, value := range e.Xattrs {
			if strings.Contains(name, "=") {
				return nil, fmt.Errorf("%q: a tar cannot hold an xattr named %q", e.Path, name)
			}
			h.PAXRecords[xattrPaxPrefix+name] = value
		}
	}
	return h, nil
}

// writeTar writes items, which are in Compare order, to path and syncs it. It sets Offset and Digest of their
// entries (a Digest already there is verified), and truncates times as the tar does.
func writeTar(ctx context.Context, path string, items []tarItem, writeRoot bool) (size int64, diffID digest.Digest, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	out := newSink(f)
	err = writeItems(ctx, out, items, writeRoot)
	cancel(nil)
	size, diffID, serr := out.close()
	if err = errors.Join(err, serr); err != nil {
		return 0, "", err
	}
	if err := f.Sync(); err != nil {
		return 0, "", err
	}
	return size, diffID, f.Close()
}

func writeItems(ctx context.Context, out *sink, items []tarItem, writeRoot bool) error {
	ahead := startReadAhead(ctx, items)
	defer ahead.stop()
	tw := tar.NewWriter(out)
	first := map[string]int{} // first names of hard links, to copy what is known about the file
	for i := range items {
		if i%64 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e := &items[i].entry
		e.Offset = -1
		if e.Type == index.Whiteout {
			e.ModTime = 0
		}
		sec, _ := splitTime(e.ModTime)
		e.ModTime = sec * 1e9
		if e.Path != "" || writeRoot {
			h, err := tarHeader(e)
			if err != nil {
				return err
			}
			if err := tw.WriteHeader(h); err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
		}
		switch {
		case e.Opaque:
			h := &tar.Header{Typeflag: tar.TypeReg, Name: index.Join(e.Path, whOpaque), ModTime: time.Unix(0, 0)}
			if err := tw.WriteHeader(h); err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
		case e.HardLink != "":
			j, ok := first[e.HardLink]
			if !ok {
				return fmt.Errorf("hard link %q to %q, which does not come before it", e.Path, e.HardLink)
			}
			e.Offset, e.Digest = items[j].entry.Offset, items[j].entry.Digest
		case e.Type == index.File:
			first[e.Path] = i
			// What went to out stands right behind the header, with nothing in between.
			e.Offset = out.written
			if err := ahead.copy(tw, items, i); err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
		}
		if e.Type != index.File && e.HardLink == "" {
			first[e.Path] = i
		}
	}
	return tw.Close()
}

// sink takes a stream, and hashes and writes it in another goroutine.
type sink struct {
	written int64

	buf  []byte
	full chan []byte
	free chan []byte
	done chan error
	hash hash.Hash
}

// emptyDigest is the digest of no bytes.
var emptyDigest = digest.FromBytes(nil)

const sinkBuffer = 512 << 10

func newSink(w io.Writer) *sink {
	const buffers = 4
	s := &sink{
		full: make(chan []byte, buffers),
		free: make(chan []byte, buffers),
		done: make(chan error, 1),
		hash: sha256.New(),
	}
	for range buffers {
		s.free <- make([]byte, 0, sinkBuffer)
	}
	s.buf = <-s.free
	go func() {
		var werr error
		for b := range s.full {
			if werr == nil {
				s.hash.Write(b)
				_, werr = w.Write(b)
			}
			s.free <- b[:0]
		}
		s.done <- werr
	}()
	return s
}

// Write never fails: close tells.
func (s *sink) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		k := min(len(p), cap(s.buf)-len(s.buf))
		s.buf = append(s.buf, p[:k]...)
		p = p[k:]
		if len(s.buf) == cap(s.buf) {
			s.full <- s.buf
			s.buf = <-s.free
		}
	}
	s.written += int64(n)
	return n, nil
}

func (s *sink) close() (int64, digest.Digest, error) {
	s.full <- s.buf
	close(s.full)
	err := <-s.done
	return s.written, digest.NewDigest(digest.SHA256, s.hash), err
}

// readAhead reads and hashes the small files that come next, in parallel and in order.
type readAhead struct {
	cancel context.CancelCauseFunc
	order  chan *smallFile
	tasks  chan *smallFile
	ended  chan struct{} // one value for each goroutine that has ended
	buf    []byte        // for large files
}

type smallFile struct {
	item int
	data []byte
	sum  digest.Digest
	err  error
	done chan struct{}
}

const (
	smallFileSize    = 128 << 10
	readAheadFiles   = 32
	readAheadWorkers = 2
)

func isSmall(e *index.Entry) bool { return e.Size <= smallFileSize }

// hasData says whether an item's bytes have to be read.
func (it *tarItem) hasData() bool {
	return it.entry.Type == index.File && it.entry.HardLink == "" && it.entry.Size > 0
}

func startReadAhead(ctx context.Context, items []tarItem) *readAhead {
	ctx, cancel := context.WithCancelCause(ctx)
	ra := &readAhead{
		cancel: cancel,
		order:  make(chan *smallFile, readAheadFiles),
		tasks:  make(chan *smallFile, readAheadFiles),
		ended:  make(chan struct{}, readAheadWorkers+1),
	}
	go func() {
		defer func() { ra.ended <- struct{}{} }()
		defer close(ra.tasks)
		for i := range items {
			if !items[i].hasData() || !isSmall(&items[i].entry) {
				continue
			}
			t := &smallFile{item: i, done: make(chan struct{})}
			select {
			case ra.order <- t:
			case <-ctx.Done():
				return
			}
			ra.tasks <- t // as much room as in order, and drained by the workers whatever happens
		}
	}()
	for range readAheadWorkers {
		go func() {
			defer func() { ra.ended <- struct{}{} }()
			for t := range ra.tasks {
				if ctx.Err() != nil {
					t.err = context.Cause(ctx)
				} else {
					// The entry's Digest and Offset are the writer's; Size and Path are nobody's.
					t.data, t.sum, t.err = readSmall(items[t.item].open, items[t.item].entry.Size)
				}
				close(t.done)
			}
		}()
	}
	return ra
}

func (ra *readAhead) stop() {
	ra.cancel(nil)
	for range readAheadWorkers + 1 {
		<-ra.ended
	}
}

func readSmall(open func() (io.ReadCloser, error), size int64) ([]byte, digest.Digest, error) {
	r, err := open()
	if err != nil {
		return nil, "", err
	}
	defer r.Close()
	buf := make([]byte, size+1)
	n, err := io.ReadFull(r, buf)
	if err != io.ErrUnexpectedEOF && err != io.EOF && err != nil {
		return nil, "", err
	}
	if int64(n) != size {
		return nil, "", ErrChanged
	}
	return buf[:n], digest.FromBytes(buf[:n]), nil
}

// copy writes the bytes of item i to w, and checks or sets its digest.
func (ra *readAhead) copy(w io.Writer, items []tarItem, i int) error {
	e := &items[i].entry
	var sum digest.Digest
	switch {
	case e.Size == 0:
		sum = emptyDigest
	case items[i].open == nil:
		return errors.New("its bytes are not available")
	case isSmall(e):
		t := <-ra.order
		<-t.done
		if t.err != nil {
			return t.err
		}
		if _, err := w.Write(t.data); err != nil {
			return err
		}
		sum = t.sum
	default:
		var err error
		if sum, err = ra.copyLarge(w, items[i].open, e.Size); err != nil {
			return err
		}
	}
	if e.Digest != "" && e.Digest != sum {
		return ErrChanged
	}
	e.Digest = sum
	return nil
}

func (ra *readAhead) copyLarge(w io.Writer, open func() (io.ReadCloser, error), size int64) (digest.Digest, error) {
	r, err := open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	if ra.buf == nil {
		ra.buf = make([]byte, sinkBuffer)
	}
	h := sha256.New()
	for rest := size; ; {
		n, err := r.Read(ra.buf)
		if int64(n) > rest {
			return "", ErrChanged
		}
		rest -= int64(n)
		h.Write(ra.buf[:n])
		if _, werr := w.Write(ra.buf[:n]); werr != nil {
			return "", werr
		}
		if err == io.EOF {
			if rest != 0 {
				return "", ErrChanged
			}
			return digest.NewDigest(digest.SHA256, h), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// canonicalLinks makes the first name, in Compare order, of each file the one that the others link to. items must
// be in that order; key gives the items that are names of one file the same value, and nil to those alone.
func canonicalLinks(items []tarItem, key func(i int) any) {
	type group struct{ first int }
	groups := map[any]*group{}
	for i := range items {
		k := key(i)
		if k == nil {
			continue
		}
		g := groups[k]
		if g == nil {
			groups[k] = &group{i}
			items[i].entry.HardLink = ""
			continue
		}
		path := items[i].entry.Path
		items[i] = tarItem{entry: items[g.first].entry}
		items[i].entry.Path = path
		items[i].entry.HardLink = items[g.first].entry.Path
	}
}

func sortItems(items []tarItem) {
	slices.SortFunc(items, func(a, b tarItem) int { return index.Compare(a.entry.Path, b.entry.Path) })
}

// indexOf makes the index of written items.
func indexOf(items []tarItem) (*index.Index, error) {
	entries := make([]index.Entry, len(items))
	for i := range items {
		entries[i] = items[i].entry
	}
	return index.NewChecked(entries)
}
