// SPDX-License-Identifier: Apache-2.0

// Package blob keeps bytes under their digest, in an OCI image layout: skopeo and the like read the directory as it
// is.
//
// Writing verifies: bytes go to the folder "ingest", are hashed on the way, synced and renamed. Reading verifies what this process has
// not verified yet: ReadAll always, a reader of Open when it is read from beginning to end (the error comes with the
// last bytes). Parts of a blob (ReadAt, after Seek) are not verified; Check is there for whoever wants to know. A
// blob that turns out to be damaged is moved to the quarantine folder: it is missing then, and gets fetched or made again.
package blob

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "crypto/sha512" // digests that others may have chosen
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/fsys"
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

// resumeFor is how long what is there of an interrupted ingest is kept for Resume.
const resumeFor = 24 * time.Hour

// Options of a Store.
type Options struct {
	// FS is how the store writes; nil means fsys.OS.
	FS fsys.FS
	// Quarantine is the folder for damaged blobs, on the same file system; "" means "quarantine" in the store's.
	Quarantine string
	// Log takes what is worth knowing but no error of any call. nil means slog.Default().
	Log *slog.Logger
}

// Store is a directory of blobs. Its methods may be called concurrently.
type Store struct {
	dir string
	opt Options
	fs  fsys.FS
	log *slog.Logger

	used     func(digest.Digest) // see OnUse
	added    func(bytes int64)   // see OnAdd
	deleting sync.RWMutex        // held for writing by DeleteIf

	mu       sync.Mutex               // guards what follows
	writing  map[string]chan struct{} // by digest or, of a resumable ingest, by the path of its file
	verified map[digest.Digest]bool   // by this process, while writing or reading
}

// Open opens the store in dir, making it when missing. Half-written blobs of an earlier run are removed, but for those
// that Resume can go on with, for a day: the caller must hold the lock of the state directory.
func Open(dir string) (*Store, error) { return OpenWith(dir, Options{}) }

// OpenWith is Open with options.
func OpenWith(dir string, opt Options) (*Store, error) {
	s := &Store{
		dir: dir, opt: opt, fs: opt.FS, log: opt.Log,
		writing: map[string]chan struct{}{}, verified: map[digest.Digest]bool{},
	}
	if s.fs == nil {
		s.fs = fsys.OS
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.opt.Quarantine == "" {
		s.opt.Quarantine = filepath.Join(dir, "quarantine")
	}
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
		if info, err := e.Info(); err == nil && strings.HasPrefix(e.Name(), resumePrefix) && time.Since(info.ModTime()) < resumeFor {
			continue
		}
		if err := s.fs.RemoveAll(filepath.Join(s.ingest(), e.Name())); err != nil {
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
		if err := fsys.WriteFile(s.fs, tmp, []byte(content), 0o644, true); err != nil {
			return nil, fmt.Errorf("blob store: %w", err)
		}
		if err := s.fs.Rename(tmp, path); err != nil {
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
	s.use(d)
	return s.exists(path)
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
			other := s.claim(string(want.Digest))
			if other == nil {
				defer s.unclaim(string(want.Digest))
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

// claim takes the right to write a digest or a file. If another has it, claim returns what is closed when that one is done.
func (s *Store) claim(name string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.writing[name]; other != nil {
		return other
	}
	s.writing[name] = make(chan struct{})
	return nil
}

func (s *Store) unclaim(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.writing[name])
	delete(s.writing, name)
}

// PutBytes stores b and returns its descriptor.
func (s *Store) PutBytes(ctx context.Context, mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, s.Put(ctx, bytes.NewReader(b), desc)
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
	if err := s.fs.Link(path, tmp); err != nil {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("blob %s: %w", d, err)
		}
		defer f.Close()
		return s.Put(context.Background(), f, ocispec.Descriptor{Digest: d})
	}
	if err := s.rename(tmp, to); err != nil {
		_ = s.fs.RemoveAll(tmp)
		return fmt.Errorf("blob %s: %w", d, err)
	}
	return nil
}

// ReadAll returns a blob of at most 64 MiB, verified. Damaged bytes are an error that wraps ErrDigest.
func (s *Store) ReadAll(d digest.Digest) ([]byte, error) {
	r, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() > maxReadAll {
		return nil, fmt.Errorf("blob %s: %w: %d bytes are too many to read at once", d, ErrSize, r.Size())
	}
	f := r.(*reader).f // verified below, whether this process has done so before or not
	b, err := io.ReadAll(io.LimitReader(f, maxReadAll+1))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	if got := d.Algorithm().FromBytes(b); got != d {
		return nil, s.damaged(d, got)
	}
	return b, nil
}

// Delete removes a blob. One that is not there is no error; who has it open reads on.
func (s *Store) Delete(d digest.Digest) error {
	path, err := s.path(d)
	if err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.verified, d)
	s.mu.Unlock()
	if err := s.fs.RemoveAll(path); err != nil {
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
