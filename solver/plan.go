// SPDX-License-Identifier: Apache-2.0

package solver

import "context"

// Planned is a vertex that has been named and not evaluated.
type Planned struct {
	Vertex *Vertex
	Recipe RecipeKey
	// Unnamed vertices, which have to run, or depend on one that has to, are not looked up by their recipe. Those ByContent are read in
	// every build.
	Unnamed, ByContent bool
}

// Plan pins the sources below an edge and names all vertices, inputs before what reads them, and nothing more: nothing is looked up and
// nothing runs. Errors are those of Result.
func (b *Build) Plan(ctx context.Context, e Edge) ([]Planned, error) {
	if e.Vertex == nil {
		return nil, nil
	}
	w, err := b.newWalk(ctx, e.Vertex)
	if err != nil {
		return nil, err
	}
	defer w.end()
	w.pinSources()
	w.nameVertices()
	w.group.Wait()
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	if len(w.failures) > 0 {
		return nil, failuresError(w.failures)
	}
	if w.ctx.Err() != nil {
		return nil, context.Cause(w.ctx)
	}
	out := make([]Planned, len(w.nodes))
	for i, n := range w.nodes {
		out[i] = Planned{Vertex: n.vertex, Recipe: n.recipe, Unnamed: n.unnamed, ByContent: n.pin.ByContent}
	}
	return out, nil
}
