// SPDX-License-Identifier: Apache-2.0

package op

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// Cache mounts travel: what they contain can be exported, and a mount that is new here begins with what was exported elsewhere. A copy that
// is here, even an empty one, is never changed from outside.

// restoreMount fills a new copy from where the build imports caches. What cannot be restored is no failure of the step: the mount begins as if there
// were nothing.
func (s *step) restoreMount(ctx context.Context, info cacheMountInfo, dir string) (bool, error) {
	if s.env.Mounts == nil {
		return false, nil
	}
	what, ok, err := s.env.Mounts.RestoreMount(ctx, info.ID, info.From, dir)
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case err != nil:
		s.env.Progress.Warn(fmt.Sprintf("cache mount %s begins empty: %v", MountName(info.ID), err))
		return false, emptyDir(dir)
	case ok:
		s.env.Progress.Log(2, fmt.Appendf(nil, "cache mount %s: restored %s\n", MountName(info.ID), what))
	}
	return ok, nil
}

// emptyDir makes a directory as it was before somebody began to fill it.
func emptyDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// MountIDs returns the IDs of the cache mounts that an op has.
func MountIDs(op *pb.Op) []string {
	var ids []string
	for _, m := range op.GetExec().GetMounts() {
		if m.MountType == pb.MountType_CACHE && m.CacheOpt != nil && !slices.Contains(ids, m.CacheOpt.ID) {
			ids = append(ids, m.CacheOpt.ID)
		}
	}
	return ids
}

// MountName is the ID of a cache mount as its user has written it: the Dockerfile frontend puts a name space and a slash before it.
func MountName(id string) string {
	if _, name, ok := strings.Cut(id, "/"); ok && name != "" {
		return name
	}
	return id
}

// MountContent is the content of one cache mount, for an export.
type MountContent struct {
	// ID is the mount's; From is the digest of its first files, or "".
	ID, From string
	LastUsed time.Time
	key      string
	n        int
}

// IDs returns the IDs of all cache mounts that are here.
func (c *CacheMounts) IDs() ([]string, error) {
	tops, err := os.ReadDir(c.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cache mounts: %w", err)
	}
	var ids []string
	for _, top := range tops {
		if info, err := readCacheMount(filepath.Join(c.dir, top.Name())); err == nil {
			ids = append(ids, info.ID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// Contents returns the cache mounts that are here and have one of the IDs: of each the copy that was used last. Mounts of one ID that began with
// different files are different mounts; of those only the latest is taken, and what was used at or after the time since.
func (c *CacheMounts) Contents(ids []string, since time.Time) ([]MountContent, error) {
	tops, err := os.ReadDir(c.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cache mounts: %w", err)
	}
	var found []MountContent
	for _, top := range tops {
		info, err := readCacheMount(filepath.Join(c.dir, top.Name()))
		if err != nil || !slices.Contains(ids, info.ID) {
			continue
		}
		if m, ok := c.latest(info, top.Name()); ok {
			found = append(found, m)
		}
	}
	slices.SortFunc(found, func(a, b MountContent) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), b.LastUsed.Compare(a.LastUsed), cmp.Compare(a.From, b.From))
	})
	var out []MountContent
	for i, m := range found {
		if i == 0 || found[i-1].ID != m.ID || !m.LastUsed.Before(since) {
			out = append(out, m)
		}
	}
	return out, nil
}

// latest finds the copy of a key that was used last.
func (c *CacheMounts) latest(info cacheMountInfo, key string) (m MountContent, ok bool) {
	entries, _ := os.ReadDir(filepath.Join(c.dir, key))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		if use := c.readUse(key, n); !ok || use.LastUsed.After(m.LastUsed) {
			m, ok = MountContent{ID: info.ID, From: info.From, LastUsed: use.LastUsed, key: key, n: n}, true
		}
	}
	return m, ok
}

// Read calls fn with the directory of m. Steps may use it meanwhile, and write to it: changed, asked after everything was read, returns the moment from
// which on they may have, and false if none can have. The directory is not deleted before fn has returned.
func (c *CacheMounts) Read(m MountContent, fn func(dir string, changed func() (time.Time, bool)) error) error {
	dir := c.copyDir(m.key, m.n)
	c.mu.Lock()
	if c.reading == nil {
		c.reading = map[string]int{}
	}
	c.reading[dir]++
	begin, takenBefore := c.clock(), 0
	used := false
	if cp := c.copy(m.key, m.n); cp != nil {
		takenBefore = cp.taken
		if cp.users > 0 {
			begin, used = cp.since, true
		}
	}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.reading[dir]--; c.reading[dir] == 0 {
			delete(c.reading, dir)
		}
	}()
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("cache mount %s: %w", m.ID, &os.PathError{Op: "stat", Path: dir, Err: err})
	}
	return fn(dir, func() (time.Time, bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		cp := c.copy(m.key, m.n)
		return begin, used || cp != nil && cp.taken != takenBefore
	})
}

// copy returns a copy that steps of this process have used, or nil. mu is held.
func (c *CacheMounts) copy(key string, n int) *cacheCopy {
	if copies := c.use[key]; n < len(copies) {
		return copies[n]
	}
	return nil
}
