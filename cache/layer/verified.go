// SPDX-License-Identifier: Apache-2.0

package layer

// Verified says whether this process knows that a layer's tar is the one of its diff ID, because it has written it, or read all of
// it: then it need not be hashed once more. It is false of a layer that has no tar or does not exist.
func (s *Store) Verified(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.metas[id]
	return m != nil && m.verified
}

// SetVerified says that somebody has read all of a layer's tar, which had the digest of its diff ID.
func (s *Store) SetVerified(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.metas[id]; m != nil && m.Tar && !m.verified {
		seen := *m
		seen.verified = true
		s.metas[id] = &seen
	}
}
