// SPDX-License-Identifier: Apache-2.0

package solvertest

// Random graphs, built by several builds at once in fake time, with failures and cancellations, and compared with Model.
//
// Bugs that were planted by hand in the solver, one at a time; each made a test of this file fail:
//
//   - slots: work that nobody wants any more is started; one job too many; a slot is kept after a failure; nothing is started
//     before something ends; the shortest path goes first
//   - sharing: runs are not shared; a new run starts while the abandoned one is stopping; the first one to leave stops the
//     run; the last one does not stop it; the last one does not wait for its end; joiners do not see the earlier log
//   - failures: siblings are not canceled; a failed step is recorded; of several failures one is not reported
//   - keys: no look-up by content; recipe keys without the output index; a local context by recipe; the content of the wrong
//     output; the wrong output as input; what depends on a fresh step is looked up by recipe; fresh steps are looked up by
//     content; fresh steps run once a Result instead of once a build
//   - records: a content hit does not write the recipe; a run does not; layers that are gone are not noticed
//   - order: one input at a time; one source at a time; only the first input is waited for; inputs are asked for before the
//     recipe key is looked up; pins are not remembered
//   - admission: memory is not looked at; what is alone is not admitted when it is too large; memory is not given back; steps
//     without a record need nothing; the peak of a failed step is forgotten; the limit of a build is not looked at; (with the
//     tests of admission_test.go) nobody is ever due; memory is not kept for those who are; what is due goes by priority;
//     steps are overtaken by their own build's; a build cannot ask for more jobs than there are
//     processors, or can although the engine has a bound
//   - verifying: the walk ends at a hit by recipe; only those are verified, or none; sources are; the result is what has been made just now; it is
//     recorded; it is recorded under the recipe key only; the second output is not compared; what cannot be made again fails
//     the build; the inputs are those of the verification
//   - progress: nothing is announced first; steps below a hit are not shown as cached; canceled steps stay at work
//
// Not seen by any test: the result of another evaluation is not taken at once when a vertex is asked for (the look-ups that
// follow find the same).

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// scenarios is how many TestSimulation tries unless -rapid.checks says otherwise. Each has about eight builds.
const scenarios = "600"

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "rapid.checks" })
	if !given {
		if err := flag.Set("rapid.checks", scenarios); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	goleak.VerifyTestMain(m)
}

// scenario is everything that is random about one try.
type scenario struct {
	jobs      int
	durations []int   // seconds
	maxMemory int64   // 0: not looked at
	memory    []int64 // of commands
	rounds    []round
}

// round is some builds at once, in a world that has changed since the last one.
type round struct {
	pins           map[string]int
	locals         map[string]Content
	failing        map[int]bool
	failingSources map[string]bool
	builds         []buildSpec
	warm           bool // the build before was the same
	// verify has all builds verify; drifting picks the recorded work that makes something else meanwhile.
	verify   bool
	drifting []bool
}

type buildSpec struct {
	graph   Graph
	also    []int // more steps to evaluate in the same build
	inTurn  bool  // them one after the other, not all at once
	noCache bool
	verify  bool
	jobs    int // its own limit; 0 means none
	start   int // seconds after the round began
	cancel  int // half a second less than so many seconds after its start; 0 means never
}

var sourceNames = []string{"x", "y"}

func drawGraph(t *rapid.T) Graph {
	n := rapid.IntRange(1, 9).Draw(t, "steps")
	g := Graph{}
	for i := range n {
		s := Step{Outputs: 1}
		s.Kind = rapid.SampledFrom([]Kind{Run, Run, Run, Run, Run, Pin, Local}).Draw(t, "kind")
		if s.Kind != Run {
			s.Source = rapid.SampledFrom(sourceNames).Draw(t, "source")
			if slices.ContainsFunc(g.Steps, func(o Step) bool { return o.Kind == s.Kind && o.Source == s.Source }) {
				s = Step{Kind: Run, Outputs: 1} // the vertex would be the same one
			}
		}
		if s.Kind == Run {
			s.Command = rapid.IntRange(0, 7).Draw(t, "command")
			s.Outputs = rapid.IntRange(1, 2).Draw(t, "outputs")
			s.IgnoreCache = rapid.IntRange(0, 9).Draw(t, "ignore cache") == 9
			for range rapid.IntRange(0, min(3, i)).Draw(t, "inputs") {
				in := Input{Step: rapid.IntRange(0, i-1).Draw(t, "input")}
				in.Output = rapid.IntRange(0, g.Steps[in.Step].Outputs-1).Draw(t, "output")
				in.Sees = rapid.IntRange(0, 2).Draw(t, "sees")
				s.Inputs = append(s.Inputs, in)
			}
		}
		g.Steps = append(g.Steps, s)
	}
	g.Root = n - 1
	g.Output = rapid.IntRange(0, g.Steps[g.Root].Outputs-1).Draw(t, "root output")
	return g
}

// mutate returns g with some commands written otherwise, or other outputs read.
func mutate(t *rapid.T, g Graph) Graph {
	g.Steps = slices.Clone(g.Steps)
	for range rapid.IntRange(0, 2).Draw(t, "mutations") {
		i := rapid.IntRange(0, len(g.Steps)-1).Draw(t, "mutated")
		if g.Steps[i].Kind != Run {
			continue
		}
		if n := len(g.Steps[i].Inputs); n > 0 && rapid.IntRange(0, 3).Draw(t, "rewired") == 3 {
			g.Steps[i].Inputs = slices.Clone(g.Steps[i].Inputs)
			in := &g.Steps[i].Inputs[rapid.IntRange(0, n-1).Draw(t, "rewired input")]
			in.Output = rapid.IntRange(0, g.Steps[in.Step].Outputs-1).Draw(t, "rewired output")
			continue
		}
		g.Steps[i].Command ^= rapid.SampledFrom([]int{1, 1, 2}).Draw(t, "mutation")
	}
	return g
}

func drawScenario(t *rapid.T) scenario {
	sc := scenario{
		jobs:      rapid.IntRange(1, 4).Draw(t, "jobs"),
		durations: rapid.SliceOfN(rapid.IntRange(0, 5), 3, 8).Draw(t, "durations"),
		maxMemory: rapid.SampledFrom([]int64{0, 0, 8}).Draw(t, "max memory"),
	}
	if sc.maxMemory > 0 {
		sc.memory = rapid.SliceOfN(rapid.Int64Range(0, 9), 3, 8).Draw(t, "memory")
	}
	g := drawGraph(t)
	for range rapid.IntRange(1, 4).Draw(t, "rounds") {
		r := round{pins: map[string]int{}, locals: map[string]Content{}, failing: map[int]bool{}, failingSources: map[string]bool{}}
		for _, name := range sourceNames {
			r.pins[name] = rapid.IntRange(0, 2).Draw(t, "pin")
			r.locals[name] = Content{A: rapid.IntRange(0, 1).Draw(t, "local A"), B: rapid.IntRange(0, 1).Draw(t, "local B")}
			r.failingSources[name] = rapid.IntRange(0, 19).Draw(t, "source fails") == 19
		}
		for c := range 8 {
			r.failing[c] = rapid.IntRange(0, 11).Draw(t, "fails") == 11
		}
		if r.verify = rapid.IntRange(0, 4).Draw(t, "verify") == 4; r.verify {
			r.drifting = rapid.SliceOfN(rapid.Bool(), 1, 8).Draw(t, "drifting")
		}
		for range rapid.SampledFrom([]int{1, 1, 2, 3}).Draw(t, "builds") {
			b := buildSpec{graph: mutate(t, g), verify: r.verify}
			if b.verify { // what runs without its cache has to be steady
				for i := range b.graph.Steps {
					b.graph.Steps[i].IgnoreCache = false
				}
			} else {
				b.noCache = rapid.IntRange(0, 9).Draw(t, "no cache") == 9
			}
			b.jobs = rapid.SampledFrom([]int{0, 0, 0, 1, 2}).Draw(t, "own jobs")
			b.start = rapid.IntRange(0, 6).Draw(t, "start")
			if rapid.IntRange(0, 5).Draw(t, "canceled") == 5 {
				b.cancel = rapid.IntRange(1, 9).Draw(t, "cancel")
			}
			if rapid.IntRange(0, 5).Draw(t, "several results") == 5 {
				b.inTurn = rapid.Bool().Draw(t, "in turn")
				for range rapid.IntRange(1, 2).Draw(t, "more results") {
					b.also = append(b.also, rapid.IntRange(0, len(g.Steps)-1).Draw(t, "also"))
				}
			}
			r.builds = append(r.builds, b)
		}
		sc.rounds = append(sc.rounds, r)
	}
	return sc
}

func TestSimulation(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		sc := drawScenario(rt)
		// A panic in the bubble would end the process before anything is shrunk: return the error and fail outside.
		var err error
		synctest.Test(t, func(*testing.T) { err = sc.run() })
		if err != nil {
			rt.Fatal(err)
		}
	})
}

func (sc scenario) run() error {
	w := NewWorld()
	w.PinTime = time.Second
	w.Durations = nil
	for _, d := range sc.durations {
		w.Durations = append(w.Durations, time.Duration(d)*time.Second)
	}
	w.Memory = sc.memory
	s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: sc.jobs, MaxMemory: sc.maxMemory, Diff: w.Diff, NewOp: w.NewOp})
	known := map[string]int64{}
	for i, r := range sc.rounds {
		if err := sc.round(w, s, r, known); err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
	}

	// Whatever has failed and been canceled, a second try gets it done, and a third one has nothing to do.
	last := sc.rounds[len(sc.rounds)-1]
	last.failing, last.failingSources = map[int]bool{}, map[string]bool{}
	last.verify = false
	for _, b := range last.builds {
		retry := last
		retry.builds = []buildSpec{{graph: b.graph, noCache: b.noCache, jobs: b.jobs}}
		if err := sc.round(w, s, retry, known); err != nil {
			return fmt.Errorf("retry: %w", err)
		}
		retry.warm = true
		if err := sc.round(w, s, retry, known); err != nil {
			return fmt.Errorf("warm: %w", err)
		}
	}
	return nil
}

// outcome is what one call of Result has brought.
type outcome struct {
	graph   Graph
	content Content
	err     error
	took    time.Duration // since the start of the build
	at      time.Time
	active  int // what was still at work when it returned
}

// round runs the builds of r and checks all there is to check. known has how much memory steps have needed so far.
func (sc scenario) round(w *World, s *solver.Solver, r round, known map[string]int64) error {
	w.Pins, w.Locals, w.Failing, w.FailingSources = r.pins, r.locals, r.failing, r.failingSources
	recorded := w.Records.Recorded()
	records := w.Records.All()
	w.Drifting = r.drift(recorded)
	w.Events()
	w.Pinned()
	w.Records.Gets()

	screens := make([]*Screen, len(r.builds))
	outcomes := make([][]outcome, len(r.builds))
	var wg sync.WaitGroup
	for i, spec := range r.builds {
		screens[i] = new(Screen)
		wg.Go(func() { outcomes[i] = build(w, s, fmt.Sprint(i), spec, screens[i]) })
	}
	wg.Wait()
	synctest.Wait()
	if n := w.Active(); n != 0 {
		return fmt.Errorf("%d steps are still at work when everything has returned", n)
	}
	most, pins := w.Most, w.Pinned()
	events := w.Events()
	if most > sc.jobs {
		return fmt.Errorf("%d steps at once, %d allowed", most, sc.jobs)
	}
	if err := sc.checkAdmission(r, events, known); err != nil {
		return err
	}

	if err := checkKept(records, w.Records.All()); r.verify && err != nil {
		return err
	}
	for i, spec := range r.builds {
		for _, o := range outcomes[i] {
			if err := checkOutcome(w, spec, o, recorded); err != nil {
				return fmt.Errorf("build %d, result of step %d: %w", i, o.graph.Root, err)
			}
		}
		if err := checkScreen(w, spec, outcomes[i], screens[i], recorded, records); err != nil {
			return fmt.Errorf("build %d, progress: %w", i, err)
		}
	}
	if r.verify {
		return nil // checkScreen has seen what every build says of each step
	}
	if err := checkRuns(w, r, events, pins, recorded); err != nil {
		return err
	}
	if len(r.builds) == 1 && len(r.builds[0].also) == 0 {
		return sc.checkAlone(w, r, r.builds[0], outcomes[0][0], events, recorded)
	}
	return nil
}

// build runs one build.
func build(w *World, s *solver.Solver, id string, spec buildSpec, screen *Screen) []outcome {
	time.Sleep(time.Duration(spec.start) * time.Second)
	begin := time.Now()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if spec.cancel > 0 {
		// Never at the same time as anything else happens: what comes first then is not a question of right and wrong.
		timer := time.AfterFunc(time.Duration(spec.cancel)*time.Second-time.Second/2, func() { cancel(errCanceled) })
		defer timer.Stop()
	}
	b := s.NewBuild(solver.BuildOptions{ID: id, Writer: screen, NoCache: spec.noCache, Verify: spec.verify, Jobs: spec.jobs})
	defer b.Close()

	wanted := []Graph{spec.graph}
	for _, step := range spec.also {
		g := spec.graph
		g.Root, g.Output = step, 0
		wanted = append(wanted, g)
	}
	outcomes := make([]outcome, len(wanted))
	var wg sync.WaitGroup
	for i, g := range wanted {
		def, _ := g.Definition()
		edge, err := b.Load(def)
		if err != nil {
			outcomes[i] = outcome{graph: g, err: fmt.Errorf("load: %w", err)}
			continue
		}
		wg.Go(func() {
			snap, err := b.Result(ctx, edge)
			o := outcome{graph: g, err: err, took: time.Since(begin), at: time.Now(), active: w.Active()}
			if err == nil {
				var ok bool
				if o.content, ok = w.Content(snap); !ok {
					o.err = fmt.Errorf("%v is not a snapshot of this world", snap)
				}
			}
			outcomes[i] = o
		})
		if spec.inTurn {
			wg.Wait()
		}
	}
	wg.Wait()
	screen.Reports = b.Reports()
	return outcomes
}

var errCanceled = errors.New("the user has pressed Ctrl-C")

// failures lists the steps of g that cannot succeed.
func failures(w *World, g Graph, m *Model, recorded map[Key]bool) []int {
	var bad []int
	for _, i := range m.Needed {
		if s := g.Steps[i]; s.Kind != Run && w.FailingSources[s.Source] {
			bad = append(bad, i)
		}
	}
	for _, i := range m.MustRun(g, recorded) {
		if s := g.Steps[i]; s.Kind == Run && w.Failing[s.Command] {
			bad = append(bad, i)
		}
	}
	return bad
}

// checkOutcome compares a result with the model.
func checkOutcome(w *World, spec buildSpec, o outcome, recorded map[Key]bool) error {
	m := w.Model(o.graph, spec.noCache)
	bad := failures(w, o.graph, m, recorded)
	if spec.cancel > 0 {
		at := time.Duration(spec.cancel)*time.Second - time.Second/2
		if errors.Is(o.err, errCanceled) {
			if o.took != at {
				return fmt.Errorf("canceled after %v, returned after %v", at, o.took)
			}
			return nil
		}
		if o.took > at {
			return fmt.Errorf("canceled after %v, returned after %v with %v", at, o.took, o.err)
		}
	}
	if len(bad) == 0 {
		if o.err != nil {
			return fmt.Errorf("unexpected error: %w", o.err)
		}
		if o.content != m.Result {
			return fmt.Errorf("result %v, the model has %v", o.content, m.Result)
		}
		return nil
	}
	if o.err == nil {
		return fmt.Errorf("no error, although steps %v cannot succeed", bad)
	}
	return checkErrors(o.err, bad)
}

// checkErrors checks that err names some of the steps that fail, each once.
func checkErrors(err error, bad []int) error {
	errs := []error{err}
	if m, ok := err.(interface{ Unwrap() []error }); ok {
		errs = m.Unwrap()
	}
	var seen []string
	for _, e := range errs {
		var v *solver.VertexError
		if !errors.As(e, &v) || !errors.Is(e, ErrStep) {
			return fmt.Errorf("error %v is not of a vertex", e)
		}
		if slices.Contains(seen, v.Vertex.Name) {
			return fmt.Errorf("%s is reported twice", v.Vertex.Name)
		}
		seen = append(seen, v.Vertex.Name)
		if !slices.ContainsFunc(bad, func(i int) bool { return v.Vertex.Name == fmt.Sprintf("step %d", i) }) {
			return fmt.Errorf("%s is reported, but %v fail", v.Vertex.Name, bad)
		}
		if s := string(v.Log); s != "" && !strings.HasPrefix(s, "begin ") {
			return fmt.Errorf("the error of %s has the log %q", v.Vertex.Name, s)
		}
	}
	return nil
}

// checkRuns checks what was run in a round, whoever ran it.
func checkRuns(w *World, r round, events []Event, pins map[string]int, recorded map[Key]bool) error {
	fresh, needed := map[Key]int{}, map[Key]bool{}
	calm := true
	for _, spec := range r.builds {
		steps := map[int]bool{}
		for _, root := range append([]int{spec.graph.Root}, spec.also...) {
			g := spec.graph
			g.Root, g.Output = root, 0
			m := w.Model(g, spec.noCache)
			for _, i := range m.Needed {
				if steps[i] || g.Steps[i].Kind == Local {
					continue
				}
				steps[i] = true
				if m.Fresh[i] {
					fresh[m.Keys[i]]++
				} else {
					needed[m.Keys[i]] = true
				}
			}
			calm = calm && spec.cancel == 0 && len(failures(w, g, m, recorded)) == 0
		}
	}
	active, succeeded := map[Key]int{}, map[Key]int{}
	for _, e := range events {
		if e.Kind == Local {
			continue
		}
		if e.Start {
			active[e.Key]++
			if active[e.Key] > 1+fresh[e.Key] {
				return fmt.Errorf("%q runs %d times at once", e.Key, active[e.Key])
			}
			if fresh[e.Key] == 0 && recorded[e.Key] {
				return fmt.Errorf("%q runs although it is recorded", e.Key)
			}
			if fresh[e.Key] == 0 && !needed[e.Key] {
				return fmt.Errorf("%q runs and nobody needs it", e.Key)
			}
			continue
		}
		active[e.Key]--
		if e.Err == nil {
			succeeded[e.Key]++
		}
	}
	if !calm {
		return nil
	}
	for source, n := range pins {
		if n > 1 {
			return fmt.Errorf("%s was pinned %d times in one build", source, n)
		}
	}
	for key := range needed {
		least, most := 0, fresh[key]
		if !recorded[key] {
			least, most = 1, most+1
		}
		if fresh[key] > 0 {
			least = 1
		}
		if n := succeeded[key]; n < least || n > most {
			return fmt.Errorf("%q has run %d times, want %d to %d", key, n, least, most)
		}
	}
	for key, most := range fresh {
		if n := succeeded[key]; n < 1 || !needed[key] && n > most {
			return fmt.Errorf("%q ignores its cache and has run %d times, want 1 to %d", key, n, most)
		}
	}
	return nil
}

// checkAlone checks what is only certain when a build has the solver for itself.
func (sc scenario) checkAlone(w *World, r round, spec buildSpec, o outcome, events []Event, recorded map[Key]bool) error {
	if o.active != 0 {
		return fmt.Errorf("%d steps are still at work when Result returns", o.active)
	}
	m := w.Model(o.graph, spec.noCache)
	run := m.MustRun(o.graph, recorded)

	var failedAt time.Time
	for _, e := range events {
		switch {
		case errors.Is(e.Err, ErrStep) && failedAt.IsZero():
			failedAt = e.At
		case e.Start && !failedAt.IsZero() && (e.At.After(failedAt) || sc.jobs == 1 && e.Kind == Run):
			return fmt.Errorf("%q starts after a failure", e.Key)
		}
	}
	if !failedAt.IsZero() && !errors.Is(o.err, errCanceled) && !o.at.Equal(failedAt) {
		return fmt.Errorf("returned %v after the failure", o.at.Sub(failedAt))
	}
	if o.err != nil {
		return nil
	}

	// Graham's bound: no scheduler that keeps its slots busy needs longer, and none can be faster than the longest path.
	parallel, serial := w.Bounds(o.graph, m, run)
	var pins time.Duration
	for _, i := range m.Needed {
		switch o.graph.Steps[i].Kind {
		case Pin:
			pins = max(pins, w.PinTime)
		case Local:
			pins = max(pins, 2*w.PinTime)
		}
	}
	jobs := sc.jobs
	if spec.jobs > 0 {
		jobs = min(jobs, spec.jobs)
	}
	if !slices.ContainsFunc(run, func(i int) bool { return m.Fresh[i] }) {
		most := pins + parallel + serial/time.Duration(jobs)
		if sc.maxMemory > 0 {
			most = pins + serial // as long as anything waits, something works
		}
		if o.took > most {
			return fmt.Errorf("took %v, more than %v", o.took, most)
		}
		// A step that does the same as one below it is found when its turn comes: then the path is shorter than it looks.
		if distinct := distinctKeys(o.graph, m); sc.maxMemory == 0 && jobs >= len(run) && (o.took > pins+parallel || distinct && o.took < pins+parallel) {
			return fmt.Errorf("took %v, the longest path is %v", o.took, pins+parallel)
		}
	}

	// A build that finds its root looks at nothing else.
	if gets := w.Records.Gets(); r.warm && !slices.Contains(m.Fresh, true) && gets > 1 {
		return fmt.Errorf("a warm build has asked for %d records", gets)
	}
	return nil
}

// distinctKeys reports whether no two commands that are needed have the same key.
func distinctKeys(g Graph, m *Model) bool {
	seen := map[Key]bool{}
	for _, i := range m.Needed {
		if g.Steps[i].Kind != Run {
			continue
		}
		if seen[m.Keys[i]] {
			return false
		}
		seen[m.Keys[i]] = true
	}
	return true
}

// checkScreen checks what one build has shown.
func checkScreen(w *World, spec buildSpec, outcomes []outcome, screen *Screen, recorded map[Key]bool, records map[string]*record.Record) error {
	_, digests := spec.graph.Definition()
	m := w.Model(spec.graph, spec.noCache)
	if len(spec.also) == 0 {
		if err := screen.Check(postOrder(spec.graph, digests)); err != nil {
			return err
		}
	}
	for _, o := range outcomes {
		if o.err != nil {
			return nil
		}
	}
	reports := map[digest.Digest]solver.Report{}
	for _, r := range screen.Reports {
		reports[r.Vertex.Digest] = r
	}
	for _, i := range m.Needed {
		name := fmt.Sprintf("step %d", i)
		v := screen.Last(digests[i])
		verified := spec.verify && spec.graph.Steps[i].Kind == Run && recorded[m.Keys[i]]
		if verified {
			if err := checkVerified(w, spec.graph.Steps[i], m.Keys[i], reports[v.Digest], records); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if v.Cached {
				return fmt.Errorf("%s is shown as cached", name)
			}
		} else if r := reports[v.Digest]; r.Verification != nil {
			// Another build, or another step of this one, has recorded it meanwhile.
			if !spec.verify || spec.graph.Steps[i].Kind != Run || v.Cached || r.Outcome != solver.Found || !r.Verification.Same() {
				return fmt.Errorf("%s has nothing to verify, is reported as %+v and shown as %+v", name, r, v)
			}
		} else if v.Cached != (r.Outcome == solver.Found || r.Outcome == solver.Skipped) || !v.Cached && r.Outcome != solver.Ran {
			return fmt.Errorf("%s is reported as %q and shown as %+v", name, r.Outcome, v)
		} else if len(r.RecipeParts) == 0 || r.Fresh != (m.Fresh[i] && spec.graph.Steps[i].Kind == Run) && r.Fresh {
			return fmt.Errorf("%s is reported as %+v", name, r)
		} else if r.Outcome == solver.Ran && spec.graph.Steps[i].Kind == Run && (r.Content == "" || r.Record == nil || r.Record.Log != r.Log) {
			return fmt.Errorf("%s ran and is reported as %+v", name, r)
		}
		if v.Completed == nil || v.Error != "" {
			return fmt.Errorf("%s ends as %+v", name, v)
		}
		want := fmt.Sprintf("begin %s\nend %[1]s\n", m.Keys[i])
		if verified && w.Failing[spec.graph.Steps[i].Command] {
			want, _, _ = strings.Cut(want, "end")
		}
		if v.Cached {
			want = ""
			if m.Fresh[i] || spec.graph.Steps[i].Kind == Local {
				return fmt.Errorf("%s is shown as cached", name)
			}
		}
		if got := screen.Log(digests[i]); got != want {
			return fmt.Errorf("log of %s (cached: %v) is %q, want %q", name, v.Cached, got, want)
		}
	}
	return nil
}

// postOrder lists the vertices of g as a definition is read: inputs first.
func postOrder(g Graph, digests []digest.Digest) []digest.Digest {
	var order []digest.Digest
	var visit func(i int)
	visit = func(i int) {
		if slices.Contains(order, digests[i]) {
			return
		}
		for _, in := range g.Steps[i].Inputs {
			visit(in.Step)
		}
		order = append(order, digests[i])
	}
	visit(g.Root)
	return order
}

// TestLayersGone deletes layers between builds, as a garbage collection does that knows nothing of records: a record
// whose layers are gone is a miss and nothing else.
func TestLayersGone(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		g := drawGraph(rt)
		next := mutate(rt, g)
		jobs := rapid.IntRange(1, 3).Draw(rt, "jobs")
		gone := rapid.SliceOfN(rapid.Bool(), 16, 16).Draw(rt, "gone")
		var err error
		synctest.Test(t, func(*testing.T) { err = layersGone(g, next, jobs, gone) })
		if err != nil {
			rt.Fatal(err)
		}
	})
}

func layersGone(g, next Graph, jobs int, gone []bool) error {
	w := NewWorld()
	s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: jobs, NewOp: w.NewOp})
	try := func(g Graph) (int, error) {
		w.Events()
		o := build(w, s, "b", buildSpec{graph: g}, new(Screen))[0]
		if want := w.Model(g, false).Result; o.err != nil || o.content != want {
			return 0, fmt.Errorf("result %v (%v), the model has %v", o.content, o.err, want)
		}
		ran, seen := 0, map[Key]bool{}
		for _, e := range w.Events() {
			if e.Start && e.Kind != Local {
				ran++
				if seen[e.Key] && !slices.ContainsFunc(g.Steps, func(s Step) bool { return s.IgnoreCache }) {
					return 0, fmt.Errorf("%q runs twice", e.Key)
				}
				seen[e.Key] = true
			}
		}
		return ran, nil
	}
	if _, err := try(g); err != nil {
		return fmt.Errorf("first build: %w", err)
	}
	w.Layers.Remove(func(i int) bool { return gone[i%len(gone)] })
	if _, err := try(next); err != nil {
		return fmt.Errorf("build after layers have gone: %w", err)
	}
	n, err := try(next)
	if err != nil {
		return fmt.Errorf("warm build: %w", err)
	}
	if n > 0 && !slices.ContainsFunc(next.Steps, func(s Step) bool { return s.IgnoreCache }) {
		return fmt.Errorf("a warm build has run %d steps", n)
	}
	return nil
}

// TestStoppingRun has one build ask for work that another one has just let go of and that takes its time to stop: the
// new run has to wait for the end of the old one.
func TestStoppingRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations, w.StopTime = []time.Duration{10 * time.Second}, 3*time.Second
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 4, NewOp: w.NewOp})
		g := Graph{Steps: []Step{{Outputs: 1}}}
		var first, second outcome
		var wg sync.WaitGroup
		wg.Go(func() { first = build(w, s, "first", buildSpec{graph: g, cancel: 3}, new(Screen))[0] })
		wg.Go(func() { second = build(w, s, "second", buildSpec{graph: g, start: 4}, new(Screen))[0] })
		wg.Wait()
		if !errors.Is(first.err, errCanceled) || first.took != 5500*time.Millisecond {
			t.Errorf("the canceled build returned %v after %v, want %v after 5.5s", first.err, first.took, errCanceled)
		}
		if second.err != nil || second.took != 11500*time.Millisecond {
			t.Errorf("the other build returned %v after %v, want 1.5s for the old run to stop and 10s for its own", second.err, second.took)
		}
		active := 0
		for _, e := range w.Events() {
			if active--; e.Start {
				active += 2
			}
			if active > 1 {
				t.Errorf("two runs for one key at once")
			}
		}
	})
}

// TestLongestPathFirst has two steps wait for one slot: the one on the longer path goes first, once an earlier build
// has shown how long things take.
func TestLongestPathFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld()
		w.Durations = []time.Duration{5 * time.Second, 0, time.Second, 0, 2 * time.Second, 0, 9 * time.Second}
		s := solver.New(solver.Options{Layers: w.Layers, Records: w.Records, Jobs: 1, NewOp: w.NewOp})
		blocker := Graph{Steps: []Step{{Command: 0, Outputs: 1}}}
		// 1 and 2 take equally long; above 2 there are nine seconds more.
		g := Graph{Root: 4, Steps: []Step{
			{Kind: Pin, Source: "x", Outputs: 1},
			{Command: 4, Outputs: 1, Inputs: []Input{{Step: 0, Sees: 0}}},
			{Command: 4, Outputs: 1, Inputs: []Input{{Step: 0, Sees: 1}}},
			{Command: 6, Outputs: 1, Inputs: []Input{{Step: 2}}},
			{Command: 2, Outputs: 1, Inputs: []Input{{Step: 1}, {Step: 3}}},
		}}
		order := func() string {
			var wg sync.WaitGroup
			wg.Go(func() { build(w, s, "blocker", buildSpec{graph: blocker, noCache: true}, new(Screen)) })
			wg.Go(func() { build(w, s, "b", buildSpec{graph: g, noCache: true, start: 1}, new(Screen)) })
			wg.Wait()
			var names []string
			for _, e := range w.Events() {
				if e.Start && e.Kind == Run {
					name, _, _ := strings.Cut(string(e.Key), " makes")
					names = append(names, name)
				}
			}
			return strings.Join(names, ", ")
		}
		order() // leaves the durations behind
		want := "command=0 sees=, command=4 sees=1, command=4 sees=0, command=6 sees=0, command=2 sees=0,0"
		if got := order(); got != want {
			t.Errorf("order is %s\n    want     %s", got, want)
		}
	})
}
