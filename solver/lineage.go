// SPDX-License-Identifier: Apache-2.0

package solver

// What a build can tell about how a result came to be, when it is there: what its sources stood for, and what each step
// on the way has left. Nothing is run for an answer.

import (
	"context"
	"slices"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Pin returns what a source vertex was resolved to in this build; false for what is no source, or was not asked for.
func (b *Build) Pin(v *Vertex) (Pin, bool) {
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	res, ok := b.pins[v.Digest]
	return res.pin, ok
}

// Outputs returns the result of a vertex as far as it is known: from this build, or, for one that was skipped because what reads it was
// found, from the record that its recipe key names. Call it when the calls of Result that it is about have returned.
func (b *Build) Outputs(ctx context.Context, v *Vertex) ([]snapshot.Snapshot, bool) {
	s := b.solver
	s.mu.Lock()
	m, ok := b.made[v.Digest]
	var recipe RecipeKey
	if r := b.reports[v.Digest]; r != nil && !r.Unnamed {
		recipe = r.Recipe
	}
	outputs := 0
	if e := b.entries[v.Digest]; e != nil {
		outputs = e.outputs
	}
	s.mu.Unlock()
	if ok {
		return m.outputs, true
	}
	if recipe == "" {
		return nil, false
	}
	rec, ok := s.lookup(ctx, string(recipe), outputs)
	if !ok {
		return nil, false
	}
	return rec.Outputs, true
}

// Chain returns the root file system after each step that leads to an edge, beginning with its source (or with nothing at all) and
// ending with the edge itself: where several inputs are read, the one is followed that the step writes on. It returns nil when a step is
// among them whose result is not known, or that does not write on any input.
func (b *Build) Chain(ctx context.Context, e Edge) []snapshot.Snapshot {
	var chain []snapshot.Snapshot
	for e.Vertex != nil {
		outputs, ok := b.Outputs(ctx, e.Vertex)
		if !ok || e.Index >= len(outputs) {
			return nil
		}
		chain = append(chain, outputs[e.Index])
		if e.Vertex.Op.GetSource() != nil {
			slices.Reverse(chain)
			return chain
		}
		if e, ok = e.below(); !ok {
			return nil
		}
	}
	chain = append(chain, nil) // scratch
	slices.Reverse(chain)
	return chain
}

// below is the edge that e's step writes on, the zero Edge for one that begins with nothing; false when there is no such thing.
func (e Edge) below() (Edge, bool) {
	input := func(i int64) (Edge, bool) {
		switch {
		case i < 0: // pb.Empty
			return Edge{}, true
		case i < int64(len(e.Vertex.Inputs)):
			return e.Vertex.Inputs[i], true
		}
		return Edge{}, false
	}
	switch op := e.Vertex.Op.Op.(type) {
	case *pb.Op_Exec:
		for _, m := range op.Exec.Mounts {
			if m.Output == int64(e.Index) {
				return input(m.Input)
			}
		}
	case *pb.Op_File:
		// Actions follow each other: an input beyond those of the op is the result of an earlier action.
		actions := op.File.Actions
		at := slices.IndexFunc(actions, func(a *pb.FileAction) bool { return a.Output == int64(e.Index) })
		for steps := 0; at >= 0 && at < len(actions) && steps < len(actions); steps++ {
			in := actions[at].Input
			if in < int64(len(e.Vertex.Inputs)) {
				return input(in)
			}
			at = int(in) - len(e.Vertex.Inputs)
		}
	case *pb.Op_Merge:
		if len(op.Merge.Inputs) > 0 {
			return input(op.Merge.Inputs[0].Input)
		}
	}
	return Edge{}, false
}
