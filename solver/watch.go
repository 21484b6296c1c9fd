// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"slices"
	"sync"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// watcher waits for the outputs of vertices.
type watcher struct {
	fn func(snapshot.Snapshot)
	// outputs are the numbers of those that are wanted; nil is all.
	outputs map[digest.Digest][]int
	calls   sync.WaitGroup
}

// Watch calls fn with the root file system after each step that e's own step builds on, as soon as the step is done: all of its layers
// are going to be in the result, if e is. What is not needed because more was found in the cache is not told of, nor is e
// itself. Each call has a goroutine of its own. stop ends it, when the calls that there were have returned.
func (b *Build) Watch(e Edge, fn func(snapshot.Snapshot)) (stop func()) {
	w := &watcher{fn: fn, outputs: map[digest.Digest][]int{}}
	for left := e.parts(); len(left) > 0; {
		below := left[0]
		left = left[1:]
		if below.Vertex == nil || slices.Contains(w.outputs[below.Vertex.Digest], below.Index) {
			continue
		}
		w.outputs[below.Vertex.Digest] = append(w.outputs[below.Vertex.Digest], below.Index)
		left = append(left, below.parts()...)
	}
	return b.watch(w)
}

// WatchAll calls fn with each result of a step or source that is recorded, as soon as it is there, found or made. Otherwise it is as Watch.
func (b *Build) WatchAll(fn func(snapshot.Snapshot)) (stop func()) {
	return b.watch(&watcher{fn: fn})
}

func (b *Build) watch(w *watcher) (stop func()) {
	s := b.solver
	s.mu.Lock()
	for d, m := range b.made {
		b.tell(w, d, m.outputs)
	}
	b.watchers = append(b.watchers, w)
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		b.watchers = slices.DeleteFunc(b.watchers, func(o *watcher) bool { return o == w })
		s.mu.Unlock()
		w.calls.Wait()
	}
}

// tell tells of a vertex that is done. Solver.mu is held.
func (b *Build) tell(w *watcher, d digest.Digest, outputs []snapshot.Snapshot) {
	if w.outputs == nil && b.pins[d].pin.ByContent {
		return // it is not recorded
	}
	for i := range outputs {
		if w.outputs == nil || slices.Contains(w.outputs[d], i) {
			snap := slices.Clone(outputs[i])
			w.calls.Go(func() { w.fn(snap) })
		}
	}
}

// parts are the edges whose layers are all in the result of e.
func (e Edge) parts() []Edge {
	if e.Vertex == nil {
		return nil
	}
	if _, ok := e.Vertex.Op.Op.(*pb.Op_Merge); ok {
		return e.Vertex.Inputs
	}
	if below, ok := e.below(); ok {
		return []Edge{below}
	}
	return nil
}
