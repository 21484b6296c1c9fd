// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// workerEnv makes this program a worker; its value is a workOrder.
const workerEnv = "SLIPWAY_TORTURE_WORKER"

type workOrder struct {
	Root, BootID, Journal string
	// First is the number of the first step.
	First int
	Seed  uint64
}

// event is a line that a worker prints: an operation begins or is finished.
type event struct {
	Op   string // commit, copy, pull, pack, remove, sync, prune
	N    int    // number of the step or image
	Done bool
}

// keep is how many of the latest steps and images a prune leaves.
const keep = 12

// files are what step n makes: always the same.
func files(n int) map[string][]byte {
	rnd := rand.New(rand.NewPCG(uint64(n), 7))
	out := map[string][]byte{fmt.Sprintf("f%d", n): fmt.Appendf(nil, "step %d", n)}
	for i := range 1 + rnd.IntN(20) {
		b := make([]byte, rnd.IntN(40_000))
		for j := range b {
			b[j] = byte(rnd.Uint32())
		}
		out[fmt.Sprintf("d%d/s%d-%d", i%3, n, i)] = b
	}
	return out
}

type worker struct {
	s   *cache.Store
	out sync.Mutex // one line at a time
	n   int
	mu  sync.Mutex // guards n and recent
	// recent are the last commits: key to what a pack may work on.
	recent []layer.ID
	away   sync.Map // tars of remote layers, by diff ID
}

func (w *worker) say(e event) {
	b, _ := json.Marshal(e)
	w.out.Lock()
	defer w.out.Unlock()
	os.Stdout.Write(append(b, '\n'))
}

func (w *worker) next() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	return w.n
}

// work uses a store until it is killed.
func work() {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	var order workOrder
	err := json.Unmarshal([]byte(os.Getenv(workerEnv)), &order)
	if err == nil {
		err = workOn(context.Background(), order)
	}
	fmt.Fprintln(os.Stderr, "torture worker:", err)
	os.Exit(1)
}

func workOn(ctx context.Context, order workOrder) error {
	journal, err := os.OpenFile(order.Journal, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	volatile := &faultfs.Volatile{FS: fsys.OS, Journal: journal}
	w := &worker{n: order.First}
	w.say(event{Op: "open"})
	if w.s, err = cache.OpenWith(ctx, order.Root, cache.Options{FS: volatile, BootID: order.BootID}); err != nil {
		return err
	}
	w.s.Layers.OnFetch("torture", w.fetch)
	w.say(event{Op: "open", Done: true})
	errs := make(chan error)
	rnd := rand.New(rand.NewPCG(order.Seed, 2))
	for range 2 {
		go func(rnd *rand.Rand) {
			for {
				if err := w.one(ctx, rnd); err != nil {
					errs <- err
					return
				}
			}
		}(rand.New(rand.NewPCG(rnd.Uint64(), 3)))
	}
	go func(rnd *rand.Rand) {
		for {
			time.Sleep(time.Duration(rnd.IntN(150)) * time.Millisecond)
			var err error
			if rnd.IntN(3) == 0 {
				err = w.prune(ctx)
			} else {
				w.say(event{Op: "sync"})
				if err = w.s.Sync(ctx); err == nil {
					w.say(event{Op: "sync", Done: true})
				}
			}
			if err != nil {
				errs <- err
				return
			}
		}
	}(rand.New(rand.NewPCG(rnd.Uint64(), 4)))
	return <-errs
}

// one does one operation.
func (w *worker) one(ctx context.Context, rnd *rand.Rand) error {
	lease := w.s.Lease("torture")
	defer lease.Release()
	n := w.next()
	ops := []struct {
		name string
		do   func(context.Context, int) error
	}{
		{"commit", w.commit}, {"commit", w.commit}, {"copy", w.copy}, {"pull", w.pull}, {"pack", w.pack}, {"remove", w.remove},
	}
	op := ops[rnd.IntN(len(ops))]
	if op.name == "remove" {
		n = max(1, n-1-rnd.IntN(2*keep))
	}
	w.say(event{Op: op.name, N: n})
	if err := op.do(ctx, n); err != nil {
		return fmt.Errorf("%s %d: %w", op.name, n, err)
	}
	w.say(event{Op: op.name, N: n, Done: true})
	return nil
}

// commit is a step: a mount that is written to. Every third is two steps, of which the second begins when the first may not
// have an index yet.
func (w *worker) commit(ctx context.Context, n int) error {
	steps := []map[string][]byte{files(n)}
	if n%3 == 0 {
		all := steps[0]
		steps = []map[string][]byte{{}, {}}
		for i, name := range slices.Sorted(maps.Keys(all)) {
			steps[i%2][name] = all[name]
		}
	}
	var snap snapshot.Snapshot
	for _, files := range steps {
		var err error
		if snap, err = w.step(ctx, snap, files); err != nil {
			return err
		}
	}
	w.mu.Lock()
	w.recent = append(w.recent, snap...)
	w.mu.Unlock()
	if err := w.s.Layers.Ensure(ctx, snap...); err != nil {
		return err
	}
	return w.record(ctx, "step", n, snap)
}

func (w *worker) step(ctx context.Context, on snapshot.Snapshot, files map[string][]byte) (snapshot.Snapshot, error) {
	m, err := w.s.Snapshots.Mount(ctx, on, snapshot.MountOptions{Writable: true})
	if err != nil {
		return nil, err
	}
	defer m.Release()
	for name, b := range files {
		path := filepath.Join(m.Path(), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return nil, err
		}
	}
	return m.Commit(ctx)
}

func (w *worker) record(ctx context.Context, kind string, n int, snap snapshot.Snapshot) error {
	log, err := w.s.Blobs.PutBytes(ctx, "text/plain", fmt.Appendf(nil, "what step %d has printed", n))
	if err != nil {
		return err
	}
	return w.s.Records.Put(ctx, &record.Record{Outputs: []snapshot.Snapshot{snap}, Log: log.Digest}, fmt.Sprintf("%s-%d", kind, n))
}

// copy is a COPY: a layer written as a tar.
func (w *worker) copy(ctx context.Context, n int) error {
	d := w.s.Layers.NewDraft(nil)
	for name, b := range files(n) {
		d.Put(index.Entry{Path: name, Type: index.File, Mode: 0o644, Size: int64(len(b))}, func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b)), nil
		})
	}
	id, err := d.Commit(ctx)
	if err != nil {
		return err
	}
	return w.record(ctx, "copy", n, snapshot.Snapshot{id})
}

// pull stores an image with its compressed layer and its layer unpacked.
func (w *worker) pull(ctx context.Context, n int) error {
	var raw, packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	tw := tar.NewWriter(io.MultiWriter(z, &raw))
	for name, b := range files(n) {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := tw.Write(b); err != nil {
			return err
		}
	}
	if err := errors.Join(tw.Close(), z.Close()); err != nil {
		return err
	}
	blob, err := w.s.Blobs.Resume(ctx, fmt.Sprint("pull-", n))
	if err != nil {
		return err
	}
	defer blob.Close()
	if _, err := blob.Write(packed.Bytes()); err != nil {
		return err
	}
	ld := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len())}
	if err := blob.Commit(ld.Size, ld.Digest); err != nil {
		return err
	}
	id, err := w.unpack(ctx, n, raw.Bytes())
	if err != nil {
		return err
	}
	config, err := json.Marshal(ocispec.Image{Author: strconv.Itoa(n), Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	if err != nil {
		return err
	}
	cd, err := w.s.Blobs.PutBytes(ctx, ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: cd, Layers: []ocispec.Descriptor{ld}})
	if err != nil {
		return err
	}
	target, err := w.s.Blobs.PutBytes(ctx, ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	if err := w.s.Images.SetLayers(ctx, target.Digest, snapshot.Snapshot{id}); err != nil {
		return err
	}
	_, err = w.s.Images.Add(ctx, image.Image{Name: imageName(n), Target: target})
	return err
}

// unpack makes a layer of a tar; every second is remote first, and fetched then.
func (w *worker) unpack(ctx context.Context, n int, raw []byte) (layer.ID, error) {
	diffID := digest.FromBytes(raw)
	if n%2 == 0 {
		return w.s.Layers.Unpack(ctx, bytes.NewReader(raw), diffID, nil)
	}
	w.away.Store(diffID, raw)
	defer w.away.Delete(diffID)
	id, err := w.s.Layers.AddRemote(ctx, layer.Remote{DiffID: diffID, Origin: "torture:"})
	if err != nil {
		return "", err
	}
	return id, w.s.Layers.Materialise(ctx, id)
}

// fetch gives the tar of a remote layer.
func (w *worker) fetch(_ context.Context, info layer.Info, _ string) (io.ReadCloser, error) {
	raw, ok := w.away.Load(info.DiffID)
	if !ok {
		return nil, errors.New("nobody has it")
	}
	return io.NopCloser(bytes.NewReader(raw.([]byte))), nil
}

func imageName(n int) string { return fmt.Sprintf("torture/image:%d", n) }

// pack gives one of the last trees its tar. A prune may have taken it away.
func (w *worker) pack(ctx context.Context, n int) error {
	w.mu.Lock()
	var id layer.ID
	if len(w.recent) > 0 {
		id = w.recent[max(0, len(w.recent)-1-n%4)]
	}
	w.mu.Unlock()
	if id == "" {
		return nil
	}
	_, err := w.s.Layers.Pack(ctx, id)
	if errors.Is(err, layer.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// remove takes an image away.
func (w *worker) remove(ctx context.Context, n int) error {
	_, err := w.s.Images.Remove(ctx, imageName(n), false)
	if errors.Is(err, image.ErrNotFound) {
		return nil
	}
	return err
}

// prune deletes all records and images but the latest, then what nothing names.
func (w *worker) prune(ctx context.Context) error {
	w.mu.Lock()
	last := w.n - keep
	w.mu.Unlock()
	w.say(event{Op: "prune", N: last})
	var keys []string
	if err := w.s.Records.Walk(ctx, func(key string, _ *record.Record) error {
		if _, n := parseKey(key); n <= last {
			keys = append(keys, key)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := w.s.Records.Delete(ctx, keys...); err != nil {
		return err
	}
	images, err := w.s.Images.List(ctx)
	if err != nil {
		return err
	}
	for _, m := range images {
		var n int
		fmt.Sscanf(image.Familiar(m.Name), "torture/image:%d", &n)
		if n <= last {
			if err := w.remove(ctx, n); err != nil {
				return err
			}
		}
	}
	if _, err := w.s.Sweep(ctx); err != nil {
		return err
	}
	w.say(event{Op: "prune", N: last, Done: true})
	return nil
}

// parseKey splits a record's key.
func parseKey(key string) (kind string, n int) {
	for i := range key {
		if key[i] == '-' {
			n, _ = strconv.Atoi(key[i+1:])
			return key[:i], n
		}
	}
	return key, 0
}
