// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Writer puts trees and tars to one place. Its methods may be called concurrently.
type Writer struct {
	blobs   Blobs
	adds    chan struct{} // has one while an Add goes on: the next one finds its chunks
	uploads chan struct{} // one for each pack that is being sent

	mu     sync.RWMutex // guards what follows
	packs  []pack
	chunks map[sum]place // what is in packs
}

// NewWriter returns a Writer to b. It knows of no chunks that are there: see Know.
func NewWriter(b Blobs) *Writer {
	return &Writer{blobs: b, adds: make(chan struct{}, 1), uploads: make(chan struct{}, packUploads), chunks: map[sum]place{}}
}

// lookup returns where a chunk is, with the number and the name of its pack.
func (w *Writer) lookup(s sum) (place, pack, bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	c, ok := w.chunks[s]
	if !ok {
		return place{}, pack{}, false
	}
	return c, w.packs[c.Pack], true
}

// learn takes note of a pack and chunks that are in it.
func (w *Writer) learn(p pack, chunks []place) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := slices.IndexFunc(w.packs, func(q pack) bool { return q.Sum == p.Sum })
	if n < 0 {
		n = len(w.packs)
		w.packs = append(w.packs, p)
	}
	for _, c := range chunks {
		if _, ok := w.chunks[c.Sum]; !ok {
			c.Pack = n
			w.chunks[c.Sum] = c
		}
	}
}

// When packs are given up, and what of them is needed goes into new ones: one of which less than a third is used, and all that are
// small, when there are too many of those.
const (
	leastUse   = 3
	smallPack  = packBytes / 8
	smallPacks = 16
)

// Know tells the Writer of what earlier exports have put to the place: chunks that they have are not sent again. Refs
// whose blobs are gone or cannot be read are of no use, which is no error; the error is that of a place that does not answer.
//
// Packs of which little is used by the refs, all together, are not taken note of, nor are small ones when there are many: what is still needed of them is sent
// again, and nothing names them any more. So Know is called once, with everything that the place has.
func (w *Writer) Know(ctx context.Context, refs ...Ref) error {
	manifests, err := w.manifests(ctx, refs)
	if err != nil {
		return err
	}
	type use struct {
		pack   pack
		chunks []place
		seen   map[sum]bool
		used   int64
	}
	uses := map[sum]*use{}
	for _, m := range manifests {
		for i := range m.Chunks {
			c := m.Chunks[i]
			p := m.Packs[c.Pack]
			u := uses[p.Sum]
			if u == nil {
				u = &use{pack: p, seen: map[sum]bool{}}
				uses[p.Sum] = u
			}
			if !u.seen[c.Sum] {
				u.seen[c.Sum] = true
				u.used += int64(c.Packed)
				u.chunks = append(u.chunks, c)
			}
		}
	}
	descs := make([]ocispec.Descriptor, 0, len(uses))
	small := 0
	for _, u := range uses {
		descs = append(descs, u.pack.descriptor())
		if u.pack.Size < smallPack {
			small++
		}
	}
	slices.SortFunc(descs, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	missing, err := w.blobs.Missing(ctx, descs)
	if err != nil {
		return fmt.Errorf("look for packs: %w", err)
	}
	gone := map[digest.Digest]bool{}
	for _, d := range missing {
		gone[d.Digest] = true
	}
	for _, d := range descs {
		var s sum
		copy(s[:], mustDecode(d.Digest))
		u := uses[s]
		if gone[d.Digest] || u.used*leastUse < u.pack.Size || small > smallPacks && u.pack.Size < smallPack {
			continue
		}
		w.learn(u.pack, u.chunks)
	}
	return nil
}

// manifests reads those of refs that can be read.
func (w *Writer) manifests(ctx context.Context, refs []Ref) ([]*manifest, error) {
	out := make([]*manifest, len(refs))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range refs {
		g.Go(func() error {
			out[i], _ = load(gctx, w.blobs, refs[i]) // what cannot be read is no help
			return context.Cause(ctx)
		})
	}
	err := g.Wait()
	return slices.DeleteFunc(out, func(m *manifest) bool { return m == nil }), err
}

// finish puts the manifest and returns what names it all.
func (w *Writer) finish(ctx context.Context, m *manifest, stats *Stats) (Ref, error) {
	m.sortChunks()
	b, err := m.encode()
	if err != nil {
		return Ref{}, err
	}
	ref := Ref{Manifest: ocispec.Descriptor{MediaType: MediaTypeManifest, Digest: digest.FromBytes(b), Size: int64(len(b))}}
	for _, p := range m.Packs {
		ref.Packs = append(ref.Packs, p.descriptor())
	}
	if err := ref.Check(); err != nil {
		return Ref{}, err
	}
	err = w.blobs.Put(ctx, ref.Manifest, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		return Ref{}, fmt.Errorf("put manifest: %w", err)
	}
	stats.Sent += int64(len(b))
	byPack := make([][]place, len(m.Packs))
	for _, c := range m.Chunks {
		byPack[c.Pack] = append(byPack[c.Pack], c)
	}
	for i, p := range m.Packs {
		w.learn(p, byPack[i])
	}
	return ref, nil
}

// Range is where the bytes of one file are in a tar.
type Range struct{ Offset, Length int64 }

// AddTar exports a tar of size bytes. files are the places of its files' contents, in order, without overlap (the Offset and Size of the files of
// the layer's index): they are cut and found again apart from the headers around them, which change when nothing else does.
func (w *Writer) AddTar(ctx context.Context, r io.ReaderAt, size int64, files []Range) (Ref, Stats, error) {
	ref, stats, err := w.addTar(ctx, r, size, files)
	if err != nil {
		return Ref{}, stats, fmt.Errorf("export chunks of a tar: %w", err)
	}
	return ref, stats, nil
}

func (w *Writer) addTar(ctx context.Context, r io.ReaderAt, size int64, files []Range) (Ref, Stats, error) {
	m := &manifest{Kind: kindTar, Small: smallFile}
	at := int64(0)
	for _, f := range files {
		if f.Offset < at || f.Length < 0 || f.Offset+f.Length > size {
			return Ref{}, Stats{}, fmt.Errorf("a file of %d bytes at %d of %d overlaps another, or the end", f.Length, f.Offset, size)
		}
		m.Tar = append(m.Tar, piece{Other: f.Offset - at, File: f.Length})
		at = f.Offset + f.Length
		if f.Length < smallFile {
			m.SmallBytes += f.Length
		}
	}
	if at < size {
		m.Tar = append(m.Tar, piece{Other: size - at})
	}
	section := func(c *cutter, at, n int64) error {
		got, err := c.take(io.NewSectionReader(r, at, n), n)
		if err == nil && got != n {
			err = errors.New("the tar is shorter than it was said to be")
		}
		return err
	}
	stats, err := w.store(ctx, m, func(c *cutter) error {
		at := int64(0)
		for _, p := range m.Tar {
			if err := section(c, at, p.Other); err != nil {
				return err
			}
			at += p.Other + p.File
		}
		if err := c.flush(); err != nil {
			return err
		}
		for _, large := range []bool{false, true} {
			at := int64(0)
			for _, p := range m.Tar {
				at += p.Other
				if p.File > 0 && p.File >= smallFile == large {
					if err := section(c, at, p.File); err != nil {
						return err
					}
					if large {
						if err := c.flush(); err != nil {
							return err
						}
					}
				}
				at += p.File
			}
			if err := c.flush(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Ref{}, stats, err
	}
	ref, err := w.finish(ctx, m, &stats)
	return ref, stats, err
}
