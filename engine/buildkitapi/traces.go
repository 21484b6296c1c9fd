// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/tracing/transform"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Builds are traced when their client has a trace, or when the engine sends traces somewhere. What happened in a build is told by
// its progress events, so its spans are made of those when it has ended; the client's own spans come over the trace service, the
// last of them after the build. Both are kept with the build's record, in the form that BuildKit has for it.

// mediaTypeTrace is BuildKit's form of a build's spans: one JSON object each.
const mediaTypeTrace = "application/vnd.buildkit.otlp.json.v0"

const (
	// traceWait is how long a client may take to send its last spans after its build, unless it asks for the record to be finalized.
	traceWait = 3 * time.Second
	// traceTimeout is how long the place where spans are sent may take.
	traceTimeout = 5 * time.Second
	// maxSpans is how many spans of one trace are kept: they come from clients.
	maxSpans = 10_000
)

// traces collects spans. Its methods may be called concurrently.
type traces struct {
	tracev1.UnimplementedTraceServiceServer
	forward sdktrace.SpanExporter // nil when they are only kept

	mu     sync.Mutex // guards active
	active map[trace.TraceID]*traced
}

// traced is one trace that builds belong to.
type traced struct {
	builds int
	spans  []tracetest.SpanStub
}

// buildTrace is the part that one build has in a trace. nil is that of a build without one.
type buildTrace struct {
	traces       *traces
	parent, span trace.SpanContext
	started      time.Time
	finalize     chan struct{} // closed when the client has sent everything
	once         sync.Once
}

func newTraces(forward sdktrace.SpanExporter) *traces {
	return &traces{forward: forward, active: map[trace.TraceID]*traced{}}
}

// Export implements the OpenTelemetry trace service.
func (t *traces) Export(ctx context.Context, req *tracev1.ExportTraceServiceRequest) (*tracev1.ExportTraceServiceResponse, error) {
	spans := transform.Spans(req.GetResourceSpans())
	t.mu.Lock()
	for _, s := range spans {
		t.keep(tracetest.SpanStubFromReadOnlySpan(s))
	}
	t.mu.Unlock()
	if t.forward != nil && len(spans) > 0 {
		if err := t.forward.ExportSpans(ctx, spans); err != nil {
			return nil, err
		}
	}
	return &tracev1.ExportTraceServiceResponse{}, nil
}

// keep adds a span to its trace if a build belongs to it. mu is held.
func (t *traces) keep(s tracetest.SpanStub) {
	if a := t.active[s.SpanContext.TraceID()]; a != nil && len(a.spans) < maxSpans {
		a.spans = append(a.spans, s)
	}
}

// carrier reads a trace context from the metadata of a call.
type carrier metadata.MD

func (c carrier) Get(key string) string {
	if v := metadata.MD(c).Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}
func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }
func (c carrier) Keys() []string        { return nil }

// begin returns the trace of a build that begins with the call of ctx, nil for none.
func (t *traces) begin(ctx context.Context) *buildTrace {
	md, _ := metadata.FromIncomingContext(ctx)
	parent := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), carrier(md)))
	if (!parent.IsValid() || !parent.IsSampled()) && t.forward == nil {
		return nil
	}
	b := &buildTrace{traces: t, parent: parent, started: time.Now(), finalize: make(chan struct{})}
	id := parent.TraceID()
	if !parent.IsValid() {
		_, _ = rand.Read(id[:])
	}
	b.span = b.newSpan(id)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.active[id] == nil {
		t.active[id] = &traced{}
	}
	t.active[id].builds++
	return b
}

func (b *buildTrace) newSpan(id trace.TraceID) trace.SpanContext {
	var span trace.SpanID
	_, _ = rand.Read(span[:])
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, SpanID: span, TraceFlags: trace.FlagsSampled})
}

// ended makes the spans of a build from its events.
func (b *buildTrace) ended(ctx context.Context, ref string, list []*bkclient.SolveStatus, err error) error {
	stubs := b.stubs(ref, list, err)
	b.traces.mu.Lock()
	for _, s := range stubs {
		b.traces.keep(s)
	}
	b.traces.mu.Unlock()
	if b.traces.forward == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, traceTimeout)
	defer cancel()
	return b.traces.forward.ExportSpans(ctx, tracetest.SpanStubs(stubs).Snapshots())
}

// stubs are a span for the build and one for each vertex that has run.
func (b *buildTrace) stubs(ref string, list []*bkclient.SolveStatus, err error) []tracetest.SpanStub {
	who := resource.NewSchemaless(attribute.String("service.name", "slipway"))
	root := tracetest.SpanStub{
		Name: "moby.buildkit.v1.Control/Solve", SpanContext: b.span, Parent: b.parent, SpanKind: trace.SpanKindServer,
		StartTime: b.started, EndTime: time.Now(), Attributes: []attribute.KeyValue{attribute.String("ref", ref)}, Resource: who,
	}
	if err != nil {
		root.Status = sdktrace.Status{Code: otelcodes.Error, Description: err.Error()}
	}
	last := map[digest.Digest]*bkclient.Vertex{}
	var order []digest.Digest
	for _, st := range list {
		for _, v := range st.Vertexes {
			if last[v.Digest] == nil {
				order = append(order, v.Digest)
			}
			last[v.Digest] = v
		}
	}
	stubs := []tracetest.SpanStub{root}
	for _, d := range order {
		v := last[d]
		if v.Started == nil || v.Completed == nil {
			continue
		}
		s := tracetest.SpanStub{
			Name: v.Name, SpanContext: b.newSpan(b.span.TraceID()), Parent: b.span, SpanKind: trace.SpanKindInternal,
			StartTime: *v.Started, EndTime: *v.Completed, Resource: who,
			Attributes: []attribute.KeyValue{attribute.String("vertex", v.Digest.String()), attribute.Bool("cached", v.Cached)},
		}
		if v.Error != "" {
			s.Status = sdktrace.Status{Code: otelcodes.Error, Description: v.Error}
		}
		stubs = append(stubs, s)
	}
	return stubs
}

// end returns all spans of the trace. The trace goes with its last build.
func (b *buildTrace) end() []tracetest.SpanStub {
	t := b.traces
	t.mu.Lock()
	defer t.mu.Unlock()
	id := b.span.TraceID()
	a := t.active[id]
	if a.builds--; a.builds == 0 {
		delete(t.active, id)
	}
	return a.spans
}

// complete says that no more spans will come.
func (b *buildTrace) complete() { b.once.Do(func() { close(b.finalize) }) }

// finishTrace makes the spans of a build that has ended, and keeps its trace in the background if it is recorded.
func (s *Server) finishTrace(t *buildTrace, b *build, recorded bool, redact func(string) string, err error) {
	if t == nil {
		return
	}
	kept := func() {}
	if recorded {
		kept = s.pending.add(b.ref, t)
	}
	s.cleanups.Go(func() {
		defer kept()
		if err := t.ended(context.Background(), b.ref, b.events.all(), err); err != nil {
			s.Log.Warn("send the spans of a build", "build", b.ref, "error", err)
		}
		if !recorded {
			t.end()
			return
		}
		if err := s.keepTrace(b.ref, t, redact); err != nil {
			s.Log.Warn("keep the trace of a build", "build", b.ref, "error", err)
		}
	})
}

// keepTrace stores the spans of a build that has ended and is recorded. It waits for the client's last ones.
func (s *Server) keepTrace(ref string, b *buildTrace, redact func(string) string) error {
	select {
	case <-b.finalize:
	case <-s.closing:
	case <-time.After(traceWait):
	}
	spans := b.end()
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetIndent("", "  ")
	for _, span := range spans {
		if err := enc.Encode(span); err != nil {
			return err
		}
	}
	if s.Begin != nil {
		defer s.Begin("trace " + ref)() // until the record names it
	}
	desc, err := s.History.Blobs.PutBytes(context.Background(), mediaTypeTrace, []byte(redact(text.String())))
	if err != nil {
		return err
	}
	return s.History.Attach(ref, []ocispec.Descriptor{desc}, func(rec *controlapi.BuildHistoryRecord) {
		rec.Trace = &controlapi.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}
	})
}

// pendingTraces are the builds whose traces are not complete, by ref.
type pendingTraces struct {
	mu   sync.Mutex // guards all
	refs map[string]*pendingTrace
}

type pendingTrace struct {
	trace *buildTrace
	done  chan struct{}
}

// add notes a build whose trace will be kept; what it returns says that it has been.
func (p *pendingTraces) add(ref string, b *buildTrace) (done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refs == nil {
		p.refs = map[string]*pendingTrace{}
	}
	pending := &pendingTrace{b, make(chan struct{})}
	p.refs[ref] = pending
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.refs, ref)
		close(pending.done)
	}
}

// finalize waits until the trace of a build is kept, without waiting for more spans.
func (p *pendingTraces) finalize(ctx context.Context, ref string) error {
	p.mu.Lock()
	pending := p.refs[ref]
	p.mu.Unlock()
	if pending == nil {
		return nil
	}
	pending.trace.complete()
	select {
	case <-pending.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// NewTraceGRPC returns a gRPC server with nothing but the OpenTelemetry trace service.
func (s *Server) NewTraceGRPC() *grpc.Server {
	g := grpc.NewServer()
	tracev1.RegisterTraceServiceServer(g, s.traces)
	return g
}
