// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"fmt"
	"iter"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Diff returns where two snapshots differ, modification times apart. Layers in the same place are compared one with the
// other, whiteouts included; when one has more layers, those count, or, if they are no mere addition, what the two
// snapshots show.
func (s *Store) Diff(ctx context.Context, a, b Snapshot) ([]index.Change, error) {
	x, y := a, b
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	if len(a) != len(b) && len(a) <= 1 && len(b) <= 1 {
		before, err := s.entries(ctx, a)
		if err != nil {
			return nil, err
		}
		after, err := s.entries(ctx, b)
		if err != nil {
			return nil, err
		}
		return index.Diff(before, after), nil
	}
	if len(a) != len(b) {
		before, err := s.View(ctx, x)
		if err != nil {
			return nil, fmt.Errorf("compare: %w", err)
		}
		after, err := s.View(ctx, y)
		if err != nil {
			return nil, fmt.Errorf("compare: %w", err)
		}
		return index.Diff(walk(before), walk(after)), nil
	}
	var out []index.Change
	for i := range a {
		before, err := s.entries(ctx, a[i:i+1])
		if err != nil {
			return nil, err
		}
		after, err := s.entries(ctx, b[i:i+1])
		if err != nil {
			return nil, err
		}
		out = append(out, index.Diff(before, after)...)
	}
	return out, nil
}

// entries are those of a snapshot's only layer; none when it has no layer.
func (s *Store) entries(ctx context.Context, snap Snapshot) (iter.Seq[index.Entry], error) {
	if len(snap) == 0 {
		return func(func(index.Entry) bool) {}, nil
	}
	x, err := s.layers.Index(ctx, snap[0])
	if err != nil {
		return nil, fmt.Errorf("compare layer %s: %w", snap[0], err)
	}
	return x.All(), nil
}

// walk yields everything in a tree, in Compare order.
func walk(t index.Tree) iter.Seq[index.Entry] {
	return func(yield func(index.Entry) bool) {
		if _, ok := t.Lookup(""); !ok {
			return
		}
		ended := false
		_ = index.Walk(t, "", func(e index.Entry) error { // its only errors are fn's
			if !ended && !yield(e) {
				ended = true
			}
			return nil
		})
	}
}
