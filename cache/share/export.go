// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// maxConflicts is how often a document is merged again because somebody else was faster.
const maxConflicts = 20

// LayerBlob is a layer as a cache keeps it.
type LayerBlob struct {
	DiffID digest.Digest
	// Size is the length of the uncompressed tar in bytes.
	Size int64
	Desc ocispec.Descriptor
	Open func() (io.ReadCloser, error)
}

// LayerSource is where an Export gets layers. Its methods may be called concurrently.
type LayerSource interface {
	// Blob returns a layer as a blob, which is made if there is none yet.
	Blob(ctx context.Context, id layer.ID) (LayerBlob, error)
	// Index returns its table of contents.
	Index(ctx context.Context, id layer.ID) (*index.Index, error)
}

// ExportOptions say what an Export works with.
type ExportOptions struct {
	Backend Backend
	// Name is that of the document.
	Name   string
	Layers LayerSource
	// Chunked sends large layers in chunks, if Layers is a ChunkSource.
	Chunked bool
	// Progress is called with the bytes of each blob that is sent, by its digest, last with done. It may be nil and is called from
	// several goroutines.
	Progress func(id string, current, total int64, done bool)
	// Warn takes what is left out and why; may be nil.
	Warn func(string)
	// Now is the time of use of what is exported; zero is the clock's.
	Now time.Time
}

// Export brings records and their layers to a Backend. Its methods may be called concurrently.
type Export struct {
	opts  ExportOptions
	ctx   context.Context
	stop  context.CancelCauseFunc
	slots chan struct{}
	group sync.WaitGroup

	chunks func() (*chunks, error)

	mu     sync.Mutex // guards layers and mounts
	layers map[layer.ID]*sending
	mounts []Mount
}

// sending is a layer on its way.
type sending struct {
	done  chan struct{}
	layer Layer
	// lost says that the layer itself could not be had; err of the place is another matter.
	lost bool
	err  error
}

// Item is a record to be exported, and its key.
type Item struct {
	Key    string
	Record *record.Record
	// Redacted says that the record's Parts are not those of the key.
	Redacted bool
}

// record is the item as documents have it, without outputs.
func (i *Item) record(now time.Time) Record {
	r := i.Record
	return Record{
		Key: i.Key, Kind: r.Kind, Content: r.ContentKey, Parts: r.Parts, Redacted: i.Redacted, Step: r.Step, Build: r.Build, Created: r.Created,
		Used: now.Unix(), Duration: r.Duration, PeakMemory: r.PeakMemory,
	}
}

// Exported is what an Export has done.
type Exported struct {
	// Records are how many the document has now, Own those of this export.
	Records, Own int
	// Bytes are the size of the document, packed.
	Bytes int64
}

// NewExport returns an Export that ends with ctx.
func NewExport(ctx context.Context, opts ExportOptions) *Export {
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64, bool) {}
	}
	if opts.Warn == nil {
		opts.Warn = func(string) {}
	}
	if opts.Now.IsZero() {
		opts.Now = time.Now()
	}
	e := &Export{opts: opts, slots: make(chan struct{}, parallel), layers: map[layer.ID]*sending{}}
	e.ctx, e.stop = context.WithCancelCause(ctx)
	e.chunks = sync.OnceValues(e.openChunks)
	return e
}

// Add begins to send the layers of snap, which are going to be exported. It does not wait.
func (e *Export) Add(snap snapshot.Snapshot) {
	for _, id := range snap {
		e.layer(id)
	}
}

// layer returns the layer on its way.
func (e *Export) layer(id layer.ID) *sending {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.layers[id]
	if s != nil {
		return s
	}
	s = &sending{done: make(chan struct{})}
	e.layers[id] = s
	e.group.Go(func() {
		defer close(s.done)
		select {
		case e.slots <- struct{}{}:
			defer func() { <-e.slots }()
			s.send(e, id)
		case <-e.ctx.Done():
			s.err = context.Cause(e.ctx)
		}
	})
	return s
}

// send brings one layer and its index to the backend.
func (s *sending) send(e *Export, id layer.ID) {
	if done, err := s.sendChunks(e, id); done {
		s.err = err
		return
	}
	blob, err := e.opts.Layers.Blob(e.ctx, id)
	if err != nil {
		s.err, s.lost = fmt.Errorf("layer %s: %w", id, err), true
		return
	}
	x, table, err := s.sendIndex(e, id)
	if err != nil {
		s.err = err
		return
	}
	desc := ocispec.Descriptor{MediaType: blob.Desc.MediaType, Digest: blob.Desc.Digest, Size: blob.Desc.Size}
	s.layer = Layer{DiffID: blob.DiffID, Size: blob.Size, Content: x.Digest(), Blob: &desc, Index: table}
	var read error // of the layer, not of the place
	sent := false
	s.err = e.opts.Backend.Put(e.ctx, desc, func() (io.ReadCloser, error) {
		rc, err := blob.Open()
		if read = err; err != nil {
			return nil, err
		}
		sent = true
		return &reporting{ReadCloser: rc, id: desc.Digest.String(), total: desc.Size, report: e.opts.Progress}, nil
	})
	s.lost = read != nil
	if s.err == nil && sent {
		e.opts.Progress(desc.Digest.String(), desc.Size, desc.Size, true)
	}
}

// sendIndex brings the table of contents of a layer to the backend.
func (s *sending) sendIndex(e *Export, id layer.ID) (*index.Index, *ocispec.Descriptor, error) {
	x, err := e.opts.Layers.Index(e.ctx, id)
	if err != nil {
		s.lost = true
		return nil, nil, fmt.Errorf("index of layer %s: %w", id, err)
	}
	packed, err := pack(x.Encode())
	if err != nil {
		return nil, nil, err
	}
	desc := descriptorOf(MediaTypeIndex, packed)
	return x, &desc, putBytes(e.ctx, e.opts.Backend, desc, packed)
}

// reporting tells how much has been read, every 256 KiB.
type reporting struct {
	io.ReadCloser
	id     string
	total  int64
	report func(string, int64, int64, bool)

	mu      sync.Mutex // guards n and told
	n, told int64
}

func (r *reporting) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.mu.Lock()
	at := r.n + int64(n)
	r.mu.Unlock()
	r.reached(at)
	return n, err
}

// reached notes that so many bytes have been read.
func (r *reporting) reached(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n = n
	if (r.told == 0 || r.n-r.told >= 256<<10) && r.n < r.total {
		r.told = r.n
		r.report(r.id, r.n, r.total, false)
	}
}

// Stop gives up and waits until nothing goes on any more.
func (e *Export) Stop(cause error) {
	e.stop(cause)
	e.group.Wait()
}

// Keys reads the document that is there and reports which keys it has. Nothing that is there is no error.
func (e *Export) Keys() map[string]bool {
	keys := map[string]bool{}
	raw, _, err := e.opts.Backend.Ref(e.ctx, e.opts.Name)
	if err != nil {
		return keys // Finish will say
	}
	if d, _, err := Decode(raw); err == nil {
		for _, r := range d.Records {
			keys[r.Key] = true
		}
	}
	return keys
}

// Finish sends what is missing of items and writes the document, merged with the one that is there, in which the records of used count as used
// now. It ends the Export.
func (e *Export) Finish(items []Item, used []string) (_ Exported, err error) {
	defer func() {
		cause := err
		if cause == nil {
			cause = errors.New("the export is over")
		}
		e.Stop(cause)
	}()
	own, err := e.document(items)
	if err != nil {
		return Exported{}, err
	}
	for try := 1; ; try++ {
		done, err := e.write(own, used)
		if errors.Is(err, ErrConflict) && try < maxConflicts {
			continue
		}
		return done, err
	}
}

// document waits for the layers of items and returns what this export has to say.
func (e *Export) document(items []Item) (*Document, error) {
	for _, item := range items { // all at once
		for _, snap := range item.Record.Outputs {
			e.Add(snap)
		}
	}
	d := &Document{}
	number := map[layer.ID]int{}
	lost := map[layer.ID]bool{}
	for _, item := range items {
		outputs := make([][]int, len(item.Record.Outputs))
		whole := true
		for i, snap := range item.Record.Outputs {
			outputs[i] = make([]int, 0, len(snap))
			for _, id := range snap {
				s := e.layer(id)
				<-s.done
				if s.err != nil && !s.lost {
					return nil, s.err
				}
				if s.err != nil {
					if cause := context.Cause(e.ctx); cause != nil {
						return nil, cause
					}
					if !lost[id] {
						e.opts.Warn("left out of the cache: " + s.err.Error())
					}
					lost[id], whole = true, false
					break
				}
				n, ok := number[id]
				if !ok {
					n = len(d.Layers)
					number[id] = n
					d.Layers = append(d.Layers, s.layer)
				}
				outputs[i] = append(outputs[i], n)
			}
		}
		if !whole {
			continue
		}
		r := item.record(e.opts.Now)
		r.Outputs = outputs
		d.Records = append(d.Records, r)
	}
	e.mu.Lock()
	d.Mounts = slices.Clone(e.mounts)
	e.mu.Unlock()
	d.normalize()
	return d, nil
}

// write merges own with what is there, once.
func (e *Export) write(own *Document, used []string) (Exported, error) {
	b := e.opts.Backend
	raw, version, err := b.Ref(e.ctx, e.opts.Name)
	var old *Document
	switch {
	case errors.Is(err, ErrNotFound):
	case errors.Is(err, ErrNoCache), errors.Is(err, ErrBuildKit), errors.Is(err, ErrVersion), errors.Is(err, ErrCorrupt):
		e.opts.Warn("what is there is replaced: " + err.Error())
	case err != nil:
		return Exported{}, fmt.Errorf("read the cache that is there: %w", err)
	default:
		if old, _, err = Decode(raw); err != nil {
			e.opts.Warn("what is there is replaced: " + err.Error())
			old = nil
		}
	}
	if old != nil {
		again := make(map[string]bool, len(used))
		for _, key := range used {
			again[key] = true
		}
		for i, r := range old.Records {
			if again[r.Key] {
				old.Records[i].Used = e.opts.Now.Unix()
			}
		}
	}
	merged := Merge(old, own, e.opts.Now)
	ours := map[digest.Digest]bool{}
	for _, d := range own.Blobs() {
		ours[d.Digest] = true
	}
	others := slices.DeleteFunc(merged.Blobs(), func(d ocispec.Descriptor) bool { return ours[d.Digest] })
	missing, err := b.Missing(e.ctx, others)
	if err != nil {
		return Exported{}, fmt.Errorf("look for what the cache has: %w", err)
	}
	if len(missing) > 0 {
		e.opts.Warn(fmt.Sprintf("%d blobs of earlier exports are gone, and with them the records that need them", len(missing)))
		merged = merged.without(missing)
	}
	packed, err := merged.Encode()
	if err != nil {
		return Exported{}, err
	}
	done := Exported{Records: len(merged.Records), Own: len(own.Records), Bytes: int64(len(packed))}
	return done, b.PutRef(e.ctx, e.opts.Name, packed, merged.Blobs(), version)
}
