// SPDX-License-Identifier: Apache-2.0

package local

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// Contexts remembers what scans of directories on this host have found, so that the next scan reads only what has
// changed: in memory, and in one file for each directory. The files are a cache: one that is missing, damaged or of
// another version means that files are read again. Its methods may be called concurrently.
type Contexts struct {
	dir string // "" remembers in memory only
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex // guards what follows and the fields of remembered
	byPath map[string]*remembered
	timer  *time.Timer // of the next save; nil when nothing waits
	closed bool

	saving sync.Mutex // held by whoever writes files
}

// remembered is what is known of one directory.
type remembered struct {
	path string
	load sync.Once
	// views are what different patterns have left of it, the last used first.
	views []*view
	used  time.Time
	// touched says that the file does not know of the last use yet, dirty that it has not got the last views.
	touched, dirty bool
}

// viewKey names patterns.
type viewKey [sha256.Size]byte

// view is what patterns leave of a directory. It is replaced as a whole.
type view struct {
	key  viewKey
	tree *tree
	// What follows is made of the tree, and nil or zero as long as nobody has needed it since the engine started.
	index *index.Index
	layer layer.ID
	bytes int64
}

const (
	// maxViews is how many patterns are remembered for one directory: a Dockerfile and a few kinds of contexts.
	maxViews = 6
	// maxNodes bounds the memory, which is 150 to 500 bytes for each.
	maxNodes = 600_000
	// maxFileBytes and maxDirBytes bound the files, and maxAge how long one stays that is not used.
	maxFileBytes = 64 << 20
	maxDirBytes  = 256 << 20
	maxAge       = 30 * 24 * time.Hour
	// saveDelay keeps the writing out of the way of the build that has made it necessary.
	saveDelay = 300 * time.Millisecond
)

// OpenContexts returns what is remembered in dir, which is created when missing. An empty dir remembers in memory
// only. Close it.
func OpenContexts(dir string, log *slog.Logger) (*Contexts, error) {
	if log == nil {
		log = slog.Default()
	}
	c := &Contexts{dir: dir, log: log, now: time.Now, byPath: map[string]*remembered{}}
	if dir == "" {
		return c, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("remembered contexts: %w", err)
	}
	if err := c.sweep(time.Now()); err != nil {
		return nil, fmt.Errorf("remembered contexts: %w", err)
	}
	return c, nil
}

// Close writes what has not been written yet.
func (c *Contexts) Close() {
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	c.save()
}

// of returns what is known of the directory at path, with the view of that key first if there is one.
func (c *Contexts) of(path string, key viewKey) (r *remembered, views []*view) {
	c.mu.Lock()
	r = c.byPath[path]
	if r == nil {
		r = &remembered{path: path}
		c.byPath[path] = r
	}
	r.used, r.touched = c.now(), true
	c.mu.Unlock()
	r.load.Do(func() {
		loaded := c.read(path)
		c.mu.Lock()
		r.views = loaded
		c.mu.Unlock()
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	views = slices.Clone(r.views)
	if i := slices.IndexFunc(views, func(v *view) bool { return v.key == key }); i > 0 {
		v := views[i]
		views = slices.Insert(slices.Delete(views, i, i+1), 0, v)
	}
	return r, views
}

// put remembers v in the place of an older view of its key.
func (c *Contexts) put(r *remembered, v *view) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byPath[r.path] = r
	same := false
	r.views = slices.DeleteFunc(r.views, func(o *view) bool {
		same = same || o.key == v.key && o.tree == v.tree
		return o.key == v.key
	})
	r.views = slices.Insert(r.views, 0, v)
	if len(r.views) > maxViews {
		r.views = r.views[:maxViews]
	}
	if !same {
		r.dirty = true
	}
	c.forget(r)
	if c.dir != "" && c.timer == nil && !c.closed {
		c.timer = time.AfterFunc(saveDelay, c.save)
	}
}

// forget drops the directories that were not used for longest when there is too much of them all. c.mu is held.
func (c *Contexts) forget(keep *remembered) {
	total := 0
	all := make([]*remembered, 0, len(c.byPath))
	for _, r := range c.byPath {
		for _, v := range r.views {
			if v.index != nil {
				total += v.index.Len()
			} else {
				total += 1000 // as good as any number: it has just been loaded, or is about to get its index
			}
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *remembered) int { return a.used.Compare(b.used) })
	for _, r := range all {
		if total <= maxNodes {
			return
		}
		if r == keep || r.dirty {
			continue
		}
		for _, v := range r.views {
			if v.index != nil {
				total -= v.index.Len()
			}
		}
		delete(c.byPath, r.path)
	}
}

// save writes the files of the directories that have changed, and notes the use of the others.
func (c *Contexts) save() {
	c.saving.Lock()
	defer c.saving.Unlock()
	if c.dir == "" {
		return
	}
	type job struct {
		path  string
		views []*view
		dirty bool
	}
	var jobs []job
	c.mu.Lock()
	c.timer = nil
	for _, r := range c.byPath {
		if r.dirty || r.touched {
			jobs = append(jobs, job{r.path, slices.Clone(r.views), r.dirty})
			r.dirty, r.touched = false, false
		}
	}
	c.mu.Unlock()
	for _, j := range jobs {
		name := c.fileName(j.path)
		if !j.dirty {
			now := time.Now()
			if err := os.Chtimes(name, now, now); !errors.Is(err, fs.ErrNotExist) {
				continue
			} // otherwise it was collected as garbage
		}
		if err := c.write(name, j.path, j.views); err != nil {
			c.log.Warn("remember a context", "path", j.path, "error", err)
		}
	}
}

func (c *Contexts) fileName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return filepath.Join(c.dir, hex.EncodeToString(sum[:16]))
}

// write replaces a file. It is not synced: after a power cut its checksum tells.
func (c *Contexts) write(name, path string, views []*view) error {
	b := encodeViews(path, views)
	if len(b) > maxFileBytes {
		b = nil // a context of this size would cost more than it saves
	}
	if b == nil {
		return removeFile(name)
	}
	tmp, err := os.CreateTemp(c.dir, "tmp-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), name)
	}
	if err != nil {
		return errors.Join(err, removeFile(tmp.Name()))
	}
	return nil
}

func removeFile(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// read returns the views in a directory's file.
func (c *Contexts) read(path string) []*view {
	if c.dir == "" {
		return nil
	}
	b, err := os.ReadFile(c.fileName(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var views []*view
	if err == nil {
		views, err = decodeViews(b, path)
	}
	if err != nil {
		c.log.Warn("what was remembered of a context is unreadable, its files are read again", "path", path, "error", err)
	}
	return views
}

// sweep removes files that nobody has used for long or that are too many, and what a killed process has left.
func (c *Contexts) sweep(now time.Time) error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if strings.HasPrefix(e.Name(), "tmp-") || now.Sub(info.ModTime()) > maxAge {
			if err := removeFile(filepath.Join(c.dir, e.Name())); err != nil {
				return err
			}
			continue
		}
		files = append(files, info)
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	var total int64
	for _, f := range files {
		if total += f.Size(); total > maxDirBytes {
			if err := removeFile(filepath.Join(c.dir, f.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
