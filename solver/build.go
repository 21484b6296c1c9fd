// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Options are what a Solver works with.
type Options struct {
	Layers  Layers
	Records Records
	// Blobs keeps the logs of steps; nil keeps none.
	Blobs Logs
	// Inputs keeps what steps saw of their inputs when they ran; nil keeps nothing.
	Inputs Inputs
	// Lease keeps what is used from its call on until the function it returns is called; nil when nothing is ever deleted.
	// Whoever calls the Solver holds a lease for each build; this one is for work that outlives the build that began it.
	Lease func(id string) (release func())
	// Jobs is how many steps run at once, all builds together; 0 means as many as there are processors, and more while a
	// build goes on that asks for more. Sources are not counted: they wait for others most of the time.
	Jobs int
	// MaxMemory is how much memory, in bytes, the steps that run at once may need together, as far as earlier runs tell. A
	// step that needs more runs when no other that needs memory does. 0 means that memory is not looked at.
	MaxMemory int64
	// Diff compares what the cache has with what a step makes now, for builds that verify; nil is for a Solver of which none
	// do.
	Diff func(ctx context.Context, recorded, now snapshot.Snapshot) ([]index.Change, error)
	// NewOp makes the op of a vertex. It says which ops are supported.
	NewOp func(*Vertex) (Op, error)
}

// Solver runs the builds of one engine, so that they share what they have in common. Its methods may be called
// concurrently.
type Solver struct {
	layers  Layers
	records Records
	logs    Logs
	inputs  Inputs
	lease   func(id string) (release func())
	newOp   func(*Vertex) (Op, error)
	diff    func(ctx context.Context, recorded, now snapshot.Snapshot) ([]index.Change, error)
	// jobs is the bound, or what a build gets that says nothing when fixedJobs is not set.
	jobs      int
	fixedJobs bool
	maxMemory int64

	// mu guards what follows, and the fields of builds, walks, nodes and runs that say so. It is held only for
	// moments: never while something is read, written, run or sent.
	mu      sync.Mutex
	builds  int // so far
	runs    map[string]*run
	wide    []*Build // open ones that asked for more than jobs
	queue   []*run   // wait for their turn
	running int      // runs that have a slot
	memory  int64    // what they need together, in bytes
}

// New returns a Solver. It has nothing to close; its builds have.
func New(o Options) *Solver {
	fixed := o.Jobs > 0
	if !fixed {
		o.Jobs = runtime.GOMAXPROCS(0)
	}
	if o.Lease == nil {
		o.Lease = func(string) func() { return func() {} }
	}
	return &Solver{
		layers: o.Layers, records: o.Records, logs: o.Blobs, inputs: o.Inputs, lease: o.Lease, newOp: o.NewOp, diff: o.Diff,
		jobs: o.Jobs, fixedJobs: fixed, maxMemory: max(0, o.MaxMemory), runs: make(map[string]*run),
	}
}

// BuildOptions describe one build.
type BuildOptions struct {
	// ID names the build in records.
	ID      string
	Session Session
	// Writer takes the build's progress; nil shows it to nobody. It is called from one goroutine.
	Writer Writer
	// NoCache runs every vertex but sources, as if all of them said ignore-cache: what a pin names does not change.
	NoCache bool
	// NoCacheFilter does the same for the vertices of the Dockerfile stages it names.
	NoCacheFilter []string
	// Verify does the work of every hit as well, sources apart, and compares: see Report.Verification. It needs Options.Diff.
	Verify bool
	// Pull is handed to ops.
	Pull bool
	// Imports is asked for what the cache does not have; may be nil.
	Imports Imports
	// Mounts is handed to ops; may be nil.
	Mounts MountSource
	// Jobs limits the steps of this build that run at once, within Options.Jobs if that is set; 0 means no limit of its own.
	Jobs int
}

// Build is one build: it pins every source once, runs what ignores its cache once and remembers results until it is
// closed. Its methods may be called concurrently.
type Build struct {
	solver        *Solver
	id            string
	seq           int // tells builds of one ID apart
	session       Session
	display       *display
	noCache       bool
	noCacheFilter []string
	verify        bool
	pull          bool
	mounts        MountSource
	jobs          int
	imports       Imports

	ctx    context.Context
	cancel context.CancelCauseFunc
	active sync.WaitGroup // calls of Result

	// What follows is guarded by Solver.mu.

	entries map[digest.Digest]*entry
	pins    map[digest.Digest]result
	made    map[digest.Digest]made
	reports map[digest.Digest]*Report
	// lost are layers that could not be fetched: no record that names one counts.
	lost map[layer.ID]bool
	// watchers are told of vertices that are done.
	watchers []*watcher
	running  int // runs that have a slot and count for this build
	closed   bool
}

// entry is a vertex with what the build knows of it.
type entry struct {
	vertex  *Vertex
	op      Op
	parts   []record.Part // op.Parts()
	outputs int
	order   int // in the definitions, as they were loaded: inputs come first
	// ignoreCache is guarded by Solver.mu: another definition may set it.
	ignoreCache bool
}

func (e *entry) isSource() bool {
	_, ok := e.op.(Source)
	return ok
}

// made is the result of a vertex in this build.
type made struct {
	outputs []snapshot.Snapshot
	// ran says that the work was done for this build, not found.
	ran bool
}

// NewBuild begins a build. Close it.
func (s *Solver) NewBuild(o BuildOptions) *Build {
	ctx, cancel := context.WithCancelCause(context.Background())
	b := &Build{
		solver: s, id: o.ID, session: o.Session, display: newDisplay(o.Writer),
		noCache: o.NoCache, noCacheFilter: slices.Clone(o.NoCacheFilter), verify: o.Verify, pull: o.Pull, jobs: o.Jobs, imports: o.Imports, mounts: o.Mounts,
		ctx: ctx, cancel: cancel,
		entries: make(map[digest.Digest]*entry), pins: make(map[digest.Digest]result), made: make(map[digest.Digest]made),
		reports: make(map[digest.Digest]*Report), lost: make(map[layer.ID]bool),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.builds++
	b.seq = s.builds
	if b.jobs > s.jobs && !s.fixedJobs {
		s.wide = append(s.wide, b)
	}
	return b
}

// Close stops what is still being evaluated, waits for it and for the Writer to have been told everything, and
// forgets the results. Work that other builds want as well goes on for them. Closing twice does nothing.
func (b *Build) Close() {
	b.solver.mu.Lock()
	again := b.closed
	b.closed = true
	b.solver.mu.Unlock()
	b.cancel(ErrClosed)
	b.active.Wait()
	b.solver.mu.Lock()
	b.solver.wide = slices.DeleteFunc(b.solver.wide, func(w *Build) bool { return w == b })
	b.solver.mu.Unlock()
	if !again {
		b.display.close()
	}
}

// Load reads a definition and returns the edge it points to. It checks that the definition is complete and that
// there is an op for every vertex. A vertex of an earlier definition is the same vertex here; it ignores its cache
// if any of them says so (for what has not been evaluated yet). Nothing is run.
func (b *Build) Load(def *pb.Definition) (Edge, error) {
	s := b.solver
	g, err := readGraph(def, b.vertex)
	if err != nil {
		return Edge{}, err
	}
	ops := make(map[*Vertex]Op, len(g.vertices))
	for _, v := range g.vertices {
		if b.vertex(v.Digest) == v {
			continue
		}
		op, err := s.newOp(v)
		if err != nil {
			return Edge{}, newVertexError(v, err, nil)
		}
		ops[v] = op
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if b.closed {
		return Edge{}, ErrClosed
	}
	for _, v := range g.vertices {
		e := b.entries[v.Digest]
		if e == nil {
			op := ops[v]
			e = &entry{vertex: v, op: op, parts: op.Parts(), outputs: outputCount(v.Op), order: len(b.entries)}
			b.entries[v.Digest] = e
		}
		if def.Metadata[v.Digest.String()].GetIgnoreCache() {
			e.ignoreCache = true
		}
	}
	// Another Load may have been faster with an equal vertex: hand out the one that counts.
	return Edge{Vertex: b.entries[g.result.Vertex.Digest].vertex, Index: g.result.Index}, nil
}

// vertex returns the build's vertex of that digest, nil when there is none.
func (b *Build) vertex(d digest.Digest) *Vertex {
	b.solver.mu.Lock()
	defer b.solver.mu.Unlock()
	if e := b.entries[d]; e != nil {
		return e.vertex
	}
	return nil
}

// ignoresCache reports whether e has to be run in this build. Solver.mu is held.
func (b *Build) ignoresCache(e *entry) bool {
	if e.ignoreCache {
		return true
	}
	if e.isSource() {
		return false
	}
	return b.noCache || slices.Contains(b.noCacheFilter, stageName(e.vertex.Name)) && stageName(e.vertex.Name) != ""
}

// Ops calls fn with each op that has been loaded.
func (b *Build) Ops(fn func(*pb.Op)) {
	s := b.solver
	s.mu.Lock()
	ops := make([]*pb.Op, 0, len(b.entries))
	for _, e := range b.entries {
		ops = append(ops, e.vertex.Op)
	}
	s.mu.Unlock()
	for _, op := range ops {
		fn(op)
	}
}

// Result evaluates an edge that Load has returned (or one of a vertex below it) and returns its snapshot; the zero Edge
// is the empty snapshot. What this build has evaluated before is not evaluated again, except what has failed. A failure
// stops the rest of this call, but not what other calls want too; nothing that was begun for this call alone is still
// going on when it returns. Steps whose results are known from elsewhere and cannot be fetched are run. Errors: *VertexError for each vertex that failed (the first one first); otherwise the cause
// of ctx, or ErrClosed.
func (b *Build) Result(ctx context.Context, e Edge) (snapshot.Snapshot, error) {
	if e.Vertex == nil {
		return nil, nil
	}
	for {
		snap, err := b.result(ctx, e)
		if err == nil || !b.forgetInputs(ctx, err) {
			return snap, err
		}
	}
}

// result is Result with the layers that are known now.
func (b *Build) result(ctx context.Context, e Edge) (snapshot.Snapshot, error) {
	w, err := b.newWalk(ctx, e.Vertex)
	if err != nil {
		return nil, err
	}
	defer w.end()
	outputs, err := w.evaluate()
	if err != nil {
		return nil, err
	}
	if e.Index < 0 || e.Index >= len(outputs) {
		return nil, fmt.Errorf("output %d of %q is asked for, which has %d", e.Index, e.Vertex.Name, len(outputs))
	}
	return slices.Clone(outputs[e.Index]), nil
}

// newWalk prepares the evaluation of v: a node for it and for every vertex below.
func (b *Build) newWalk(ctx context.Context, v *Vertex) (*walk, error) {
	s := b.solver
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.closed {
		return nil, ErrClosed
	}
	w := &walk{build: b}
	nodes := make(map[digest.Digest]*node)
	if err := w.collect(nodes, v.Digest); err != nil {
		return nil, err
	}
	w.nodes = slices.SortedFunc(maps.Values(nodes), func(x, y *node) int { return x.entry.order - y.entry.order })
	w.root = nodes[v.Digest]
	w.plan(nodes)

	b.active.Add(1)
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.unlink = context.AfterFunc(b.ctx, func() { w.cancel(ErrClosed) })
	return w, nil
}

// collect adds the vertex and what is below it to nodes. Solver.mu is held.
func (w *walk) collect(nodes map[digest.Digest]*node, d digest.Digest) error {
	if nodes[d] != nil {
		return nil
	}
	e := w.build.entries[d]
	if e == nil {
		return errors.New("the edge is not of this build")
	}
	nodes[d] = &node{walk: w, entry: e, vertex: e.vertex, done: make(chan struct{}), inputDigests: make([]digest.Digest, len(e.vertex.Inputs))}
	for _, in := range e.vertex.Inputs {
		if err := w.collect(nodes, in.Vertex.Digest); err != nil {
			return err
		}
	}
	return nil
}
