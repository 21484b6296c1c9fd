// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dgraph-io/badger/v4"
)

// GetValue returns the value of key in bucket. An unreadable value is logged, deleted and not there.
func (s *Store) GetValue(bucket, key string) ([]byte, bool, error) {
	name, err := valueKey(bucket, key)
	if err != nil {
		return nil, false, err
	}
	raw, err := s.get(name)
	if err != nil || raw == nil {
		return nil, false, err
	}
	value, err := unseal(raw)
	if err != nil {
		s.quarantine(name, raw, err)
		return nil, false, nil
	}
	return value, true, nil
}

// PutValue sets the value of key in bucket, for facts that can be found again: it outlives the process, but does not
// wait for the disk, so that a power cut may undo it. Values are at most 1 MiB.
func (s *Store) PutValue(bucket, key string, value []byte) error {
	if value == nil {
		value = []byte{} // nil would delete
	}
	return s.changeValues(bucket, map[string][]byte{key: value}, false)
}

// DeleteValue removes key from bucket, if it is there; a power cut may undo it.
func (s *Store) DeleteValue(bucket, key string) error {
	return s.changeValues(bucket, map[string][]byte{key: nil}, false)
}

// ChangeValues sets the values of several keys of bucket, and removes the keys whose value is nil. It is on disk
// when ChangeValues returns. After a crash all of it or nothing is there when it is small (about 1 MiB in sum).
func (s *Store) ChangeValues(bucket string, change map[string][]byte) error {
	return s.changeValues(bucket, change, true)
}

func (s *Store) changeValues(bucket string, change map[string][]byte, sync bool) error {
	var w writes
	for _, key := range slices.Sorted(maps.Keys(change)) {
		name, err := valueKey(bucket, key)
		if err != nil {
			return err
		}
		if value := change[key]; value == nil {
			w.del(name)
		} else {
			w.set(name, seal(value))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.write(w, sync); err != nil {
		return fmt.Errorf("change values of %s: %w", bucket, err)
	}
	return nil
}

// DropValues removes the keys of bucket whose value stale says is about what is gone. stale is asked once without and, for
// those, once more with all writing held back, so that a value that was set in the meantime stays; it must not write
// to the store.
func (s *Store) DropValues(bucket string, stale func(value []byte) bool) error {
	var keys []string
	err := s.WalkValues(bucket, func(key string, value []byte) error {
		if stale(value) {
			keys = append(keys, key)
		}
		return nil
	})
	if err != nil || len(keys) == 0 {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var w writes
	for _, key := range keys {
		name, err := valueKey(bucket, key)
		if err != nil {
			return err
		}
		raw, err := s.get(name)
		if err != nil {
			return fmt.Errorf("drop values of %s: %w", bucket, err)
		}
		if value, err := unseal(raw); raw != nil && err == nil && stale(value) {
			w.del(name)
		}
	}
	if err := s.write(w, true); err != nil {
		return fmt.Errorf("drop values of %s: %w", bucket, err)
	}
	return nil
}

// TrimValues removes the keys of bucket that were set longest ago, but for the last keep of them. It is for facts that nobody
// misses.
func (s *Store) TrimValues(bucket string, keep int) error {
	prefix, err := valueKey(bucket, "")
	if err != nil {
		return err
	}
	s.mu.Lock() // what is set meanwhile is not old
	defer s.mu.Unlock()
	type item struct {
		key string
		set uint64
	}
	var items []item
	err = s.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte(prefix)})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			items = append(items, item{string(it.Item().Key()), it.Item().Version()})
		}
		return nil
	})
	if err == nil && len(items) > keep {
		slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.set, b.set) })
		var w writes
		for _, i := range items[:len(items)-keep] {
			w.del(i.key)
		}
		err = s.write(w, false)
	}
	if err != nil {
		return fmt.Errorf("trim values of %s: %w", bucket, err)
	}
	return nil
}

// WalkValues calls fn for every key of bucket, in the order of the keys, as they were when it began. fn may keep value and
// may call any method of the store.
func (s *Store) WalkValues(bucket string, fn func(key string, value []byte) error) error {
	prefix, err := valueKey(bucket, "")
	if err != nil {
		return err
	}
	bad := map[string][]byte{}
	err = s.scan(context.Background(), prefix, func(key string, raw []byte) error {
		value, err := unseal(raw)
		if err != nil {
			bad[prefix+key] = bytes.Clone(raw)
			return nil
		}
		return fn(key, bytes.Clone(value))
	})
	for _, key := range slices.Sorted(maps.Keys(bad)) {
		_, why := unseal(bad[key])
		s.quarantine(key, bad[key], why)
	}
	return err
}

func valueKey(bucket, key string) (string, error) {
	if bucket == "" || strings.Contains(bucket, "/") {
		return "", fmt.Errorf("bucket name %q: must not be empty nor contain a slash", bucket)
	}
	return valuePrefix + bucket + "/" + key, nil
}
