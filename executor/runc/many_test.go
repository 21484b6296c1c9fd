// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// stepsEnv is how many containers TestNothingIsLeftByMany runs: `make torture` says 1000.
const stepsEnv = "SLIPWAY_TEST_STEPS"

// TestNothingIsLeftByMany runs many steps, as a build does, several at once: each on an overlay of its own, with a network,
// mounts and an address. An executor that goes on must then hold what it held after the first few.
func TestNothingIsLeftByMany(t *testing.T) {
	n := newNetwork(t)
	dir := t.TempDir()
	r := newExecutor(t, runc.Options{StateDir: dir, Network: n})
	lower := runctest.Rootfs(t)
	steps := 100
	if v := os.Getenv(stepsEnv); v != "" {
		var err error
		if steps, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	} else if testing.Short() {
		steps = 20
	}
	work := t.TempDir()
	batch := func(from, to int) {
		const atOnce = 4
		var wg sync.WaitGroup
		for w := range atOnce {
			wg.Go(func() {
				for i := from + w; i < to; i += atOnce {
					overlayStep(t, r, lower, work, i)
				}
			})
		}
		wg.Wait()
	}
	batch(0, 12) // the pools are filled
	before := settled(t, func() map[string]int { return held(t, r, dir, n.Bridge()) })
	start := time.Now()
	batch(12, 12+steps)
	t.Logf("%d steps in %v; held: %v", steps, time.Since(start), before)
	after := settled(t, func() map[string]int { return held(t, r, dir, n.Bridge()) })
	// What is kept for the next ones may be fewer or more, by what the pools hold.
	for kind, more := range map[string]int{"goroutines": 4, "descriptors": 6, "runner's descriptors": 4, "runner's threads": 8, "links": 4} {
		if d := after[kind] - before[kind]; d <= more {
			after[kind] = before[kind]
		}
	}
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("after %d steps (-before +after):\n%s", steps, d)
	}
}

// overlayStep runs one step on an overlay.
func overlayStep(t *testing.T, r *runc.Runc, lower, work string, i int) {
	base := filepath.Join(work, strconv.Itoa(i))
	for _, d := range []string{"upper", "work", "merged", "cache"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			t.Error(err)
			return
		}
	}
	defer os.RemoveAll(base)
	merged := filepath.Join(base, "merged")
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", lower, base+"/upper", base+"/work")
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		t.Errorf("overlay: %v", err)
		return
	}
	s := spec(merged, "echo $$ >/cache/pid; touch /new; (sleep 100 &); true")
	s.ID = fmt.Sprintf("many-%d", i)
	s.Network = executor.NetworkBridge
	s.Mounts = []executor.Mount{
		{Kind: executor.MountBind, Source: filepath.Join(base, "cache"), Target: "/cache"},
		{Kind: executor.MountTmpfs, Target: "/tmp"},
	}
	s.Resources.PidsLimit = 50
	if res, err := tryRun(t.Context(), r, s); err != nil || res.exit.Code != 0 {
		t.Errorf("step %d: %+v, %v", i, res, err)
	}
	if err := unix.Unmount(merged, 0); err != nil {
		t.Errorf("step %d: the root is still in use: %v", i, err)
		unix.Unmount(merged, unix.MNT_DETACH)
	}
}

// held counts what the executor with that state directory, and this process, hold.
func held(t *testing.T, r *runc.Runc, dir, bridge string) map[string]int {
	t.Helper()
	runner := fmt.Sprintf("/proc/%d/", runc.RunnerPID(r))
	out := map[string]int{
		"goroutines":           runtime.NumGoroutine(),
		"descriptors":          entries("/proc/self/fd"),
		"runner's descriptors": entries(runner + "fd"),
		"runner's threads":     entries(runner + "task"),
		"processes":            len(containerPids(t, dir)),
		"mounts":               0,
		"files":                entries(filepath.Join("/run", runc.EngineName(dir), "files")),
		"states":               entries(filepath.Join("/run", runc.EngineName(dir), "containers")),
	}
	// Only ours: others run on this machine too. The runner is in the same mount namespace.
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range bytes.Lines(mounts) {
		if bytes.Contains(line, []byte(filepath.Dir(dir))) || bytes.Contains(line, []byte(runc.EngineName(dir))) {
			out["mounts"]++
		}
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(path, runc.EngineName(dir)) {
			out["cgroups"]++
		}
		return nil
	})
	links, err := netlink.LinkList()
	for range 100 {
		if err == nil {
			break
		}
		links, err = netlink.LinkList()
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "slv"+strings.TrimPrefix(bridge, "slw")[:6]) {
			out["links"]++
		}
	}
	children, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range children {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue
		}
		if f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])); f[1] == strconv.Itoa(runc.RunnerPID(r)) {
			out["runner's children"]++
		}
	}
	return out
}

func entries(dir string) int {
	list, _ := os.ReadDir(dir)
	return len(list)
}

// settled counts until two counts in a row are equal: namespaces are made and deleted in the background.
func settled(t *testing.T, count func() map[string]int) map[string]int {
	t.Helper()
	last := count()
	for range 50 {
		time.Sleep(100 * time.Millisecond)
		now := count()
		if cmp.Equal(last, now) {
			return now
		}
		last = now
	}
	return last
}
