// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"fmt"
	"slices"
)

// state says how far the evaluation of a vertex has come.
//
//	Waiting ──► Probing ──► Ready ──► Running ──► Done | Failed | Canceled
//
// Done is also reached from Probing, by a lookup or by joining work that another build has finished; a local context
// goes from Waiting to Running, because its content is needed before anything can be looked up.
type state int

const (
	// waiting: nothing has asked for its result. It may never be: a hit above needs nothing below.
	waiting state = iota
	// probing: its recipe key is being looked up; after a miss its inputs are being made and its content key is looked up.
	probing
	// ready: it has to run and waits for its turn.
	ready
	// running: its op works, for this build or for another one that wants the same.
	running
	// done: its outputs are there.
	done
	// failed: its err says why.
	failed
	// canceled: nobody wants it any more, because something else failed or the caller has gone.
	canceled
)

var stateNames = [...]string{"waiting", "probing", "ready", "running", "done", "failed", "canceled"}

func (s state) String() string { return stateNames[s] }

// final reports whether a vertex in this state stays in it.
func (s state) final() bool { return s >= done }

// transitions has what may follow each state; the final ones are followed by nothing.
var transitions = [...][]state{
	waiting: {probing, running, done, failed, canceled},
	probing: {ready, done, failed, canceled},
	ready:   {running, failed, canceled},
	running: {done, failed, canceled},
	done:    {}, failed: {}, canceled: {},
}

// set is the only function that changes the state of a node, and the only place where that has consequences: what the
// build shows and remembers, who is told, and that the first failure stops the rest. Outputs and cached (before done)
// and err (before failed) have been filled in. s.mu is held.
func (n *node) set(to state) {
	if !slices.Contains(transitions[n.state], to) {
		panic(fmt.Sprintf("solver: vertex %s (%s) goes from %v to %v", n.vertex.Digest, n.vertex.Name, n.state, to))
	}
	from := n.state
	n.state = to
	w, show := n.walk, n.walk.build.display
	switch to {
	case running:
		show.start(n.vertex)
	case done:
		if n.cached {
			n.report(Found)
		} else {
			n.report(Ran)
		}
		for _, below := range w.settle(n) {
			show.cached(below.vertex)
		}
		if n.cached {
			show.cached(n.vertex) // one that was verified was at work, and is shown so
		} else {
			show.complete(n.vertex, nil)
		}
		w.build.made[n.vertex.Digest] = made{outputs: n.outputs, ran: !n.cached}
		for _, watcher := range w.build.watchers {
			w.build.tell(watcher, n.vertex.Digest, n.outputs)
		}
	case failed:
		n.report(Failed)
		show.start(n.vertex)
		show.complete(n.vertex, n.err.Err)
		w.failures = append(w.failures, n.err)
		w.cancel(fmt.Errorf("canceled because %q failed", n.vertex.Name))
	case canceled:
		n.report(Canceled)
		show.cancel(n.vertex, from == running)
	}
	if to.final() {
		close(n.done)
	}
}

// settle notes that n needs nothing more of its inputs, and returns the vertices that nobody in this walk can ask for any
// more, inputs before what reads them: everything they could have been needed for was found in the cache.
func (w *walk) settle(n *node) []*node {
	var unneeded []*node
	for left := []*node{n}; len(left) > 0; {
		reader := left[len(left)-1]
		left = left[:len(left)-1]
		for _, in := range reader.distinctInputs {
			in.openReaders--
			if in.openReaders == 0 && in.state == waiting {
				unneeded = append(unneeded, in)
				left = append(left, in)
			}
		}
	}
	slices.SortFunc(unneeded, func(a, b *node) int { return a.entry.order - b.entry.order })
	return unneeded
}
