// SPDX-License-Identifier: Apache-2.0

package share_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// memory is a Backend that compares and swaps.
type memory struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	refs  map[string][]byte
	turns map[string]int
	puts  int
}

func newMemory() *memory {
	return &memory{blobs: map[digest.Digest][]byte{}, refs: map[string][]byte{}, turns: map[string]int{}}
}

func (m *memory) Missing(_ context.Context, descs []ocispec.Descriptor) (out []ocispec.Descriptor, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range descs {
		if m.blobs[d.Digest] == nil {
			out = append(out, d)
		}
	}
	return out, nil
}

func (m *memory) Open(_ context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.blobs[desc.Digest]
	if b == nil {
		return nil, share.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(b[offset:])), nil
}

func (m *memory) Put(_ context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	m.mu.Lock()
	have := m.blobs[desc.Digest] != nil
	m.mu.Unlock()
	if have {
		return nil
	}
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		return err
	}
	if digest.FromBytes(b) != desc.Digest {
		return errors.New("wrong bytes")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blobs[desc.Digest] = b
	m.puts++
	return nil
}

func (m *memory) Ref(_ context.Context, name string) ([]byte, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refs[name] == nil {
		return nil, "", share.ErrNotFound
	}
	return m.refs[name], strconv.Itoa(m.turns[name]), nil
}

func (m *memory) PutRef(_ context.Context, name string, document []byte, blobs []ocispec.Descriptor, version string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := ""
	if m.turns[name] > 0 {
		now = strconv.Itoa(m.turns[name])
	}
	if version != now {
		return share.ErrConflict
	}
	for _, d := range blobs {
		if m.blobs[d.Digest] == nil {
			return fmt.Errorf("blob %s is not there", d.Digest)
		}
	}
	m.refs[name], m.turns[name] = document, m.turns[name]+1
	return nil
}

func (m *memory) Close() error { return nil }

// machine is a layer store.
type machine struct {
	t      *testing.T
	layers *layer.Store
}

func newMachine(t *testing.T) machine {
	t.Helper()
	s, err := layer.Open(t.TempDir(), layer.Options{NoEROFS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return machine{t, s}
}

// add makes a layer of one file.
func (m machine) add(name, content string) layer.ID {
	m.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg})
	_, _ = io.WriteString(w, content)
	if err := w.Close(); err != nil {
		m.t.Fatal(err)
	}
	id, err := m.layers.Unpack(m.t.Context(), &b, "", nil)
	if err != nil {
		m.t.Fatal(err)
	}
	return id
}

// Blob and Index make the machine a LayerSource.
func (m machine) Blob(ctx context.Context, id layer.ID) (share.LayerBlob, error) {
	info, err := m.layers.Stat(ctx, id)
	if err != nil {
		return share.LayerBlob{}, err
	}
	return share.LayerBlob{
		DiffID: info.DiffID, Size: info.TarSize,
		Desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: info.DiffID, Size: info.TarSize},
		Open: func() (io.ReadCloser, error) {
			rc, _, err := m.layers.OpenTar(ctx, id)
			return rc, err
		},
	}, nil
}

func (m machine) Index(ctx context.Context, id layer.ID) (*index.Index, error) {
	return m.layers.Index(ctx, id)
}

// keyOf stands for the solver's.
func keyOf(kind string, parts []record.Part) string {
	return digest.FromString(kind + fmt.Sprint(parts)).String()
}

// item is a record with a stack of layers.
func item(name string, snap ...layer.ID) share.Item {
	parts := []record.Part{{Name: "command", Value: name}}
	return share.Item{Key: keyOf(record.KindRecipe, parts), Record: &record.Record{
		Kind: record.KindRecipe, Parts: parts, Outputs: []snapshot.Snapshot{snap}, Step: record.Step{Name: name}, Build: "b1",
		Created: time.Unix(1e9, 0), Duration: time.Second,
	}}
}

func export(t *testing.T, m machine, b share.Backend, name string, items ...share.Item) share.Exported {
	t.Helper()
	e := share.NewExport(t.Context(), share.ExportOptions{Backend: b, Name: name, Layers: m, Warn: func(w string) { t.Log(w) }})
	done, err := e.Finish(items, nil)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// open imports, and has layers fetched from b.
func open(t *testing.T, m machine, b share.Backend, name string) (*share.Import, error) {
	t.Helper()
	m.layers.OnFetch("test", func(ctx context.Context, _ layer.Info, origin string) (io.ReadCloser, error) {
		d, size, _ := strings.Cut(strings.TrimPrefix(origin, "test:"), " ")
		n, _ := strconv.ParseInt(size, 10, 64)
		return b.Open(ctx, ocispec.Descriptor{Digest: digest.Digest(d), Size: n}, 0, -1)
	})
	return share.OpenImport(t.Context(), share.ImportOptions{
		Backend: b, Name: name, Title: "there", Layers: m.layers, Key: keyOf,
		Origin: func(l share.Layer) string { return fmt.Sprintf("test:%s %d", l.Blob.Digest, l.Blob.Size) },
	})
}

// read returns the content of a file of a layer.
func (m machine) read(id layer.ID, name string) (string, error) {
	f, err := m.layers.OpenFile(m.t.Context(), id, name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return string(b), err
}

// TestPlaces exports to each kind of place and imports on another machine, twice.
func TestPlaces(t *testing.T) {
	places := map[string]func(t *testing.T) (b share.Backend, name string, again func() (share.Backend, string)){
		"memory": func(t *testing.T) (share.Backend, string, func() (share.Backend, string)) {
			m := newMemory()
			return m, "main", func() (share.Backend, string) { return m, "main" }
		},
		"registry": func(t *testing.T) (share.Backend, string, func() (share.Backend, string)) {
			s := registrytest.Start(t, registrytest.Options{})
			ref := s.Host + "/team/cache:main"
			r, err := share.OpenRepository(registry.New(registry.Options{DockerConfigDir: t.TempDir()}), ref, registry.Sources{})
			if err != nil {
				t.Fatal(err)
			}
			return r, ref, func() (share.Backend, string) { return r, ref }
		},
		"directory": func(t *testing.T) (share.Backend, string, func() (share.Backend, string)) {
			store, err := contentlocal.NewStore(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			c := share.OpenContent(store, "")
			return c, "", func() (share.Backend, string) { return share.OpenContent(store, c.Manifest().Digest), "" }
		},
	}
	for kind, place := range places {
		t.Run(kind, func(t *testing.T) {
			b, name, again := place(t)
			one := newMachine(t)
			if _, err := open(t, newMachine(t), b, name); !errors.Is(err, share.ErrNotFound) {
				t.Fatalf("an empty place: %v", err)
			}
			low, high := one.add("low", "below"), one.add("high", "above")
			if done := export(t, one, b, name, item("first", low), item("second", low, high)); done.Records != 2 {
				t.Fatalf("%+v", done)
			}
			b, name = again()
			other := one.add("other", "another")
			if done := export(t, one, b, name, item("third", other)); done.Records != 3 || done.Own != 1 {
				t.Fatalf("merged: %+v", done)
			}
			b, name = again()
			two := newMachine(t)
			im, err := open(t, two, b, name)
			if err != nil || im.Ignored() != 0 {
				t.Fatal(err)
			}
			if _, ok, err := im.Get(t.Context(), item("nothing").Key); ok || err != nil {
				t.Errorf("an unknown key: %v, %v", ok, err)
			}
			rec, ok, err := im.Get(t.Context(), item("second").Key)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			if rec.Step.Name != "second" || rec.From != "there" || rec.Build != "b1" || rec.Duration != time.Second || len(rec.Outputs[0]) != 2 {
				t.Errorf("%+v", rec)
			}
			for i, id := range rec.Outputs[0] {
				want, _ := one.layers.Stat(t.Context(), []layer.ID{low, high}[i])
				got, err := two.layers.Stat(t.Context(), id)
				if err != nil || got.Form != layer.FormRemote || got.Content != want.Content || got.DiffID != want.DiffID {
					t.Errorf("layer %d is %+v, %v; want %+v", i, got, err, want)
				}
			}
			if s, err := two.read(rec.Outputs[0][1], "high"); s != "above" || err != nil {
				t.Errorf("read %q, %v", s, err)
			}
			if got, err := two.layers.Stat(t.Context(), rec.Outputs[0][0]); err != nil || got.Form != layer.FormRemote {
				t.Errorf("a layer that nobody reads has come: %+v, %v", got, err)
			}
		})
	}
}

// TestTwoExporters: many at once lose nothing where the place can compare.
func TestTwoExporters(t *testing.T) {
	b, m := newMemory(), newMachine(t)
	var group sync.WaitGroup
	var items []share.Item
	for i := range 8 {
		it := item("step "+strconv.Itoa(i), m.add("f", strconv.Itoa(i)))
		items = append(items, it)
		group.Go(func() { export(t, m, b, "main", it) })
	}
	group.Wait()
	im, err := open(t, newMachine(t), b, "main")
	if err != nil {
		t.Fatal(err)
	}
	for _, it := range items {
		if _, ok, err := im.Get(t.Context(), it.Key); !ok || err != nil {
			t.Errorf("%s is lost: %v", it.Record.Step.Name, err)
		}
	}
}

// TestDamage flips bits everywhere: nothing wrong is ever believed.
func TestDamage(t *testing.T) {
	b, m := newMemory(), newMachine(t)
	it := item("step", m.add("f", "what it should be"))
	export(t, m, b, "main", it)
	original := b.refs["main"]
	try := func(what string) {
		t.Helper()
		two := newMachine(t)
		im, err := open(t, two, b, "main")
		if err != nil {
			return
		}
		rec, ok, err := im.Get(t.Context(), it.Key)
		if err != nil || !ok {
			return
		}
		if s, err := two.read(rec.Outputs[0][0], "f"); err == nil && s != "what it should be" {
			t.Errorf("%s: read %q", what, s)
		}
	}
	for i := 0; i < len(original); i += 7 {
		b.refs["main"] = bytes.Clone(original)
		b.refs["main"][i] ^= 4
		try(fmt.Sprintf("document, byte %d", i))
	}
	b.refs["main"] = original
	for d, good := range b.blobs {
		step := max(1, len(good)/12)
		for i := 0; i < len(good); i += step {
			b.blobs[d] = bytes.Clone(good)
			b.blobs[d][i] ^= 4
			try(fmt.Sprintf("blob of %d bytes, byte %d", len(good), i))
		}
		b.blobs[d] = good
	}
	two := newMachine(t)
	im, err := open(t, two, b, "main")
	if err != nil {
		t.Fatal(err)
	}
	if rec, ok, err := im.Get(t.Context(), it.Key); !ok || err != nil {
		t.Fatal(err)
	} else if s, err := two.read(rec.Outputs[0][0], "f"); s != "what it should be" {
		t.Errorf("whole again: %q, %v", s, err)
	}
}

// TestCollected: what a place has collected takes its records with it at the next export, and no others.
func TestCollected(t *testing.T) {
	b, m := newMemory(), newMachine(t)
	gone, stays := m.add("gone", "1"), m.add("stays", "2")
	export(t, m, b, "main", item("gone", gone), item("stays", stays))
	info, err := m.layers.Stat(t.Context(), gone)
	if err != nil {
		t.Fatal(err)
	}
	delete(b.blobs, info.DiffID)
	done := export(t, m, b, "main", item("new", m.add("new", "3")))
	if done.Records != 2 {
		t.Errorf("%+v", done)
	}
	// A layer that cannot be had any more takes its record with it only.
	if err := m.layers.Delete(t.Context(), stays); err != nil {
		t.Fatal(err)
	}
	done = export(t, m, b, "other", item("stays", stays), item("new", m.add("new", "3")))
	if done.Own != 1 {
		t.Errorf("%+v", done)
	}
}

// TestForged: documents that are well-formed and wrong.
func TestForged(t *testing.T) {
	b, m := newMemory(), newMachine(t)
	good, evil := item("good", m.add("good", "1")), item("evil", m.add("evil", "2"))
	evil.Key = item("another").Key // its parts say something else
	export(t, m, b, "main", good, evil)
	im, err := open(t, newMachine(t), b, "main")
	if err != nil || im.Ignored() != 1 {
		t.Fatalf("ignored %d, %v", im.Ignored(), err)
	}
	if _, ok, _ := im.Get(t.Context(), evil.Key); ok {
		t.Error("a record is believed whose parts do not make its key")
	}
	d, _, err := share.Decode(b.refs["main"])
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*share.Document){
		"layer out of range": func(d *share.Document) { d.Records[0].Outputs[0][0] = 99 },
		"negative layer":     func(d *share.Document) { d.Records[0].Outputs[0][0] = -1 },
		"no digest":          func(d *share.Document) { d.Layers[0].DiffID, d.Layers[1].DiffID = "x", "x" },
		"other content":      func(d *share.Document) { d.Layers[0].Content = d.Layers[1].Content },
		"other index":        func(d *share.Document) { d.Layers[0].Index, d.Layers[1].Index = d.Layers[1].Index, d.Layers[0].Index },
		"no outputs":         func(d *share.Document) { d.Records[0].Outputs, d.Records[1].Outputs = nil, nil },
		"version":            func(d *share.Document) { d.Version = 2 },
	} {
		forged, _, _ := share.Decode(b.refs["main"])
		change(forged)
		raw, err := share.EncodeAsIs(forged)
		if err != nil {
			t.Fatal(err)
		}
		two := newMachine(t)
		im, err := share.NewImport(share.ImportOptions{Backend: b, Layers: two.layers, Key: keyOf, Origin: func(share.Layer) string { return "" }}, raw)
		if name == "version" {
			if !errors.Is(err, share.ErrVersion) {
				t.Errorf("another version: %v", err)
			}
			continue
		}
		if err != nil {
			continue
		}
		rec, ok, err := im.Get(t.Context(), good.Key)
		if !ok || err != nil {
			continue
		}
		for _, id := range rec.Outputs[0] {
			want, _ := m.layers.Stat(t.Context(), good.Record.Outputs[0][0])
			if info, err := two.layers.Stat(t.Context(), id); err != nil || info.Content != want.Content {
				t.Errorf("%s: believed: %+v, %v", name, info, err)
			}
		}
	}
	if len(d.Layers) != 2 {
		t.Error(len(d.Layers))
	}
}

// TestMerge: what is kept of earlier exports.
func TestMerge(t *testing.T) {
	at := time.Unix(2e9, 0)
	rec := func(key string, used time.Time, layers ...int) share.Record {
		return share.Record{Key: digest.FromString(key).String(), Kind: record.KindRecipe, Outputs: [][]int{layers}, Used: used.Unix()}
	}
	lay := func(name string, size int64) share.Layer {
		d := digest.FromString(name)
		return share.Layer{DiffID: d, Content: d, Blob: &ocispec.Descriptor{Digest: d, Size: size}}
	}
	old := &share.Document{
		Layers: []share.Layer{lay("a", 1), lay("b", 6<<30), lay("c", 6<<30), lay("shared", 1)},
		Records: []share.Record{
			rec("same", at, 0), rec("fresh", at.Add(-time.Hour), 1), rec("older", at.Add(-2*time.Hour), 2), rec("ancient", at.Add(-15*24*time.Hour), 0),
			rec("small", at.Add(-3*time.Hour), 3),
		},
	}
	now := &share.Document{Layers: []share.Layer{lay("shared", 1), lay("n", 1)}, Records: []share.Record{rec("same", at, 0), rec("new", at, 0, 1)}}
	got := share.Merge(old, now, at)
	have := map[string]share.Record{}
	for _, r := range got.Records {
		have[r.Key] = r
	}
	for key, want := range map[string]bool{"same": true, "new": true, "fresh": true, "small": true, "older": false, "ancient": false} {
		if _, ok := have[digest.FromString(key).String()]; ok != want {
			t.Errorf("%s is there: %v, want %v", key, ok, want)
		}
	}
	if l := got.Layers[have[digest.FromString("same").String()].Outputs[0][0]]; l.DiffID != digest.FromString("shared") {
		t.Errorf("the newer record of one key does not count: %+v", l)
	}
	if len(got.Layers) != 3 {
		t.Errorf("%d layers", len(got.Layers))
	}
	first, err := got.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, ignored, err := share.Decode(first)
	if err != nil || ignored != 0 {
		t.Fatal(ignored, err)
	}
	if second, err := share.Merge(nil, back, at).Encode(); err != nil || !bytes.Equal(first, second) {
		t.Errorf("the same document has other bytes: %v", err)
	}
}

// FuzzDecode: whatever comes, no panic, and only records whose layers are there.
func FuzzDecode(f *testing.F) {
	raw, err := (&share.Document{}).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"version":1,"layers":[],"records":[{"key":"x","outputs":[[0]]}]}`), false)
	f.Add(raw, true)
	f.Fuzz(func(t *testing.T, b []byte, packed bool) {
		if !packed {
			var err error
			if b, err = share.Pack(b); err != nil {
				t.Fatal(err)
			}
		}
		d, _, err := share.Decode(b)
		if err != nil {
			return
		}
		for _, r := range d.Records {
			for _, out := range r.Outputs {
				for _, i := range out {
					_ = d.Layers[i]
				}
			}
		}
		if _, err := d.Encode(); err != nil {
			t.Error(err)
		}
	})
}
