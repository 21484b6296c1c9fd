// SPDX-License-Identifier: Apache-2.0

package solvertest

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-cmp/cmp"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// drift picks what makes something else in this round: of what is recorded when it begins, so that only verification sees it.
func (r round) drift(recorded map[Key]bool) map[Key]bool {
	if !r.verify {
		return nil
	}
	var keys []Key
	for key := range recorded {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	out := map[Key]bool{}
	for i, key := range keys {
		if r.drifting[i%len(r.drifting)] {
			out[key] = true
		}
	}
	return out
}

// checkKept checks that every record is what it was.
func checkKept(before, now map[string]*record.Record) error {
	for key, rec := range before {
		if d := cmp.Diff(rec, now[key]); d != "" {
			return fmt.Errorf("verifying has changed the record under %s: %s", key, d)
		}
	}
	return nil
}

// checkVerified checks what a build that verifies says of a step that it has found. records are those of before.
func checkVerified(w *World, s Step, key Key, r solver.Report, records map[string]*record.Record) error {
	v := r.Verification
	if _, byRecipe := records[string(r.Recipe)]; byRecipe && !r.Unnamed && r.FoundBy != record.KindRecipe {
		return fmt.Errorf("has a record by recipe, and is reported as found by %s", r.FoundBy)
	}
	switch {
	case r.Outcome != solver.Found || r.FoundBy == "" || r.Record == nil || r.Content == "" || v == nil:
		return fmt.Errorf("was to be verified, and is reported as %+v", r)
	case w.Failing[s.Command]:
		if !errors.Is(v.Err, ErrStep) {
			return fmt.Errorf("cannot be made again, and is reported with %v", v.Err)
		}
		return nil
	case v.Err != nil:
		return fmt.Errorf("cannot be made again: %w", v.Err)
	case w.Drifting[key] != (len(v.Changes) > 0) || w.Drifting[key] != !v.Same():
		return fmt.Errorf("drifts: %v, and is reported with %v", w.Drifting[key], v.Changes)
	case w.Drifting[key] && (len(v.Changes) != 1 || v.Changes[0].Path != "B"):
		return fmt.Errorf("drifts in B, and is reported with %v", v.Changes)
	}
	return nil
}
