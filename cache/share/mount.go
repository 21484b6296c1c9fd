// SPDX-License-Identifier: Apache-2.0

package share

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/docker/go-units"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/share/chunk"
)

// Mount is the content of a cache mount.
type Mount struct {
	// ID is the mount's, and From the digest of its first files; "" for none.
	ID   string `json:"id"`
	From string `json:"from,omitempty"`
	// Content is a tree.
	Content chunk.Ref `json:"content"`
	// Files and Bytes say how much that is, for people.
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
	Used  int64 `json:"used"` // seconds since 1970
}

// The most that is kept of cache mounts that the build at hand does not have.
const (
	keepMounts  = 100
	maxMountKey = 4096
)

func (m *Mount) check() error {
	if m.ID == "" || len(m.ID) > maxMountKey || len(m.From) > maxMountKey || m.Files < 0 || m.Bytes < 0 {
		return errors.New("a cache mount without a name")
	}
	return m.Content.Check()
}

func (m *Mount) size() (n int64) {
	for _, desc := range m.Content.Blobs() {
		n += desc.Size
	}
	return n
}

// sortMounts sorts by ID; of two for one mount the first stays.
func sortMounts(mounts []Mount) []Mount {
	if len(mounts) == 0 {
		return nil
	}
	out := slices.Clone(mounts)
	slices.SortStableFunc(out, func(a, b Mount) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.From, b.From)) })
	return slices.CompactFunc(out, func(a, b Mount) bool { return a.ID == b.ID && a.From == b.From })
}

// mergeMounts returns now's, and of old those that are not too old, the latest first, up to keepBytes.
func mergeMounts(old, now []Mount, at time.Time) []Mount {
	out := slices.Clone(now)
	rest := slices.Clone(old)
	slices.SortStableFunc(rest, func(a, b Mount) int { return cmp.Compare(b.Used, a.Used) })
	var bytes int64
	for _, m := range rest {
		same := func(n Mount) bool { return n.ID == m.ID && n.From == m.From }
		if m.Used < at.Add(-keepFor).Unix() || len(out) >= keepMounts+len(now) || slices.ContainsFunc(out, same) {
			continue
		}
		if bytes+m.size() > keepBytes {
			continue
		}
		bytes += m.size()
		out = append(out, m)
	}
	return out
}

// chunks is what an Export needs for content in chunks, made when it is needed first.
type chunks struct {
	writer *chunk.Writer
	// layers are those that the place has in chunks, by layerKey.
	layers map[string]Layer
}

// openChunks reads what the place has in chunks.
func (e *Export) openChunks() (*chunks, error) {
	c := &chunks{writer: chunk.NewWriter(e.opts.Backend), layers: map[string]Layer{}}
	raw, _, err := e.opts.Backend.Ref(e.ctx, e.opts.Name)
	if err != nil {
		return c, context.Cause(e.ctx) // Finish will say
	}
	d, _, err := Decode(raw)
	if err != nil {
		return c, nil
	}
	var refs []chunk.Ref
	for _, l := range d.Layers {
		if l.Chunks != nil && l.check() == nil {
			refs = append(refs, *l.Chunks)
			c.layers[l.layerKey()] = l
		}
	}
	for _, m := range d.Mounts {
		refs = append(refs, m.Content)
	}
	if err := c.writer.Know(e.ctx, refs...); err != nil {
		return nil, fmt.Errorf("read what the cache has in chunks: %w", err)
	}
	return c, nil
}

// AddMount exports the directory of a cache mount, in chunks. lastUsed is when a step has used it.
func (e *Export) AddMount(id, from string, lastUsed time.Time, dir string, opts chunk.TreeOptions) (chunk.Stats, error) {
	c, err := e.chunks()
	if err != nil {
		return chunk.Stats{}, err
	}
	ref, stats, err := c.writer.AddTree(e.ctx, dir, opts)
	if err != nil {
		return stats, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mounts = append(e.mounts, Mount{ID: id, From: from, Content: ref, Files: stats.Files, Bytes: stats.Bytes, Used: lastUsed.Unix()})
	return stats, nil
}

// ChunkSource is a LayerSource whose layers can be exported in chunks.
type ChunkSource interface {
	LayerSource
	// Describe returns a layer's diff ID, tar size and content digest.
	Describe(ctx context.Context, id layer.ID) (Layer, error)
	// Tar opens its tar.
	Tar(ctx context.Context, id layer.ID) (TarReader, error)
}

// TarReader is an open tar.
type TarReader interface {
	io.ReaderAt
	io.Closer
}

// leastChunked is the size of a tar from which on it is worth chunks: below, a pack and a manifest are more than a blob.
const leastChunked = 1 << 20

// sendChunks brings one layer to the place in chunks; false if it is better a blob.
func (s *sending) sendChunks(e *Export, id layer.ID) (bool, error) {
	source, ok := e.opts.Layers.(ChunkSource)
	if !e.opts.Chunked || !ok {
		return false, nil
	}
	c, err := e.chunks()
	if err != nil {
		return true, err
	}
	l, err := source.Describe(e.ctx, id)
	if err != nil {
		s.lost = true
		return true, fmt.Errorf("layer %s: %w", id, err)
	}
	if l.Size < leastChunked {
		return false, nil
	}
	if known, ok := c.layers[l.layerKey()]; ok {
		missing, err := e.opts.Backend.Missing(e.ctx, known.blobs())
		if err != nil {
			return true, err
		}
		if len(missing) == 0 {
			s.layer = known
			return true, nil
		}
	}
	x, table, err := s.sendIndex(e, id)
	if err != nil {
		return true, err
	}
	tar, err := source.Tar(e.ctx, id)
	if err != nil {
		s.lost = true
		return true, fmt.Errorf("layer %s: %w", id, err)
	}
	defer tar.Close()
	var files []chunk.Range
	for i := range x.Len() {
		if f := x.At(i); f.Offset >= 0 && f.Size > 0 && f.HardLink == "" {
			files = append(files, chunk.Range{Offset: f.Offset, Length: f.Size})
		}
	}
	ref, stats, err := c.writer.AddTar(e.ctx, tar, l.Size, placesInOrder(files, l.Size))
	if err != nil {
		return true, fmt.Errorf("layer %s: %w", id, err)
	}
	e.opts.Progress(ref.Manifest.Digest.String(), stats.Sent, stats.Sent, true)
	s.layer = Layer{DiffID: l.DiffID, Size: l.Size, Content: x.Digest(), Chunks: &ref, Index: table}
	return true, nil
}

// placesInOrder sorts where files are in a tar, and leaves out what does not fit: how a tar is cut decides only what is found again.
func placesInOrder(files []chunk.Range, size int64) []chunk.Range {
	slices.SortFunc(files, func(a, b chunk.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	end := int64(0)
	return slices.DeleteFunc(files, func(f chunk.Range) bool {
		if f.Offset < end || f.Offset+f.Length > size {
			return true
		}
		end = f.Offset + f.Length
		return false
	})
}

// Mounts are the cache mounts that the cache has.
func (im *Import) Mounts() []Mount { return im.doc.Mounts }

// RestoreMount writes the content of a cache mount to dir, an empty directory, and says how much it was; false if the cache has none. After an error
// dir may have a part of it.
func (im *Import) RestoreMount(ctx context.Context, id, from, dir string) (what string, ok bool, err error) {
	i := slices.IndexFunc(im.doc.Mounts, func(m Mount) bool { return m.ID == id && m.From == from })
	if i < 0 {
		return "", false, nil
	}
	stats, err := chunk.Restore(ctx, im.opts.Backend, im.doc.Mounts[i].Content, dir)
	if err != nil {
		return "", false, err
	}
	return fmt.Sprintf("%d files, %s, from %s", stats.Files, units.HumanSize(float64(stats.Bytes)), im.opts.Title), true, nil
}
