// SPDX-License-Identifier: Apache-2.0

package share

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What is kept of what earlier exports have written: see Merge.
const (
	keepFor     = 14 * 24 * time.Hour
	keepRecords = 20_000
	keepBytes   = 10 << 30
)

// Merge returns what a place has after an export: all of now, and of old, which may be nil, the records with other keys, most recently used
// first, as long as they are not too old, too many, or their layers too large (docs/cache-format.md, "What is kept").
func Merge(old, now *Document, at time.Time) *Document {
	out := &Document{Layers: slices.Clone(now.Layers), Records: slices.Clone(now.Records)}
	if old == nil {
		out.Mounts = slices.Clone(now.Mounts)
		out.normalize()
		return out
	}
	out.Mounts = mergeMounts(old.Mounts, now.Mounts, at)
	have := make(map[string]bool, len(now.Records))
	for _, r := range now.Records {
		have[r.Key] = true
	}
	counted := map[string]int{} // layerKey: its number in out
	paid := map[digest.Digest]bool{}
	for i := range out.Layers {
		counted[out.Layers[i].layerKey()] = i
		for _, desc := range out.Layers[i].blobs() {
			paid[desc.Digest] = true
		}
	}
	rest := slices.Clone(old.Records)
	slices.SortFunc(rest, func(a, b Record) int {
		return cmp.Or(cmp.Compare(b.Used, a.Used), cmp.Compare(a.Key, b.Key))
	})
	var bytes int64
	oldest := at.Add(-keepFor).Unix()
	for _, r := range rest {
		if have[r.Key] || r.Used < oldest || len(out.Records) >= keepRecords {
			continue
		}
		var more int64
		unpaid := map[digest.Digest]bool{}
		for _, i := range r.layersOf() {
			if _, ok := counted[old.Layers[i].layerKey()]; ok {
				continue
			}
			for _, desc := range old.Layers[i].blobs() {
				if !paid[desc.Digest] && !unpaid[desc.Digest] {
					unpaid[desc.Digest] = true
					more += desc.Size
				}
			}
		}
		if bytes+more > keepBytes {
			continue
		}
		maps.Copy(paid, unpaid)
		bytes += more
		outputs := make([][]int, len(r.Outputs))
		for j, o := range r.Outputs {
			outputs[j] = make([]int, len(o))
			for k, i := range o {
				key := old.Layers[i].layerKey()
				n, ok := counted[key]
				if !ok {
					n = len(out.Layers)
					counted[key] = n
					out.Layers = append(out.Layers, old.Layers[i])
				}
				outputs[j][k] = n
			}
		}
		r.Outputs = outputs
		out.Records = append(out.Records, r)
	}
	out.normalize()
	return out
}

// without returns the document without the records that need one of these blobs.
func (d *Document) without(missing []ocispec.Descriptor) *Document {
	gone := make(map[digest.Digest]bool, len(missing))
	for _, desc := range missing {
		gone[desc.Digest] = true
	}
	out := &Document{Layers: slices.Clone(d.Layers)}
	for _, m := range d.Mounts {
		if !slices.ContainsFunc(m.Content.Blobs(), func(desc ocispec.Descriptor) bool { return gone[desc.Digest] }) {
			out.Mounts = append(out.Mounts, m)
		}
	}
	for _, r := range d.Records {
		lost := slices.ContainsFunc(r.layersOf(), func(i int) bool {
			return slices.ContainsFunc(d.Layers[i].blobs(), func(desc ocispec.Descriptor) bool { return gone[desc.Digest] })
		})
		if !lost {
			out.Records = append(out.Records, r)
		}
	}
	out.normalize()
	return out
}
