// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// A committed tree is not synced: that would cost more than the step that made it. Nor is a remote layer that is made known: an imported
// cache may name dozens. The info names the boot in which it was made and a number, counted up from commit to commit. Within that boot the
// page cache has everything, whatever happens to the process. In another boot the layer counts only if the file "synced" says that a syncfs
// of that boot has covered that number. Otherwise the machine may have gone down with half of it in memory, and it is missing: as
// if it had never been made. A tree that was packed before falls back to its tar, which is always synced.

const syncedFile = "synced"

// boot keeps track of what is durable.
type boot struct {
	id string

	// commits is held for reading from the moment a layer gets its number until it is visible, and for writing while the
	// numbers that a syncfs will cover are looked up.
	commits sync.RWMutex

	mu     sync.Mutex        // guards what follows
	number uint64            // of the last commit
	synced map[string]uint64 // the last number that is durable, for each boot

	syncMu sync.Mutex // one syncfs at a time; guards dir
	dir    *os.File   // kept open, so that syncfs reports every write error since the first call
	closed bool
}

// openBoot reads what earlier syncs have noted. Without the note, or with one that cannot be read, nothing of an earlier boot
// counts as synced.
func (s *Store) openBoot() error {
	b := &s.boot
	if b.id = s.opt.BootID; b.id == "" {
		raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return err
		}
		b.id = strings.TrimSpace(string(raw))
	}
	b.synced = map[string]uint64{}
	raw, err := os.ReadFile(filepath.Join(s.dir, syncedFile))
	if err == nil {
		if err := json.Unmarshal(raw, &b.synced); err != nil || b.synced == nil {
			s.log.Warn("layer store: the note of what is synced cannot be read: trees of earlier boots are dropped", "err", err)
			b.synced = map[string]uint64{}
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Above every number of an earlier process of this boot: commits are rarer than nanoseconds.
	b.number = max(b.synced[b.id], uint64(time.Now().UnixNano()))
	return nil
}

// begin gives a layer that is not synced its number. done must be called when it is visible, or will never be.
func (b *boot) begin(m *meta) (done func()) {
	b.commits.RLock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.number++
	m.Boot, m.Number = b.id, b.number
	return b.commits.RUnlock
}

// trusts says whether what m's files had in them when it was committed is still there.
func (b *boot) trusts(m *meta) bool { return m.Boot == b.id || b.covers(m) }

// covers says whether all of m is on disk.
func (b *boot) covers(m *meta) bool {
	if m.Boot == "" {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return m.Number <= b.synced[m.Boot]
}

// Sync makes everything written so far durable, committed trees included (syncfs), and notes that it did.
func (s *Store) Sync(ctx context.Context) error {
	if err := s.sync(ctx); err != nil {
		return fmt.Errorf("layer store: sync: %w", err)
	}
	return nil
}

func (s *Store) sync(ctx context.Context) error {
	b := &s.boot
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	if b.closed {
		return os.ErrClosed
	}
	if b.dir == nil {
		var err error
		if b.dir, err = os.Open(s.dir); err != nil {
			return err
		}
	}
	b.commits.Lock() // waits for commits that have a number and are not visible yet: milliseconds
	b.mu.Lock()
	covered, noted := b.number, b.synced[b.id]
	b.mu.Unlock()
	b.commits.Unlock()
	if err := s.fs.SyncFS(b.dir); err != nil {
		return err
	}
	if covered == noted {
		return nil
	}
	b.mu.Lock()
	next := maps.Clone(b.synced)
	b.mu.Unlock()
	next[b.id] = covered
	raw, err := json.Marshal(next)
	if err != nil {
		return err
	}
	tmp := s.tmpName()
	if err := fsys.WriteFile(s.fs, tmp, raw, 0o600, true); err != nil {
		return err
	}
	if err := s.fs.Rename(tmp, filepath.Join(s.dir, syncedFile)); err != nil {
		return err
	}
	if err := s.fs.Sync(s.dir); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.synced = next
	return nil
}

func (b *boot) close() error {
	b.syncMu.Lock()
	defer b.syncMu.Unlock()
	b.closed = true
	if b.dir == nil {
		return nil
	}
	defer func() { b.dir = nil }()
	return b.dir.Close()
}
