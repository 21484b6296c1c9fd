// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

var recordsCurve = &curve{
	name:  "records",
	about: "A store with so many records of earlier builds, and a layer for every tenth: the engine starts on it, a small build finds everything in it, and du counts it.",
	unit:  "records",
	sizes: []int{100, 1_000, 10_000, 100_000},
	series: func(ctx context.Context, b *bench, s *slipway, n int) ([]*contestant, error) {
		dir, state := filepath.Join(b.dir, "context"), b.stateDir(s.name())
		if err := b.writeInput(dir, map[string]string{"busybox": "", "Dockerfile": smallImage}); err != nil {
			return nil, err
		}
		if err := fillStore(ctx, filepath.Join(state, "root"), n); err != nil {
			return nil, fmt.Errorf("fill the store: %w", err)
		}
		var o *slipwayBuilds
		open := func(ctx context.Context) error {
			opened, err := s.open(ctx, state, 0)
			if err == nil {
				o = opened.(*slipwayBuilds)
			}
			return err
		}
		end := func() error {
			if o == nil {
				return nil
			}
			err := o.close()
			o = nil
			return err
		}
		daemons := func() []int {
			if o == nil {
				return nil
			}
			return o.daemons()
		}
		start := &contestant{
			name: "start", daemons: daemons,
			run:   func(ctx context.Context, _ *calls) error { return open(ctx) },
			after: func(context.Context) error { return end() },
		}
		running := func(ctx context.Context) error {
			if o != nil {
				return nil
			}
			return open(ctx)
		}
		build := &contestant{
			name: "cached build", daemons: daemons, before: running,
			run: func(_ context.Context, c *calls) error { return c.do(o.build(build{dir: dir, tag: "bench"})) },
		}
		du := &contestant{
			name: "du", daemons: daemons, before: running, close: end,
			run: func(_ context.Context, c *calls) error { return c.do(o.command("cache", "du")) },
		}
		return []*contestant{start, build, du}, nil
	},
}

// fillStore makes a store in dir that looks as if n steps had been built in it.
func fillStore(ctx context.Context, dir string, n int) (err error) {
	store, err := cache.Open(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	lease := store.Lease("bench")
	defer lease.Release()
	const batch, perLayer = 1000, 10
	var snap snapshot.Snapshot
	var items []record.Item
	now := time.Now()
	for i := range n {
		if i%perLayer == 0 {
			text := fmt.Appendf(nil, "record %d\n", i)
			d := store.Layers.NewDraft(nil)
			d.Put(index.Entry{Path: "file", Type: index.File, Mode: 0o644, Size: int64(len(text)), Digest: digest.FromBytes(text)},
				func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil })
			id, err := d.Commit(ctx)
			if err != nil {
				return err
			}
			snap = snapshot.Snapshot{layer.ID(id)}
		}
		key := digest.FromString(fmt.Sprint("key ", i)).String()
		items = append(items, record.Item{Keys: []string{key}, Record: &record.Record{
			Outputs: []snapshot.Snapshot{snap}, Kind: record.KindContent, Created: now, LastUsed: now, Duration: time.Second,
			Parts: []record.Part{{Name: "op", Value: "exec"}, {Name: "arg 0", Value: "/bin/sh"}, {Name: "arg 1", Value: fmt.Sprint("echo ", i)}},
			Step:  record.Step{Name: fmt.Sprint("RUN echo ", i), Stage: "bench", File: "Dockerfile", Line: i + 1}, Build: "bench",
		}})
		if len(items) == batch || i == n-1 {
			if err := store.Records.PutBatch(ctx, items); err != nil {
				return err
			}
			items = items[:0]
		}
	}
	return store.Sync(ctx)
}
