// SPDX-License-Identifier: Apache-2.0

package layerblob

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// An eStargz blob is a tar cut into gzip members: one begins at each 4 MB of a file's bytes, so that they can be had without the rest, and goes on with
// whatever is in the tar up to the next such place. The members depend on nothing else, so all processors make them, and one
// goroutine writes them in their order, which is when it is known where they begin. The table of contents and the footer are the library's.
const (
	stargzChunk = 4 << 20
	// stargzMembers bounds how many small ones can be under way.
	stargzMembers = 256
	stargzWorkers = 8
)

// stargz is what has been made of a tar.
type stargz struct {
	// diffID is that of the tar with the table of contents behind it.
	diffID, toc digest.Digest
}

// writeStargz writes the tar, which must have the digest want, as eStargz, by up to workers goroutines (0: one for each processor). The bytes
// do not depend on their number.
func writeStargz(ctx context.Context, w io.Writer, in io.Reader, want digest.Digest, level, workers int) (stargz, error) {
	if workers <= 0 {
		workers = min(runtime.GOMAXPROCS(0), stargzWorkers)
	}
	// What is in memory: the members under way, uncompressed, and the one that is read meanwhile.
	most := int64(workers) * stargzChunk
	group, ctx := errgroup.WithContext(ctx)
	s := &stargzSplitter{
		ctx: ctx, sum: sha256.New(), room: semaphore.NewWeighted(most), most: most,
		ordered: make(chan *stargzMember, stargzMembers), work: make(chan *stargzMember, workers),
	}
	group.Go(func() error {
		defer close(s.ordered)
		defer close(s.work)
		if err := s.split(in); err != nil {
			return err
		}
		if got := digest.NewDigest(digest.SHA256, s.sum); got != want {
			return fmt.Errorf("the layer is damaged: its tar has digest %s", got)
		}
		return nil
	})
	for range workers {
		group.Go(func() error {
			z, err := gzip.NewWriterLevel(nil, level)
			if err != nil {
				return err
			}
			for m := range s.work {
				if err := m.compress(z); err != nil {
					return err
				}
			}
			return nil
		})
	}
	out := &counter{w: w}
	group.Go(func() error {
		for m := range s.ordered {
			select {
			case <-m.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if m.chunk != nil {
				m.chunk.Offset = out.n
			}
			if _, err := out.Write(m.out); err != nil {
				return err
			}
			s.room.Release(m.charged)
			keepLarge(m.out)
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return stargz{}, err
	}
	for _, file := range s.short {
		file.Digest = file.ChunkDigest
	}
	toc, err := estargz.NewGzipCompressorWithLevel(level).WriteTOCAndFooter(out, out.n, &estargz.JTOC{Version: 1, Entries: s.entries}, s.sum)
	return stargz{diffID: digest.NewDigest(digest.SHA256, s.sum), toc: toc}, err
}

// stargzMember is a gzip member.
type stargzMember struct {
	in, out []byte
	// chunk says what of which file the member begins with; nil for the first, which begins with the tar.
	chunk *estargz.TOCEntry
	// chunkSize is how much of in that is.
	chunkSize int64
	charged   int64
	done      chan struct{}
}

func (m *stargzMember) compress(z *gzip.Writer) error {
	if m.chunk != nil {
		m.chunk.ChunkDigest = digest.FromBytes(m.in[:m.chunkSize]).String()
	}
	b := &appender{takeLarge(len(m.in))}
	z.Reset(b)
	if _, err := z.Write(m.in); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	keepLarge(m.in)
	m.in, m.out = nil, b.b
	close(m.done)
	return nil
}

// stargzSplitter cuts a tar into members.
type stargzSplitter struct {
	ctx     context.Context
	sum     hash.Hash // of what has been read
	entries []*estargz.TOCEntry
	short   []*estargz.TOCEntry // files of one chunk, whose digest is the chunk's
	now     *stargzMember
	room    *semaphore.Weighted
	most    int64 // of room

	ordered, work chan *stargzMember
}

// Write takes what has been read from the tar. It is part of the member that is put together.
func (s *stargzSplitter) Write(p []byte) (int, error) {
	s.sum.Write(p)
	s.now.in = append(s.now.in, p...)
	return len(p), nil
}

// next ends the member that is put together and begins one with sizeBytes of a file.
func (s *stargzSplitter) next(chunk *estargz.TOCEntry, sizeBytes int64) error {
	if m := s.now; m != nil {
		m.charged = min(int64(len(m.in)), s.most)
		if err := s.room.Acquire(s.ctx, m.charged); err != nil {
			return context.Cause(s.ctx)
		}
		for _, to := range []chan *stargzMember{s.ordered, s.work} {
			select {
			case to <- m:
			case <-s.ctx.Done():
				return context.Cause(s.ctx)
			}
		}
	}
	s.now = &stargzMember{chunk: chunk, chunkSize: sizeBytes, done: make(chan struct{}), in: takeLarge(int(sizeBytes) + 2048)}
	return nil
}

// split reads the tar to its end, every byte of which goes through Write.
func (s *stargzSplitter) split(in io.Reader) error {
	if err := s.next(nil, 0); err != nil {
		return err
	}
	raw := io.TeeReader(in, s)
	for r := tar.NewReader(raw); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read the layer's tar: %w", err)
		}
		if strings.TrimPrefix(path.Clean("/"+h.Name), "/") == estargz.TOCTarName {
			return fmt.Errorf("the layer has a file %s, which eStargz needs for itself", estargz.TOCTarName)
		}
		e, err := stargzEntry(h)
		if err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
		if e.Type != "reg" || e.Size == 0 {
			if e.Type == "reg" {
				e.Digest = digest.FromBytes(nil).String()
			}
			s.entries = append(s.entries, e)
			continue
		}
		if err := s.file(r, e); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	if _, err := io.Copy(io.Discard, raw); err != nil { // behind the end of the tar
		return err
	}
	return s.next(nil, 0)
}

// file reads the bytes of a regular file.
func (s *stargzSplitter) file(r io.Reader, first *estargz.TOCEntry) error {
	whole, e, size := sha256.New(), first, first.Size
	for at := int64(0); at < size; {
		n := min(stargzChunk, size-at)
		if size-at >= stargzChunk { // the library's readers take 0 for "to the end of the file"
			e.ChunkSize = n
		}
		e.ChunkOffset = at
		if err := s.next(e, n); err != nil {
			return err
		}
		var to io.Writer = io.Discard
		if size > stargzChunk {
			to = whole
		}
		if _, err := io.CopyN(to, r, n); err != nil {
			return fmt.Errorf("read the layer's tar: %w", err)
		}
		if int64(len(s.now.in)) != n {
			return errors.New("sparse files are not supported in eStargz layers")
		}
		s.entries = append(s.entries, e)
		at += n
		e = &estargz.TOCEntry{Name: first.Name, Type: "chunk"}
	}
	if size > stargzChunk {
		first.Digest = digest.NewDigest(digest.SHA256, whole).String()
	} else {
		s.short = append(s.short, first)
	}
	return nil
}

// stargzEntry is what the table of contents says of an entry.
func stargzEntry(h *tar.Header) (*estargz.TOCEntry, error) {
	e := &estargz.TOCEntry{
		Name: h.Name, Mode: h.Mode, UID: h.Uid, GID: h.Gid, Uname: h.Uname, Gname: h.Gname, LinkName: h.Linkname, Xattrs: map[string][]byte{},
	}
	if !h.ModTime.IsZero() && h.ModTime.Unix() != 0 {
		e.ModTime3339 = h.ModTime.UTC().Round(time.Second).Format(time.RFC3339)
	}
	for name, value := range h.PAXRecords {
		if xattr, ok := strings.CutPrefix(name, "SCHILY.xattr."); ok {
			e.Xattrs[xattr] = []byte(value)
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		e.Type, e.Size = "reg", h.Size
	case tar.TypeDir:
		e.Type = "dir"
	case tar.TypeSymlink:
		e.Type = "symlink"
	case tar.TypeLink:
		e.Type = "hardlink"
	case tar.TypeChar, tar.TypeBlock:
		e.Type = "char"
		if h.Typeflag == tar.TypeBlock {
			e.Type = "block"
		}
		e.DevMajor, e.DevMinor = int(h.Devmajor), int(h.Devminor)
	case tar.TypeFifo:
		e.Type = "fifo"
	default:
		return nil, fmt.Errorf("entries of type %q are not supported in eStargz layers", h.Typeflag)
	}
	return e, nil
}

// counter counts what has been written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// largeBuffers are used again; small ones are left to the collector.
var largeBuffers = sync.Pool{New: func() any { return make([]byte, 0, stargzChunk+stargzChunk/16) }}

// takeLarge returns an empty buffer for about sizeBytes.
func takeLarge(sizeBytes int) []byte {
	if sizeBytes < stargzChunk/8 {
		return make([]byte, 0, sizeBytes)
	}
	return largeBuffers.Get().([]byte)[:0]
}

func keepLarge(b []byte) {
	if cap(b) >= stargzChunk {
		//lint:ignore SA6002 three words are allocated for megabytes that are not
		largeBuffers.Put(b)
	}
}

type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) {
	a.b = append(a.b, p...)
	return len(p), nil
}
