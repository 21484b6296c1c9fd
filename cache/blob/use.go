// SPDX-License-Identifier: Apache-2.0

package blob

import (
	"os"

	"github.com/opencontainers/go-digest"
)

// OnUse sets the function that is called with the digest of every blob that is looked for, before it is, and of every
// blob that becomes visible, before it does. It must not call the store. Call OnUse before the store is used.
func (s *Store) OnUse(fn func(digest.Digest)) { s.used = fn }

// OnAdd sets the function that is called with the size in bytes of every blob that is about to become visible. Call
// OnAdd before the store is used.
func (s *Store) OnAdd(fn func(bytes int64)) { s.added = fn }

func (s *Store) add(bytes int64) {
	if s.added != nil {
		s.added(bytes)
	}
}

func (s *Store) use(d digest.Digest) {
	if s.used != nil {
		s.used(d)
	}
}

// exists says whether the file of a blob is there, for somebody who has announced that the blob is used.
func (s *Store) exists(path string) bool {
	s.deleting.RLock()
	defer s.deleting.RUnlock()
	_, err := os.Lstat(path)
	return err == nil
}

// DeleteIf removes a blob unless unused says no. While unused is asked and the blob vanishes nobody finds out
// whether it is there: who has announced its use before (OnUse) is seen by unused, who comes later finds it gone.
// It reports whether the blob was deleted.
func (s *Store) DeleteIf(d digest.Digest, unused func() bool) (bool, error) {
	s.deleting.Lock()
	defer s.deleting.Unlock()
	if !unused() {
		return false, nil
	}
	return true, s.Delete(d)
}
