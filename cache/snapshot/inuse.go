// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"slices"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// Mounted says whether id is a layer of a snapshot that is mounted, or about to be: a mount counts before it asks for
// its first layer.
func (s *Store) Mounted(id layer.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.mounts {
		if slices.Contains(m.snap, id) {
			return true
		}
	}
	return false
}
