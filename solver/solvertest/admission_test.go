// SPDX-License-Identifier: Apache-2.0

package solvertest

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-68981b69/slipway/solver"
)

// checkAdmission checks that what ran at once was within the limits of each build, and had memory. known has what steps
// have needed before; it is brought up to date.
func (sc scenario) checkAdmission(r round, events []Event, known map[string]int64) error {
	byBuild := make([]int, len(r.builds))
	share := max(1, sc.maxMemory/int64(sc.jobs))
	var memory int64
	users := 0
	before := func(e Event) int64 { // what the solver thought at least
		if e.Memory == 0 {
			return 0
		}
		if need, ok := known[e.Own]; ok {
			return need
		}
		return min(share, e.Memory) // it may run twice in a round
	}
	needs := map[string]int64{}
	for _, e := range events {
		if e.Kind != Run {
			continue
		}
		build := slices.IndexFunc(r.builds, func(buildSpec) bool { return true })
		if _, err := fmt.Sscan(e.Build, &build); err != nil {
			return err
		}
		sign := -1
		if e.Start {
			sign = 1
		}
		byBuild[build] += sign
		if limit := r.builds[build].jobs; limit > 0 && byBuild[build] > limit {
			return fmt.Errorf("%d steps of build %d at once, %d allowed", byBuild[build], build, limit)
		}
		if e.Memory > 0 {
			users += sign
			memory += int64(sign) * before(e)
			if sc.maxMemory > 0 && memory > sc.maxMemory && users > 1 {
				return fmt.Errorf("%d steps at once that need %d together, %d allowed", users, memory, sc.maxMemory)
			}
		}
		if !e.Start && (e.Err == nil || errors.Is(e.Err, ErrStep)) && e.Memory > 0 {
			needs[e.Own] = e.Memory
		}
	}
	for own, need := range needs {
		known[own] = need
	}
	return nil
}

// names lists the commands of the steps that began, in order.
func names(events []Event) []string {
	var out []string
	for _, e := range events {
		if e.Start && e.Kind == Run {
			name, _, _ := strings.Cut(strings.TrimPrefix(string(e.Key), "command="), " ")
			out = append(out, name)
		}
	}
	return out
}

// lone is a graph of one step; commands of different n do different things.
func lone(n int) Graph { return Graph{Steps: []Step{{Command: n, Outputs: 1}}} }

// fan is a graph whose root reads one step for each command.
func fan(commands ...int) Graph {
	g := Graph{Root: len(commands)}
	root := Step{Command: 98, Outputs: 1}
	for i, c := range commands {
		g.Steps = append(g.Steps, Step{Command: c, Outputs: 1})
		root.Inputs = append(root.Inputs, Input{Step: i, Sees: 2})
	}
	g.Steps = append(g.Steps, root)
	return g
}

// TestMemory: steps start together as long as there is memory for what they have needed before; what is larger than
// everything runs alone; what has never run is taken for an equal share.
func TestMemory(t *testing.T) {
	for _, c := range []struct {
		name   string
		memory int64 // of each of four steps
		want   [2]time.Duration
	}{
		{"two fit", 4, [2]time.Duration{10 * time.Second, 20 * time.Second}},
		{"one fits", 6, [2]time.Duration{10 * time.Second, 40 * time.Second}},
		{"none fits", 20, [2]time.Duration{10 * time.Second, 40 * time.Second}},
		{"all fit", 1, [2]time.Duration{10 * time.Second, 10 * time.Second}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWorld()
				w.Durations, w.Memory = []time.Duration{10 * time.Second, 0}, []int64{c.memory, 0}
				s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 4, MaxMemory: 8, NewOp: w.NewOp})
				g := fan(0, 2, 4, 6)
				g.Steps[4].Command = 99 // takes no time and no memory
				for i, want := range c.want {
					o := build(w, s, "b", buildSpec{graph: g, noCache: true}, new(Screen))[0]
					if o.err != nil || o.took != want {
						t.Errorf("build %d took %v (%v), want %v", i+1, o.took, o.err, want)
					}
				}
			})
		})
	}
}

// TestMemoryOfFailure: what a step needed that has failed counts the next time; what a canceled one needed so far does not.
func TestMemoryOfFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations, w.Memory = []time.Duration{10 * time.Second}, []int64{6}
		w.Failing = map[int]bool{0: true, 2: true}
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 2, MaxMemory: 8, NewOp: w.NewOp})
		if o := build(w, s, "a", buildSpec{graph: lone(0)}, new(Screen))[0]; !errors.Is(o.err, ErrStep) {
			t.Fatal(o.err)
		}
		if o := build(w, s, "b", buildSpec{graph: lone(2), cancel: 3}, new(Screen))[0]; !errors.Is(o.err, errCanceled) {
			t.Fatal(o.err)
		}
		w.Failing = nil
		took := func(g Graph) time.Duration {
			var wg sync.WaitGroup
			begin := time.Now()
			for i, g := range []Graph{g, lone(4)} {
				wg.Go(func() { build(w, s, fmt.Sprint(i), buildSpec{graph: g, noCache: true}, new(Screen)) })
			}
			wg.Wait()
			return time.Since(begin)
		}
		if got := took(lone(2)); got != 10*time.Second {
			t.Errorf("beside a step that was canceled: %v, want both at once", got)
		}
		if got := took(lone(0)); got != 20*time.Second {
			t.Errorf("beside a step that has failed: %v, want one after the other", got)
		}
	})
}

// TestLargeStepGetsItsTurn has small steps come for ever, from new builds, so that there is never room for a large one unless
// it is kept.
func TestLargeStepGetsItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = []time.Duration{3 * time.Second}
		w.Memory = append(slices.Repeat([]int64{2}, 100), 8) // commands 100 and 101·n+100
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 4, MaxMemory: 8, NewOp: w.NewOp})
		large := lone(100)
		build(w, s, "before", buildSpec{graph: large}, new(Screen)) // leaves its need behind
		w.Events()

		var wg sync.WaitGroup
		for i := range 60 {
			wg.Go(func() {
				build(w, s, fmt.Sprint(i), buildSpec{graph: lone(i % 50 * 2), noCache: true, start: i}, new(Screen))
			})
		}
		var o outcome
		wg.Go(func() { o = build(w, s, "large", buildSpec{graph: large, noCache: true, start: 2}, new(Screen))[0] })
		wg.Wait()
		// Eight others may pass it by, one each second; then three seconds until the last of them has ended, and its own three.
		if o.err != nil || o.took < 6*time.Second || o.took > 16*time.Second {
			t.Errorf("the large step took %v (%v)", o.took, o.err)
		}
	})
}

// TestLargeStepOfOneBuild: the same within one build. The large step is on the longest path, so it ranks first, and comes when
// small ones have all the memory.
func TestLargeStepOfOneBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = append(slices.Repeat([]time.Duration{3 * time.Second}, 94), time.Second, 0, 9*time.Second, 0, 0, 0, 3*time.Second)
		w.Memory = append(slices.Repeat([]int64{2}, 94), 0, 0, 0, 0, 0, 0, 8)
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 5, MaxMemory: 8, NewOp: w.NewOp})
		small := []int{}
		for i := range 40 {
			small = append(small, 2*i)
		}
		g := fan(small...)
		last := len(g.Steps) - 1
		root := g.Steps[last]
		g.Steps = append(g.Steps[:last], Step{Command: 94, Outputs: 1}, Step{Command: 100, Outputs: 1, Inputs: []Input{{Step: last, Sees: 2}}},
			Step{Command: 96, Outputs: 1, Inputs: []Input{{Step: last + 1, Sees: 2}}})
		root.Inputs = append(root.Inputs, Input{Step: last + 2, Sees: 2})
		g.Steps = append(g.Steps, root)
		g.Root = len(g.Steps) - 1
		build(w, s, "before", buildSpec{graph: g}, new(Screen))
		w.Events()
		build(w, s, "b", buildSpec{graph: g, noCache: true}, new(Screen))
		order := names(w.Events())
		// Four small ones and 94 are before it, and eight may pass it by.
		if i := slices.Index(order, "100"); i < 5 || i > 13 {
			t.Errorf("the large step began as number %d of %v", i, order)
		}
	})
}

// TestShortBuildGetsItsTurn has builds with longer paths come for ever, more than there are slots for, so that a step of
// another build is never first by priority.
func TestShortBuildGetsItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = []time.Duration{2 * time.Second}
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 1, NewOp: w.NewOp})
		var wg sync.WaitGroup
		for i := range 40 {
			g := fan(10+8*i, 12+8*i, 14+8*i)
			wg.Go(func() { build(w, s, fmt.Sprint(i), buildSpec{graph: g, noCache: true, start: 2 * i}, new(Screen)) })
		}
		var o outcome
		wg.Go(func() { o = build(w, s, "short", buildSpec{graph: lone(400), noCache: true, start: 1}, new(Screen))[0] })
		wg.Wait()
		// One second until the first step has ended, eight others, and its own two seconds.
		if want := 19 * time.Second; o.err != nil || o.took != want {
			t.Errorf("the short build took %v (%v), want %v", o.took, o.err, want)
		}
	})
}

// TestDueInOrderOfArrival: what has been overtaken too often goes by arrival, not by priority: there could always be something
// of a higher one.
func TestDueInOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = []time.Duration{2 * time.Second}
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 1, NewOp: w.NewOp})
		long := fan(10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34)
		long.Steps = append(long.Steps, Step{Command: 96, Outputs: 1, Inputs: []Input{{Step: long.Root}}})
		long.Root++
		var wg sync.WaitGroup
		wg.Go(func() { build(w, s, "long", buildSpec{graph: long}, new(Screen)) })
		wg.Go(func() { build(w, s, "low", buildSpec{graph: lone(50), start: 1}, new(Screen)) })
		wg.Go(func() {
			time.Sleep(time.Second / 2)
			build(w, s, "higher", buildSpec{graph: fan(60), start: 1}, new(Screen))
		})
		wg.Wait()
		order := names(w.Events())
		if low, higher := slices.Index(order, "50"), slices.Index(order, "60"); low != 9 || higher != 10 {
			t.Errorf("the steps that are due began as numbers %d and %d of %v", low, higher, order)
		}
	})
}

// TestOwnBuildKeepsItsOrder: within one build nobody is overtaken, however many go first: the longest path does.
func TestOwnBuildKeepsItsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = []time.Duration{time.Second}
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 1, NewOp: w.NewOp})
		// Twelve steps that lead to the root over another one, and one that leads to it directly and comes first by its number.
		g := Graph{Steps: []Step{{Command: 50, Outputs: 1}}}
		middle, root := Step{Command: 60, Outputs: 1}, Step{Command: 62, Outputs: 1, Inputs: []Input{{Step: 0, Sees: 2}}}
		for i := range 12 {
			middle.Inputs = append(middle.Inputs, Input{Step: len(g.Steps), Sees: 2})
			g.Steps = append(g.Steps, Step{Command: 2 * i, Outputs: 1})
		}
		root.Inputs = append(root.Inputs, Input{Step: len(g.Steps), Sees: 2})
		g.Steps = append(g.Steps, middle, root)
		g.Root = len(g.Steps) - 1
		w.Durations = []time.Duration{time.Second}
		var wg sync.WaitGroup
		wg.Go(func() { build(w, s, "blocker", buildSpec{graph: lone(70)}, new(Screen)) })
		synctest.Wait() // it has the slot: all steps of the other build are in the queue when it is given back
		wg.Go(func() { build(w, s, "b", buildSpec{graph: g, noCache: true}, new(Screen)) })
		wg.Wait()
		order := names(w.Events())
		if i := slices.Index(order, "50"); i < 10 {
			t.Errorf("the step with the shortest path began as number %d of %v", i, order)
		}
	})
}

// TestMoreJobs: a build may ask for more jobs than there are processors, unless the engine has been given a bound; others get
// theirs meanwhile.
func TestMoreJobs(t *testing.T) {
	processors := runtime.GOMAXPROCS(0)
	for _, c := range []struct {
		name       string
		fixed, own int
		want       int
	}{
		{"default", 0, 0, processors},
		{"more", 0, processors + 3, processors + 3},
		{"fewer", 0, 1, 1},
		{"more than the bound", 2, 5, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWorld()
				w.Durations = []time.Duration{10 * time.Second}
				s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: c.fixed, NewOp: w.NewOp})
				var commands []int
				for i := range processors + 6 {
					commands = append(commands, 2*i)
				}
				build(w, s, "b", buildSpec{graph: fan(commands...), jobs: c.own}, new(Screen))
				if w.Most != c.want {
					t.Errorf("%d steps at once, want %d", w.Most, c.want)
				}
				w.Events()
				var wg sync.WaitGroup
				for i := range 2 {
					wg.Go(func() { build(w, s, fmt.Sprint(i), buildSpec{graph: fan(commands[i:]...), noCache: true}, new(Screen)) })
				}
				wg.Wait()
				if want := max(c.fixed, 0); w.Most != want && (want > 0 || w.Most != processors) {
					t.Errorf("%d steps at once when that build has ended", w.Most)
				}
			})
		})
	}
	t.Run("beside a wide build", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := NewWorld()
			w.Durations = []time.Duration{10 * time.Second}
			s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, NewOp: w.NewOp})
			var commands []int
			for i := range 40 * processors {
				commands = append(commands, 2*i)
			}
			var wg sync.WaitGroup
			wg.Go(func() { build(w, s, "wide", buildSpec{graph: fan(commands...), jobs: 2 * processors}, new(Screen)) })
			var o outcome
			wg.Go(func() {
				o = build(w, s, "narrow", buildSpec{graph: fan(900, 902, 904, 906, 908, 910, 912), start: 1}, new(Screen))[0]
			})
			wg.Wait()
			if o.err != nil || o.took > 120*time.Second {
				t.Errorf("the other build took %v (%v)", o.took, o.err)
			}
			active, most := 0, 0
			for _, e := range w.Events() {
				if e.Build == "narrow" {
					if active--; e.Start {
						active += 2
					}
					most = max(most, active)
				}
			}
			if most > processors {
				t.Errorf("%d steps at once of a build that did not ask for more than %d", most, processors)
			}
		})
	})
}
