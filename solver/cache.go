// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
)

// Records is the action cache as the solver uses it. record.Store implements it.
type Records interface {
	// Get returns the record of key. What cannot be read is a miss.
	Get(ctx context.Context, key string) (*record.Record, bool, error)
	PutBatch(ctx context.Context, items []record.Item) error
	// Touch notes that the records were used now.
	Touch(keys ...string) error
	// GetValue and PutValue keep other facts by bucket and key.
	GetValue(bucket, key string) ([]byte, bool, error)
	PutValue(bucket, key string, value []byte) error
}

// Layers is the layer store as the solver uses it. layer.Store implements it.
type Layers interface {
	// Stat returns an error when the layer is not there.
	Stat(ctx context.Context, id layer.ID) (layer.Info, error)
	// Ensure brings layers that are in memory only to disk.
	Ensure(ctx context.Context, ids ...layer.ID) error
	// Materialise brings remote layers here, all at once.
	Materialise(ctx context.Context, ids ...layer.ID) error
}

// Logs keeps the logs of steps. blob.Store implements it.
type Logs interface {
	Put(ctx context.Context, r io.Reader, want ocispec.Descriptor) error
}

// costBucket has what a step cost last time, by stepKey: two varints, its duration in nanoseconds and its peak memory in bytes.
// The store bounds it (cache.Store.Prune).
const costBucket = "solver.costs"

// defaultDuration is taken for steps that have never run.
const defaultDuration = time.Second

// cost is what a step took when it ran last.
type cost struct {
	duration time.Duration
	memory   int64 // peak, in bytes; 0 when it is not known
}

// lookup returns the record of key if everything that it names is still there. Any trouble on the way is a miss: the work
// is then done again, which is always right.
func (s *Solver) lookup(ctx context.Context, key string, outputs int) (*record.Record, bool) {
	rec, ok, err := s.records.Get(ctx, key)
	if err != nil || !ok || len(rec.Outputs) != outputs {
		return nil, false
	}
	for _, id := range layersOf(rec) {
		if _, err := s.layers.Stat(ctx, id); err != nil {
			return nil, false
		}
	}
	// An error costs at most that the record is thought older than it is.
	_ = s.records.Touch(key)
	return rec, true
}

// layersOf returns the layers that rec names, each once.
func layersOf(rec *record.Record) []layer.ID {
	var ids []layer.ID
	for _, snap := range rec.Outputs {
		ids = append(ids, snap...)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// commit writes down what work has produced: first what the record names, then the record, so that a crash in between
// costs one repeated step; the other order would cost a wrong hit.
func (s *Solver) commit(ctx context.Context, n *node, rec *record.Record, key ContentKey, out *output) error {
	if err := s.layers.Ensure(ctx, layersOf(rec)...); err != nil {
		return fmt.Errorf("keep the result: %w", err)
	}
	var err error
	if rec.Log, err = out.store(ctx, s.logs); err != nil {
		return err
	}
	items := []record.Item{{Record: rec, Keys: []string{string(key)}}, n.recipeItem(rec)}
	if err := s.records.PutBatch(ctx, items); err != nil {
		return fmt.Errorf("record the result: %w", err)
	}
	s.putCost(n.entry, cost{rec.Duration, rec.PeakMemory})
	return nil
}

// recipeItem is what rec, found or made under n's content key, is under n's recipe key. The recipe key is written for
// steps that ignore their cache as well: nothing in this build reads it, but the next build must not find an older result.
func (n *node) recipeItem(rec *record.Record) record.Item {
	recipe := *rec
	recipe.Kind, recipe.Parts, recipe.Step = record.KindRecipe, n.recipeParts, n.step()
	recipe.ContentKey = string(n.content)
	return record.Item{Record: &recipe, Keys: []string{string(n.recipe)}}
}

// step says where in the user's files n comes from.
func (n *node) step() record.Step {
	r := Report{Vertex: n.vertex}
	return r.Step()
}

// lastCost returns what the work of e took when it ran last, false when that is not known.
func (s *Solver) lastCost(e *entry) (cost, bool) {
	b, ok, err := s.records.GetValue(costBucket, stepKey(e.parts))
	if err != nil || !ok {
		return cost{}, false
	}
	duration, n := binary.Varint(b)
	if n <= 0 || duration < 0 {
		return cost{}, false
	}
	memory, m := binary.Varint(b[n:])
	if m <= 0 || memory < 0 {
		return cost{}, false
	}
	return cost{time.Duration(duration), memory}, true
}

// putCost notes what the work of e has taken. An error is none: only the order of later builds depends on it.
func (s *Solver) putCost(e *entry, c cost) {
	b := binary.AppendVarint(nil, int64(c.duration))
	_ = s.records.PutValue(costBucket, stepKey(e.parts), binary.AppendVarint(b, c.memory))
}

// lastDuration returns how long the work of e took when it ran last, defaultDuration when that is not known.
func (s *Solver) lastDuration(e *entry) time.Duration {
	if c, ok := s.lastCost(e); ok {
		return c.duration
	}
	return defaultDuration
}
