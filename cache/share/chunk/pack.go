// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
)

const (
	// packBytes is how long a pack gets. Larger ones are fewer requests and fewer blobs in a manifest.
	packBytes = 16 << 20
	// packUploads is how many packs a Writer sends at once. With the one being filled and the chunks ahead that is some 90 MB.
	packUploads = 3
	// chunksAhead bounds the chunks that are hashed and compressed ahead of the one that is next.
	chunksAhead = 48
)

// job is one chunk on its way into a pack.
type job struct {
	data []byte
	sum  sum
	// known says that the place has it; else packed is what goes into a pack.
	known  bool
	packed []byte
	done   chan struct{}
}

// stream is one Add: chunks come in, packs go out, and the manifest's lists are made.
type stream struct {
	w     *Writer
	m     *manifest
	stats Stats

	number map[sum]int // chunks that m has
	packs  map[int]int // packs of the Writer that m has

	cur     []byte // the pack being filled
	curPack int    // its number in m.Packs; -1 when there is none
	group   *errgroup.Group
}

// store makes chunks of what feed gives to the cutter and puts those that are not there to the place. The lists of m are filled in, but for the
// entries or pieces.
func (w *Writer) store(ctx context.Context, m *manifest, feed func(c *cutter) error) (Stats, error) {
	select {
	case w.adds <- struct{}{}:
		defer func() { <-w.adds }()
	case <-ctx.Done():
		return Stats{}, context.Cause(ctx)
	}
	g, ctx := errgroup.WithContext(ctx)
	s := &stream{w: w, m: m, number: map[sum]int{}, packs: map[int]int{}, curPack: -1, group: g}
	order, work := make(chan *job, chunksAhead), make(chan *job, chunksAhead)
	g.Go(func() error {
		defer close(order)
		defer close(work)
		c := newCutter(func(b []byte) error {
			j := &job{data: b, done: make(chan struct{})}
			for _, to := range []chan *job{order, work} {
				select {
				case to <- j:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			return nil
		})
		if err := feed(c); err != nil {
			return err
		}
		return c.flush()
	})
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error { return w.hash(ctx, work) })
	}
	g.Go(func() error {
		for j := range order {
			select {
			case <-j.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := s.take(ctx, j); err != nil {
				return err
			}
		}
		return s.endPack(ctx)
	})
	err := g.Wait()
	return s.stats, err
}

// hash names chunks and compresses those that are not known.
func (w *Writer) hash(ctx context.Context, work <-chan *job) error {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(maxCut), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return fmt.Errorf("zstd: %w", err)
	}
	for j := range work {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		j.sum = sha256.Sum256(j.data)
		if _, _, j.known = w.lookup(j.sum); !j.known {
			out := enc.EncodeAll(j.data, newChunk(nil))
			if len(out) < len(j.data) {
				j.packed = out
			} else {
				freeChunk(out)
				j.packed = j.data
			}
		}
		close(j.done)
	}
	return nil
}

// take gives the chunk its place.
func (s *stream) take(ctx context.Context, j *job) error {
	s.stats.Chunks++
	s.stats.Bytes += int64(len(j.data))
	n, ok := s.number[j.sum]
	if !ok {
		n = len(s.m.Chunks)
		s.number[j.sum] = n
		if j.known {
			c, p, _ := s.w.lookup(j.sum)
			c.Pack = s.pack(c.Pack, p)
			s.m.Chunks = append(s.m.Chunks, c)
		} else if err := s.add(ctx, j); err != nil {
			return err
		}
	}
	s.m.Stream = append(s.m.Stream, n)
	if j.packed != nil && &j.packed[0] != &j.data[0] {
		freeChunk(j.packed)
	}
	freeChunk(j.data)
	return nil
}

// pack returns the number in the manifest of pack i of the Writer.
func (s *stream) pack(i int, p pack) int {
	n, ok := s.packs[i]
	if !ok {
		n = len(s.m.Packs)
		s.m.Packs = append(s.m.Packs, p)
		s.packs[i] = n
	}
	return n
}

// add puts a new chunk into the pack at hand.
func (s *stream) add(ctx context.Context, j *job) error {
	if s.curPack >= 0 && len(s.cur)+len(j.packed) > packBytes {
		if err := s.endPack(ctx); err != nil {
			return err
		}
	}
	if s.curPack < 0 {
		s.curPack = len(s.m.Packs)
		s.m.Packs = append(s.m.Packs, pack{})
		s.cur = packBuffers.Get().(*packBuffer).b[:0]
	}
	s.m.Chunks = append(s.m.Chunks, place{Sum: j.sum, Pack: s.curPack, Offset: int64(len(s.cur)), Packed: len(j.packed), Size: len(j.data)})
	s.cur = append(s.cur, j.packed...)
	s.stats.New++
	return nil
}

type packBuffer struct{ b []byte }

var packBuffers = sync.Pool{New: func() any { return &packBuffer{b: make([]byte, 0, packBytes)} }}

// endPack sends the pack at hand, which waits while packUploads are being sent.
func (s *stream) endPack(ctx context.Context) error {
	if s.curPack < 0 {
		return nil
	}
	b, n := s.cur, s.curPack
	s.cur, s.curPack = nil, -1
	p := pack{Size: int64(len(b)), Sum: sha256.Sum256(b)}
	s.m.Packs[n] = p
	s.stats.Packs++
	s.stats.Sent += p.Size
	select {
	case s.w.uploads <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.group.Go(func() error {
		defer func() { <-s.w.uploads }()
		err := s.w.blobs.Put(ctx, p.descriptor(), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			return fmt.Errorf("put pack %s: %w", p.descriptor().Digest, err)
		}
		packBuffers.Put(&packBuffer{b}) // not after an error: it may still be read
		return nil
	})
	return nil
}
