// SPDX-License-Identifier: Apache-2.0

package solvertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// World is what the fake ops work on. Set its exported fields while nothing runs.
type World struct {
	Pins   map[string]int     // what Pin sources stand for
	Locals map[string]Content // what Local sources hold
	// Durations has how long commands take; command c takes Durations[c % len].
	Durations []time.Duration
	// Memory has how many bytes commands need; command c needs Memory[c % len]. What needs none is no solver.MemoryUser.
	Memory []int64
	// PinTime is how long pinning and reading a local context take.
	PinTime time.Duration
	// StopTime is how long a step works on after it was told to stop.
	StopTime time.Duration
	// Failing commands and sources fail after their time.
	Failing        map[int]bool
	FailingSources map[string]bool
	// Drifting has the work that makes something else now than it has made before.
	Drifting map[Key]bool

	Layers  *Layers
	Records *Records

	mu     sync.Mutex
	active map[Key]int
	events []Event
	pinned map[string]int
	steps  int // at work now, without sources
	Most   int // of them at once since the last Reset
}

// Event is the beginning or the end of work.
type Event struct {
	Key  Key
	Kind Kind
	Own  string // what the step does, whatever its inputs
	// Memory is how much it needs, in bytes.
	Memory int64
	Build  string // that began it
	At     time.Time
	Start  bool
	Err    error // of an end
}

// ErrStep is why failing commands and sources fail.
var ErrStep = errors.New("this step fails")

// NewWorld returns a World with empty stores.
func NewWorld() *World {
	return &World{
		Pins: map[string]int{}, Locals: map[string]Content{}, Durations: []time.Duration{time.Second},
		Failing: map[int]bool{}, FailingSources: map[string]bool{},
		Layers: &Layers{contents: map[layer.ID]Content{}}, Records: NewRecords(), active: map[Key]int{}, pinned: map[string]int{},
	}
}

// Events returns what has happened since the last call.
func (w *World) Events() []Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.events
	w.events, w.Most = nil, w.steps
	return e
}

// Pinned returns how often each source was pinned for each build since the last call.
func (w *World) Pinned() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.pinned
	w.pinned = map[string]int{}
	return p
}

// Active returns how much is at work.
func (w *World) Active() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, a := range w.active {
		n += a
	}
	return n
}

// Content returns what a snapshot of this world holds.
func (w *World) Content(s snapshot.Snapshot) (Content, bool) {
	if len(s) != 1 {
		return Content{}, false
	}
	return w.Layers.content(s[0])
}

// Diff is for solver.Options: A and B are two files.
func (w *World) Diff(_ context.Context, recorded, now snapshot.Snapshot) ([]index.Change, error) {
	before, ok := w.Content(recorded)
	after, ok2 := w.Content(now)
	if !ok || !ok2 {
		return nil, fmt.Errorf("%v or %v is not a snapshot of this world", recorded, now)
	}
	var out []index.Change
	if before.A != after.A {
		out = append(out, index.Change{Path: "A"})
	}
	if before.B != after.B {
		out = append(out, index.Change{Path: "B"})
	}
	return out, nil
}

func (w *World) duration(s Step) time.Duration {
	if s.Kind != Run {
		return w.PinTime
	}
	return w.Durations[s.Command%len(w.Durations)]
}

func (w *World) memory(s Step) int64 {
	if s.Kind != Run || len(w.Memory) == 0 {
		return 0
	}
	return w.Memory[s.Command%len(w.Memory)]
}

func pinned(v int) Content { return Content{A: v % 4, B: v / 4 % 3} }

func pinPart(v int) record.Part { return record.Part{Name: "pin", Value: strconv.Itoa(v)} }

// NewOp is for solver.Options.
func (w *World) NewOp(v *solver.Vertex) (solver.Op, error) {
	s := stepOf(v.Op)
	o := &op{world: w, step: s}
	if s.Kind != Run {
		return &source{op: o}, nil
	}
	if w.memory(s) > 0 {
		return process{o}, nil
	}
	return o, nil
}

// process is an op that needs memory.
type process struct{ *op }

func (process) MemoryLimit() int64 { return 0 }

type op struct {
	world *World
	step  Step
	pin   []record.Part
}

func (o *op) Parts() []record.Part { return o.step.parts() }

func (o *op) InputDigest(_ context.Context, _ *solver.Env, i int, in snapshot.Snapshot) (digest.Digest, error) {
	c, ok := o.world.Content(in)
	if !ok {
		return "", fmt.Errorf("input %d is not a snapshot of this world: %v", i, in)
	}
	return o.step.Inputs[i].seen(c), nil
}

func (o *op) Run(ctx context.Context, env *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	var sees []int
	var contents []Content
	var digests []digest.Digest
	for i, in := range inputs {
		c, ok := o.world.Content(in)
		if !ok {
			return nil, fmt.Errorf("input %d is not a snapshot of this world: %v", i, in)
		}
		sees = append(sees, o.step.Inputs[i].Sees)
		contents = append(contents, c)
		digests = append(digests, o.step.Inputs[i].seen(c))
	}
	key := keyOf(append(o.step.parts(), o.pin...), digests)
	env.Progress.Log(1, []byte("begin "+string(key)+"\n"))
	if err := o.world.work(ctx, env, o.step, key); err != nil {
		return nil, err
	}
	env.Progress.Log(2, []byte("end "+string(key)+"\n"))
	var result []Content
	switch o.step.Kind {
	case Local:
		result = []Content{o.world.Locals[o.step.Source]}
	case Pin:
		result = []Content{pinned(o.world.Pins[o.step.Source])}
	default:
		result = produce(o.step.Command, o.step.Outputs, sees, contents)
		if o.world.Drifting[key] {
			last := &result[len(result)-1]
			last.B = (last.B + 1) % 3
		}
	}
	outputs := make([]snapshot.Snapshot, len(result))
	for i, c := range result {
		outputs[i] = snapshot.Snapshot{o.world.Layers.add(c)}
	}
	return outputs, nil
}

// work takes its time and fails when it has to.
func (w *World) work(ctx context.Context, env *solver.Env, s Step, key Key) error {
	e := Event{Key: key, Kind: s.Kind, Own: fmt.Sprint(s.parts()), Memory: w.memory(s), Build: env.BuildID, Start: true}
	w.event(e)
	var err error
	select {
	case <-time.After(w.duration(s)):
		if s.Kind == Run && w.Failing[s.Command] {
			err = ErrStep
		}
	case <-ctx.Done():
		time.Sleep(w.StopTime)
		err = context.Cause(ctx)
	}
	env.ReportPeakMemory(e.Memory)
	e.Start, e.Err = false, err
	w.event(e)
	return err
}

func (w *World) event(e Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e.At = time.Now()
	w.events = append(w.events, e)
	d := -1
	if e.Start {
		d = 1
	}
	w.active[e.Key] += d
	if e.Kind == Run {
		w.steps += d
		w.Most = max(w.Most, w.steps)
	}
}

type source struct{ *op }

func (s *source) Pin(ctx context.Context, env *solver.Env) (solver.Pin, error) {
	s.world.mu.Lock()
	s.world.pinned[fmt.Sprintf("%s of build %s (%d)", s.step.Source, env.BuildID, s.step.Kind)]++
	s.world.mu.Unlock()
	env.Progress.Status("resolve "+s.step.Source, 0, 0, false)
	select {
	case <-time.After(s.world.PinTime):
	case <-ctx.Done():
		return solver.Pin{}, context.Cause(ctx)
	}
	if s.world.FailingSources[s.step.Source] {
		return solver.Pin{}, ErrStep
	}
	env.Progress.Status("resolve "+s.step.Source, 0, 0, true)
	if s.step.Kind == Local {
		return solver.Pin{ByContent: true}, nil
	}
	return solver.Pin{Parts: []record.Part{pinPart(s.world.Pins[s.step.Source])}}, nil
}

func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	o := *s.op
	if s.step.Kind == Pin {
		o.pin = []record.Part{pinPart(s.world.Pins[s.step.Source])}
	}
	return o.Run(ctx, env, nil)
}

// Layers is a layer store in memory. It implements solver.Layers.
type Layers struct {
	mu       sync.Mutex
	made     int
	contents map[layer.ID]Content
}

func (l *Layers) add(c Content) layer.ID {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made++
	id := layer.ID("layer" + strconv.Itoa(l.made))
	l.contents[id] = c
	return id
}

func (l *Layers) content(id layer.ID) (Content, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.contents[id]
	return c, ok
}

// Stat implements solver.Layers.
func (l *Layers) Stat(_ context.Context, id layer.ID) (layer.Info, error) {
	if _, ok := l.content(id); !ok {
		return layer.Info{}, fmt.Errorf("layer %s: not found", id)
	}
	return layer.Info{ID: id}, nil
}

// Ensure implements solver.Layers.
func (l *Layers) Ensure(ctx context.Context, ids ...layer.ID) error {
	for _, id := range ids {
		if _, err := l.Stat(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// Materialise implements solver.Layers: everything is here.
func (l *Layers) Materialise(ctx context.Context, ids ...layer.ID) error {
	return l.Ensure(ctx, ids...)
}

// Remove deletes every layer that gone says.
func (l *Layers) Remove(gone func(i int) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 1; i <= l.made; i++ {
		if gone(i) {
			delete(l.contents, layer.ID("layer"+strconv.Itoa(i)))
		}
	}
}

// Records is an action cache in memory. It implements solver.Records.
type Records struct {
	mu      sync.Mutex
	records map[string]*record.Record
	values  map[string][]byte
	gets    int
}

// NewRecords returns an empty one.
func NewRecords() *Records {
	return &Records{records: map[string]*record.Record{}, values: map[string][]byte{}}
}

// Get implements solver.Records.
func (r *Records) Get(ctx context.Context, key string) (*record.Record, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gets++
	rec, ok := r.records[key]
	return rec, ok, ctx.Err()
}

// PutBatch implements solver.Records.
func (r *Records) PutBatch(ctx context.Context, items []record.Item) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, it := range items {
		for _, key := range it.Keys {
			r.records[key] = it.Record
		}
	}
	return ctx.Err()
}

// Touch implements solver.Records.
func (r *Records) Touch(...string) error { return nil }

// GetValue implements solver.Records.
func (r *Records) GetValue(bucket, key string) ([]byte, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.values[bucket+"\x00"+key]
	return v, ok, nil
}

// PutValue implements solver.Records.
func (r *Records) PutValue(bucket, key string, value []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.values[bucket+"\x00"+key] = value
	return nil
}

// Gets returns how many records were asked for since the last call.
func (r *Records) Gets() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.gets
	r.gets = 0
	return n
}

// All returns the records by key.
func (r *Records) All() map[string]*record.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.records)
}

// Recorded returns the keys of the content records.
func (r *Records) Recorded() map[Key]bool {
	keys := make(map[Key]bool)
	for _, rec := range r.All() {
		if rec.Kind == record.KindContent {
			keys[keyOfRecord(rec)] = true
		}
	}
	return keys
}

// Screen is a solver.Writer that keeps everything.
type Screen struct {
	mu     sync.Mutex
	Status client.SolveStatus
	// Reports are what the build has told at its end.
	Reports []solver.Report
}

// Write implements solver.Writer.
func (s *Screen) Write(st *client.SolveStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Status.Vertexes = append(s.Status.Vertexes, st.Vertexes...)
	s.Status.Statuses = append(s.Status.Statuses, st.Statuses...)
	s.Status.Logs = append(s.Status.Logs, st.Logs...)
	s.Status.Warnings = append(s.Status.Warnings, st.Warnings...)
}

// Check returns what is wrong with what was shown of one build that is over: every vertex is announced before any starts,
// in the order of the definition; starts and ends alternate; everything that was started has ended.
func (s *Screen) Check(want []digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var announced []digest.Digest
	last := make(map[digest.Digest]*client.Vertex)
	started := false
	for _, v := range s.Status.Vertexes {
		old := last[v.Digest]
		last[v.Digest] = v
		switch {
		case old == nil:
			if started || v.Started != nil {
				return fmt.Errorf("%s is announced after something has started", v.Name)
			}
			announced = append(announced, v.Digest)
		case v.Completed == nil: // started
			started = true
			if old.Started != nil && old.Completed == nil {
				return fmt.Errorf("%s is started twice", v.Name)
			}
		default:
			started = true
			if old.Completed != nil {
				return fmt.Errorf("%s is completed twice", v.Name)
			}
		}
	}
	if fmt.Sprint(announced) != fmt.Sprint(want) {
		return fmt.Errorf("announced %v, want %v", announced, want)
	}
	for _, v := range last {
		if v.Started != nil && v.Completed == nil {
			return fmt.Errorf("%s is still shown at work", v.Name)
		}
	}
	return nil
}

// Last returns what was shown last of a vertex.
func (s *Screen) Last(d digest.Digest) *client.Vertex {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last *client.Vertex
	for _, v := range s.Status.Vertexes {
		if v.Digest == d {
			last = v
		}
	}
	return last
}

// Log returns everything a vertex wrote.
func (s *Screen) Log(d digest.Digest) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b []byte
	for _, l := range s.Status.Logs {
		if l.Vertex == d {
			b = append(b, l.Data...)
		}
	}
	return string(b)
}
