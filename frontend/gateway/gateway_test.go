// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// fakeBuild answers every definition with the same snapshot or error.
type fakeBuild struct {
	loaded []*pb.Definition
	err    error
}

func (b *fakeBuild) Load(def *pb.Definition) (solver.Edge, error) {
	b.loaded = append(b.loaded, def)
	return solver.Edge{Vertex: &solver.Vertex{Digest: digest.FromString("v")}}, nil
}

func (b *fakeBuild) Result(context.Context, solver.Edge) (snapshot.Snapshot, error) {
	return snapshot.Snapshot{"layer"}, b.err
}

// fakeFiles is a tree with the bytes of its files.
type fakeFiles struct {
	*index.Index
	data map[string]string
}

func (f fakeFiles) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(f.data[path])), nil
}

type statuses []*bkclient.SolveStatus

func (s *statuses) Write(st *bkclient.SolveStatus) { *s = append(*s, st) }

func testClient(t *testing.T, build *fakeBuild, change func(*Options)) *Client {
	t.Helper()
	text := "0123456789"
	files := fakeFiles{index.New([]index.Entry{
		{Path: "", Type: index.Dir, Mode: 0o755},
		{Path: "dir", Type: index.Dir, Mode: 0o1777},
		{Path: "dir/file", Type: index.File, Mode: 0o4755, Size: int64(len(text)), UID: 7},
		{Path: "dir/other", Type: index.File, Mode: 0o644},
		{Path: "link", Type: index.Symlink, Mode: 0o777, Target: "/dir/file"},
	}), map[string]string{"dir/file": text}}
	o := Options{
		Build:  build,
		View:   func(context.Context, snapshot.Snapshot) (Files, error) { return files, nil },
		Writer: &statuses{},
	}
	if change != nil {
		change(&o)
	}
	c, err := New(o, map[string]string{"target": "x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func marshal(t *testing.T, s llb.State) *pb.Definition {
	t.Helper()
	def, err := s.Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return def.ToPB()
}

func solve(t *testing.T, c *Client) gwclient.Reference {
	t.Helper()
	res, err := c.Solve(t.Context(), gwclient.SolveRequest{Definition: marshal(t, llb.Local("x"))})
	if err != nil {
		t.Fatal(err)
	}
	return res.Ref
}

func TestReadFile(t *testing.T) {
	ref := solve(t, testClient(t, &fakeBuild{}, nil))
	for _, tc := range []struct {
		name string
		req  gwclient.ReadRequest
		want string
		err  error
	}{
		{name: "whole", req: gwclient.ReadRequest{Filename: "/dir/file"}, want: "0123456789"},
		{name: "through a symlink", req: gwclient.ReadRequest{Filename: "link"}, want: "0123456789"},
		{name: "out and in again", req: gwclient.ReadRequest{Filename: "../../dir/./file"}, want: "0123456789"},
		{name: "range", req: gwclient.ReadRequest{Filename: "dir/file", Range: &gwclient.FileRange{Offset: 3, Length: 4}}, want: "3456"},
		{name: "range beyond the end", req: gwclient.ReadRequest{Filename: "dir/file", Range: &gwclient.FileRange{Offset: 8, Length: 40}}, want: "89"},
		{name: "offset beyond the end", req: gwclient.ReadRequest{Filename: "dir/file", Range: &gwclient.FileRange{Offset: 80, Length: 4}}, want: ""},
		{name: "as dockerui reads", req: gwclient.ReadRequest{Filename: "dir/file", Range: &gwclient.FileRange{Length: maxRead + 1}}, want: "0123456789"},
		{name: "missing", req: gwclient.ReadRequest{Filename: "nothing"}, err: fs.ErrNotExist},
		{name: "directory", req: gwclient.ReadRequest{Filename: "dir"}, err: errors.ErrUnsupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ref.ReadFile(t.Context(), tc.req)
			if tc.err != nil {
				if err == nil || tc.err == fs.ErrNotExist && !errors.Is(err, tc.err) {
					t.Fatalf("error %v, want %v", err, tc.err)
				}
				return
			}
			if err != nil || string(got) != tc.want {
				t.Errorf("got %q, %v; want %q", got, err, tc.want)
			}
		})
	}
}

func TestStatAndReadDir(t *testing.T) {
	ref := solve(t, testClient(t, &fakeBuild{}, nil))
	st, err := ref.StatFile(t.Context(), gwclient.StatRequest{Path: "link"})
	if err != nil {
		t.Fatal(err)
	}
	if mode := fs.FileMode(st.Mode); mode != 0o755|fs.ModeSetuid || st.Size != 10 || st.Uid != 7 {
		t.Errorf("stat of the link's target: %+v (mode %v)", st, mode)
	}
	if st, err := ref.StatFile(t.Context(), gwclient.StatRequest{Path: "/"}); err != nil || !fs.FileMode(st.Mode).IsDir() {
		t.Errorf("stat /: %+v, %v", st, err)
	}
	list, err := ref.ReadDir(t.Context(), gwclient.ReadDirRequest{Path: "/dir"})
	if err != nil || len(list) != 2 || list[0].Path != "file" || list[1].Path != "other" {
		t.Errorf("ReadDir: %v, %v", list, err)
	}
	list, err = ref.ReadDir(t.Context(), gwclient.ReadDirRequest{Path: "/dir", IncludePattern: "f*"})
	if err != nil || len(list) != 1 || list[0].Path != "file" {
		t.Errorf("ReadDir f*: %v, %v", list, err)
	}
	if _, err := ref.ReadDir(t.Context(), gwclient.ReadDirRequest{Path: "/dir/file"}); err == nil {
		t.Error("ReadDir of a file has no error")
	}
}

func TestErrorsCarryTheirPlace(t *testing.T) {
	info := &pb.SourceInfo{Filename: "Dockerfile", Data: []byte("FROM scratch\nRUN false\n")}
	vertex := &solver.Vertex{
		Digest:    digest.FromString("v"),
		Name:      "RUN false",
		Locations: []*pb.Location{{Ranges: []*pb.Range{{Start: &pb.Position{Line: 2}, End: &pb.Position{Line: 2}}}}},
		Sources:   []*pb.SourceInfo{info},
	}
	build := &fakeBuild{err: fmt.Errorf("wrapped: %w", &solver.VertexError{Vertex: vertex, Err: errors.New("exit code: 1"), Locations: vertex.Locations, Sources: vertex.Sources})}
	err := solve(t, testClient(t, build, nil)).Evaluate(t.Context())
	sources := errdefs.Sources(err)
	if len(sources) != 1 {
		t.Fatalf("%d sources in %v", len(sources), err)
	}
	var printed bytes.Buffer
	if err := sources[0].Print(&printed); err != nil || !strings.Contains(printed.String(), ">>> RUN false") {
		t.Errorf("excerpt %q, %v", printed.String(), err)
	}
	var ve *errdefs.VertexError
	if !errors.As(err, &ve) || ve.Digest != vertex.Digest.String() {
		t.Errorf("no vertex in %v", err)
	}
}

func TestEntitlements(t *testing.T) {
	host := marshal(t, llb.Image("x").Run(llb.Shlex("true"), llb.Network(pb.NetMode_HOST)).Root())
	insecure := marshal(t, llb.Image("x").Run(llb.Shlex("true"), llb.Security(pb.SecurityMode_INSECURE)).Root())
	for _, tc := range []struct {
		def     *pb.Definition
		allowed []string
		ok      bool
	}{
		{host, nil, false},
		{host, []string{"security.insecure"}, false},
		{host, []string{"network.host"}, true},
		{insecure, []string{"network.host"}, false},
		{insecure, []string{"network.host", "security.insecure"}, true},
	} {
		c := testClient(t, &fakeBuild{}, func(o *Options) { o.Entitlements = tc.allowed })
		_, err := c.Solve(t.Context(), gwclient.SolveRequest{Definition: tc.def})
		if (err == nil) != tc.ok {
			t.Errorf("allowed %v: %v", tc.allowed, err)
		}
	}
	for _, name := range []string{"everything", "network.host=x", "device=vendor.test/x=y,alias=z"} {
		if _, err := New(Options{Entitlements: []string{name}}, nil, nil); err == nil {
			t.Errorf("the entitlement %q is accepted", name)
		}
	}
}

func TestNestedFrontends(t *testing.T) {
	var got map[string]string
	c := testClient(t, &fakeBuild{}, func(o *Options) {
		o.Frontends = map[string]gwclient.BuildFunc{"dockerfile.v0": func(_ context.Context, c gwclient.Client) (*gwclient.Result, error) {
			got = c.BuildOpts().Opts
			return gwclient.NewResult(), nil
		}}
	})
	// From a syntax line the builtin frontend stands in for docker/dockerfile; "cmdline" is what the line says.
	ask := func(c *Client, source, cmdline string) error {
		opts := map[string]string{"source": source, "a": "b"}
		if cmdline != "" {
			opts["cmdline"] = cmdline
		}
		got = nil
		_, err := c.Solve(t.Context(), gwclient.SolveRequest{Frontend: "gateway.v0", FrontendOpt: opts})
		return err
	}
	for _, source := range []string{"docker/dockerfile:1", "docker.io/docker/dockerfile:1.7-labs", "docker/dockerfile-upstream:master"} {
		if err := ask(c, source, source); err != nil || got["cmdline"] == "" || got["a"] != "b" || got["target"] != "" {
			t.Errorf("%s: %v, options %v", source, err, got)
		}
		if err := ask(c, source, ""); err == nil || got != nil {
			t.Errorf("%s, asked for by gateway.v0: the builtin frontend has run", source)
		}
	}
	for _, source := range []string{"example.com/docker/dockerfile:1", "docker/dockerfile2", "", "tonistiigi/buildkit-nix"} {
		if err := ask(c, source, source); err == nil || got != nil {
			t.Errorf("%q: the builtin frontend has run", source)
		}
	}
	c.opts["build-arg:BUILDKIT_SYNTAX"] = "docker/dockerfile:1"
	if err := ask(c, "docker/dockerfile:1", "docker/dockerfile:1"); err == nil || got != nil {
		t.Error("BUILDKIT_SYNTAX=docker/dockerfile:1: the builtin frontend has run")
	}
	if _, err := c.Solve(t.Context(), gwclient.SolveRequest{Frontend: "other.v0"}); err == nil {
		t.Error("an unknown frontend is accepted")
	}
}

func TestRefusals(t *testing.T) {
	c := testClient(t, &fakeBuild{}, nil)
	if _, err := c.NewContainer(t.Context(), gwclient.NewContainerRequest{}); err == nil {
		t.Error("NewContainer has no error")
	}
	if _, err := c.Solve(t.Context(), gwclient.SolveRequest{CacheImports: []gwclient.CacheOptionsEntry{{Type: "registry"}}}); err == nil {
		t.Error("a cache import has no error")
	}
	for _, id := range []string{"git://example.com/x", "https://example.com/x", "x"} {
		if _, err := c.ResolveSourceMetadata(t.Context(), &pb.SourceOp{Identifier: id}, sourceresolver.Opt{}); err == nil {
			t.Errorf("metadata of %s has no error", id)
		}
	}
	if res, err := c.Solve(t.Context(), gwclient.SolveRequest{Definition: &pb.Definition{}}); err != nil || res.Ref != nil {
		t.Errorf("the empty definition is scratch: %v, %v", res, err)
	}
	caps := c.BuildOpts().Caps
	if err := caps.Supports(gwpb.CapSourceMetaResolverImageAttestations); err != nil {
		t.Errorf("attestations of images are not announced: %v", err)
	}
	if err := caps.Supports(gwpb.CapImportCaches); err != nil {
		t.Errorf("cache imports are not announced: %v", err)
	}
	if err := caps.Supports(gwpb.CapReadFile); err != nil {
		t.Errorf("ReadFile is not announced: %v", err)
	}
	llbCaps := c.BuildOpts().LLBCaps
	if llbCaps.Supports(pb.CapSourceGitBundle) == nil {
		t.Error("git bundles are announced")
	}
	if err := llbCaps.Supports(pb.CapSourceGit); err != nil {
		t.Errorf("git sources are not announced: %v", err)
	}
	if err := llbCaps.Supports(pb.CapFileBase); err != nil {
		t.Errorf("file ops are not announced: %v", err)
	}
}

func TestResolveImageConfig(t *testing.T) {
	var events statuses
	var mode string
	c := testClient(t, &fakeBuild{}, func(o *Options) {
		o.Writer = &events
		o.Images = func(_ context.Context, env *solver.Env, ref string, _ *ocispec.Platform, m string) (digest.Digest, []byte, error) {
			mode = m
			env.Progress.Status("resolve", 1, 2, true)
			if ref != "docker.io/library/busybox:latest" {
				return "", nil, fmt.Errorf("asked for %s", ref)
			}
			return digest.FromString("m"), []byte("{}"), nil
		}
	})
	ref, dgst, config, err := c.ResolveImageConfig(t.Context(), "docker.io/library/busybox:latest", sourceresolver.Opt{
		LogName: "load metadata", ImageOpt: &sourceresolver.ResolveImageOpt{ResolveMode: "pull"},
	})
	if err != nil || ref != "docker.io/library/busybox:latest" || dgst != digest.FromString("m") || string(config) != "{}" || mode != "pull" {
		t.Errorf("got %s %s %s %v, mode %q", ref, dgst, config, err, mode)
	}
	first, last := events[0].Vertexes[0], events[len(events)-1].Vertexes[0]
	if first.Name != "load metadata" || first.Completed != nil || last.Completed == nil || last.Digest != first.Digest {
		t.Errorf("events %+v … %+v", first, last)
	}
}

// TestBridge plays a frontend in the client: what it gets through the bridge is what it would get here.
func TestBridge(t *testing.T) {
	b := NewBridge(t.Context(), testClient(t, &fakeBuild{}, nil))
	ctx := t.Context()
	res, err := b.Solve(ctx, &gwpb.SolveRequest{Definition: marshal(t, llb.Local("x")), AllowResultReturn: true, AllowResultArrayRef: true})
	if err != nil {
		t.Fatal(err)
	}
	id := res.Result.GetRef().GetId()
	read, err := b.ReadFile(ctx, &gwpb.ReadFileRequest{Ref: id, FilePath: "link"})
	if err != nil || string(read.Data) != "0123456789" {
		t.Errorf("ReadFile: %v, %v", read, err)
	}
	if _, err := b.ReadFile(ctx, &gwpb.ReadFileRequest{Ref: "other", FilePath: "link"}); err == nil {
		t.Error("a made-up reference can be read")
	}
	if _, err := b.Evaluate(ctx, &gwpb.EvaluateRequest{Ref: id}); err != nil {
		t.Error(err)
	}
	if _, err := b.Return(ctx, &gwpb.ReturnRequest{Result: &gwpb.Result{
		Result: &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: id}}, Metadata: map[string][]byte{"k": []byte("v")},
	}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Return(ctx, &gwpb.ReturnRequest{Result: &gwpb.Result{}}); err == nil {
		t.Error("a second Return is accepted")
	}
	out, err := b.Wait(ctx)
	if err != nil || string(out.Metadata["k"]) != "v" {
		t.Fatalf("%v, %v", out, err)
	}
	if snap, err := Snapshot(ctx, out.Ref); err != nil || len(snap) != 1 {
		t.Errorf("snapshot %v, %v", snap, err)
	}
}

// TestFrontendInANamedContext: a named context in the place of a frontend's image is not that image.
func TestFrontendInANamedContext(t *testing.T) {
	var asked []string
	c := testClient(t, &fakeBuild{}, func(o *Options) {
		o.Containers = &op.Containers{}
		o.AllowFrontend = func(_, source string) error {
			asked = append(asked, source)
			if source != "docker.io/good/frontend" {
				return errors.New("not allowed")
			}
			return nil
		}
	})
	_, err := c.Solve(t.Context(), gwclient.SolveRequest{Frontend: "gateway.v0", FrontendOpt: map[string]string{
		"source": "docker.io/good/frontend", "context:good/frontend": "docker-image://bad/frontend",
	}})
	if err == nil || !strings.Contains(err.Error(), "not allowed") || len(asked) != 2 {
		t.Errorf("%v, asked about %q", err, asked)
	}
}

// slowBuild takes a moment to stop.
type slowBuild struct {
	fakeBuild
	begun chan struct{}
	ended atomic.Bool
}

func (b *slowBuild) Result(ctx context.Context, _ solver.Edge) (snapshot.Snapshot, error) {
	close(b.begun)
	<-ctx.Done()
	time.Sleep(50 * time.Millisecond) // what it takes to stop a step
	b.ended.Store(true)
	return nil, context.Cause(ctx)
}

// TestServeBridgeWaits: when a frontend has gone, so have the calls that it has made.
func TestServeBridgeWaits(t *testing.T) {
	build := &slowBuild{begun: make(chan struct{})}
	b := NewBridge(t.Context(), testClient(t, &fakeBuild{}, func(o *Options) { o.Build = build }))
	ours, theirs := net.Pipe()
	stop := serveBridge(b, ours)
	conn, err := grpc.NewClient("passthrough:///frontend", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return theirs, nil }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answered := make(chan error, 1)
	go func() {
		_, err := gwpb.NewLLBBridgeClient(conn).Solve(t.Context(), &gwpb.SolveRequest{Definition: marshal(t, llb.Local("x")), Evaluate: true})
		answered <- err
	}()
	<-build.begun
	stop()
	if !build.ended.Load() {
		t.Error("a call goes on after stop")
	}
	if err := <-answered; err == nil {
		t.Error("the call has no error")
	}
}

// TestExecRefusesDescriptors: what is refused leaves nothing behind.
func TestExecRefusesDescriptors(t *testing.T) {
	for _, fds := range [][]uint32{{0, 3}, {0, 0}} {
		b := NewBridge(t.Context(), testClient(t, &fakeBuild{}, nil))
		b.containers["c"] = &container{}
		before := runtime.NumGoroutine()
		for range 20 {
			_, err := b.startExec(t.Context(), nil, "p", &gwpb.InitMessage{ContainerID: "c", Meta: &pb.Meta{Args: []string{"x"}}, Fds: fds})
			if status.Code(err) != codes.InvalidArgument {
				t.Fatalf("%d: %v", fds, err)
			}
		}
		if after := runtime.NumGoroutine(); after >= before+20 {
			t.Errorf("%d: %d goroutines are left", fds, after-before)
		}
	}
}
