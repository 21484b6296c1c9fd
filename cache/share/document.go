// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/share/chunk"
)

// Version is that of the documents written here.
const Version = 1

// The media types of what only caches have.
const (
	MediaTypeDocument = "application/vnd.slipway.cache.v1+json+zstd"
	MediaTypeConfig   = "application/vnd.slipway.cache.config.v1+json"
	MediaTypeIndex    = "application/vnd.slipway.layer.index.v3+zstd"
)

// Bounds of what is read.
const (
	maxDocument     = 64 << 20 // of JSON
	maxPacked       = 32 << 20 // of a document as it is kept
	maxLayerIndex   = 256 << 20
	maxOutputLayers = 1000 // layers of one output
)

// ErrVersion is what the error of Decode wraps for a document of another version.
var ErrVersion = errors.New("a cache of another version")

// Document is what one cache has: docs/cache-format.md.
type Document struct {
	Version int      `json:"version"`
	Layers  []Layer  `json:"layers"`
	Records []Record `json:"records"`
	Mounts  []Mount  `json:"mounts,omitempty"`
}

// Layer is one layer that records name.
type Layer struct {
	// DiffID is the digest of its tar, and Size that tar's length in bytes.
	DiffID digest.Digest `json:"diffID"`
	Size   int64         `json:"size"`
	// Content is the digest of its table of contents (index.Index.Digest).
	Content digest.Digest `json:"content"`
	// Blob is its tar as a blob, with OCI's media types; nil in an image's config.
	Blob *ocispec.Descriptor `json:"blob,omitempty"`
	// Chunks are its tar in chunks, instead of Blob.
	Chunks *chunk.Ref `json:"chunks,omitempty"`
	// Index is its encoded table of contents, zstd; nil in an image's config.
	Index *ocispec.Descriptor `json:"index,omitempty"`
}

// Record is what one key stands for.
type Record struct {
	Key  string `json:"key"`
	Kind string `json:"kind"`
	// Content is the content key of the work of a recipe's record; "" when it is not known.
	Content string        `json:"content,omitempty"`
	Parts   []record.Part `json:"parts"`
	// Redacted says that Parts are not those of the key: something in them is not for everybody.
	Redacted bool `json:"redacted,omitempty"`
	// Outputs are numbers of Layers, lowest first, for each output of the step.
	Outputs    [][]int       `json:"outputs"`
	Step       record.Step   `json:"step"`
	Build      string        `json:"build,omitempty"`
	Created    time.Time     `json:"created"`
	Used       int64         `json:"used"` // seconds since 1970
	Duration   time.Duration `json:"duration,omitempty"`
	PeakMemory int64         `json:"peakMemory,omitempty"`
}

// Encode returns the document as it is kept. It brings d into the order that makes equal documents equal bytes.
func (d *Document) Encode() ([]byte, error) {
	d.normalize()
	raw, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode cache: %w", err)
	}
	if len(raw) > maxDocument {
		return nil, fmt.Errorf("encode cache: %d bytes are more than the %d that can be read again", len(raw), maxDocument)
	}
	return pack(raw)
}

// pack compresses b, the same way each time.
func pack(b []byte) ([]byte, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return nil, err
	}
	return enc.EncodeAll(b, nil), nil
}

// unpack is the reverse of pack, for at most limit bytes.
func unpack(b []byte, limit int64) ([]byte, error) {
	dec, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(uint64(limit)+1<<20))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	raw, err := io.ReadAll(io.LimitReader(dec, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > limit {
		return nil, fmt.Errorf("more than %d bytes", limit)
	}
	return raw, nil
}

// Decode reads what Encode has written and somebody else may have changed. Records that name what is not there or not whole are left out
// and counted. Errors wrap ErrVersion for a document of another version.
func Decode(b []byte) (d *Document, ignored int, err error) {
	raw, err := unpack(b, maxDocument)
	if err != nil {
		return nil, 0, fmt.Errorf("decode cache: %w", err)
	}
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(raw, &version); err != nil {
		return nil, 0, fmt.Errorf("decode cache: %w", err)
	}
	if version.Version != Version {
		return nil, 0, fmt.Errorf("%w: %d; this program knows %d", ErrVersion, version.Version, Version)
	}
	d = &Document{}
	if err := json.Unmarshal(raw, d); err != nil {
		return nil, 0, fmt.Errorf("decode cache: %w", err)
	}
	usable := make([]bool, len(d.Layers))
	for i := range d.Layers {
		usable[i] = d.Layers[i].check() == nil
	}
	d.Mounts = slices.DeleteFunc(d.Mounts, func(m Mount) bool { return m.check() != nil })
	before := len(d.Records)
	seen := make(map[string]bool, before)
	d.Records = slices.DeleteFunc(d.Records, func(r Record) bool {
		bad := r.check(usable) != nil || seen[r.Key]
		seen[r.Key] = true
		return bad
	})
	return d, before - len(d.Records), nil
}

// check says what is wrong with a layer of a document.
func (l *Layer) check() error {
	if err := errors.Join(checkDigest(l.DiffID), checkDigest(l.Content)); err != nil {
		return err
	}
	if l.Size < 0 {
		return fmt.Errorf("a tar of %d bytes", l.Size)
	}
	if l.Chunks != nil {
		if l.Blob != nil {
			return errors.New("both a blob and chunks")
		}
		if err := l.Chunks.Check(); err != nil {
			return err
		}
	}
	for _, desc := range []*ocispec.Descriptor{l.Blob, l.Index} {
		if desc == nil {
			continue
		}
		if err := checkDigest(desc.Digest); err != nil {
			return err
		}
		if desc.Size < 0 {
			return fmt.Errorf("blob %s of %d bytes", desc.Digest, desc.Size)
		}
		// Only the registry, the directory or the bucket of the cache is asked.
		desc.URLs, desc.Data, desc.Platform = nil, nil, nil
	}
	return nil
}

// checkDigest takes the one algorithm that is used here.
func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %q: not SHA-256", d)
	}
	return nil
}

// check says what is wrong with a record of a document of which these layers are usable.
func (r *Record) check(usable []bool) error {
	if err := checkDigest(digest.Digest(r.Key)); err != nil {
		return err
	}
	if r.Kind != record.KindRecipe && r.Kind != record.KindContent {
		return fmt.Errorf("a record of kind %q", r.Kind)
	}
	if r.Content != "" {
		if err := checkDigest(digest.Digest(r.Content)); err != nil {
			return err
		}
	}
	if len(r.Outputs) == 0 || r.Duration < 0 || r.PeakMemory < 0 {
		return errors.New("a record without outputs")
	}
	for _, out := range r.Outputs {
		if len(out) > maxOutputLayers {
			return fmt.Errorf("an output of %d layers", len(out))
		}
		for _, i := range out {
			if i < 0 || i >= len(usable) || !usable[i] {
				return fmt.Errorf("layer %d is not there", i)
			}
		}
	}
	return nil
}

// layerKey tells layers apart that are different to a store.
func (l *Layer) layerKey() string {
	return string(l.DiffID) + " " + string(l.Content)
}

// normalize drops layers that no record names, and those that are there twice, and sorts the rest.
func (d *Document) normalize() {
	d.Version = Version
	type place struct {
		old int
		l   Layer
	}
	named := make([]bool, len(d.Layers))
	for _, r := range d.Records {
		for _, out := range r.Outputs {
			for _, i := range out {
				named[i] = true
			}
		}
	}
	var kept []place
	for i, l := range d.Layers {
		if named[i] {
			kept = append(kept, place{i, l})
		}
	}
	slices.SortStableFunc(kept, func(a, b place) int { return cmp.Compare(a.l.layerKey(), b.l.layerKey()) })
	number := make([]int, len(d.Layers))
	layers := []Layer{}
	for _, p := range kept {
		if n := len(layers); n == 0 || layers[n-1].layerKey() != p.l.layerKey() {
			layers = append(layers, p.l)
		}
		number[p.old] = len(layers) - 1
	}
	records := make([]Record, len(d.Records))
	for i, r := range d.Records {
		outputs := make([][]int, len(r.Outputs))
		for j, out := range r.Outputs {
			outputs[j] = make([]int, len(out))
			for k, l := range out {
				outputs[j][k] = number[l]
			}
		}
		r.Outputs = outputs
		r.Created = r.Created.UTC().Truncate(time.Second)
		records[i] = r
	}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Key, b.Key) })
	d.Layers, d.Records = layers, records
	d.Mounts = sortMounts(d.Mounts)
}

// Blobs are all blobs that the document names, each once, in its order.
func (d *Document) Blobs() []ocispec.Descriptor {
	var out []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	add := func(descs []ocispec.Descriptor) {
		for _, desc := range descs {
			if !seen[desc.Digest] {
				seen[desc.Digest] = true
				out = append(out, desc)
			}
		}
	}
	for i := range d.Layers {
		add(d.Layers[i].blobs())
	}
	for i := range d.Mounts {
		add(d.Mounts[i].Content.Blobs())
	}
	return out
}

// blobs are what of a layer is kept as blobs.
func (l *Layer) blobs() []ocispec.Descriptor {
	var out []ocispec.Descriptor
	if l.Index != nil {
		out = append(out, *l.Index)
	}
	if l.Blob != nil {
		out = append(out, *l.Blob)
	}
	if l.Chunks != nil {
		out = append(out, l.Chunks.Blobs()...)
	}
	return out
}

// layersOf are the numbers of the layers that a record names, each once.
func (r *Record) layersOf() []int {
	out := slices.Concat(r.Outputs...)
	slices.Sort(out)
	return slices.Compact(out)
}
