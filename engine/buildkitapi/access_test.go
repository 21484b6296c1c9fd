// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"bytes"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestEntitlements(t *testing.T) {
	s := &Server{Options: Options{Entitlements: []string{"network.host", "device"}}}
	for _, tc := range []struct {
		names []string
		owner bool
		want  string
	}{
		{nil, false, ""},
		{[]string{"network.host"}, false, ""},
		{[]string{"device=vendor.com/gpu=0"}, false, ""},
		{[]string{"network.host", "security.insecure"}, false, "security.insecure"},
		{[]string{"security.insecure"}, true, ""},
	} {
		err := s.checkEntitlements(tc.names, tc.owner)
		if tc.want == "" && err != nil || tc.want != "" && (status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%q (owner %v): %v", tc.names, tc.owner, err)
		}
	}
}

func TestFrontendsThatMayBeAskedFor(t *testing.T) {
	for _, tc := range []struct {
		f            Frontends
		name, source string
		want         string
	}{
		{Frontends{}, "dockerfile.v0", "", ""},
		{Frontends{}, "gateway.v0", "anything/at:all", ""},
		{Frontends{NoDockerfile: true}, "dockerfile.v0", "", "dockerfile.v0"},
		{Frontends{NoDockerfile: true}, "gateway.v0", "a", ""},
		{Frontends{NoGateway: true}, "gateway.v0", "a", "gateway.v0 is switched off"},
		{Frontends{Repositories: []string{"docker/dockerfile", "host.test/team/x"}}, "gateway.v0", "docker.io/docker/dockerfile:1.7", ""},
		{Frontends{Repositories: []string{"docker/dockerfile", "host.test/team/x"}}, "gateway.v0", "host.test/team/x@sha256:" + strings.Repeat("0", 64), ""},
		{Frontends{Repositories: []string{"host.test/team/x"}}, "gateway.v0", "host.test/team/x/y", "host.test/team/x/y"},
		{Frontends{Repositories: []string{"host.test/team/x"}}, "gateway.v0", "UPPER", "not among those"},
		{Frontends{Repositories: []string{"UPPER"}}, "gateway.v0", "UPPER", "not among those"},
		{Frontends{Repositories: []string{"host.test/team/x"}}, "gateway.v0", "", "only certain images"},
		{Frontends{}, "gateway.v0", "", ""},
		{Frontends{Repositories: []string{"host.test/team/x"}}, "dockerfile.v0", "", ""},
	} {
		err := tc.f.check(tc.name, tc.source)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%+v %s %s: %v", tc.f, tc.name, tc.source, err)
		}
	}
}

func TestListWorkersFilter(t *testing.T) {
	s := testServer(t)
	s.WorkerID = "w1"
	s.Options.Labels = func() map[string]string { return map[string]string{"com.example.a": "b"} }
	for filter, want := range map[string]int{"": 1, "id==w1": 1, "id==w2": 0, "labels.com.example.a==b": 1, "labels.com.example.a==c": 0, "labels.x": 0} {
		req := &controlapi.ListWorkersRequest{}
		if filter != "" {
			req.Filter = []string{filter}
		}
		got, err := s.ListWorkers(t.Context(), req)
		if err != nil || len(got.Record) != want {
			t.Errorf("%s: %d workers, %v", filter, len(got.GetRecord()), err)
		}
	}
	if _, err := s.ListWorkers(t.Context(), &controlapi.ListWorkersRequest{Filter: []string{"=="}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a filter that is none: %v", err)
	}
}

// TestTraceOfABuild: spans of the build and its vertices, below the client's; what clients send for other traces is not kept.
func TestTraceOfABuild(t *testing.T) {
	ts := newTraces(nil)
	if ts.begin(t.Context()) != nil {
		t.Error("a build without a trace is traced")
	}
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", parent))
	b := ts.begin(ctx)
	if b == nil {
		t.Fatal("not traced")
	}
	start := time.Now()
	end := start.Add(time.Second)
	d := digest.FromString("v")
	err := b.ended(ctx, "ref", []*bkclient.SolveStatus{
		{Vertexes: []*bkclient.Vertex{{Digest: d, Name: "RUN x", Started: &start}, {Digest: digest.FromString("never"), Name: "waiting"}}},
		{Vertexes: []*bkclient.Vertex{{Digest: d, Name: "RUN x", Started: &start, Completed: &end, Error: "exit code: 1"}}},
	}, status.Error(codes.Unknown, "no"))
	if err != nil {
		t.Fatal(err)
	}
	ts.mu.Lock()
	ts.keep(tracetest.SpanStub{Name: "of another trace"})
	ts.mu.Unlock()
	spans := b.end()
	if len(spans) != 2 {
		t.Fatalf("%d spans: %v", len(spans), spans)
	}
	root, step := spans[0], spans[1]
	if root.Parent.SpanID().String() != "b7ad6b7169203331" || root.Status.Description == "" || step.Parent.SpanID() != root.SpanContext.SpanID() {
		t.Errorf("spans do not hang together: %+v %+v", root, step)
	}
	if step.Name != "RUN x" || step.EndTime.Sub(step.StartTime) != time.Second || step.Status.Description != "exit code: 1" {
		t.Errorf("step %+v", step)
	}
	if len(ts.active) != 0 {
		t.Error("the trace is not forgotten")
	}
}

// TestTracesAreSentOn: with a place to send spans to every build is traced, and what clients send goes there too.
func TestTracesAreSentOn(t *testing.T) {
	place := tracetest.NewInMemoryExporter()
	ts := newTraces(place)
	b := ts.begin(t.Context())
	if b == nil {
		t.Fatal("not traced")
	}
	if err := b.ended(t.Context(), "ref", nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := place.GetSpans(); len(got) != 1 || got[0].Name != "moby.buildkit.v1.Control/Solve" || !got[0].SpanContext.TraceID().IsValid() {
		t.Errorf("sent on: %v", got)
	}
	b.end()
	place.Reset()

	// A client's spans, over a socket with nothing but the trace service.
	s := testServer(t)
	s.traces = ts
	g := s.NewTraceGRPC()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	defer g.Stop()
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	id := bytes.Repeat([]byte{7}, 16)
	_, err = tracev1.NewTraceServiceClient(conn).Export(t.Context(), &tracev1.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{
		ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{TraceId: id, SpanId: id[:8], Name: "of a client"}}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if got := place.GetSpans(); len(got) != 1 || got[0].Name != "of a client" {
		t.Errorf("sent on: %v", got)
	}
	if _, err := controlapi.NewControlClient(conn).Info(t.Context(), &controlapi.InfoRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("the Control API is there as well: %v", err)
	}
}

// TestPeerOfTCP: who comes over TCP is nobody's user, wherever from.
func TestPeerOfTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if uid, err := PeerUID(conn); err == nil {
		t.Errorf("a TCP peer is user %d", uid)
	}
}
