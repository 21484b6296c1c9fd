// SPDX-License-Identifier: Apache-2.0

package solver

// What a build can tell about its vertices when it has ended: which were found and by which key, which ran, and what
// their keys were made of. The lists of parts are those that the keys were hashed from, so that nobody who compares two
// of them can disagree with the keys.

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Outcome is what has become of a vertex in a build.
type Outcome string

// The outcomes.
const (
	// Skipped: nobody asked for its result, because what reads it was found.
	Skipped Outcome = "skipped"
	// Found: its result is that of an earlier run.
	Found Outcome = "found"
	// Ran: its work was done in this build, or at the same time for another one.
	Ran      Outcome = "ran"
	Failed   Outcome = "failed"
	Canceled Outcome = "canceled"
)

// Report is what a build tells about one vertex.
type Report struct {
	Vertex  *Vertex
	Outcome Outcome
	// Source vertices have no inputs; those ByContent are read in every build.
	Source, ByContent bool
	// Fresh says that the vertex had to run whatever the cache has. Unnamed ones are fresh or depend on one that is; their
	// recipe key is not looked up.
	Fresh, Unnamed bool
	// Recipe is the recipe key and RecipeParts are what it was made of; "" when the build did not come that far.
	Recipe      RecipeKey
	RecipeParts []record.Part
	// Content is the content key; "" when it was not needed.
	Content      ContentKey
	ContentParts []record.Part
	// Record is what was found or written, nil for what is not recorded. FoundBy is the kind of key that it was found by.
	Record  *record.Record
	FoundBy string
	// Verification says what has come of making what was found again; nil when it was not (BuildOptions.Verify).
	Verification *Verification
	// Log is the blob with all output of what ran, "" when there was none.
	Log digest.Digest
	Err error
	// Ended is when the vertex was done with.
	Ended time.Time
}

// Step says where in the user's files the vertex comes from.
func (r *Report) Step() record.Step {
	file, line := position(r.Vertex)
	return record.Step{Name: r.Vertex.Name, Stage: stageName(r.Vertex.Name), File: file, Line: line}
}

// Reports returns what the build can tell about its vertices, inputs before what reads them. Call it when all calls of
// Result have returned.
func (b *Build) Reports() []Report {
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	out := make([]Report, 0, len(b.reports))
	for _, r := range b.reports {
		out = append(out, *r)
	}
	order := func(r Report) int { return b.entries[r.Vertex.Digest].order }
	slices.SortFunc(out, func(x, y Report) int { return order(x) - order(y) })
	return out
}

// Made returns when the work of e's vertex was done, here or where its record has come from, in whole seconds: shared caches keep no more. It is zero for sources and for
// what has no record. Call it when the vertex has been evaluated.
func (b *Build) Made(e Edge) time.Time {
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	r := b.reports[e.Vertex.Digest]
	if r == nil || r.Record == nil || r.Source {
		return time.Time{}
	}
	return r.Record.Created.UTC().Truncate(time.Second)
}

// rank orders outcomes by how much they tell, for vertices that several evaluations of a build come to.
func (o Outcome) rank() int {
	return slices.Index([]Outcome{"", Skipped, Canceled, Found, Failed, Ran}, o)
}

// report notes what has become of n. Solver.mu is held.
func (n *node) report(outcome Outcome) {
	b := n.walk.build
	old := b.reports[n.vertex.Digest]
	if old != nil && old.Outcome.rank() >= outcome.rank() {
		return
	}
	r := &Report{
		Vertex: n.vertex, Outcome: outcome, Source: n.entry.isSource(), ByContent: n.pin.ByContent,
		Fresh: n.fresh, Unnamed: n.unnamed,
		Recipe: n.recipe, RecipeParts: n.recipeParts, Content: n.content, ContentParts: n.contentParts,
		Record: n.record, FoundBy: n.foundBy, Verification: n.verified, Log: n.log, Ended: time.Now(),
	}
	if n.record != nil {
		r.Log = n.record.Log
	}
	if n.err != nil {
		r.Err = n.err.Err
	}
	b.reports[n.vertex.Digest] = r
}

// nameReport adds the keys to what was reported of n before it had any: a source that is read to be named. Solver.mu is
// held.
func (n *node) nameReport() {
	if r := n.walk.build.reports[n.vertex.Digest]; r != nil && r.Recipe == "" {
		r.ByContent, r.Recipe, r.RecipeParts = true, n.recipe, n.recipeParts
	}
}

// Inputs keeps what ops saw of their inputs, file by file, so that a later build can say what has changed.
type Inputs interface {
	// Keep stores what write writes under the digest that stands for it in keys, unless that is known already. What
	// cannot be kept is not: an error of write is the only one.
	Keep(ctx context.Context, d digest.Digest, write func(io.Writer) error)
}

// keepInputs has what the op sees of its inputs written down, beside the work itself. It returns at once; call what it
// returns to wait.
func (n *node) keepInputs(ctx context.Context, inputs []snapshot.Snapshot) (wait func()) {
	keeper := n.walk.build.solver.inputs
	describer, ok := n.entry.op.(Describer)
	if !ok || keeper == nil {
		return func() {}
	}
	var keeping sync.WaitGroup
	for i, in := range inputs {
		if !describer.Describes(i) {
			continue
		}
		keeping.Go(func() {
			keeper.Keep(ctx, n.inputDigests[i], func(w io.Writer) error {
				return describer.DescribeInput(ctx, i, in, w)
			})
		})
	}
	return keeping.Wait
}
