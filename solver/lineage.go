// SPDX-License-Identifier: Apache-2.0

package solver

// What a build can tell about how a result came to be, when it is there: what its sources stood for, and what each step
// on the way has left. Nothing is run for an answer.

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
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
	return b.known(ctx, v, b.solver.lookup)
}

// known is Outputs that looks records up by lookup.
func (b *Build) known(ctx context.Context, v *Vertex, lookup func(context.Context, string, int) (*record.Record, bool)) ([]snapshot.Snapshot, bool) {
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
	rec, ok := lookup(ctx, string(recipe), outputs)
	if !ok {
		return nil, false
	}
	return rec.Outputs, true
}

// chainBucket has, by the recipe key of a vertex and the number of its output, how many layers each of the snapshots had that
// Chain has returned for it: records of steps below are pruned before that of the result, which is used again and again. The
// store bounds it (cache.Store.Prune).
const chainBucket = "solver.chains"

// chainNote is a value of chainBucket.
type chainNote struct {
	// Result is a digest of the result's layers: it may have been made anew.
	Result digest.Digest
	// Layers are how many of those each step has had below it and made itself.
	Layers []int
}

// Chain returns the root file system after each step that leads to an edge, beginning with its source (or with nothing at all) and
// ending with the edge itself: where several inputs are read, the one is followed that the step writes on. It returns nil when a step is
// among them whose result is not known, or that does not write on any input.
func (b *Build) Chain(ctx context.Context, e Edge) []snapshot.Snapshot {
	chain := b.chain(ctx, e)
	if e.Vertex == nil {
		return chain
	}
	outputs, ok := b.Outputs(ctx, e.Vertex)
	b.solver.mu.Lock()
	var recipe RecipeKey
	if r := b.reports[e.Vertex.Digest]; r != nil {
		recipe = r.Recipe
	}
	b.solver.mu.Unlock()
	if !ok || e.Index >= len(outputs) || recipe == "" {
		return chain
	}
	final := outputs[e.Index]
	key, note := string(recipe)+" "+strconv.Itoa(e.Index), chainNote{Result: digestOf(final)}
	old, _, err := b.solver.records.GetValue(chainBucket, key)
	if err != nil {
		return chain
	}
	if stacked(chain, final) {
		for _, s := range chain {
			note.Layers = append(note.Layers, len(s))
		}
		if raw, err := json.Marshal(note); err == nil && !bytes.Equal(raw, old) {
			_ = b.solver.records.PutValue(chainBucket, key, raw) // it only matters when records are gone
		}
		return chain
	}
	var noted chainNote
	if json.Unmarshal(old, &noted) != nil || noted.Result != note.Result {
		return chain
	}
	var again []snapshot.Snapshot
	for _, n := range noted.Layers {
		if n < 0 || n > len(final) {
			return chain
		}
		again = append(again, final[:n:n])
	}
	if !stacked(again, final) {
		return chain
	}
	return again
}

// digestOf is a digest of the IDs of a snapshot's layers.
func digestOf(s snapshot.Snapshot) digest.Digest {
	var ids strings.Builder
	for _, id := range s {
		ids.WriteString(string(id) + " ")
	}
	return digest.FromString(ids.String())
}

// stacked reports whether each snapshot of chain is the one before with nothing or something on top, and final the last.
func stacked(chain []snapshot.Snapshot, final snapshot.Snapshot) bool {
	for i, s := range chain {
		next := final
		if i+1 < len(chain) {
			next = chain[i+1]
		}
		if len(s) > len(next) || !slices.Equal(s, next[:len(s)]) {
			return false
		}
	}
	return len(chain) > 0 && len(chain[len(chain)-1]) == len(final)
}

// chain is Chain as far as results are known.
func (b *Build) chain(ctx context.Context, e Edge) []snapshot.Snapshot {
	var chain []snapshot.Snapshot
	for e.Vertex != nil {
		outputs, ok := b.known(ctx, e.Vertex, b.lookup)
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
