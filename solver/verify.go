// SPDX-License-Identifier: Apache-2.0

package solver

// Verifying the cache: what a record promises is made again and compared. In a build that verifies (BuildOptions.Verify) a
// walk does not stop at a hit. It goes down to the sources, and each vertex that has a record is run on what the records of
// its inputs name, not on what these have just made: so a step that makes something else each time is the only one that
// is found, not everything above it. What such a run makes is compared and left to be swept. The build's result is what
// the records say, as if it had not verified, and no record is written for a hit.
//
// Sources are left out: a pin is a digest, and what is fetched is checked against it.

import (
	"context"
	"fmt"
	"strconv"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Verification is what has come of making again what was found.
type Verification struct {
	// Changes are the paths in which the new outputs differ from those in the record, output by output; none when they have
	// the same content.
	Changes []index.Change
	// Err is why the work could not be done again, nil when it could.
	Err error
}

// Same reports whether the work has made the same again.
func (v *Verification) Same() bool { return v.Err == nil && len(v.Changes) == 0 }

// verifies reports whether a result that is found for n has to be made again and compared.
func (n *node) verifies() bool { return n.walk.build.verify && !n.fresh && !n.entry.isSource() }

// verify makes what found, the record under n's recipe key, or the one under its content key promises, and gives n the
// recorded result. It returns false when there is no record: then there is nothing to verify.
func (w *walk) verify(n *node, inputs []snapshot.Snapshot, found *record.Record) bool {
	s := w.build.solver
	if found == nil {
		var ok bool
		if found, ok = w.build.lookup(w.ctx, string(n.content), n.entry.outputs); !ok {
			return false
		}
	}
	// It is this build's alone: another one that wants the same takes what is recorded.
	id := "verify " + strconv.Itoa(w.build.seq) + " " + n.vertex.Digest.String()
	remembered := func() (result, bool) { return result{}, n.recall() }
	_, _ = s.share(n, id, remembered, func(r *run) (result, error) { return r.verify(n, inputs, found) })
	return true
}

// verify does n's work and compares what comes of it with rec. It is the body of a run; n is the node that began it.
func (r *run) verify(n *node, inputs []snapshot.Snapshot, rec *record.Record) (result, error) {
	r.claim.priority, r.claim.memory = n.walk.remaining(n), r.solver.memoryOf(n.entry)
	if err := r.await(); err != nil {
		return result{}, err
	}
	v := &Verification{}
	outputs, err := n.entry.op.Run(r.ctx, r.env, inputs)
	if err == nil {
		v.Changes, err = r.compare(rec.Outputs, outputs)
	}
	if cause := context.Cause(r.ctx); cause != nil {
		return result{}, cause
	}
	v.Err = err
	switch {
	case err != nil:
		r.out.Warn("found in the cache, but cannot be made again: " + err.Error())
	case len(v.Changes) > 0:
		r.out.Warn(fmt.Sprintf("found in the cache, but made again it differs: /%s", v.Changes[0].Path))
	}
	return result{outputs: rec.Outputs, rec: rec, cached: true, verified: v}, nil
}

func (r *run) compare(recorded, now []snapshot.Snapshot) ([]index.Change, error) {
	if len(now) != len(recorded) {
		return nil, fmt.Errorf("the op returned %d outputs instead of %d", len(now), len(recorded))
	}
	var out []index.Change
	for i := range recorded {
		changes, err := r.solver.diff(r.ctx, recorded[i], now[i])
		if err != nil {
			return nil, fmt.Errorf("compare output %d: %w", i, err)
		}
		out = append(out, changes...)
	}
	return out, nil
}
