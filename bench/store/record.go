// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

const (
	manyRecords = 5000
	manyLayers  = 1000
	// apparentBytes is the size of each of the layers that are pruned: 50 GB altogether.
	apparentBytes = 50 << 20
	batch         = 100
)

func recordKey(i int) string { return digest.FromString(fmt.Sprint("record ", i)).String() }

// newRecord is a record like that of a RUN step.
func newRecord(i int, layers ...layer.ID) *record.Record {
	rec := &record.Record{
		Outputs: []snapshot.Snapshot{layers}, Kind: record.KindContent,
		Step:     record.Step{Name: fmt.Sprintf("[build %d/9] RUN make -C part%d", i%9, i), Stage: "build", File: "Dockerfile", Line: i%40 + 1},
		Build:    "bench",
		Duration: time.Duration(i) * time.Millisecond, PeakMemory: 100 << 20,
	}
	for p := range 8 {
		rec.Parts = append(rec.Parts, record.Part{Name: fmt.Sprint("part ", p), Value: digest.FromString(fmt.Sprint(i, p)).String()})
	}
	return rec
}

// putRecords writes n records, each over two of layers.
func putRecords(ctx context.Context, s *record.Store, n int, layers []layer.ID, durable bool) error {
	var items []record.Item
	for i := range n {
		rec := newRecord(i, layers[i%len(layers)], layers[(i+1)%len(layers)])
		rec.Durable = durable
		items = append(items, record.Item{Record: rec, Keys: []string{recordKey(i)}})
	}
	return s.PutBatch(ctx, items)
}

// recordGroup reads and writes records.
var recordGroup = group{
	name: "record",
	prepare: func(ctx context.Context, b *bench) (err error) {
		if b.records, err = record.Open(b.path("records")); err != nil {
			return err
		}
		return putRecords(ctx, b.records, manyRecords, []layer.ID{"t1", "t2"}, false)
	},
	round: func(ctx context.Context, b *bench) error {
		rounds := len(b.of("record-get").ours)
		raw := map[string][]byte{}
		for i := range batch {
			enc, err := json.Marshal(newRecord(i, "t1", "t2"))
			if err != nil {
				return err
			}
			raw[recordKey(i)] = enc
		}
		for i := range 20 {
			key := recordKey((rounds*7919 + i*131) % batch)
			err := b.floor("record-get", func() error { return json.Unmarshal(raw[key], new(record.Record)) })
			if err != nil {
				return err
			}
			key = recordKey((rounds*7919 + i*131) % manyRecords)
			err = b.ours("record-get", func() error {
				_, ok, err := b.records.Get(ctx, key)
				if err == nil && !ok {
					err = errors.New("a record is missing")
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		for range 4 {
			var items []record.Item
			var bytes []byte
			for i := range batch {
				rec := newRecord(rounds+i, "t1", "t2")
				rec.Durable = true
				items = append(items, record.Item{Record: rec, Keys: []string{recordKey(rounds + i)}})
				bytes = append(bytes, raw[recordKey(i)]...)
			}
			if err := b.floor("record-batch", func() error { return writeSynced(b.path("floor-records"), bytes) }); err != nil {
				return err
			}
			if err := b.ours("record-batch", func() error { return b.records.PutBatch(ctx, items) }); err != nil {
				return err
			}
		}
		return nil
	},
	finish: func(b *bench) error { return b.records.Close() },
}

func writeSynced(path string, b []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

// pruneGroup deletes everything that a store has.
var pruneGroup = group{
	name: "prune", heavy: true,
	round: func(ctx context.Context, b *bench) error {
		floor := b.path("floor-prune")
		names := []string{"info.json", "index", "layer.tar", "layer.erofs"}
		for i := range manyLayers {
			dir := fmt.Sprintf("%s/%d", floor, i)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			for _, name := range names {
				if err := os.WriteFile(dir+"/"+name, make([]byte, 1024), 0o600); err != nil {
					return err
				}
			}
			if err := os.Truncate(dir+"/layer.tar", apparentBytes); err != nil {
				return err
			}
		}
		if err := b.syncDisk(); err != nil {
			return err
		}
		err := b.floor("prune", func() error {
			for i := range manyLayers {
				dir := fmt.Sprintf("%s/%d", floor, i)
				for _, name := range names {
					if err := os.Remove(dir + "/" + name); err != nil {
						return err
					}
				}
				if err := os.Remove(dir); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}

		dir := b.path("prune")
		st, err := cache.Open(ctx, dir)
		if err != nil {
			return err
		}
		var ids []layer.ID
		for i := range manyLayers {
			draft := st.Layers.NewDraft(nil)
			draft.Put(index.Entry{Path: fmt.Sprint("file", i), Type: index.File, Mode: 0o644, Offset: -1}, nil)
			id, err := draft.Commit(ctx)
			if err != nil {
				return errors.Join(err, st.Close())
			}
			if err := os.Truncate(fmt.Sprintf("%s/layers/%s/layer.tar", dir, id), apparentBytes); err != nil {
				return errors.Join(err, st.Close())
			}
			ids = append(ids, id)
		}
		if err := putRecords(ctx, st.Records, manyRecords, ids, true); err != nil {
			return errors.Join(err, st.Close())
		}
		if err := b.syncDisk(); err != nil {
			return errors.Join(err, st.Close())
		}
		err = b.ours("prune", func() error {
			_, err := st.Prune(ctx, []cache.Policy{{All: true}})
			return err
		})
		left := 0
		if err == nil {
			err = st.Layers.Walk(ctx, func(layer.Info) error { left++; return nil })
		}
		if err == nil && left > 0 {
			err = fmt.Errorf("%d layers left", left)
		}
		return errors.Join(err, st.Close(), b.moveAway(dir))
	},
}
