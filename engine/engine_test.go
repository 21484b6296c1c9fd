// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/executor/runc"
)

// runner builds the program that containers need, once, when it is not embedded.
var runner = sync.OnceValue(func() error {
	if runc.Embedded() || os.Getenv("SLIPWAY_RUNNER") != "" {
		return nil
	}
	path := filepath.Join(binDir, "slipway-runner")
	out, err := exec.Command("go", "build", "-tags", "seccomp", "-o", path, "../cmd/slipway-runner").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build slipway-runner: %w: %s", err, out)
	}
	return os.Setenv("SLIPWAY_RUNNER", path)
})

var binDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "slipway-engine-test-")
	if err != nil {
		panic(err)
	}
	binDir = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// testEngine is an engine that serves a socket, and clients of it.
type testEngine struct {
	t      *testing.T
	root   string
	socket string
	client *bkclient.Client
	stop   func()
}

func openTest(t *testing.T) *testEngine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts and containers")
	}
	return openAt(t, t.TempDir())
}

func openAt(t *testing.T, root string) *testEngine {
	t.Helper()
	return openWith(t, Options{Root: root, OwnerEntitled: true})
}

func openWith(t *testing.T, options Options) *testEngine {
	t.Helper()
	options.Log = testLog{t}
	root := options.Root
	e, err := Open(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, 0, Listener{Listener: listener}) }()
	client, err := bkclient.New(t.Context(), "unix://"+socket)
	if err != nil {
		t.Fatal(err)
	}
	te := &testEngine{t: t, root: root, socket: socket, client: client}
	te.stop = sync.OnceFunc(func() {
		client.Close()
		cause := errors.New("test ends")
		cancel(cause)
		if err := <-served; !errors.Is(err, cause) {
			t.Errorf("Serve: %v", err)
		}
		if err := e.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		te.checkNothingLeft()
	})
	t.Cleanup(te.stop)
	return te
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	fmt.Fprintf(l.t.Output(), "engine: %s", p)
	return len(p), nil
}

// checkNothingLeft looks for mounts below the state directory and processes that run in it.
func (te *testEngine) checkNothingLeft() {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		te.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, te.root) {
			te.t.Errorf("left mounted: %s", line)
		}
	}
	roots, _ := filepath.Glob("/proc/[0-9]*/root")
	for _, r := range roots {
		if target, err := os.Readlink(r); err == nil && strings.HasPrefix(target, te.root) {
			te.t.Errorf("left running: %s in %s", r, target)
		}
	}
}

// request is one build.
type request struct {
	files   map[string]string
	attrs   map[string]string
	name    string
	session []session.Attachable
	// remote makes the engine fetch the files through the session.
	remote bool
	// client runs the frontend's call in this process, as buildctl does.
	client bool
	status func(*bkclient.SolveStatus)
	// exports are instead of the image of that name; cacheFrom and cacheTo are caches.
	exports            []bkclient.ExportEntry
	cacheFrom, cacheTo []bkclient.CacheOptionsEntry
}

// result is what a build has shown.
type result struct {
	response map[string]string
	vertices map[string]*bkclient.Vertex // last state by name
	logs     string
}

func (te *testEngine) build(ctx context.Context, r request) (result, error) {
	te.t.Helper()
	return te.buildFilesIn(ctx, r, te.t.TempDir())
}

// buildFiles builds in a directory that stays.
func (te *testEngine) buildFiles(r request, dir string) (result, error) {
	te.t.Helper()
	return te.buildFilesIn(te.t.Context(), r, dir)
}

func (te *testEngine) buildFilesIn(ctx context.Context, r request, dir string) (result, error) {
	te.t.Helper()
	for name, text := range r.files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			te.t.Fatal(err)
		}
	}
	return te.buildDir(ctx, r, dir)
}

func (te *testEngine) buildDir(ctx context.Context, r request, dir string) (result, error) {
	te.t.Helper()
	files, err := fsutil.NewFS(dir)
	if err != nil {
		te.t.Fatal(err)
	}
	opt := bkclient.SolveOpt{
		Frontend:      "dockerfile.v0",
		FrontendAttrs: map[string]string{},
		LocalMounts:   map[string]fsutil.FS{"context": files, "dockerfile": files},
		Session:       r.session,
	}
	for k, v := range r.attrs {
		opt.FrontendAttrs[k] = v
	}
	if frontend, ok := r.attrs["frontend"]; ok {
		opt.Frontend = frontend
		delete(opt.FrontendAttrs, "frontend")
	}
	if !r.remote {
		host, err := buildkitapi.HostID()
		if err != nil {
			te.t.Fatal(err)
		}
		opt.FrontendAttrs[buildkitapi.HostAttr] = host
		opt.FrontendAttrs[buildkitapi.LocalDirAttr+"context"] = dir
		opt.FrontendAttrs[buildkitapi.LocalDirAttr+"dockerfile"] = dir
	}
	if r.name != "" {
		opt.Exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": r.name}}}
	}
	if r.exports != nil {
		opt.Exports = r.exports
	}
	opt.CacheImports, opt.CacheExports = r.cacheFrom, r.cacheTo
	events := make(chan *bkclient.SolveStatus)
	out := result{vertices: map[string]*bkclient.Vertex{}}
	var group errgroup.Group
	group.Go(func() error {
		for s := range events {
			for _, v := range s.Vertexes {
				out.vertices[v.Name] = v
			}
			for _, l := range s.Logs {
				out.logs += string(l.Data)
			}
			if r.status != nil {
				r.status(s)
			}
		}
		return nil
	})
	var response *bkclient.SolveResponse
	if r.client {
		response, err = te.client.Build(ctx, opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			return c.Solve(ctx, gwclient.SolveRequest{Frontend: opt.Frontend, FrontendOpt: opt.FrontendAttrs})
		}, events)
	} else {
		response, err = te.client.Solve(ctx, nil, opt, events)
	}
	_ = group.Wait()
	if err == nil {
		out.response = response.ExporterResponse
	}
	return out, err
}

func (te *testEngine) mustBuild(r request) result {
	te.t.Helper()
	out, err := te.build(te.t.Context(), r)
	if err != nil {
		te.t.Fatalf("build: %v\n%s", err, out.logs)
	}
	return out
}

// base puts an image "base" with a shell into the store.
func (te *testEngine) base() {
	te.t.Helper()
	if err := runner(); err != nil {
		te.t.Skipf("needs slipway-runner: %v", err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		te.t.Skip("needs busybox (Debian: busybox-static)")
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		te.t.Fatal(err)
	}
	te.mustBuild(request{name: "base", files: map[string]string{
		"busybox":    string(data),
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nENV PATH=/bin\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\nRUN /bin/busybox --install -s /bin\nSHELL [\"/bin/sh\", \"-c\"]\n",
	}})
}

// steps are the vertices that are instructions, with what became of them.
func (r result) steps() (cached, ran []string) {
	for name, v := range r.vertices {
		if strings.HasPrefix(name, "[internal]") || strings.HasPrefix(name, "exporting") {
			continue
		}
		if v.Cached {
			cached = append(cached, name)
		} else {
			ran = append(ran, name)
		}
	}
	return cached, ran
}

func TestBuildWithoutBase(t *testing.T) {
	te := openTest(t)
	for _, tc := range []struct {
		name string
		r    request
	}{
		{"direct", request{}},
		{"through the session", request{remote: true}},
		{"frontend called by the client", request{remote: true, client: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.r.name = "scratch-" + strings.ReplaceAll(tc.name, " ", "-")
			tc.r.files = map[string]string{"Dockerfile": "FROM scratch\nCOPY a /dir/b\nLABEL k=v\n", "a": tc.name}
			out := te.mustBuild(tc.r)
			if out.response["containerimage.digest"] == "" || out.response["containerimage.config.digest"] == "" {
				t.Errorf("response %v", out.response)
			}
			body := te.get(t, "/images/"+tc.r.name+"/json")
			if !strings.Contains(body, `"k":"v"`) || !strings.Contains(body, out.response["containerimage.config.digest"]) {
				t.Errorf("inspect: %s", body)
			}
		})
	}
	if left, _ := os.ReadDir(filepath.Join(te.root, "contexts")); len(left) > 0 {
		te.stop() // waits for the clean-up after builds
		if left, _ = os.ReadDir(filepath.Join(te.root, "contexts")); len(left) > 0 {
			t.Errorf("transferred files are left: %v", left)
		}
	}
}

// get asks the Docker API on the same socket.
func (te *testEngine) get(t *testing.T, path string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", te.socket)
		},
	}}
	resp, err := client.Get("http://slipway" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v: %s", path, resp.Status, err, body)
	}
	return string(body)
}

// multiStage resolves one image only: BuildKit's frontend writes the same flag without a lock each time it resolves one
// (builder/resolvecache.go), which the race detector rightly reports.
const multiStage = `FROM base AS common
FROM common AS build
WORKDIR /src
COPY a .
RUN cat a > /out; echo made
FROM common AS other
COPY b /b
RUN cat /b
FROM common
COPY --from=build /out /out
COPY --from=other /b /b
`

func TestSecondBuildRunsNothing(t *testing.T) {
	te := openTest(t)
	te.base()
	files := map[string]string{"Dockerfile": multiStage, "a": "one\n", "b": "two\n"}
	first := te.mustBuild(request{files: files, name: "app"})
	if !strings.Contains(first.logs, "made") || !strings.Contains(first.logs, "two") {
		t.Errorf("logs %q", first.logs)
	}
	second := te.mustBuild(request{files: files, name: "app"})
	if cached, ran := second.steps(); len(ran) > 0 || len(cached) < 7 {
		t.Errorf("second build: cached %q, ran %q", cached, ran)
	}
	if got, want := second.response["containerimage.digest"], first.response["containerimage.digest"]; got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	files["a"] = "changed\n"
	third := te.mustBuild(request{files: files, name: "app"})
	_, ran := third.steps()
	for _, name := range ran {
		if strings.Contains(name, "other") && !strings.Contains(name, "COPY --from=other") {
			t.Errorf("%q ran for a change that does not concern it", name)
		}
	}
	if len(ran) == 0 {
		t.Error("the change was not noticed")
	}

	// The cache survives a restart.
	te.stop()
	te2 := openAt(t, te.root)
	if cached, ran := te2.mustBuild(request{files: files, name: "app"}).steps(); len(ran) > 0 || len(cached) < 7 {
		t.Errorf("after a restart: cached %q, ran %q", cached, ran)
	}
}

func TestFailureShowsItsPlace(t *testing.T) {
	te := openTest(t)
	te.base()
	out, err := te.build(t.Context(), request{files: map[string]string{"Dockerfile": "FROM base\n\nRUN echo before; exit 3\n"}})
	if err == nil || !strings.Contains(err.Error(), "exit code: 3") {
		t.Fatalf("error %v", err)
	}
	if !strings.Contains(out.logs, "before") {
		t.Errorf("logs %q", out.logs)
	}
	sources := errdefs.Sources(err)
	if len(sources) != 1 {
		t.Fatalf("%d sources", len(sources))
	}
	var text bytes.Buffer
	if err := sources[0].Print(&text); err != nil || !strings.Contains(text.String(), "3 | >>> RUN echo before; exit 3") {
		t.Errorf("excerpt %q", text.String())
	}
	_, err = te.build(t.Context(), request{files: map[string]string{"Dockerfile": "FROM scratch\nCOPPY a b\n"}})
	if err == nil || len(errdefs.Sources(err)) != 1 || !strings.Contains(err.Error(), "COPPY") {
		t.Errorf("parse error %v", err)
	}
}

func TestSecrets(t *testing.T) {
	te := openTest(t)
	te.base()
	r := request{
		files:   map[string]string{"Dockerfile": "FROM base\nRUN --mount=type=secret,id=s,required=true echo got-$(tr sam SAM </run/secrets/s)-$(cat /run/secrets/s)\n"},
		session: []session.Attachable{secretsprovider.FromMap(map[string][]byte{"s": []byte("sesame")})},
	}
	if out := te.mustBuild(r); !strings.Contains(out.logs, "got-SeSAMe-[secret s]\n") {
		t.Errorf("logs %q", out.logs)
	}
	r.session = nil
	r.attrs = map[string]string{"no-cache": ""}
	if _, err := te.build(t.Context(), r); err == nil || !strings.Contains(err.Error(), "secret s: not found") {
		t.Errorf("without the secret: %v", err)
	}
}

func TestTwoBuildsAtOnceShareTheirWork(t *testing.T) {
	te := openTest(t)
	te.base()
	dir := t.TempDir()
	dockerfile := "FROM base\nRUN sleep 0.3; cat /proc/sys/kernel/random/uuid > /id\n"
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	digests := make([]string, 3)
	var group errgroup.Group
	for i := range digests {
		group.Go(func() error {
			out, err := te.buildDir(t.Context(), request{name: fmt.Sprintf("at-once-%d", i)}, dir)
			digests[i] = out.response["containerimage.digest"]
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if digests[0] == "" || digests[0] != digests[1] || digests[0] != digests[2] {
		t.Errorf("digests %v", digests)
	}
}

func TestCancelEndsTheStep(t *testing.T) {
	te := openTest(t)
	te.base()
	ctx, cancel := context.WithCancel(t.Context())
	started := time.Now()
	_, err := te.build(ctx, request{
		files: map[string]string{"Dockerfile": "FROM base\nRUN echo begun; sleep 600\n"},
		status: func(s *bkclient.SolveStatus) {
			for _, l := range s.Logs {
				if bytes.Contains(l.Data, []byte("begun")) {
					cancel()
				}
			}
		},
	})
	cancel()
	if err == nil || time.Since(started) > 30*time.Second {
		t.Errorf("error %v after %s", err, time.Since(started))
	}
	te.stop() // checks that the process is gone
}

// TestPlainDefinition solves LLB that did not come from a frontend.
func TestPlainDefinition(t *testing.T) {
	te := openTest(t)
	def, err := llb.Scratch().File(llb.Mkfile("/a", 0o644, []byte("x"))).Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	response, err := te.client.Solve(t.Context(), def, bkclient.SolveOpt{
		Exports: []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": "plain"}}},
	}, nil)
	if err != nil || response.ExporterResponse["containerimage.digest"] == "" {
		t.Errorf("%v, %v", response, err)
	}
}

func TestRefusedRequests(t *testing.T) {
	te := openTest(t)
	r := request{files: map[string]string{"Dockerfile": "FROM base\nRUN --network=host true\n"}}
	te.base()
	if _, err := te.build(t.Context(), r); err == nil || !strings.Contains(err.Error(), "network.host is not allowed") {
		t.Errorf("host network: %v", err)
	}
	r = request{files: map[string]string{"Dockerfile": "# syntax=docker/dockerfile:1\nFROM base\nRUN true\n"}}
	if _, err := te.build(t.Context(), r); err != nil {
		t.Errorf("docker/dockerfile: %v", err)
	}
	r = request{files: map[string]string{"Dockerfile": "FROM base\n"}, attrs: map[string]string{"attest:sbom": ""}}
	if _, err := te.build(t.Context(), r); err == nil || !strings.Contains(err.Error(), "generator=IMAGE") {
		t.Errorf("SBOM: %v", err)
	}
}

func TestOneSocketTwoProtocols(t *testing.T) {
	te := openTest(t)
	if got := te.get(t, "/_ping"); got != "OK" {
		t.Errorf("ping: %q", got)
	}
	info, err := te.client.Info(t.Context())
	if err != nil || info.BuildkitVersion.Version != buildkitapi.BuildKitVersion {
		t.Errorf("info %+v, %v", info, err)
	}
	workers, err := te.client.ListWorkers(t.Context())
	if err != nil || len(workers) != 1 || workers[0].Labels[LabelRoot] != te.root || len(workers[0].Platforms) == 0 {
		t.Errorf("workers %+v, %v", workers, err)
	}
	if _, err := Open(t.Context(), Options{Root: te.root}); !errors.Is(err, cache.ErrLocked) {
		t.Errorf("a second engine: %v", err)
	}
}

func TestIdleEngineEnds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	e, err := Open(t.Context(), Options{Root: t.TempDir(), Log: testLog{t}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	const idle = 300 * time.Millisecond
	go func() { served <- e.Serve(t.Context(), idle, Listener{Listener: listener}) }()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-served:
		t.Fatalf("ended with a connection open: %v", err)
	case <-time.After(3 * idle):
	}
	conn.Close()
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("does not end")
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestDialInside reaches the engine without a socket in the file system, as --standalone does.
func TestDialInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	e, err := Open(t.Context(), Options{Root: t.TempDir(), Log: testLog{t}})
	if err != nil {
		t.Fatal(err)
	}
	client, err := bkclient.New(t.Context(), "unix:///inside", bkclient.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return e.Dial(ctx)
	}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Info(t.Context()); err != nil {
		t.Error(err)
	}
	client.Close()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// TestTCPWithoutCertificatesIsRefused: whatever a caller hands over.
func TestTCPWithoutCertificatesIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an engine needs root: SKIPPED")
	}
	e, err := Open(t.Context(), Options{Root: t.TempDir(), Log: testLog{t}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for name, conf := range map[string]*tls.Config{"plain": nil, "any client": {}, "optional": {ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: x509.NewCertPool()}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Serve(t.Context(), 0, Listener{Listener: l, TLS: conf}); !errors.Is(err, errPlainTCP) {
			t.Errorf("%s: %v", name, err)
		}
		if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
			conn.Close()
			t.Errorf("%s: somebody listens", name)
		}
	}
}
