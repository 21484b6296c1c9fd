// SPDX-License-Identifier: Apache-2.0

package record

import (
	"context"
	"errors"
	"fmt"

	"github.com/dgraph-io/badger/v4"
)

// OnUse sets the function that is called with the key of every record that is found or put. It may be called with the
// store locked and must not call it. Call OnUse before the store is used.
func (s *Store) OnUse(fn func(key string)) { s.used = fn }

func (s *Store) use(key string) {
	if s.used != nil {
		s.used(key)
	}
}

// discardRatio is the part of a value log file that must be garbage for it to be rewritten.
const discardRatio = 0.5

// Compact gives back the room of what was deleted. It may take a second; call it in the background after many
// deletions. Reads and writes go on meanwhile.
func (s *Store) Compact(ctx context.Context) error {
	// The values are in the tree itself (see openBadger); deleted ones go when its levels are merged.
	if err := s.db.Flatten(1); err != nil {
		return fmt.Errorf("compact record database: %w", err)
	}
	for ctx.Err() == nil {
		switch err := s.db.RunValueLogGC(discardRatio); {
		case errors.Is(err, badger.ErrNoRewrite), errors.Is(err, badger.ErrRejected):
			return nil
		case err != nil:
			return fmt.Errorf("collect garbage of the value log: %w", err)
		}
	}
	return context.Cause(ctx)
}
