// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// ReaderAt is an open blob.
type ReaderAt interface {
	io.ReaderAt
	io.ReadSeekCloser
	// Size is the length of the blob in bytes.
	Size() int64
}

// reader is an open blob. It hashes what is read as long as that is in order and this process does not know the blob to be good.
type reader struct {
	f    *os.File
	s    *Store
	d    digest.Digest
	size int64
	hash hash.Hash // nil when there is nothing to find out
	pos  int64     // how far hash has come
}

// Open opens a blob for reading. The error wraps ErrNotFound when there is none. The first time that a process reads a
// blob from beginning to end, the end is an error that wraps ErrDigest if the bytes are not the digest's.
func (s *Store) Open(d digest.Digest) (ReaderAt, error) {
	path, err := s.path(d)
	if err != nil {
		return nil, err
	}
	s.use(d)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	r := &reader{f: f, s: s, d: d, size: st.Size()}
	if !s.isVerified(d) {
		r.hash = d.Algorithm().Hash()
	}
	return r, nil
}

func (r *reader) Size() int64 { return r.size }

func (r *reader) Close() error { return r.f.Close() }

// File is the file that the blob is, for who lets the kernel copy it without verifying it.
func (r *reader) File() *os.File { return r.f }

// Check reads the blob from the disk, even if r is closed. A damaged one goes into quarantine, and is an error that wraps ErrDigest.
func (r *reader) Check(ctx context.Context) error {
	got, err := r.s.sum(ctx, r.d)
	if err != nil || got == r.d {
		return err
	}
	return r.s.damaged(r.d, got)
}

func (r *reader) ReadAt(p []byte, off int64) (int, error) { return r.f.ReadAt(p, off) }

// Seek ends the verification, unless it goes nowhere or back to the beginning.
func (r *reader) Seek(offset int64, whence int) (int64, error) {
	at, err := r.f.Seek(offset, whence)
	switch {
	case r.hash == nil || err == nil && at == r.pos:
	case err == nil && at == 0:
		r.hash.Reset()
		r.pos = 0
	default:
		r.hash = nil
	}
	return at, err
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.f.Read(p)
	if r.hash == nil {
		return n, err
	}
	r.hash.Write(p[:n])
	r.pos += int64(n)
	if err != io.EOF && (err != nil || r.pos < r.size) {
		return n, err
	}
	got := digest.NewDigest(r.d.Algorithm(), r.hash)
	r.hash = nil
	if got != r.d {
		return n, r.s.damaged(r.d, got)
	}
	r.s.setVerified(r.d)
	return n, err
}

// WriteTo leaves the copying to the kernel where it can do it. A blob that is not known to be good is hashed at the same time.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	switch {
	case r.hash == nil:
		return io.Copy(w, r.f)
	case r.pos > 0:
		return io.CopyBuffer(w, onlyReader{r}, make([]byte, 256<<10))
	}
	n, got, err := CopyAndHash(w, r.f, r.size, r.d.Algorithm())
	r.hash = nil
	switch {
	case err != nil:
		return n, err
	case got != r.d:
		return n, r.s.damaged(r.d, got)
	}
	r.s.setVerified(r.d)
	return n, nil
}

// CopyAndHash copies the sizeBytes of f, which stands at its beginning, to w and returns their digest. Both are done at the same
// time and on their own, so that the copying can be the kernel's.
func CopyAndHash(w io.Writer, f *os.File, sizeBytes int64, algorithm digest.Algorithm) (int64, digest.Digest, error) {
	var stop atomic.Bool
	h := algorithm.Hash()
	hashed := make(chan error, 1)
	go func() {
		buf := make([]byte, 1<<20)
		for at := int64(0); at < sizeBytes && !stop.Load(); {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), sizeBytes-at)], at)
			h.Write(buf[:n])
			at += int64(n)
			if err == io.EOF && at < sizeBytes {
				err = io.ErrUnexpectedEOF
			}
			if err != nil && err != io.EOF {
				hashed <- err
				return
			}
		}
		hashed <- nil
	}()
	n, err := io.Copy(w, f)
	if err != nil {
		stop.Store(true)
	}
	herr := <-hashed
	switch {
	case err != nil:
		return n, "", err
	case herr != nil:
		return n, "", herr
	case n != sizeBytes:
		return n, "", fmt.Errorf("%d bytes instead of %d: %w", n, sizeBytes, io.ErrUnexpectedEOF)
	}
	return n, digest.NewDigest(algorithm, h), nil
}

func (s *Store) isVerified(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.verified[d]
}

func (s *Store) setVerified(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verified[d] = true
}

// damaged puts a blob out of the way, whose bytes are those of another digest, and returns the error for its reader.
func (s *Store) damaged(d, got digest.Digest) error {
	err := fmt.Errorf("blob %s: %w: the stored bytes are %s", d, ErrDigest, got)
	if qerr := s.Quarantine(d); qerr != nil {
		return errors.Join(err, qerr)
	}
	s.log.Error("a damaged blob was put into quarantine; it will be fetched or made again", "digest", d, "found", got, "quarantine", s.opt.Quarantine)
	return err
}

// Check reads a blob from the disk and compares it with its digest: errors wrap ErrDigest when it is damaged, and ErrNotFound.
// It changes nothing.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	got, err := s.sum(ctx, d)
	if err == nil && got != d {
		err = fmt.Errorf("blob %s: %w: the stored bytes are %s", d, ErrDigest, got)
	}
	return err
}

// sum is the digest of the bytes that are stored as d.
func (s *Store) sum(ctx context.Context, d digest.Digest) (digest.Digest, error) {
	path, err := s.path(d)
	if err != nil {
		return "", err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("blob %s: %w", d, err)
	}
	defer f.Close()
	h := d.Algorithm().Hash()
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		if _, err := io.CopyN(h, f, 8<<20); err == io.EOF {
			return digest.NewDigest(d.Algorithm(), h), nil
		} else if err != nil {
			return "", fmt.Errorf("blob %s: %w", d, err)
		}
	}
}

// Quarantine moves a blob to the quarantine folder, where it keeps its encoded digest as its name: it is missing then. One that
// is not there is no error.
func (s *Store) Quarantine(d digest.Digest) error {
	path, err := s.path(d)
	if err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.verified, d)
	s.mu.Unlock()
	if err := os.MkdirAll(s.opt.Quarantine, 0o700); err != nil {
		return fmt.Errorf("quarantine blob %s: %w", d, err)
	}
	if err := s.fs.Rename(path, filepath.Join(s.opt.Quarantine, d.Encoded())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("quarantine blob %s: %w", d, err)
	}
	return nil
}
