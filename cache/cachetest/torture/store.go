// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// state is what a worker has reported to be finished, as far as nobody was told to delete it.
type state struct {
	// done has a record's key or an image's name, and whether a sync has covered it.
	done map[string]bool
	// open are operations that have begun.
	open map[event]bool
	// syncing are those that the sync under way will cover.
	syncing []string
	last    int
}

func name(e event) string {
	switch e.Op {
	case "commit":
		return fmt.Sprint("step-", e.N)
	case "copy":
		return fmt.Sprint("copy-", e.N)
	case "pull", "remove":
		return imageName(e.N)
	}
	return ""
}

func number(name string) int {
	var n int
	if i := strings.LastIndexAny(name, "-:"); i >= 0 {
		fmt.Sscan(name[i+1:], &n)
	}
	return n
}

func (st *state) take(e event) {
	begin := e
	begin.Done = false
	if e.Done {
		delete(st.open, begin)
	} else {
		st.open[e] = true
	}
	st.last = max(st.last, e.N)
	switch {
	case e.Op == "sync" && !e.Done:
		st.syncing = slices.Collect(maps.Keys(st.done))
	case e.Op == "sync":
		for _, n := range st.syncing {
			if _, ok := st.done[n]; ok {
				st.done[n] = true
			}
		}
	case e.Op == "prune" && !e.Done:
		maps.DeleteFunc(st.done, func(n string, _ bool) bool { return number(n) <= e.N })
	case e.Op == "remove" && !e.Done:
		delete(st.done, name(e))
	case e.Done && e.Op != "remove" && name(e) != "" && !st.doomed(e.N):
		st.done[name(e)] = false
	}
}

// doomed says that a prune under way may delete what has that number, or that somebody removes it.
func (st *state) doomed(n int) bool {
	for e := range st.open {
		if e.Op == "prune" && n <= e.N || e.Op == "remove" && e.N == n {
			return true
		}
	}
	return false
}

// storeRuns kills workers.
func (t *torture) storeRuns(ctx context.Context, root string, runs int) error {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	journal := root + ".journal"
	if err := os.RemoveAll(journal); err != nil {
		return err
	}
	st := &state{done: map[string]bool{}}
	boot := 1
	for range runs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.runs++
		st.open, st.syncing = map[event]bool{}, nil
		order, err := json.Marshal(workOrder{Root: root, BootID: fmt.Sprint("boot-", boot), Journal: journal, First: st.last, Seed: t.rnd.Uint64()})
		if err != nil {
			return err
		}
		child := exec.Command(exe)
		child.Env = append(os.Environ(), workerEnv+"="+string(order))
		child.Stderr = os.Stderr
		if err := t.killAfterRandomTime(child, st); err != nil {
			return err
		}
		for e := range st.open {
			t.killedIn(e.Op)
		}
		powerCut := t.rnd.IntN(3) == 0
		if powerCut {
			boot++
			t.powerCuts++
			if err := t.cutPower(journal); err != nil {
				return err
			}
		}
		before := len(t.violations)
		if err := t.verifyStore(ctx, root, fmt.Sprint("boot-", boot), st, powerCut); err != nil {
			t.violate("%v", err)
		}
		// What verifyStore has found is what there is, and it has synced that.
		if err := os.RemoveAll(journal); err != nil {
			return err
		}
		if len(t.violations) > before+20 {
			return errors.New("too many violations")
		}
		t.logf("power cut %v, %d results known", powerCut, len(st.done))
	}
	return nil
}

// killAfterRandomTime runs child, takes what it reports, and kills it.
func (t *torture) killAfterRandomTime(child *exec.Cmd, st *state) error {
	out, err := child.StdoutPipe()
	if err != nil {
		return err
	}
	if err := child.Start(); err != nil {
		return err
	}
	// Some die while they open the store, most at work.
	after := time.Duration(t.rnd.IntN(120)) * time.Millisecond
	if t.rnd.IntN(4) > 0 {
		after += time.Duration(t.rnd.IntN(800)) * time.Millisecond
	}
	killed := make(chan bool, 1)
	timer := time.AfterFunc(after, func() { killed <- child.Process.Kill() == nil })
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) == nil {
			st.take(e)
			if e.Done && name(e) != "" && e.Op != "remove" {
				t.acknowledged++
			}
		}
	}
	err = child.Wait()
	if timer.Stop() {
		t.survivors++
		t.violate("the worker ended by itself: %v", err)
		return nil
	}
	if !<-killed {
		t.survivors++
		return nil
	}
	t.kills++
	return nil
}

func (t *torture) cutPower(journal string) error {
	f, err := os.Open(journal)
	if errors.Is(err, os.ErrNotExist) {
		return nil // killed before it had opened the store
	}
	if err != nil {
		return err
	}
	defer f.Close()
	did, err := faultfs.Replay(f).PowerCut(t.rnd)
	for _, d := range did {
		t.logf("power cut: %s", d)
	}
	return err
}

// verifyStore opens the store and holds it to its promises. What was found missing for a good reason leaves st.
func (t *torture) verifyStore(ctx context.Context, root, bootID string, st *state, powerCut bool) error {
	s, err := cache.OpenWith(ctx, root, cache.Options{BootID: bootID})
	if err != nil {
		return fmt.Errorf("the store does not open: %w", err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.violate("close: %v", err)
		}
		t.verifyNothingLeft(root)
	}()
	found := map[string]bool{}
	if err := s.Records.Walk(ctx, func(key string, rec *record.Record) error {
		kind, n := parseKey(key)
		missing := slices.ContainsFunc(rec.Outputs[0], func(id layer.ID) bool {
			_, err := s.Layers.Stat(ctx, id)
			return err != nil
		})
		if missing {
			return nil // a miss; whether it may be one is found out below
		}
		found[key] = true
		if err := verifyFiles(ctx, s, rec.Outputs[0], n, kind == "step"); err != nil {
			t.violate("wrong hit: %s: %v", key, err)
		}
		return nil
	}); err != nil {
		return err
	}
	images, err := s.Images.List(ctx)
	if err != nil {
		return err
	}
	for _, m := range images {
		name := image.Familiar(m.Name)
		snap, ok, err := s.Images.Layers(ctx, m.Target.Digest)
		if err == nil && !ok {
			err = errors.New("its layers are not known")
		}
		if err == nil {
			err = verifyFiles(ctx, s, snap, number(name), false)
		}
		if err != nil {
			t.violate("image %s: %v", name, err)
		}
		found[name] = true
	}
	for _, n := range slices.Sorted(maps.Keys(st.done)) {
		switch synced := st.done[n]; {
		case found[n]:
			t.checked++
		case powerCut && !synced:
			t.dropped++
			delete(st.done, n)
		default:
			t.violate("lost: %s (synced: %v, power cut: %v)", n, synced, powerCut)
			delete(st.done, n)
		}
	}
	problems, err := sweepAndCheck(ctx, s)
	if err != nil {
		return err
	}
	for _, p := range problems {
		t.violate("check after the sweep: %+v", p)
	}
	for _, dir := range []string{"content/ingest", "layers/tmp", "layers/uppers"} {
		t.verifyEmpty(filepath.Join(root, dir))
	}
	// From here on everything there is must outlive the next power cut.
	if err := s.Layers.Sync(ctx); err != nil {
		return err
	}
	if err := s.Sync(ctx); err != nil {
		return err
	}
	for n := range st.done {
		st.done[n] = true
	}
	return nil
}

// sweepAndCheck sweeps the store and checks all of it. A sweep leaves a layer alone that the store is just tidying up in the
// background (the tree of a packed layer), for the next sweep.
func sweepAndCheck(ctx context.Context, s *cache.Store) ([]cache.Problem, error) {
	for try := 0; ; try++ {
		if _, err := s.Sweep(ctx); err != nil {
			return nil, fmt.Errorf("sweep: %w", err)
		}
		problems, err := s.Check(ctx, cache.CheckOptions{})
		orphans := slices.ContainsFunc(problems, func(p cache.Problem) bool { return p.Kind == cache.ProblemOrphan })
		if err != nil || !orphans || try == 3 {
			return problems, err
		}
	}
}

// verifyEmpty looks into a directory that has nothing in it between two processes. The store empties it in the background.
func (t *torture) verifyEmpty(dir string) {
	var left []os.DirEntry
	for range 200 {
		left, _ = os.ReadDir(dir)
		left = slices.DeleteFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "resume-") })
		if len(left) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.violate("%s is left in %s", left[0].Name(), dir)
}

// verifyFiles reads a snapshot and compares it with what step n makes. mounted also reads it as the kernel shows it.
func verifyFiles(ctx context.Context, s *cache.Store, snap snapshot.Snapshot, n int, mounted bool) error {
	v, err := s.Snapshots.View(ctx, snap)
	if err != nil {
		return err
	}
	want := files(n)
	seen := 0
	err = index.Walk(v, "", func(e index.Entry) error {
		if e.Type != index.File {
			return nil
		}
		seen++
		f, err := v.OpenFile(ctx, e.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err == nil && !bytes.Equal(b, want[e.Path]) {
			err = fmt.Errorf("%s: %d bytes are not what it should be (%d bytes)", e.Path, len(b), len(want[e.Path]))
		}
		return err
	})
	if err == nil && seen != len(want) {
		err = fmt.Errorf("%d files instead of %d", seen, len(want))
	}
	if err != nil || !mounted {
		return err
	}
	m, err := s.Snapshots.Mount(ctx, snap, snapshot.MountOptions{})
	if err != nil {
		return err
	}
	defer m.Release()
	for name, b := range want {
		got, err := os.ReadFile(filepath.Join(m.Path(), name))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, b) {
			return fmt.Errorf("mounted: %s is not what it should be", name)
		}
	}
	return nil
}

// verifyNothingLeft looks for mounts below root.
func (t *torture) verifyNothingLeft(root string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.violate("%v", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], root+"/") {
			t.violate("left mounted: %s", f[4])
		}
	}
}
