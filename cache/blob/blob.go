// SPDX-License-Identifier: Apache-2.0

// Package blob keeps bytes under their digest, in an OCI image layout: skopeo and the like read the directory as it
// is. What is in the store has been verified while it was written: bytes go to the folder "ingest", are hashed on
// the way, synced and renamed. Reading does not verify again, except ReadAll.
package blob

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "crypto/sha512" // digests that others may have chosen
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Errors that callers look for with errors.Is.
var (
	// ErrNotFound says that the store does not have the blob.
	ErrNotFound = errors.New("no such blob")
	// ErrDigest says that bytes are not those that their digest or size promises.
	ErrDigest = errors.New("digest does not match")
	// ErrSize says that there are more or fewer bytes than promised, or more than ReadAll takes.
	ErrSize = errors.New("wrong size")
)

// maxReadAll bounds ReadAll: manifests and configs are read whole, layers are not.
const maxReadAll = 64 << 20

// Store is a directory of blobs. Its methods may be called concurrently.
type Store struct {
	dir string

	mu      sync.Mutex // guards writing
	writing map[digest.Digest]chan struct{}
}

// Open opens the store in dir, making it when missing. Half-written blobs of an earlier run are removed: the caller
// must hold the lock of the state directory.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir, writing: map[digest.Digest]chan struct{}{}}
	for _, sub := range []string{filepath.Join("blobs", "sha256"), "ingest"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("blob store: %w", err)
		}
	}
	leftovers, err := os.ReadDir(s.ingest())
	if err != nil {
		return nil, fmt.Errorf("blob store: %w", err)
	}
	for _, e := range leftovers {
		if err := os.RemoveAll(filepath.Join(s.ingest(), e.Name())); err != nil {
			return nil, fmt.Errorf("blob store: %w", err)
		}
	}
	for name, content := range map[string]string{
		ocispec.ImageLayoutFile: `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`,
		ocispec.ImageIndexFile:  `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}`,
	} {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		tmp := s.ingestName()
		if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
			return nil, fmt.Errorf("blob store: %w", err)
		}
		if err := os.Rename(tmp, path); err != nil {
			return nil, fmt.Errorf("blob store: %w", err)
		}
	}
	return s, nil
}

// Dir returns the store's directory, an OCI image layout.
func (s *Store) Dir() string { return s.dir }

func (s *Store) ingest() string { return filepath.Join(s.dir, "ingest") }

func (s *Store) ingestName() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return filepath.Join(s.ingest(), hex.EncodeToString(b[:]))
}

// path returns where a blob is, or an error for what is no digest this store can verify.
func (s *Store) path(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("blob %q: %w", d, err)
	}
	return filepath.Join(s.dir, "blobs", string(d.Algorithm()), d.Encoded()), nil
}

// Has says whether the store has the blob.
func (s *Store) Has(d digest.Digest) bool {
	path, err := s.path(d)
	if err != nil {
		return false
	}
	_, err = os.Lstat(path)
	return err == nil
}

// Put stores what r reads. Digest and Size of want are verified where they are set; what is wrong never becomes
// visible. A blob that is there already is not written, and r not read. While another Put writes the same digest,
// Put waits for it.
func (s *Store) Put(ctx context.Context, r io.Reader, want ocispec.Descriptor) error {
	if want.Digest != "" {
		if _, err := s.path(want.Digest); err != nil {
			return err
		}
		for {
			if s.Has(want.Digest) {
				return nil
			}
			other := s.claim(want.Digest)
			if other == nil {
				defer s.unclaim(want.Digest)
				break
			}
			select {
			case <-other:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	alg := digest.SHA256
	if want.Digest != "" {
		alg = want.Digest.Algorithm()
	}
	w, err := s.writer(ctx, alg)
	if err != nil {
		return err
	}
	defer w.Close()
	if want.Size > 0 {
		// One more than promised is enough to know that it is too much.
		r = io.LimitReader(r, want.Size+1)
	}
	if _, err := io.CopyBuffer(w, onlyReader{r}, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("blob %s: %w", want.Digest, err)
	}
	return w.Commit(want.Size, want.Digest)
}

type onlyReader struct{ io.Reader }

// claim takes the right to write a digest. If another has it, claim returns what is closed when that one is done.
func (s *Store) claim(d digest.Digest) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.writing[d]; other != nil {
		return other
	}
	s.writing[d] = make(chan struct{})
	return nil
}

func (s *Store) unclaim(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.writing[d])
	delete(s.writing, d)
}

// PutBytes stores b and returns its descriptor.
func (s *Store) PutBytes(ctx context.Context, mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, s.Put(ctx, bytes.NewReader(b), desc)
}

// Writer takes the bytes of one blob. It is used by one goroutine.
type Writer struct {
	s    *Store
	ctx  context.Context
	f    *os.File
	hash hash.Hash
	alg  digest.Algorithm
	size int64
	done bool
}

// Writer starts a blob whose digest is not known yet.
func (s *Store) Writer(ctx context.Context) (*Writer, error) {
	return s.writer(ctx, digest.SHA256)
}

func (s *Store) writer(ctx context.Context, alg digest.Algorithm) (*Writer, error) {
	f, err := os.OpenFile(s.ingestName(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("blob store: %w", err)
	}
	return &Writer{s: s, ctx: ctx, f: f, hash: alg.Hash(), alg: alg}, nil
}

// Write appends p. It fails when the context that the Writer was made with has ended.
func (w *Writer) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, context.Cause(w.ctx)
	}
	n, err := w.f.Write(p)
	w.hash.Write(p[:n])
	w.size += int64(n)
	return n, err
}

// Digest returns the digest of what has been written so far.
func (w *Writer) Digest() digest.Digest { return digest.NewDigest(w.alg, w.hash) }

// Size returns how many bytes have been written so far.
func (w *Writer) Size() int64 { return w.size }

// Commit makes the blob visible, under Digest, if it has the size and digest given; 0 and "" take any. Nothing can
// be written after.
func (w *Writer) Commit(size int64, want digest.Digest) error {
	got := w.Digest()
	if size > 0 && size != w.size {
		return fmt.Errorf("blob %s: %w: %d bytes instead of %d", want, ErrSize, w.size, size)
	}
	if want != "" && want != got {
		return fmt.Errorf("blob %s: %w: it is %s", want, ErrDigest, got)
	}
	path, err := w.s.path(got)
	if err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("blob %s: %w", got, err)
	}
	if err := w.f.Close(); err != nil {
		return fmt.Errorf("blob %s: %w", got, err)
	}
	w.done = true
	if w.s.Has(got) {
		return os.Remove(w.f.Name())
	}
	if err := rename(w.f.Name(), path); err != nil {
		_ = os.Remove(w.f.Name())
		return fmt.Errorf("blob %s: %w", got, err)
	}
	return nil
}

// Close throws away what was not committed. It may be called more than once.
func (w *Writer) Close() error {
	if w.done {
		return nil
	}
	w.done = true
	return errors.Join(w.f.Close(), os.Remove(w.f.Name()))
}

// rename moves a finished file to its place, durably.
func rename(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Link makes the finished file at path the blob d, without copying where the file system can (a hard link). The
// caller vouches for the digest. The file must not change afterwards.
func (s *Store) Link(d digest.Digest, path string) error {
	to, err := s.path(d)
	if err != nil {
		return err
	}
	if s.Has(d) {
		return nil
	}
	tmp := s.ingestName()
	if err := os.Link(path, tmp); err != nil {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("blob %s: %w", d, err)
		}
		defer f.Close()
		return s.Put(context.Background(), f, ocispec.Descriptor{Digest: d})
	}
	if err := rename(tmp, to); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("blob %s: %w", d, err)
	}
	return nil
}

// ReaderAt is an open blob.
type ReaderAt interface {
	io.ReaderAt
	io.ReadSeekCloser
	// Size is the length of the blob in bytes.
	Size() int64
}

type file struct {
	*os.File
	size int64
}

func (f *file) Size() int64 { return f.size }

// Open opens a blob for reading. The error wraps ErrNotFound when there is none.
func (s *Store) Open(d digest.Digest) (ReaderAt, error) {
	path, err := s.path(d)
	if err != nil {
		return nil, err
	}
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
	return &file{f, st.Size()}, nil
}

// ReadAll returns a blob of at most 64 MiB, verified. Damaged bytes are an error that wraps ErrDigest.
func (s *Store) ReadAll(d digest.Digest) ([]byte, error) {
	f, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > maxReadAll {
		return nil, fmt.Errorf("blob %s: %w: %d bytes are too many to read at once", d, ErrSize, f.Size())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxReadAll+1))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	if got := d.Algorithm().FromBytes(b); got != d {
		return nil, fmt.Errorf("blob %s: %w: the stored bytes are %s", d, ErrDigest, got)
	}
	return b, nil
}

// Delete removes a blob. One that is not there is no error; who has it open reads on.
func (s *Store) Delete(d digest.Digest) error {
	path, err := s.path(d)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("blob %s: %w", d, err)
	}
	return nil
}

// Walk calls fn with the digest and size of every blob until fn returns an error, which Walk returns.
func (s *Store) Walk(fn func(d digest.Digest, size int64) error) error {
	algs, err := os.ReadDir(filepath.Join(s.dir, "blobs"))
	if err != nil {
		return fmt.Errorf("blob store: %w", err)
	}
	for _, alg := range algs {
		entries, err := os.ReadDir(filepath.Join(s.dir, "blobs", alg.Name()))
		if err != nil {
			return fmt.Errorf("blob store: %w", err)
		}
		for _, e := range entries {
			d := digest.NewDigestFromEncoded(digest.Algorithm(alg.Name()), e.Name())
			info, err := e.Info()
			if d.Validate() != nil || errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("blob store: %w", err)
			}
			if err := fn(d, info.Size()); err != nil {
				return err
			}
		}
	}
	return nil
}
