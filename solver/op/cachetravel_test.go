// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
)

// elsewhere has cache mounts of another machine: files by ID.
type elsewhere struct {
	mu    sync.Mutex
	files map[string]string
	asked []string
	err   error
}

func (e *elsewhere) RestoreMount(_ context.Context, id, from, dir string) (string, bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = append(e.asked, id)
	content, ok := e.files[id]
	if !ok || from != "" {
		return "", false, nil
	}
	if err := os.WriteFile(filepath.Join(dir, "n"), []byte(content), 0o600); err != nil {
		return "", false, err
	}
	if e.err != nil {
		return "", false, e.err
	}
	return "1 file", true, os.Chmod(dir, 0o700)
}

func TestMountFromElsewhere(t *testing.T) {
	e := newExecEnv(t)
	e.Caches = NewCacheMounts(filepath.Join(t.TempDir(), "mounts"))
	e.newOp = New(*e.Deps)
	source := &elsewhere{files: map[string]string{"go": "old\n", "private": "p\n", "seeded": "e\n"}}
	e.mounts = source

	_, log := e.must(shell("stat -c %a /cache; cat /cache/n; echo new >> /cache/n", cacheMount("go", pb.CacheSharingOpt_LOCKED)), nil)
	if log != "cache mount go: restored 1 file\n700\nold\n" {
		t.Errorf("first use: %q", log)
	}
	_, log = e.must(shell("cat /cache/n", cacheMount("go", pb.CacheSharingOpt_SHARED)), nil)
	if log != "old\nnew\n" {
		t.Errorf("what is here wins: %q", log)
	}
	e.must(shell("rm /cache/n", cacheMount("go", pb.CacheSharingOpt_SHARED)), nil)
	if _, log = e.must(shell("ls /cache", cacheMount("go", pb.CacheSharingOpt_SHARED)), nil); log != "" {
		t.Errorf("even when it is empty: %q", log)
	}
	if _, log = e.must(shell("ls /cache", cacheMount("none", pb.CacheSharingOpt_SHARED)), nil); log != "" {
		t.Errorf("what is nowhere: %q", log)
	}
	if want := []string{"go", "none"}; !slices.Equal(source.asked, want) {
		t.Errorf("asked for %q, want %q", source.asked, want)
	}

	// A second private copy begins empty, as it does where the first one was made.
	key := cacheMountInfo{ID: "private"}.key()
	_, release, err := e.Caches.acquire(t.Context(), key, pb.CacheSharingOpt_PRIVATE, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, log = e.must(shell("ls /cache", cacheMount("private", pb.CacheSharingOpt_PRIVATE)), nil); log != "" {
		t.Errorf("second private copy: %q", log)
	}
	release()
	if _, log = e.must(shell("ls /cache", cacheMount("private", pb.CacheSharingOpt_PRIVATE)), nil); !strings.HasSuffix(log, "\nn\n") {
		t.Errorf("first private copy: %q", log)
	}

	// The same ID with other first files is another mount.
	from := tree(t, e.Deps, "/cache 0770", "/cache/seed =s")
	m := cacheMount("seeded", pb.CacheSharingOpt_LOCKED)
	m.Input, m.Selector = 1, "/cache"
	if _, log = e.must(shell("ls /cache", m), nil, from); log != "seed\n" {
		t.Errorf("with first files: %q", log)
	}

	// Half of it, then trouble: nothing of it is seen.
	source.err = errors.New("the bucket has burnt down")
	_, log = e.must(shell("stat -c %a /cache; ls /cache", cacheMount("seeded", pb.CacheSharingOpt_LOCKED)), nil)
	if log != "755\n" {
		t.Errorf("after trouble: %q", log)
	}
}

func TestMountContents(t *testing.T) {
	c := NewCacheMounts(t.TempDir())
	clock := time.Now().Add(time.Hour) // later than the directories are
	c.now = func() time.Time { return clock }
	use := func(info cacheMountInfo, sharing pb.CacheSharingOpt, name string) (release func()) {
		t.Helper()
		n, release, err := c.acquire(t.Context(), info.key(), sharing, nil)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := c.open(info, n, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return release
	}
	old, latest, other := cacheMountInfo{ID: "go", From: "old"}, cacheMountInfo{ID: "go", From: "new"}, cacheMountInfo{ID: "npm"}
	use(old, pb.CacheSharingOpt_SHARED, "0")()
	start := clock.Add(time.Hour)
	clock = start
	first := use(latest, pb.CacheSharingOpt_PRIVATE, "0")
	use(latest, pb.CacheSharingOpt_PRIVATE, "1")()
	use(other, pb.CacheSharingOpt_SHARED, "0")()
	contents := func(since time.Time, ids ...string) []MountContent {
		t.Helper()
		list, err := c.Contents(ids, since)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	list := contents(start, "go")
	if len(list) != 1 || list[0].From != "new" || list[0].n != 1 {
		t.Fatalf("got %+v", list)
	}
	if ids, err := c.IDs(); err != nil || !slices.Equal(ids, []string{"go", "npm"}) {
		t.Errorf("IDs %q, %v", ids, err)
	}
	if all := contents(time.Time{}, "go", "npm", "none"); len(all) != 3 {
		t.Errorf("got %+v", all)
	}
	clock = clock.Add(time.Minute)
	first() // and this copy was used last
	list = contents(start, "go")
	if len(list) != 1 || list[0].n != 0 {
		t.Fatalf("got %+v", list)
	}

	// Nobody can have written, then somebody may have, since the beginning.
	m := list[0]
	err := c.Read(m, func(dir string, changed func() (time.Time, bool)) error {
		if _, err := os.Stat(filepath.Join(dir, "0")); err != nil {
			t.Error(err)
		}
		if _, ok := changed(); ok {
			t.Error("changed by nobody")
		}
		begin := clock
		clock = clock.Add(time.Minute)
		use(latest, pb.CacheSharingOpt_SHARED, "x")()
		if at, ok := changed(); !ok || !at.Equal(begin) {
			t.Errorf("changed since %v, %v; reading began at %v", at, ok, begin)
		}
		// It is not deleted under the reader.
		if ok, err := c.Remove(t.Context(), usageID(m.key, m.n)); ok || err != nil {
			t.Errorf("deleted: %v, %v", ok, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// Somebody had it before.
	began := clock
	release := use(latest, pb.CacheSharingOpt_SHARED, "y")
	clock = clock.Add(time.Minute)
	err = c.Read(m, func(_ string, changed func() (time.Time, bool)) error {
		release()
		if at, ok := changed(); !ok || !at.Equal(began) {
			t.Errorf("changed since %v, %v; it was taken at %v", at, ok, began)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := c.Remove(t.Context(), usageID(m.key, m.n)); !ok || err != nil {
		t.Errorf("not deleted: %v", err)
	}
	if err := c.Read(m, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was deleted is read: %v", err)
	}
}

func TestMountNames(t *testing.T) {
	for id, want := range map[string]string{"/go": "go", "ns/go": "go", "//root/.cache": "/root/.cache", "go": "go", "ns//var/x": "/var/x", "x/": "x/"} {
		if got := MountName(id); got != want {
			t.Errorf("%q is called %q, want %q", id, got, want)
		}
	}
	m := cacheMount("a", pb.CacheSharingOpt_SHARED)
	op := &pb.Op{Op: &pb.Op_Exec{Exec: shell("", m, m, cacheMount("b", pb.CacheSharingOpt_LOCKED))}}
	if got := MountIDs(op); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %q", got)
	}
	if got := MountIDs(&pb.Op{}); got != nil {
		t.Errorf("got %q", got)
	}
}
