// SPDX-License-Identifier: Apache-2.0

package op

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
)

func TestCacheMountUsage(t *testing.T) {
	dir := t.TempDir()
	c := NewCacheMounts(dir)
	clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c.now = func() time.Time { return clock }
	info := cacheMountInfo{ID: "/root/.cache"}
	use := func(content int) (release func()) {
		t.Helper()
		n, release, err := c.acquire(t.Context(), info.key(), pb.CacheSharingOpt_LOCKED, nil)
		if err != nil {
			t.Fatal(err)
		}
		copyDir, err := c.open(info, n, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(copyDir, "f"), make([]byte, content), 0o600); err != nil {
			t.Fatal(err)
		}
		return release
	}
	if list, err := c.Usage(t.Context()); err != nil || len(list) != 0 {
		t.Fatalf("nothing is listed as %+v, %v", list, err)
	}
	release := use(1 << 20)
	list, err := c.Usage(t.Context())
	if err != nil || len(list) != 1 || !list[0].InUse {
		t.Fatalf("in use: %+v, %v", list, err)
	}
	if ok, err := c.Remove(t.Context(), list[0].ID); ok || err != nil {
		t.Fatalf("removed in use: %v, %v", ok, err)
	}
	release()
	clock = clock.Add(time.Hour)
	use(2 << 20)()
	list, err = c.Usage(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	u := list[0]
	if u.InUse || !u.Mutable || u.Size < 2<<20 || u.Size > 3<<20 || u.UsageCount != 1 || !u.LastUsed.Equal(clock) || !u.Created.Equal(clock.Add(-time.Hour)) {
		t.Errorf("%+v", u)
	}
	// Another process knows the same.
	c = NewCacheMounts(dir)
	if list, err = c.Usage(t.Context()); err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	if !list[0].LastUsed.Equal(clock) {
		t.Errorf("last used %v", list[0].LastUsed)
	}
	for _, bad := range []string{"", "-", "x", "../x-0", "x-0", u.ID + "9"} {
		if ok, _ := c.Remove(t.Context(), bad); ok {
			t.Errorf("removed %q", bad)
		}
	}
	if ok, err := c.Remove(t.Context(), u.ID); !ok || err != nil {
		t.Fatalf("remove: %v, %v", ok, err)
	}
	if list, err = c.Usage(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("left: %+v, %v", list, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	use(1)()
}
