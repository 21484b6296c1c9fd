// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// TestFaults fails every call of a step that mounts, writes and commits, with both drivers. Nothing stays mounted, the base is as it
// was, the next attempt succeeds, and nothing is left over.
func TestFaults(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounts need root")
	}
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	for _, driver := range []string{DriverOverlay, DriverCopy} {
		for _, sticky := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sticky=%v", driver, sticky), func(t *testing.T) {
				for k := 1; faultAt(t, driver, sticky, k); k++ {
				}
			})
		}
	}
}

// faultAt fails the k-th call, and reports whether there was one.
func faultAt(t *testing.T, driver string, sticky bool, k int) bool {
	ctx := t.Context()
	dir := faultfs.Dir(t)
	reopen := func(fs fsys.FS) *fixture {
		t.Helper()
		f := &fixture{t: t, dir: dir}
		var err error
		f.layers, err = layer.Open(filepath.Join(dir, "layers"), layer.Options{FS: fs, Log: slog.New(slog.DiscardHandler)})
		ok(t, err)
		f.Store, err = OpenWith(filepath.Join(dir, "snapshots"), f.layers, Options{Copy: driver == DriverCopy, FS: fs})
		ok(t, err)
		return f
	}
	step := func(f *fixture, base Snapshot) (Snapshot, error) {
		m, err := f.Mount(ctx, base, MountOptions{Writable: true})
		if err != nil {
			return nil, err
		}
		defer m.Release()
		if err := errors.Join(os.WriteFile(filepath.Join(m.Path(), "new"), []byte("n"), 0o644), os.Remove(filepath.Join(m.Path(), "old"))); err != nil {
			return nil, err
		}
		return m.Commit(ctx)
	}
	closeAll := func(f *fixture) {
		t.Helper()
		f.Close()
		if err := f.layers.Close(); err != nil {
			t.Error(err)
		}
	}
	f := reopen(fsys.OS)
	base := Snapshot{f.untar("old=1", "d/", "d/f=2")}
	want := f.viewTree(base)
	closeAll(f)

	fault := &faultfs.Fault{FS: fsys.OS}
	f = reopen(fault)
	fault.At, fault.Sticky = fault.Calls()+k, sticky
	_, err := step(f, base)
	where := fault.Failed()
	if err != nil && !errors.Is(err, faultfs.ErrInjected) {
		t.Errorf("%s: the error hides its cause: %v", where, err)
	}
	if where == "" && err != nil {
		t.Errorf("without a fault: %v", err)
	}
	closeAll(f)
	if left, err := mountsBelow(dir); err != nil || len(left) > 0 {
		t.Errorf("%s: left mounted: %v, %v", where, left, err)
	}

	f = reopen(fsys.OS)
	if got := f.viewTree(base); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: the base is %q now", where, got)
	}
	next, err := step(f, base)
	if err != nil {
		t.Errorf("%s: the next attempt: %v", where, err)
	} else if got := f.viewTree(next); len(got) != 4 {
		t.Errorf("%s: the next attempt gives %q", where, got)
	}
	closeAll(f)
	for _, sub := range []string{"layers/uppers", "layers/tmp", "snapshots/mnt"} {
		if left, err := os.ReadDir(filepath.Join(dir, sub)); err != nil || len(left) > 0 {
			t.Errorf("%s: left in %s: %v, %v", where, sub, left, err)
		}
	}
	return where != ""
}
