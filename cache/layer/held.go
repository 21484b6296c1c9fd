// SPDX-License-Identifier: Apache-2.0

package layer

// DropHeld forgets the layers that are only in memory. Nobody may be using them: it is for the time when no build runs.
func (s *Store) DropHeld() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.held)
}
