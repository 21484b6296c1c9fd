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
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
)

// How a tar is written. What lies between two headers is known beforehand, so the entries are cut into batches, and
// several workers fill the buffers of the next ones: headers, and files read straight to their place behind them, and
// hashed there. The finished buffers go, in order, to one goroutine that hashes the tar and to one that writes it. So
// every byte is copied once (from the page cache), whatever is slowest is busy all the time, and the bytes are the same
// at any number of workers. A large file is read by the one who keeps the order, buffer by buffer.
const (
	batchBytes = 512 << 10 // of files in a batch
	batchItems = 512
	largeFile  = 1 << 20
	tarBuffer  = batchBytes + largeFile // what a batch needs at most, as a rule
	// flushBytes is how much is written between two requests to the kernel to begin bringing it to the disk: the fsync
	// at the end waits for the rest only.
	flushBytes = 32 << 20
)

// readAheadWorkers is how many goroutines read and hash files.
var readAheadWorkers = max(2, runtime.GOMAXPROCS(0))

// writeTar is createTar with the file synced.
func writeTar(ctx context.Context, fs fsys.FS, path string, items []tarItem, writeRoot bool) (size int64, diffID digest.Digest, err error) {
	f, size, diffID, err := createTar(ctx, fs, path, items, writeRoot)
	if err != nil {
		return 0, "", err
	}
	return size, diffID, syncAll(f)
}

// createTar writes items, which are in Compare order, to path and returns the file, which is open and not synced. It sets
// Offset and Digest of their entries (a Digest already there is verified), and truncates times as the tar does.
func createTar(ctx context.Context, fs fsys.FS, path string, items []tarItem, writeRoot bool) (_ fsys.File, size int64, diffID digest.Digest, err error) {
	f, err := fs.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, 0, "", err
	}
	tail := startFollowing(ctx, path)
	ctx, cancel := context.WithCancelCause(ctx)
	out := newSink(f, tail, cancel)
	err = writeItems(ctx, out, items, writeRoot)
	cancel(nil)
	size, diffID, serr := out.close()
	if serr != nil { // it is also why the rest was canceled
		err = serr
	}
	tail.finish(err)
	if err != nil {
		f.Close()
		return nil, 0, "", err
	}
	return f, size, diffID, nil
}

// syncAll makes files durable, all at once, so that they share the commits of the file system's journal, and closes them.
func syncAll(files ...fsys.File) error {
	errs := make([]error, len(files))
	var wg sync.WaitGroup
	for i, f := range files {
		wg.Go(func() {
			errs[i] = f.Sync()
			if err := f.Close(); errs[i] == nil {
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func writeItems(ctx context.Context, out *sink, items []tarItem, writeRoot bool) error {
	ahead := startBatches(ctx, items, writeRoot)
	defer ahead.stop()
	first := map[string]int{} // first names of hard links, to copy what is known about the file
	for i := range items {
		if link := items[i].entry.HardLink; link != "" {
			first[link] = -1
		}
	}
	for b := range ahead.order {
		<-b.done
		if b.err != nil {
			return b.err
		}
		base := out.written
		for i := b.from; i < b.to; i++ {
			e := &items[i].entry
			if e.HardLink != "" {
				j := first[e.HardLink]
				if j < 0 {
					return fmt.Errorf("hard link %q to %q, which does not come before it", e.Path, e.HardLink)
				}
				e.Offset, e.Digest = items[j].entry.Offset, items[j].entry.Digest
				continue
			}
			if e.Type == index.File {
				e.Offset += base
			}
			if _, ok := first[e.Path]; ok {
				first[e.Path] = i
			}
		}
		out.put(b.buf)
		if last := &items[b.to-1]; last.hasData() && last.entry.Size >= largeFile {
			if err := out.copyLarge(ctx, last); err != nil {
				return fmt.Errorf("%q: %w", last.entry.Path, err)
			}
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	end := newTarBuf()
	end.b = append(end.b, make([]byte, 2*tarBlock)...)
	out.put(end)
	return nil
}

// batch is a run of items: small ones, or up to one large file at its end, whose bytes are not in buf.
type batch struct {
	from, to int
	buf      *tarBuf
	err      error
	done     chan struct{}
}

// batches reads ahead.
type batches struct {
	items     []tarItem
	writeRoot bool
	cancel    context.CancelCauseFunc
	order     chan *batch
	tasks     chan *batch
	running   sync.WaitGroup
}

func startBatches(ctx context.Context, items []tarItem, writeRoot bool) *batches {
	ctx, cancel := context.WithCancelCause(ctx)
	room := 2 * readAheadWorkers
	bs := &batches{
		items: items, writeRoot: writeRoot, cancel: cancel,
		order: make(chan *batch, room), tasks: make(chan *batch, room),
	}
	bs.running.Go(func() {
		defer close(bs.order)
		defer close(bs.tasks)
		for from := 0; from < len(items); {
			b := &batch{from: from, to: bs.end(from), done: make(chan struct{})}
			from = b.to
			select {
			case bs.order <- b:
			case <-ctx.Done():
				return
			}
			bs.tasks <- b // as much room as in order, and drained by the workers whatever happens
		}
	})
	for range min(readAheadWorkers, len(items)/64+1) {
		bs.running.Go(func() {
			for b := range bs.tasks {
				b.err = context.Cause(ctx)
				if b.err == nil {
					b.err = bs.fill(ctx, b)
				}
				close(b.done)
			}
		})
	}
	return bs
}

// stop ends reading ahead and waits for it.
func (bs *batches) stop() {
	bs.cancel(nil)
	bs.running.Wait()
}

// end returns where the batch that begins at from ends.
func (bs *batches) end(from int) int {
	var bytes int64
	for i := from; i < len(bs.items); i++ {
		if bs.items[i].hasData() {
			if bytes += bs.items[i].entry.Size; bytes >= batchBytes {
				return i + 1
			}
		}
		if i-from == batchItems-1 {
			return i + 1
		}
	}
	return len(bs.items)
}

// fill makes the buffer of a batch. Offsets are within it until its place in the tar is known.
func (bs *batches) fill(ctx context.Context, b *batch) (err error) {
	buf := newTarBuf()
	b.buf = buf
	for i := b.from; i < b.to; i++ {
		item := &bs.items[i]
		e := &item.entry
		e.Offset = -1
		if e.Type == index.Whiteout {
			e.ModTime = 0
		}
		sec, _ := splitTime(e.ModTime)
		e.ModTime = sec * 1e9
		if e.Path != "" || bs.writeRoot {
			if buf.b, err = appendHeader(buf.b, e); err != nil {
				return err
			}
		}
		if e.Opaque {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: index.Join(e.Path, whOpaque), ModTime: time.Unix(0, 0)}
			if buf.b, err = appendTarHeader(buf.b, h); err != nil {
				return err
			}
			continue
		}
		if e.Type != index.File || e.HardLink != "" {
			continue
		}
		e.Offset = int64(len(buf.b))
		sum := emptyDigest
		switch {
		case e.Size == 0:
		case item.open == nil:
			return fmt.Errorf("%q: its bytes are not available", e.Path)
		case e.Size >= largeFile:
			continue // the last of its batch, and read later
		default:
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if sum, err = buf.readFile(item); err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
		}
		if e.Digest != "" && e.Digest != sum {
			return fmt.Errorf("%q: %w", e.Path, ErrChanged)
		}
		e.Digest = sum
	}
	return nil
}

// tarBuf is a piece of a tar on its way.
type tarBuf struct {
	b     []byte
	users atomic.Int32
}

var tarBufs = sync.Pool{New: func() any { return &tarBuf{b: make([]byte, 0, tarBuffer)} }}

func newTarBuf() *tarBuf { return tarBufs.Get().(*tarBuf) }

func (buf *tarBuf) release() {
	if buf.users.Add(-1) == 0 {
		buf.b = buf.b[:0]
		tarBufs.Put(buf)
	}
}

// pad fills the last block.
func (buf *tarBuf) pad(size int64) {
	if rest := int(size % tarBlock); rest != 0 {
		buf.b = append(buf.b, emptyBlock[rest:]...)
	}
}

// Hashed is implemented by readers of files that may have been hashed before. Digest returns the digest of the whole file
// if that is known and the file has certainly not been written to since: asked after reading, it is that of what was read,
// and saves hashing it once more.
type Hashed interface {
	Digest() (digest.Digest, bool)
}

// knownDigest is what r knows about its file; "" if nothing.
func knownDigest(r io.Reader) digest.Digest {
	if h, ok := r.(Hashed); ok {
		if d, ok := h.Digest(); ok {
			return d
		}
	}
	return ""
}

// readFile appends the bytes of an item, with padding, and returns their digest.
func (buf *tarBuf) readFile(item *tarItem) (digest.Digest, error) {
	r, err := item.open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	size := int(item.entry.Size)
	at := len(buf.b)
	buf.b = slices.Grow(buf.b, size+tarBlock)
	// Asked for one byte more than there should be, a file that gives all the others and not this one has ended there.
	space := buf.b[at : at+size+1]
	_, isFile := r.(*os.File)
	got := 0
	for got <= size {
		n, err := r.Read(space[got:])
		got += n
		if err == io.EOF || err == nil && isFile && got == size {
			break
		}
		if err != nil {
			return "", err
		}
	}
	if got != size {
		return "", ErrChanged
	}
	buf.b = buf.b[:at+size]
	if sum := knownDigest(r); sum != "" {
		buf.pad(int64(size))
		return sum, nil
	}
	sum := sha256.Sum256(buf.b[at:])
	buf.pad(int64(size))
	return digest.NewDigestFromBytes(digest.SHA256, sum[:]), nil
}

// sink takes a stream in order; one goroutine hashes it, one writes it.
type sink struct {
	written int64 // or on its way

	toHash, toDisk chan *tarBuf
	running        sync.WaitGroup
	hash           hash.Hash
	err            error // of the write; after running
}

// newSink starts a sink. follower is told what has been written; cancel is called when a write fails.
func newSink(w io.Writer, follower *tail, cancel context.CancelCauseFunc) *sink {
	s := &sink{toHash: make(chan *tarBuf, 4), toDisk: make(chan *tarBuf, 4), hash: sha256.New()}
	s.running.Go(func() {
		for buf := range s.toHash {
			s.hash.Write(buf.b)
			buf.release()
		}
	})
	s.running.Go(func() {
		var done, flushed int64
		file, _ := w.(*os.File)
		for buf := range s.toDisk {
			if s.err == nil {
				var n int
				if n, s.err = w.Write(buf.b); s.err != nil {
					cancel(s.err)
				}
				done += int64(n)
				follower.wrote(n)
			}
			buf.release()
			if file != nil && done-flushed >= flushBytes {
				// Only to begin: trouble shows in the fsync.
				_ = unix.SyncFileRange(int(file.Fd()), flushed, done-flushed, unix.SYNC_FILE_RANGE_WRITE)
				flushed = done
			}
		}
	})
	return s
}

// put hands over a buffer.
func (s *sink) put(buf *tarBuf) {
	s.written += int64(len(buf.b))
	buf.users.Store(2)
	s.toHash <- buf
	s.toDisk <- buf
}

func (s *sink) close() (int64, digest.Digest, error) {
	close(s.toHash)
	close(s.toDisk)
	s.running.Wait()
	return s.written, digest.NewDigest(digest.SHA256, s.hash), s.err
}

// copyLarge takes the bytes of an item, with padding, and checks or sets its digest.
func (s *sink) copyLarge(ctx context.Context, item *tarItem) error {
	r, err := item.open()
	if err != nil {
		return err
	}
	defer r.Close()
	e := &item.entry
	h := sha256.New()
	known := knownDigest(r)
	for rest := e.Size; ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		buf := newTarBuf()
		n, err := io.ReadFull(r, buf.b[:largeFile])
		rest -= int64(n)
		if rest < 0 {
			return ErrChanged
		}
		buf.b = buf.b[:n]
		if known == "" {
			h.Write(buf.b)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if rest != 0 {
				return ErrChanged
			}
			buf.pad(e.Size)
			s.put(buf)
			break
		}
		if err != nil {
			return err
		}
		s.put(buf)
	}
	sum := known
	if known == "" {
		sum = digest.NewDigest(digest.SHA256, h)
	} else if knownDigest(r) != known {
		return ErrChanged // while it was being read, with nothing to show what was read
	}
	if e.Digest != "" && e.Digest != sum {
		return ErrChanged
	}
	e.Digest = sum
	return nil
}
