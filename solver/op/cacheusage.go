// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/seed-68981b69/slipway/cache"
)

// CacheMounts is a cache.Source: cache mounts take room, and can be given up when no step has them.
var _ cache.Source = (*CacheMounts)(nil)

// trashDir takes cache mounts that are being deleted. No key is called so.
const trashDir = "trash"

// cacheUse is what DIR/<hash>/<n>.json says: when and how often a copy was used.
type cacheUse struct {
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"lastUsed"`
	Uses     int       `json:"uses"`
}

// NewCacheMounts keeps cache mounts in dir, which is made when it is needed. What an earlier process was deleting is gone
// after. One process at a time uses a dir.
func NewCacheMounts(dir string) *CacheMounts {
	_ = os.RemoveAll(filepath.Join(dir, trashDir)) // what stays is only in the way of the disk; Remove says so
	return &CacheMounts{dir: dir, now: time.Now}
}

func (c *CacheMounts) copyDir(key string, n int) string {
	return filepath.Join(c.dir, key, strconv.Itoa(n))
}

func (c *CacheMounts) readUse(key string, n int) cacheUse {
	var u cacheUse
	if b, err := os.ReadFile(c.copyDir(key, n) + ".json"); err == nil && json.Unmarshal(b, &u) == nil {
		return u
	}
	if st, err := os.Stat(c.copyDir(key, n)); err == nil {
		u.Created, u.LastUsed = st.ModTime().UTC(), st.ModTime().UTC()
	}
	return u
}

// noteUse writes down that a copy was used now. Trouble costs that it is thought older than it is. mu is held.
func (c *CacheMounts) noteUse(key string, n int) {
	if _, err := os.Lstat(c.copyDir(key, n)); err != nil {
		return // the step has failed before it was made
	}
	now := c.clock().UTC()
	u := c.readUse(key, n)
	if u.Uses == 0 {
		u.Created = now
	}
	u.LastUsed = now
	u.Uses++
	if b, err := json.Marshal(u); err == nil {
		_ = os.WriteFile(c.copyDir(key, n)+".json", b, 0o600)
	}
	delete(c.sizes, c.copyDir(key, n))
}

func (c *CacheMounts) clock() time.Time {
	if c.now == nil {
		return time.Now()
	}
	return c.now()
}

// Usage implements cache.Source.
func (c *CacheMounts) Usage(ctx context.Context) ([]cache.Usage, error) {
	tops, err := os.ReadDir(c.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cache mounts: %w", err)
	}
	var list []cache.Usage
	for _, top := range tops {
		key := top.Name()
		b, err := os.ReadFile(filepath.Join(c.dir, key, "mount.json"))
		var info cacheMountInfo
		if err != nil || json.Unmarshal(b, &info) != nil {
			continue // no cache mount, or one that is just going
		}
		entries, _ := os.ReadDir(filepath.Join(c.dir, key))
		for _, e := range entries {
			n, err := strconv.Atoi(e.Name())
			if err != nil || !e.IsDir() {
				continue
			}
			size, used, err := c.measure(ctx, key, n)
			if err != nil {
				return nil, fmt.Errorf("cache mount %s: %w", info.ID, err)
			}
			c.mu.Lock()
			use := c.readUse(key, n)
			c.mu.Unlock()
			list = append(list, cache.Usage{
				ID: usageID(key, n), Type: cache.TypeCacheMount, Description: "cache mount " + info.ID, Mutable: true, InUse: used, Size: size,
				Created: use.Created, LastUsed: use.LastUsed, UsageCount: max(use.Uses-1, 0),
			})
		}
	}
	return list, nil
}

func usageID(key string, n int) string { return key + "-" + strconv.Itoa(n) }

// measure returns the size of a copy on disk, which is remembered until it is used again, and whether it is in use.
func (c *CacheMounts) measure(ctx context.Context, key string, n int) (size int64, used bool, err error) {
	dir := c.copyDir(key, n)
	c.mu.Lock()
	used = c.used(key, n)
	size, known := c.sizes[dir]
	c.mu.Unlock()
	if known && !used {
		return size, false, nil
	}
	if size, err = cache.DirUsage(ctx, dir); errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	usedNow := c.used(key, n)
	if err == nil && !used && !usedNow {
		if c.sizes == nil {
			c.sizes = map[string]int64{}
		}
		c.sizes[dir] = size
	}
	return size, used || usedNow, err
}

// used says whether a step has the copy. mu is held.
func (c *CacheMounts) used(key string, n int) bool {
	copies := c.use[key]
	return n < len(copies) && copies[n].users > 0
}

// Remove implements cache.Source.
func (c *CacheMounts) Remove(ctx context.Context, id string) (bool, error) {
	i := strings.LastIndexByte(id, '-')
	n, err := strconv.Atoi(id[i+1:])
	if i <= 0 || err != nil || n < 0 || filepath.Base(id[:i]) != id[:i] {
		return false, fmt.Errorf("cache mount %q: no such ID", id)
	}
	key := id[:i]
	trash := filepath.Join(c.dir, trashDir, randomID())
	ok, err := c.detach(key, n, trash)
	if err != nil || !ok {
		return false, err
	}
	if err := os.RemoveAll(trash); err != nil {
		return true, fmt.Errorf("delete cache mount: %w", err)
	}
	return true, nil
}

// detach moves a copy that nobody uses to trash. The next step that wants it begins with an empty one.
func (c *CacheMounts) detach(key string, n int, trash string) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dir := c.copyDir(key, n)
	if c.used(key, n) || c.reading[dir] > 0 {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(trash), 0o700); err != nil {
		return false, fmt.Errorf("delete cache mount: %w", err)
	}
	if err := os.Rename(dir, trash); errors.Is(err, os.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("delete cache mount: %w", err)
	}
	delete(c.sizes, dir)
	_ = os.Remove(dir + ".json")
	// With its last copy the key goes; a copy that is there keeps its directory from being removed.
	top := filepath.Join(c.dir, key)
	if entries, err := os.ReadDir(top); err == nil && len(entries) == 1 && entries[0].Name() == "mount.json" {
		_ = os.RemoveAll(top)
	}
	return true, nil
}
