// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// run is one piece of work that is going on: looking up or making what a content key names, or pinning a source.
// Everybody who wants the same piece waits for the same run. It goes on while anybody waits; when the last one has gone
// it is canceled, and that last one waits until it has stopped.
type run struct {
	id     string // in Solver.runs
	solver *Solver
	ctx    context.Context
	cancel context.CancelCauseFunc
	out    *output
	env    *Env
	done   chan struct{} // closed at the end
	// granted is closed when the run may start to work.
	granted chan struct{}

	// What follows is guarded by Solver.mu.

	// phase is as far as the nodes that wait have come at least: probing, ready, running.
	phase     state
	waiters   []*node
	owner     *Build // whose limit of jobs it counts against: the build that began it
	claim     claim
	abandoned bool // nobody waited any more: canceled, or about to be
	result    result
	err       error
}

// result is what a run brings.
type result struct {
	outputs []snapshot.Snapshot
	// rec is the record of the outputs; nil for what is not recorded.
	rec *record.Record
	// cached says that the outputs were found, not made.
	cached bool
	// verified is what has come of making a cached result again.
	verified *Verification
	// recipe is the recipe key that was written together with rec, if any.
	recipe RecipeKey
	// pin is what a source stands for, from the run that pins it. Without outputs it has only been pinned.
	pin Pin
}

// share returns the result of the run of that id, which it starts (with work in a goroutine of its own) when there is none.
// remembered is asked under the lock before that: the build may have come by the result in the meantime. When n's walk
// ends before the run does, share returns the reason; n's state has been set unless it returns that or only a pin.
func (s *Solver) share(n *node, id string, remembered func() (result, bool), work func(*run) (result, error)) (result, error) {
	for {
		s.mu.Lock()
		if res, ok := remembered(); ok {
			s.mu.Unlock()
			return res, nil
		}
		r := s.runs[id]
		if r != nil && r.abandoned {
			s.mu.Unlock()
			// It is stopping. Wait, so that two runs for one key are never at work at once.
			select {
			case <-r.done:
				continue
			case <-n.walk.ctx.Done():
				return result{}, context.Cause(n.walk.ctx)
			}
		}
		if r == nil {
			r = s.begin(n, id, work)
		}
		r.join(n)
		s.mu.Unlock()

		select {
		case <-r.done:
		case <-n.walk.ctx.Done():
			if r.leave(n) {
				return result{}, context.Cause(n.walk.ctx)
			}
		}
		return r.result, r.err
	}
}

// begin starts a run. mu is held.
func (s *Solver) begin(n *node, id string, work func(*run) (result, error)) *run {
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &run{
		id: id, solver: s, cancel: cancel, out: new(output), owner: n.walk.build, phase: n.state,
		claim: claim{slot: !n.entry.isSource(), order: n.entry.order},
		done:  make(chan struct{}), granted: make(chan struct{}),
	}
	session := &runSession{r}
	r.ctx = forClient(ctx, session, r.out)
	r.env = &Env{Session: session, Progress: r.out, Pull: r.owner.pull, BuildID: r.owner.id, Unread: n.unread, Mounts: r.owner.mounts}
	s.runs[id] = r
	release := s.lease("run " + id)
	go func() {
		defer release()
		res, err := work(r)
		r.finish(res, err)
		// The result was found or made under this lease, perhaps before those who have waited for it had one of their own.
		// Now they all have, so used once more it is kept for them.
		for _, snap := range res.outputs {
			for _, layer := range snap {
				_, _ = s.layers.Stat(context.Background(), layer)
			}
		}
	}()
	return r
}

// forClient is forClient for the build's client; without one nothing is known about who that is.
func (b *Build) forClient(ctx context.Context, progress Progress) context.Context {
	if b.session == nil {
		return registry.WithProgress(ctx, progress.Status)
	}
	return forClient(ctx, b.session, progress)
}

// forClient returns a context in which layers that are elsewhere are fetched with what the client may do, and shown.
func forClient(ctx context.Context, session Session, progress Progress) context.Context {
	var tokens registry.TokenSource
	if t, ok := session.(TokenSession); ok {
		tokens = t
	}
	return registry.WithProgress(registry.WithAccess(ctx, session.Credentials, tokens), progress.Status)
}

// join adds n to those who wait. mu is held.
func (r *run) join(n *node) {
	r.waiters = append(r.waiters, n)
	r.out.join(n.walk.build.display, n.vertex)
	r.follow(n)
	// A run in the queue may have been passed over because nobody wanted it.
	r.solver.dispatch()
}

// follow brings n to the phase of the run. mu is held.
func (r *run) follow(n *node) {
	if n.state == probing && r.phase > probing {
		n.set(ready)
	}
	if n.state != running && r.phase == running {
		n.set(running)
	}
}

// advance brings the run and everybody who waits for it to a phase. mu is held.
func (r *run) advance(to state) {
	r.phase = to
	for _, n := range r.waiters {
		r.follow(n)
	}
}

// leave takes n away from those who wait and reports whether it did so before the run was over. The last one to leave
// stops the run and waits until it has stopped.
func (r *run) leave(n *node) bool {
	s := r.solver
	s.mu.Lock()
	i := slices.Index(r.waiters, n)
	if i < 0 { // finish was first
		s.mu.Unlock()
		return false
	}
	r.waiters = slices.Delete(r.waiters, i, i+1)
	r.out.leave(n.walk.build.display, n.vertex)
	last := len(r.waiters) == 0
	if last {
		r.abandoned = true
		r.cancel(context.Cause(n.walk.ctx))
	}
	s.mu.Unlock()
	if last {
		<-r.done
	}
	return true
}

// wanted reports whether any evaluation that waits is still going on. It is what keeps work from starting in the moment
// between a failure and the departure of those that it stops. mu is held.
func (r *run) wanted() bool {
	return slices.ContainsFunc(r.waiters, func(n *node) bool { return n.walk.ctx.Err() == nil })
}

// await returns when it is the run's turn to work, or with an error when nobody wants it any more.
func (r *run) await() error {
	s := r.solver
	s.mu.Lock()
	r.advance(ready)
	s.queue = append(s.queue, r)
	s.dispatch()
	s.mu.Unlock()
	select {
	case <-r.granted:
	case <-r.ctx.Done():
		s.mu.Lock()
		if i := slices.Index(s.queue, r); i >= 0 {
			s.queue = slices.Delete(s.queue, i, i+1)
		}
		s.mu.Unlock()
	}
	return context.Cause(r.ctx) // nil while it is wanted
}

// finish ends the run: it tells everybody who waits and gives the slot to the next run, in one step, so that a failure
// stops its siblings before any of them could take the slot.
func (r *run) finish(res result, err error) {
	s := r.solver
	var log []byte
	var kept digest.Digest
	if err != nil {
		log = r.out.tail()
		if s.wants(r) {
			kept, _ = r.out.store(context.WithoutCancel(r.ctx), s.logs) // the failure counts more than its log
		}
	}
	r.out.discard()

	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.runs, r.id)
	s.giveBack(r)
	r.result, r.err = res, err
	for _, n := range r.waiters {
		switch {
		case err != nil:
			n.log = kept
			n.fail(err, log)
		case res.outputs != nil:
			if n.record, n.verified = res.rec, res.verified; res.cached {
				n.foundBy = res.rec.Kind
			}
			n.finish(res.outputs, res.cached)
		}
	}
	r.waiters = nil
	r.cancel(errors.New("the run is over"))
	close(r.done)
	s.dispatch()
}

// wants reports whether anybody waits for r.
func (s *Solver) wants(r *run) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(r.waiters) > 0
}

// execute looks up what n's content key names and makes it on a miss. It is the body of a run; n is the node that began it.
func (r *run) execute(n *node, inputs []snapshot.Snapshot, key ContentKey, parts []record.Part) (result, error) {
	s := r.solver
	// A look-up inside the run, of which there is one for each key, cannot miss a record that is just being written.
	if !n.fresh {
		if rec, ok := r.owner.lookup(r.ctx, string(key), n.entry.outputs); ok {
			return result{outputs: rec.Outputs, rec: rec, cached: true}, nil
		}
	}
	r.claim.priority, r.claim.memory = n.walk.remaining(n), s.memoryOf(n.entry)
	if err := r.await(); err != nil {
		return result{}, err
	}
	defer n.keepInputs(r.ctx, inputs)()
	start := time.Now()
	outputs, err := n.entry.op.Run(r.ctx, r.env, inputs)
	if err != nil {
		s.noteFailure(r, n.entry)
		return result{}, err
	}
	// What ends well after it was told to stop may have lost a part of itself on the way: a shell that carries on
	// after its killed child. It is not recorded.
	if err := context.Cause(r.ctx); err != nil {
		return result{}, err
	}
	if len(outputs) != n.entry.outputs {
		return result{}, fmt.Errorf("the op returned %d outputs instead of %d", len(outputs), n.entry.outputs)
	}
	end := time.Now()
	rec := &record.Record{
		Outputs: outputs, Kind: record.KindContent, Parts: parts, Step: n.step(), Build: r.owner.id,
		Created: end, LastUsed: end, Duration: end.Sub(start), PeakMemory: r.env.peakMemory.Load(),
		CPUTime: time.Duration(r.env.cpuTime.Load()), ReadBytes: r.env.readBytes.Load(), WrittenBytes: r.env.writtenBytes.Load(),
	}
	if err := s.commit(context.WithoutCancel(r.ctx), n, rec, key, r.out); err != nil {
		return result{}, err
	}
	return result{outputs: outputs, rec: rec, recipe: n.recipe}, nil
}

// pin pins a source, and makes it at once when its content is all that names it. It is the body of a run; n is the
// node that began it.
func (r *run) pin(n *node) (result, error) {
	source := n.entry.op.(Source)
	pin, err := source.Pin(r.ctx, r.env)
	if err != nil {
		return result{}, err
	}
	res := result{pin: pin}
	if pin.ByContent {
		r.solver.mu.Lock()
		r.advance(running)
		r.solver.mu.Unlock()
		if res.outputs, err = source.Run(r.ctx, r.env, nil); err != nil {
			return result{}, err
		}
		if len(res.outputs) != n.entry.outputs {
			return result{}, fmt.Errorf("the source returned %d outputs instead of %d", len(res.outputs), n.entry.outputs)
		}
	}
	if err := context.Cause(r.ctx); err != nil {
		return result{}, err
	}
	r.solver.mu.Lock()
	r.owner.pins[n.vertex.Digest] = res
	r.solver.mu.Unlock()
	return res, nil
}
