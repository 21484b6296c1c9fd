// SPDX-License-Identifier: Apache-2.0

package solver

// How a result comes about. One call of Build.Result is one walk over the part of the graph that its edge needs:
//
//	pin    every source, all at once; a local context is read here, because nothing above it can be named before
//	name   a recipe key for every vertex, inputs first
//	make   the root. To make a vertex is: look its recipe key up and be done on a hit. Otherwise make its inputs, all
//	       at once, and then look its content key up and run it on a miss, in one run for all who want that key (run.go)
//
// So a walk goes down from the root only as far as keys are unknown, and what runs goes up again from there. Every vertex
// that is asked for has a goroutine, which reads like the lines above; they wait for each other by the done channels of
// the nodes. The first failure cancels the walk's context, and with it everything that only this walk waits for.

import (
	"context"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// walk is one evaluation of an edge.
type walk struct {
	build  *Build
	nodes  []*node // in the order of the definition: inputs come before what reads them
	root   *node
	ctx    context.Context // ends with the first failure
	cancel context.CancelCauseFunc
	unlink func() bool // from the build's context
	group  sync.WaitGroup

	failures []*VertexError // in the order in which they happened; guarded by Solver.mu

	planPaths sync.Once
	paths     map[*node]time.Duration // set by planPaths
}

// node is one vertex in one walk.
type node struct {
	walk   *walk
	entry  *entry
	vertex *Vertex
	inputs []*node // one for each of the vertex's inputs
	// distinctInputs has each of them once.
	distinctInputs []*node
	readers        []*node // those that have this node as an input
	// unread says that all of them only stack layers, and so do theirs.
	unread bool

	// fresh vertices are run whatever the cache has. unnamed ones are fresh or depend on one: their recipe does not say
	// what they contain, so it is not looked up.
	fresh, unnamed bool
	pin            Pin // of a source, once the walk has pinned it
	recipe         RecipeKey
	recipeParts    []record.Part
	inputDigests   []digest.Digest // what the op sees of each input, as far as that was asked
	content        ContentKey
	contentParts   []record.Part

	done chan struct{} // closed in a final state
	// What follows is guarded by Solver.mu until done is closed.
	state       state
	openReaders int // readers that may still ask for this node's result
	outputs     []snapshot.Snapshot
	cached      bool
	err         *VertexError
	// For the report: what was found or written, by which kind of key it was found, what has come of making it again, and
	// the log of a failure.
	record   *record.Record
	foundBy  string
	verified *Verification
	log      digest.Digest
}

// plan links the nodes and decides which of them have to run. Solver.mu is held.
func (w *walk) plan(nodes map[digest.Digest]*node) {
	for _, n := range w.nodes {
		n.fresh = w.build.ignoresCache(n.entry)
		for _, e := range n.vertex.Inputs {
			in := nodes[e.Vertex.Digest]
			n.inputs = append(n.inputs, in)
			if !slices.Contains(n.distinctInputs, in) {
				n.distinctInputs = append(n.distinctInputs, in)
				in.readers = append(in.readers, n)
				in.openReaders++
			}
		}
	}
	for _, n := range slices.Backward(w.nodes) { // readers first
		n.unread = !slices.ContainsFunc(n.readers, func(r *node) bool {
			s, ok := r.entry.op.(Stacker)
			return !ok || !s.Stacks() || !r.unread
		})
	}
}

// evaluate returns the outputs of the root when nothing of the walk is going on any more.
func (w *walk) evaluate() ([]snapshot.Snapshot, error) {
	s := w.build.solver
	vertices := make([]*Vertex, len(w.nodes))
	for i, n := range w.nodes {
		vertices[i] = n.vertex
	}
	w.build.display.announce(vertices)

	w.pinSources()
	w.nameVertices()
	w.demand(w.root)
	w.group.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(w.failures) > 0:
		return nil, failuresError(w.failures)
	case w.root.state != done:
		return nil, context.Cause(w.ctx)
	}
	return w.root.outputs, nil
}

// end lets go of the walk. A source that was shown at work while it was pinned and then not needed, because something
// else failed, is shown as canceled.
func (w *walk) end() {
	w.unlink()
	w.cancel(nil)
	for _, n := range w.nodes {
		if n.state == waiting && w.root.state != done {
			w.build.display.cancel(n.vertex, false)
		}
	}
	w.build.solver.mu.Lock()
	for _, n := range w.nodes {
		switch {
		case n.pin.ByContent:
			n.nameReport()
		case n.state != waiting:
		case w.root.state == done:
			n.report(Skipped)
		default:
			n.report(Canceled)
		}
	}
	w.build.solver.mu.Unlock()
	w.build.active.Done()
}

// pinSources pins all sources of the walk. The sources with a pin that says nothing are done then.
func (w *walk) pinSources() {
	s, b := w.build.solver, w.build
	for _, n := range w.nodes {
		if !n.entry.isSource() {
			continue
		}
		w.group.Go(func() {
			id := "pin " + strconv.Itoa(b.seq) + " " + n.vertex.Digest.String()
			remembered := func() (result, bool) {
				res, ok := b.pins[n.vertex.Digest]
				if ok && res.outputs != nil {
					n.finish(res.outputs, false)
				}
				return res, ok
			}
			res, err := s.share(n, id, remembered, func(r *run) (result, error) { return r.pin(n) })
			s.mu.Lock()
			defer s.mu.Unlock()
			if err == nil {
				n.pin = res.pin
			} else if !n.state.final() {
				n.set(canceled)
			}
		})
	}
	w.group.Wait()
}

// nameVertices makes the recipe keys.
func (w *walk) nameVertices() {
	// What ops see of local contexts is the only thing in keys that has to be computed from more than a few bytes.
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, n := range w.nodes {
		for i, in := range n.inputs {
			if in.pin.ByContent {
				g.Go(func() error { return w.digestInput(n, i) })
			}
		}
	}
	if g.Wait() != nil || w.ctx.Err() != nil {
		return
	}
	for _, n := range w.nodes {
		n.unnamed = n.fresh
		inputs := make([]recipeInput, len(n.inputs))
		for i, in := range n.inputs {
			if in.pin.ByContent {
				inputs[i] = recipeInput{content: n.inputDigests[i]}
				continue
			}
			inputs[i] = recipeInput{recipe: in.recipe, output: n.vertex.Inputs[i].Index}
			n.unnamed = n.unnamed || in.unnamed
		}
		n.recipeParts = recipeParts(n.entry.keyParts(n.pin), inputs)
		n.recipe = recipeKey(n.recipeParts)
	}
}

// digestInput finds out what n sees of its i-th input, which is done. An error is n's failure.
func (w *walk) digestInput(n *node, i int) error {
	if n.inputDigests[i] != "" {
		return nil
	}
	b := w.build
	env := &Env{
		Session: b.session, Progress: vertexProgress{b.display, n.vertex}, Pull: b.pull, BuildID: b.id,
	}
	in := n.inputs[i].outputs[n.vertex.Inputs[i].Index]
	d, err := n.entry.op.InputDigest(b.forClient(w.ctx, env.Progress), env, i, in)
	if err == nil {
		n.inputDigests[i] = d
		return nil
	}
	if w.ctx.Err() == nil {
		b.solver.mu.Lock()
		defer b.solver.mu.Unlock()
		if !n.state.final() {
			n.fail(&FilesError{Err: err, Inputs: []snapshot.Snapshot{in}, Action: -1, Unread: i}, nil)
		}
	}
	return err
}

// demand has n made, once.
func (w *walk) demand(n *node) {
	s := w.build.solver
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case n.state != waiting:
	case w.ctx.Err() != nil:
		n.set(canceled)
	case n.recall():
	default:
		n.set(probing)
		w.group.Go(func() {
			w.make(n)
			s.mu.Lock()
			defer s.mu.Unlock()
			if !n.state.final() { // which only happens when the walk has ended
				n.set(canceled)
			}
		})
	}
}

// make brings n to a final state, or returns because the walk's context has ended.
func (w *walk) make(n *node) {
	s := w.build.solver
	var found *record.Record
	if !n.unnamed {
		if rec, ok := w.build.lookup(w.ctx, string(n.recipe), n.entry.outputs); ok {
			if !n.verifies() {
				s.mu.Lock()
				n.record, n.foundBy = rec, record.KindRecipe
				n.finish(rec.Outputs, true)
				s.mu.Unlock()
				w.fetchAhead(n)
				return
			}
			found = rec
		}
	}

	for _, in := range n.distinctInputs {
		w.demand(in)
	}
	for _, in := range n.distinctInputs {
		select {
		case <-in.done:
		case <-w.ctx.Done():
		}
	}
	if w.ctx.Err() != nil {
		return
	}

	inputs := make([]snapshot.Snapshot, len(n.inputs))
	for i, in := range n.inputs {
		if w.digestInput(n, i) != nil {
			return
		}
		inputs[i] = in.outputs[n.vertex.Inputs[i].Index]
	}
	parts := contentParts(n.entry.keyParts(n.pin), n.inputDigests)
	key := contentKey(parts)
	n.content, n.contentParts = key, parts
	if n.verifies() && w.verify(n, inputs, found) {
		return
	}
	id := string(key)
	if n.fresh {
		// Neither what another build has begun nor what it began before this one asked is fresh enough.
		id = "fresh " + strconv.Itoa(w.build.seq) + " " + id
	}
	remembered := func() (result, bool) { return result{}, n.recall() }
	res, err := s.share(n, id, remembered, func(r *run) (result, error) { return r.execute(n, inputs, key, parts) })
	if err != nil || res.rec == nil || res.recipe == n.recipe {
		return
	}
	// Found under the content key, or made for another recipe: the next build may stop here already. If it
	// cannot be written, the record under the content key is still there.
	_ = s.records.PutBatch(context.WithoutCancel(w.ctx), []record.Item{n.recipeItem(res.rec)})
}

// fetchAhead begins to bring the layers of a found result here whose content is not known: whoever has asked for the result has to
// look into them. What goes wrong is told to that one.
func (w *walk) fetchAhead(n *node) {
	if n.unread {
		return
	}
	s, b := w.build.solver, w.build
	var unknown []layer.ID
	for _, snap := range n.outputs {
		for _, id := range snap {
			if info, err := s.layers.Stat(w.ctx, id); err == nil && info.Form == layer.FormRemote && info.Content == "" {
				unknown = append(unknown, id)
			}
		}
	}
	if len(unknown) == 0 {
		return
	}
	w.group.Go(func() {
		_ = s.layers.Materialise(b.forClient(w.ctx, vertexProgress{b.display, n.vertex}), unknown...)
	})
}

// recall takes the result that this build has made of n's vertex in another walk. Solver.mu is held.
func (n *node) recall() bool {
	m, ok := n.walk.build.made[n.vertex.Digest]
	if !ok || n.fresh && !m.ran {
		return false
	}
	n.finish(m.outputs, !m.ran)
	return true
}

// finish gives n its result. Solver.mu is held.
func (n *node) finish(outputs []snapshot.Snapshot, cached bool) {
	n.outputs, n.cached = outputs, cached
	n.set(done)
}

// fail gives n its error. Solver.mu is held.
func (n *node) fail(err error, log []byte) {
	n.err = newVertexError(n.vertex, err, log)
	n.set(failed)
}

// remaining returns how long the longest path from n to the root will take, n included, as far as earlier builds tell.
func (w *walk) remaining(n *node) time.Duration {
	w.planPaths.Do(func() {
		w.paths = make(map[*node]time.Duration, len(w.nodes))
		for _, n := range slices.Backward(w.nodes) {
			var above time.Duration
			for _, reader := range n.readers {
				above = max(above, w.paths[reader])
			}
			w.paths[n] = above + w.build.solver.lastDuration(n.entry)
		}
	})
	return w.paths[n]
}
