// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/fsys"
)

// TestFaults fails every call of every way to write a blob. Afterwards nothing wrong is there, what was there before still is, and
// nothing is left over once the store has been opened again.
func TestFaults(t *testing.T) {
	old, fresh := []byte("was there before"), bytes.Repeat([]byte("new "), 200_000)
	d := digest.FromBytes(fresh)
	finished := filepath.Join(t.TempDir(), "layer.tar")
	if err := os.WriteFile(finished, fresh, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		op   func(s *Store) error
		// gone is a blob that the operation removes.
		gone digest.Digest
	}{
		{"put", func(s *Store) error {
			return s.Put(t.Context(), bytes.NewReader(fresh), ocispec.Descriptor{Digest: d, Size: int64(len(fresh))})
		}, ""},
		{"writer", func(s *Store) error {
			w, err := s.Writer(t.Context())
			if err != nil {
				return err
			}
			defer w.Close()
			if _, err := w.Write(fresh); err != nil {
				return err
			}
			return w.Commit(0, "")
		}, ""},
		{"resume", func(s *Store) error {
			w, err := s.Resume(t.Context(), "it")
			if err != nil {
				return err
			}
			defer w.Close()
			for w.Size() < int64(len(fresh)) {
				if _, err := w.Write(fresh[w.Size():min(w.Size()+300_000, int64(len(fresh)))]); err != nil {
					return err
				}
			}
			return w.Commit(0, d)
		}, ""},
		{"link", func(s *Store) error { return s.Link(d, finished) }, ""},
		{"delete", func(s *Store) error { return s.Delete(digest.FromBytes(old)) }, digest.FromBytes(old)},
	} {
		for _, sticky := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sticky=%v", c.name, sticky), func(t *testing.T) {
				for k := 1; ; k++ {
					dir := faultfs.Dir(t)
					s, err := Open(dir)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := s.PutBytes(t.Context(), "", old); err != nil {
						t.Fatal(err)
					}
					fault := &faultfs.Fault{FS: fsys.OS}
					if s, err = OpenWith(dir, Options{FS: fault}); err != nil {
						t.Fatal(err)
					}
					fault.At, fault.Sticky = fault.Calls()+k, sticky
					err = c.op(s)
					where := fault.Failed()
					if where != "" && err != nil && !errors.Is(err, faultfs.ErrInjected) {
						t.Errorf("%s: the error hides its cause: %v", where, err)
					}

					again, oerr := Open(dir)
					if oerr != nil {
						t.Fatalf("%s: %v", where, oerr)
					}
					if c.gone == "" || err != nil {
						if b, err := again.ReadAll(digest.FromBytes(old)); err != nil || !bytes.Equal(b, old) {
							t.Errorf("%s: the old blob is lost: %v", where, err)
						}
					}
					if err == nil && c.gone == "" && !again.Has(d) {
						t.Errorf("%s: no error, but no blob either", where)
					}
					if err := again.Walk(func(d digest.Digest, _ int64) error { return again.Check(t.Context(), d) }); err != nil {
						t.Errorf("%s: %v", where, err)
					}
					left, _ := os.ReadDir(filepath.Join(dir, "ingest"))
					for _, e := range left {
						if !strings.HasPrefix(e.Name(), resumePrefix) {
							t.Errorf("%s: %s is left in ingest", where, e.Name())
						}
					}
					if where == "" {
						if err != nil {
							t.Errorf("without a fault: %v", err)
						}
						return
					}
					if err := c.op(again); err != nil {
						t.Errorf("%s: the next attempt: %v", where, err)
					}
					if err := again.Walk(func(d digest.Digest, _ int64) error { return again.Check(t.Context(), d) }); err != nil {
						t.Errorf("%s: after the next attempt: %v", where, err)
					}
				}
			})
		}
	}
}

func TestResume(t *testing.T) {
	dir := faultfs.Dir(t)
	content := bytes.Repeat([]byte("0123456789"), 1000)
	d := digest.FromBytes(content)
	write := func(s *Store, ref string, wantOffset int64, b []byte) *Writer {
		t.Helper()
		w, err := s.Resume(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if w.Size() != wantOffset {
			t.Errorf("resumed at %d, want %d", w.Size(), wantOffset)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		return w
	}
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	write(s, "a", 0, content[:4000]).Close()
	write(s, "b", 0, content[:10]).Close()
	if s, err = Open(dir); err != nil { // the process has died
		t.Fatal(err)
	}
	w := write(s, "a", 4000, content[4000:])
	// Another of the same name has to wait, and then finds that there is nothing to go on with.
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("no time"))
	if _, err := s.Resume(ctx, "a"); err == nil || err.Error() != "no time" {
		t.Errorf("second writer of a name: %v", err)
	}
	if err := w.Commit(int64(len(content)), d); err != nil {
		t.Fatal(err)
	}
	if b, err := s.ReadAll(d); err != nil || !bytes.Equal(b, content) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	// What does not fit in the end is thrown away.
	w = write(s, "b", 10, content)
	if err := w.Commit(0, d); !errors.Is(err, ErrDigest) {
		t.Errorf("commit of other bytes: %v", err)
	}
	w = write(s, "b", 0, content)
	if err := w.Commit(0, d); err != nil {
		t.Errorf("commit of what is there already: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "ingest")); len(left) != 0 {
		t.Errorf("left in ingest: %v", left)
	}
}

// TestManyWritersOneWrite puts one blob from many goroutines: only one of the readers is read.
func TestManyWritersOneWrite(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("x"), 1<<20)
	var read atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r := &sumReader{bytes.NewReader(content), &read}
			if err := s.Put(t.Context(), r, ocispec.Descriptor{Digest: digest.FromBytes(content)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if read.Load() != int64(len(content)) {
		t.Errorf("%d bytes were read, want %d", read.Load(), len(content))
	}
}

type sumReader struct {
	r io.Reader
	n *atomic.Int64
}

func (c *sumReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// TestColdRead flips a byte behind the store's back: the first full read of the next process finds it, and the blob is gone then.
func TestColdRead(t *testing.T) {
	content := bytes.Repeat([]byte("x"), 1<<20)
	d := digest.FromBytes(content)
	for _, c := range []struct {
		name string
		read func(r ReaderAt) error
	}{
		{"read", func(r ReaderAt) error { _, err := io.ReadAll(onlyReader{r}); return err }},
		{"copy", func(r ReaderAt) error { _, err := io.Copy(io.Discard, r); return err }},
		{"begin again", func(r ReaderAt) error {
			if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
				return err
			}
			if _, err := r.Seek(0, io.SeekStart); err != nil {
				return err
			}
			_, err := io.ReadAll(r)
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := faultfs.Dir(t)
			s, err := Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			put := func() {
				t.Helper()
				if err := s.Put(t.Context(), bytes.NewReader(content), ocispec.Descriptor{Digest: d}); err != nil {
					t.Fatal(err)
				}
				r, err := s.Open(d)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				if err := c.read(r); err != nil {
					t.Errorf("good blob: %v", err)
				}
			}
			put()
			if s, err = Open(dir); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.WriteAt([]byte("y"), 4711)
			f.Close()
			r, err := s.Open(d)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.read(r); !errors.Is(err, ErrDigest) {
				t.Errorf("damaged blob: %v", err)
			}
			r.Close()
			if s.Has(d) {
				t.Error("the damaged blob is still there")
			}
			if _, err := os.Stat(filepath.Join(dir, "quarantine", d.Encoded())); err != nil {
				t.Error(err)
			}
			put()
		})
	}
}
