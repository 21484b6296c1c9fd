// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// TestRemoteLayers: remote layers are kept as long as something names them or lies on them, cost next to nothing, are no damage,
// and go when nothing names them.
func TestRemoteLayers(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := open(t, dir)
	tars := map[digest.Digest][]byte{}
	from := open(t, t.TempDir())
	remote := func(name string, below ...layer.ID) layer.ID {
		t.Helper()
		raw, err := io.ReadAll(oneFile(t, name, name))
		if err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(raw)
		tars[d] = raw
		made, err := from.Layers.Unpack(ctx, bytes.NewReader(raw), d, nil)
		if err != nil {
			t.Fatal(err)
		}
		x, err := from.Layers.Index(ctx, made)
		if err != nil {
			t.Fatal(err)
		}
		id, err := s.Layers.AddRemote(ctx, layer.Remote{DiffID: d, Index: x, Below: below, Origin: "test:" + name})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	fetch := func(_ context.Context, info layer.Info, _ string) (io.ReadCloser, error) {
		if b, ok := tars[info.DiffID]; ok {
			return io.NopCloser(bytes.NewReader(b)), nil
		}
		return nil, errors.New("not there")
	}
	bottom := remote("bottom")
	middle := remote("middle", bottom)
	top := remote("top", bottom, middle)
	nobodys := remote("nobody's", bottom)
	// A result that has the uppermost layer alone, as a diff does.
	if err := s.Records.Put(ctx, &record.Record{Outputs: []snapshot.Snapshot{{top}}, Step: record.Step{Name: "diff"}}, "key"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	s.Layers.OnFetch("test", fetch)
	if _, err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	for _, id := range []layer.ID{bottom, middle, top} {
		if !s.has(t, id) {
			t.Errorf("%s has gone", id)
		}
	}
	if s.has(t, nobodys) {
		t.Error("what nothing names is still there")
	}
	list, err := s.DiskUsage(ctx, UsageFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range list {
		if u.Description == "diff" && (u.Size == 0 || u.Size > 64<<10) {
			t.Errorf("%d bytes for what is elsewhere", u.Size)
		}
	}
	if found, err := s.Check(ctx, CheckOptions{Repair: true}); err != nil || len(found) > 0 {
		t.Errorf("check: %+v, %v", found, err)
	}
	if err := s.Layers.Materialise(ctx, top); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Check(ctx, CheckOptions{}); err != nil {
		t.Error(err)
	} else {
		for _, p := range found { // it needs what it lay on no more
			if p.Kind != ProblemOrphan {
				t.Errorf("check: %+v", p)
			}
		}
	}
	if _, err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if s.has(t, bottom) || !s.has(t, top) {
		t.Error("a layer that has come keeps those below it, or is not kept")
	}
}
