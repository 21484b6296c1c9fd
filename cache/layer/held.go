// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"

	"github.com/seed-68981b69/slipway/cache/index"
)

// HoldIndex is Draft.Hold for a layer from scratch whose index is finished: x is that of the layer, with times in whole
// seconds and without offsets, and open opens its files. id is what an earlier HoldIndex of the same x has returned, ""
// otherwise.
func (s *Store) HoldIndex(id ID, x *index.Index, open func(path string) (io.ReadCloser, error)) (ID, error) {
	if id == "" {
		for i := range x.Len() {
			e := x.At(i)
			if err := checkEntry(&e); err != nil {
				return "", fmt.Errorf("hold layer: %w", err)
			}
			if e.Type == index.File && e.Digest == "" {
				return "", fmt.Errorf("hold layer: file %q has not been hashed", e.Path)
			}
		}
		sum := sha256.Sum256(x.Encode())
		id = ID("h" + hex.EncodeToString(sum[:]))
	}
	if _, err := s.meta(id); err == nil {
		return id, nil
	}
	root := x.At(0)
	s.mu.Lock()
	defer s.mu.Unlock()
	// The newest takes the place of an equal one, as in Draft.Hold.
	s.held[id] = &heldLayer{index: x, openPath: open, writeRoot: rootInTar(&root)}
	return id, nil
}

// tarItems returns what is to be written, for the writer to change.
func (h *heldLayer) tarItems() []tarItem {
	if h.openPath == nil {
		return slices.Clone(h.items)
	}
	items := make([]tarItem, h.index.Len())
	for i := range items {
		e := h.index.At(i)
		items[i].entry = e
		if e.Type == index.File && e.HardLink == "" {
			items[i].open = func() (io.ReadCloser, error) { return h.openPath(e.Path) }
		}
	}
	return items
}

// DropHeld forgets the layers that are only in memory. Nobody may be using them: it is for the time when no build runs.
func (s *Store) DropHeld() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.held)
}
