// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// TestFailedSteps keeps failed steps, counts them, lets their time pass and needs their room.
func TestFailedSteps(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	now := time.Now()
	s.now = func() time.Time { return now }
	keep := func(content string) (*FailedStep, layer.ID) {
		t.Helper()
		lease := s.Lease("build")
		defer lease.Release()
		id, err := s.Layers.Unpack(ctx, oneFile(t, "f", content), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		f := &FailedStep{Name: "RUN " + content, Op: []byte("op"), Inputs: []snapshot.Snapshot{nil, nil}, Mounts: []snapshot.Snapshot{{id}, nil}}
		if err := s.KeepFailed(ctx, f); err != nil {
			t.Fatal(err)
		}
		return f, id
	}
	first, layerID := keep("first")
	if ids := first.MountIDs(); len(ids) != 2 || ids[0] == "" || ids[1] != "" {
		t.Fatalf("names %q", ids)
	}
	if step, ok := FailedStepOf(first.MountIDs()[0]); !ok || step != first.ID {
		t.Errorf("%s is of step %q", first.MountIDs()[0], step)
	}
	check := func(f *FailedStep, want bool) {
		t.Helper()
		snap, err := s.FailedResult(ctx, f.MountIDs()[0])
		if want && (err != nil || !slices.Equal(snap, f.Mounts[0])) || !want && !errors.Is(err, ErrNoFailedStep) {
			t.Errorf("%s: %v, %v", f.Name, snap, err)
		}
	}
	// A sweep leaves them, du shows them once, and what no name leads to is not there.
	if _, err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	check(first, true)
	list, err := s.DiskUsage(ctx, UsageFilter{Filters: []string{"description~=first"}})
	if err != nil || len(list) != 1 || list[0].Size == 0 || list[0].InUse || list[0].ID != first.ID {
		t.Errorf("disk usage: %+v, %v", list, err)
	}
	for _, name := range []string{"", "x", first.ID, first.ID + "-mount-1", first.ID + "-mount-2", first.ID + "-mount--1", first.ID + "-other-0", first.ID + "-input-0", "failed-../../x-mount-0"} {
		if snap, err := s.FailedResult(ctx, name); !errors.Is(err, ErrNoFailedStep) {
			t.Errorf("%q: %v, %v", name, snap, err)
		}
	}
	// Its time is over: it is not found, and the next sweep takes it and its layer.
	now = now.Add(FailedStepsFor + time.Second)
	check(first, false)
	second, _ := keep("second")
	if kept, err := s.FailedSteps(); err != nil || len(kept) != 1 || kept[0].ID != second.ID {
		t.Errorf("kept: %v, %v", kept, err)
	}
	done, err := s.Prune(ctx, nil)
	if err != nil || len(done.Deleted) != 1 || done.Deleted[0].ID != first.ID || !slices.Contains(done.Layers, layerID) {
		t.Errorf("pruned: %+v, %v", done, err)
	}
	// A collection takes them like results, and a layer that is missing is found out.
	check(second, true)
	if _, err := s.Prune(ctx, []Policy{{All: true, MaxUsedSpace: 1}}); err != nil {
		t.Fatal(err)
	}
	check(second, false)
	third, layerID := keep("third")
	if err := s.Layers.Delete(ctx, layerID); err != nil {
		t.Fatal(err)
	}
	check(third, false)
	// One too many, and a file that is damaged.
	var all []*FailedStep
	for i := range MaxFailedSteps + 1 {
		now = now.Add(time.Second)
		f, _ := keep(string(rune('a' + i)))
		all = append(all, f)
	}
	check(all[0], false)
	check(all[1], true)
	if err := os.WriteFile(filepath.Join(s.Dir, failedDir, all[1].ID+".json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if kept, err := s.FailedSteps(); err != nil || len(kept) != MaxFailedSteps-1 {
		t.Errorf("kept: %d, %v", len(kept), err)
	}
}
