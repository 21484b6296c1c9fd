// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// flushBytes is how much is written between two requests to the kernel to begin bringing it to the disk: the fsync at the end
// waits for the rest only.
const flushBytes = 32 << 20

// resumePrefix begins the names of the ingests that Resume can go on with.
const resumePrefix = "resume-"

// Writer takes the bytes of one blob. It is used by one goroutine.
type Writer struct {
	s    *Store
	ctx  context.Context
	f    fsys.File
	path string
	ref  string // of a resumable one
	hash hash.Hash
	alg  digest.Algorithm
	size int64
	done bool
	// flushed is how much the kernel has been asked to bring to the disk.
	flushed int64
}

// Writer starts a blob whose digest is not known yet.
func (s *Store) Writer(ctx context.Context) (*Writer, error) {
	return s.writer(ctx, digest.SHA256)
}

func (s *Store) writer(ctx context.Context, alg digest.Algorithm) (*Writer, error) {
	path := s.ingestName()
	f, err := s.fs.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("blob store: %w", err)
	}
	return &Writer{s: s, ctx: ctx, f: f, path: path, hash: alg.Hash(), alg: alg}, nil
}

// Resume starts a blob under a name of the caller's choice (the digest it expects, say), or goes on with what a Writer of that
// name has left when it was closed or its process died: Size says where to go on. Everything is verified at Commit, as
// a whole; what does not match there is thrown away, so that the next attempt begins at 0. One Writer at a time has a
// name; Resume waits for it.
func (s *Store) Resume(ctx context.Context, ref string) (*Writer, error) {
	sum := sha256.Sum256([]byte(ref))
	path := filepath.Join(s.ingest(), resumePrefix+hex.EncodeToString(sum[:]))
	for {
		other := s.claim(path)
		if other == nil {
			break
		}
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	w := &Writer{s: s, ctx: ctx, path: path, ref: ref, hash: digest.SHA256.Hash(), alg: digest.SHA256}
	err := w.reopen()
	if err != nil {
		s.unclaim(path)
		return nil, fmt.Errorf("resume blob %s: %w", ref, err)
	}
	return w, nil
}

// reopen hashes what is there and opens it for more.
func (w *Writer) reopen() error {
	old, err := os.Open(w.path)
	switch {
	case err == nil:
		defer old.Close()
		if w.size, err = io.CopyBuffer(w.hash, onlyReader{old}, make([]byte, 256<<10)); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	w.f, err = w.s.fs.OpenFile(w.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	return err
}

// Write appends p. It fails when the context that the Writer was made with has ended.
func (w *Writer) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, context.Cause(w.ctx)
	}
	n, err := w.f.Write(p)
	w.hash.Write(p[:n])
	w.size += int64(n)
	if file, ok := w.f.(*os.File); ok && w.size-w.flushed >= flushBytes {
		// Only to begin: trouble shows in the fsync.
		_ = unix.SyncFileRange(int(file.Fd()), w.flushed, w.size-w.flushed, unix.SYNC_FILE_RANGE_WRITE)
		w.flushed = w.size
	}
	return n, err
}

// Digest returns the digest of what has been written so far.
func (w *Writer) Digest() digest.Digest { return digest.NewDigest(w.alg, w.hash) }

// Size returns how many bytes have been written so far, those of earlier Writers of the same name included.
func (w *Writer) Size() int64 { return w.size }

// Written opens what has been written so far, from its beginning.
func (w *Writer) Written() (io.ReadCloser, error) {
	f, err := os.Open(w.path)
	if err != nil {
		return nil, fmt.Errorf("blob store: %w", err)
	}
	return f, nil
}

// Commit makes the blob visible, under Digest, if it has the size and digest given; 0 and "" take any. Nothing can
// be written after.
func (w *Writer) Commit(size int64, want digest.Digest) error {
	if w.done {
		return fmt.Errorf("blob %s: committed or closed before", want)
	}
	got := w.Digest()
	var err error
	switch {
	case size > 0 && size != w.size:
		err = fmt.Errorf("blob %s: %w: %d bytes instead of %d", want, ErrSize, w.size, size)
	case want != "" && want != got:
		err = fmt.Errorf("blob %s: %w: it is %s", want, ErrDigest, got)
	}
	if err != nil && w.ref != "" {
		err = errors.Join(err, w.drop())
	}
	if err != nil {
		return err
	}
	if err := w.commit(got); err != nil {
		return errors.Join(fmt.Errorf("blob %s: %w", got, err), w.drop())
	}
	w.s.setVerified(got)
	return nil
}

func (w *Writer) commit(d digest.Digest) error {
	to, err := w.s.path(d)
	if err != nil {
		return err
	}
	if w.s.Has(d) {
		return w.drop()
	}
	w.s.add(w.size)
	if err := w.f.Sync(); err != nil {
		return err
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	if err := w.s.rename(w.path, to); err != nil {
		return err
	}
	w.end()
	return nil
}

// end lets the next Writer of the same name begin.
func (w *Writer) end() {
	w.done = true
	if w.ref != "" {
		w.s.unclaim(w.path)
	}
}

// drop throws away what has been written.
func (w *Writer) drop() error {
	if w.done {
		return nil
	}
	defer w.end()
	_ = w.f.Close() // again, perhaps; nothing of the file is wanted
	if err := w.s.fs.RemoveAll(w.path); err != nil {
		return fmt.Errorf("blob store: %w", err)
	}
	return nil
}

// Close ends a Writer that was not committed. What was written is thrown away; that of Resume is kept for the next
// Resume. Close may be called more than once, and after Commit.
func (w *Writer) Close() error {
	if w.done {
		return nil
	}
	if w.ref == "" || w.size == 0 {
		return w.drop()
	}
	defer w.end()
	return w.f.Close()
}

// Drop ends a Writer that was not committed and throws away what was written, that of earlier Writers of the same name included.
func (w *Writer) Drop() error { return w.drop() }

// rename moves a finished file to its place, durably.
func (s *Store) rename(from, to string) error {
	dir := filepath.Dir(to)
	if err := s.fs.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := s.fs.Rename(from, to); err != nil {
		return err
	}
	return s.fs.Sync(dir)
}
