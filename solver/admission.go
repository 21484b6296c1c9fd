// SPDX-License-Identifier: Apache-2.0

package solver

// Which of the runs that are ready starts next, and when.
//
// A run that does work takes a slot, of which there are Options.Jobs, and the memory that its step has needed before
// (Options.MaxMemory for all that run). What runs ahead of it on the longest path to a result goes first, and what does
// not fit into memory is passed over for what does: nothing is idle that could work. Two rules keep that from going wrong:
//
//   - A step that needs memory fits when no other has any. So one that is larger than everything there is runs alone, and
//     as long as anything waits, something runs: there is no deadlock, because nothing that runs waits for what is queued.
//   - A run can be overtaken only so often (patience): by runs that rank behind it while there is no memory for it, and by
//     runs of other builds. Then it is due: it goes before everything that is not, in the order of arrival, and while
//     memory is too short for it nobody else gets any. Its own build has an end, so everything gets its turn.

import (
	"slices"
	"time"
)

// patience is how often a run lets others overtake it. It is a compromise: one would leave memory idle each time a large
// step comes, and many would make the end of a build wait for a large step that could have been in its middle.
const patience = 8

// claim is what a run takes while it works, and its place in the queue. Until the run is queued it belongs to the run's
// goroutine; then it is guarded by Solver.mu.
type claim struct {
	slot   bool  // it counts among the jobs
	memory int64 // in bytes
	held   bool  // it has got both

	priority  time.Duration // longest path to a result
	order     int           // among runs of equal priority: in the order of the definition
	overtaken int
}

func (c *claim) due() bool { return c.overtaken >= patience }

// before reports whether r goes first if both can start. due runs keep their order in the queue.
func (r *run) before(other *run) bool {
	x, y := &r.claim, &other.claim
	switch {
	case x.due() != y.due():
		return x.due()
	case x.due():
		return false
	case x.priority != y.priority:
		return x.priority > y.priority
	}
	return x.order < y.order
}

// dispatch starts queued runs as long as any fits. It chooses among what is in the queue now: the step that follows the one
// that has just ended comes a moment too late for its slot, because its content key is only being made. mu is held.
func (s *Solver) dispatch() {
	for r := s.next(); r != nil; r = s.next() {
		s.queue = slices.DeleteFunc(s.queue, func(q *run) bool { return q == r })
		if r.claim.slot {
			s.countOvertaken(r)
			s.running++
			s.memory += r.claim.memory
			r.owner.running++
			r.claim.held = true
		}
		r.advance(running)
		close(r.granted)
	}
}

// next returns the run that starts now, nil when none can. mu is held.
func (s *Solver) next() *run {
	// The queue is in the order of arrival, and so are those that are due.
	short := slices.IndexFunc(s.queue, func(r *run) bool {
		return r.claim.due() && r.wanted() && s.hasSlot(r) && !s.hasMemory(r)
	})
	var best *run
	for i, r := range s.queue {
		switch {
		case !r.wanted() || !s.hasSlot(r) || !s.hasMemory(r):
		case short >= 0 && r.claim.memory > 0 && !(r.claim.due() && i < short): // memory is being kept
		case best == nil || r.before(best):
			best = r
		}
	}
	return best
}

// countOvertaken notes which queued runs see r start before them that could have had its slot. mu is held.
func (s *Solver) countOvertaken(r *run) {
	for _, q := range s.queue {
		if q.wanted() && s.hasSlot(q) && (q.before(r) || q.owner != r.owner) {
			q.claim.overtaken++
		}
	}
}

// giveBack frees what r has held. mu is held.
func (s *Solver) giveBack(r *run) {
	if !r.claim.held {
		return
	}
	r.claim.held = false
	s.running--
	s.memory -= r.claim.memory
	r.owner.running--
}

// hasSlot reports whether r may be one more of the jobs of all builds, and of its own. mu is held.
func (s *Solver) hasSlot(r *run) bool {
	if !r.claim.slot {
		return true
	}
	own := r.owner.jobs
	if own <= 0 {
		own = s.jobs
	}
	return s.running < s.slots() && r.owner.running < own
}

// slots is how many jobs there may be now. mu is held.
func (s *Solver) slots() int {
	n := s.jobs
	for _, b := range s.wide {
		n = max(n, b.jobs)
	}
	return n
}

// hasMemory reports whether there is memory for r. mu is held.
func (s *Solver) hasMemory(r *run) bool {
	need := r.claim.memory
	return need == 0 || s.memory == 0 || s.memory+need <= s.maxMemory
}

// memoryOf returns how much memory, in bytes, the work of e is expected to need: what it needed last time. A step that has
// never run is taken for one that leaves as much to each of the other jobs.
func (s *Solver) memoryOf(e *entry) int64 {
	user, ok := e.op.(MemoryUser)
	if !ok || s.maxMemory == 0 {
		return 0
	}
	last, _ := s.lastCost(e)
	need := last.memory
	if need == 0 {
		s.mu.Lock()
		need = max(1, s.maxMemory/int64(s.slots()))
		s.mu.Unlock()
	}
	if limit := user.MemoryLimit(); limit > 0 {
		need = min(need, limit)
	}
	return need
}

// noteFailure keeps how much memory a step needed that has failed, which may be why it has. What was told to stop had no
// time to need all of it.
func (s *Solver) noteFailure(r *run, e *entry) {
	peak := r.env.peakMemory.Load()
	if r.ctx.Err() != nil || peak == 0 {
		return
	}
	last, known := s.lastCost(e)
	if !known {
		last.duration = defaultDuration
	}
	if peak > last.memory {
		s.putCost(e, cost{last.duration, peak})
	}
}
