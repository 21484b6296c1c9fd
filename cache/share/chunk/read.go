// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// How packs are read: what is needed of them is asked for in windows of the stream, sorted by place; what is close together in a pack is one
// request. Several windows are on their way at once.
const (
	// windowBytes is how much of the stream a window has, uncompressed; more only if one chunk is more.
	windowBytes = 8 << 20
	// windowsAhead is how many are read at once.
	windowsAhead = 4
	// gapBytes is how much between two chunks is rather read than asked around.
	gapBytes = 256 << 10
)

// reader reads the chunks of one manifest.
type reader struct {
	blobs Blobs
	m     *manifest
	dec   *zstd.Decoder
}

func newReader(b Blobs, m *manifest) (*reader, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(2*maxChunk), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &reader{blobs: b, m: m, dec: dec}, nil
}

func (r *reader) close() { r.dec.Close() }

// load reads chunks, by their numbers, in any order and verified.
func (r *reader) load(ctx context.Context, numbers []int) (map[int][]byte, error) {
	numbers = slices.Clone(numbers)
	slices.SortFunc(numbers, func(a, b int) int {
		x, y := &r.m.Chunks[a], &r.m.Chunks[b]
		return cmp.Or(cmp.Compare(x.Pack, y.Pack), cmp.Compare(x.Offset, y.Offset), cmp.Compare(a, b))
	})
	numbers = slices.Compact(numbers)
	out := make(map[int][]byte, len(numbers))
	for len(numbers) > 0 {
		n, length := r.run(numbers)
		if err := r.read(ctx, numbers[:n], length, out); err != nil {
			return nil, err
		}
		numbers = numbers[n:]
	}
	return out, nil
}

// run returns how many of the chunks, from the first, are read with one request, and how long that is.
func (r *reader) run(numbers []int) (n int, length int64) {
	first := &r.m.Chunks[numbers[0]]
	end := first.Offset + int64(first.Packed)
	for n = 1; n < len(numbers); n++ {
		c := &r.m.Chunks[numbers[n]]
		if c.Pack != first.Pack || c.Offset > end+gapBytes || c.Offset+int64(c.Packed)-first.Offset > 2*windowBytes {
			break
		}
		end = max(end, c.Offset+int64(c.Packed))
	}
	return n, end - first.Offset
}

// read reads chunks with one request. Chunks of a poisoned manifest may lie over each other.
func (r *reader) read(ctx context.Context, numbers []int, length int64, out map[int][]byte) error {
	first := &r.m.Chunks[numbers[0]]
	desc := r.m.Packs[first.Pack].descriptor()
	body, err := r.blobs.Open(ctx, desc, first.Offset, length)
	if err != nil {
		return fmt.Errorf("read pack %s: %w", desc.Digest, err)
	}
	defer body.Close()
	b := make([]byte, length)
	if _, err := io.ReadFull(body, b); err != nil {
		return fmt.Errorf("read pack %s, %d bytes at %d: %w", desc.Digest, length, first.Offset, err)
	}
	for _, i := range numbers {
		c := &r.m.Chunks[i]
		at := c.Offset - first.Offset
		data := b[at : at+int64(c.Packed)]
		if c.Packed != c.Size {
			if data, err = r.dec.DecodeAll(data, make([]byte, 0, c.Size)); err != nil {
				return fmt.Errorf("%w: chunk at %d of pack %s: %w", ErrCorrupt, c.Offset, desc.Digest, err)
			}
		} else {
			data = slices.Clone(data) // the rest need not stay for it
		}
		if len(data) != c.Size || sha256.Sum256(data) != c.Sum {
			return fmt.Errorf("%w: the chunk at %d of pack %s has other bytes than the manifest says", ErrCorrupt, c.Offset, desc.Digest)
		}
		out[i] = data
	}
	return nil
}

// span is a stretch of the stream.
type span struct{ at, length int64 }

// locate says where in the stream its chunks begin: one more number than there are places in it.
func (m *manifest) locate() []int64 {
	starts := make([]int64, len(m.Stream)+1)
	for i, c := range m.Stream {
		starts[i+1] = starts[i] + int64(m.Chunks[c].Size)
	}
	return starts
}

// within returns the places of the stream, from and to (exclusive), whose chunks have something of s.
func within(starts []int64, s span) (from, to int) {
	if s.length == 0 {
		return 0, 0
	}
	from, found := slices.BinarySearch(starts, s.at)
	if !found {
		from--
	}
	to, _ = slices.BinarySearch(starts, s.at+s.length)
	return from, to
}
