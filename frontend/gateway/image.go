// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/frontend/dockerui"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver/op"
)

const (
	// gatewayName is the frontend that runs another one from an image.
	gatewayName = "gateway.v0"
	builtinName = "dockerfile.v0"
	// inputsCap is what a frontend's image must announce to be given inputs.
	inputsCap = "moby.buildkit.frontend.inputs"
	// maxFrontendMessage bounds a gRPC message of a frontend, in bytes.
	maxFrontendMessage = 16 << 20
	// exitTimeout is how long a frontend that has returned may take to end.
	exitTimeout = 3 * time.Second
)

// runsBuiltin says whether the builtin frontend stands in for the frontend image that a Dockerfile's syntax line names. The
// published images of docker/dockerfile are the same program, so that a build needs not fetch and start one. Who asks
// for the image itself gets it: by the frontend gateway.v0 with the option source, or by the build argument BUILDKIT_SYNTAX.
func (c *Client) runsBuiltin(req gwclient.SolveRequest) bool {
	if _, ok := req.FrontendOpt["cmdline"]; !ok {
		return false // not from a syntax line
	}
	if _, ok := c.opts["build-arg:BUILDKIT_SYNTAX"]; ok {
		return false
	}
	if _, ok := c.Frontends[builtinName]; !ok {
		return false
	}
	named, err := reference.ParseNormalizedNamed(req.FrontendOpt["source"])
	if err != nil {
		return false
	}
	switch named.Name() {
	case "docker.io/docker/dockerfile", "docker.io/docker/dockerfile-upstream":
		_, replaced := c.opts["context:"+req.FrontendOpt["source"]]
		return !replaced
	}
	return false
}

// frontendImage is an image that is a frontend.
type frontendImage struct {
	name       string
	definition *pb.Definition
	rootfs     snapshot.Snapshot
	config     dockerspec.DockerOCIImage
}

// runImage runs a frontend from its image, as a container that speaks the gateway protocol on its standard input and output.
func (c *Client) runImage(ctx context.Context, req gwclient.SolveRequest) (*gwclient.Result, error) {
	source := req.FrontendOpt["source"]
	if source == "" {
		return nil, errors.New("no source specified for gateway: the frontend gateway.v0 needs the option source=IMAGE")
	}
	if _, ok := req.FrontendOpt["gateway-devel"]; ok {
		return nil, errors.New("not supported: gateway-devel")
	}
	if c.Containers == nil {
		return nil, fmt.Errorf("frontend image %q: containers are not available here", source)
	}
	client := c.client(req.FrontendOpt, req.FrontendInputs)
	client.request = &Request{Frontend: gatewayName, Opts: maps.Clone(req.FrontendOpt), Inputs: req.FrontendInputs}
	c.asked.addSub(client)
	img, err := client.pullFrontend(ctx, source)
	if err != nil {
		return nil, fmt.Errorf("frontend %s: %w", source, err)
	}
	if err := img.checkCaps(req); err != nil {
		return nil, err
	}
	res, err := client.serveFrontend(ctx, img)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return res, err
}

// pullFrontend solves the frontend's image, or the named context that takes its place.
func (c *Client) pullFrontend(ctx context.Context, source string) (*frontendImage, error) {
	img := &frontendImage{name: source}
	ui, err := dockerui.NewClient(c)
	if err != nil {
		return nil, err
	}
	var state *llb.State
	named, err := ui.NamedContext(source, dockerui.ContextOpt{})
	if err != nil {
		return nil, err
	}
	if named != nil {
		if c.AllowFrontend != nil {
			if err := c.AllowFrontend(gatewayName, ""); err != nil {
				return nil, fmt.Errorf("a named context is in the place of its image: %w", err)
			}
		}
		var config *dockerspec.DockerOCIImage
		if state, config, err = named.Load(ctx); err != nil {
			return nil, err
		}
		if config != nil {
			img.config = *config
		}
	}
	if state == nil {
		ref, err := reference.ParseNormalizedNamed(source)
		if err != nil {
			return nil, err
		}
		name, dgst, config, err := c.ResolveImageConfig(ctx, reference.TagNameOnly(ref).String(), sourceresolver.Opt{})
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(config, &img.config); err != nil {
			return nil, fmt.Errorf("image config: %w", err)
		}
		if ref, err = reference.ParseNormalizedNamed(name); err != nil {
			return nil, err
		}
		if dgst != "" {
			if ref, err = reference.WithDigest(ref, dgst); err != nil {
				return nil, err
			}
		}
		st := llb.Image(ref.String(), recordTypeFrontend{})
		state = &st
	}
	def, err := state.Marshal(ctx)
	if err != nil {
		return nil, err
	}
	img.definition = def.ToPB()
	ref, err := c.load(ctx, img.definition, nil)
	if err != nil {
		return nil, err
	}
	img.rootfs, err = ref.Snapshot(ctx)
	return img, err
}

// recordTypeFrontend marks the image's records as a frontend's.
type recordTypeFrontend struct{}

func (recordTypeFrontend) SetImageOption(i *llb.ImageInfo) {
	i.RecordType = string(bkclient.UsageRecordTypeFrontend)
}

// checkCaps compares what the request needs with what the image says of itself.
func (img *frontendImage) checkCaps(req gwclient.SolveRequest) error {
	has := capNames(img.config.Config.Labels["moby.buildkit.frontend.caps"])
	needed := capNames(req.FrontendOpt["frontend.caps"])
	if len(req.FrontendInputs) > 0 {
		needed = append(needed, inputsCap)
	}
	for _, name := range needed {
		if !slices.Contains(has, name) {
			return grpcerrors.WrapCode(errdefs.NewUnsupportedFrontendCapError(name), codes.Unimplemented)
		}
	}
	return nil
}

// capNames splits "a,b+c": what follows a plus is a remark.
func capNames(list string) []string {
	var names []string
	for _, c := range strings.Split(list, ",") {
		if name, _, _ := strings.Cut(c, "+"); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// process is how the frontend is started; opts, session and workers reach it as environment variables.
func (img *frontendImage) process(opts map[string]string, session string, workers []gwclient.WorkerInfo) (op.ContainerProcess, error) {
	config := img.config.Config
	p := op.ContainerProcess{Args: []string{"/run"}, Env: slices.Clone(config.Env), Cwd: "/"}
	if len(config.Entrypoint) > 0 {
		p.Args = config.Entrypoint
	}
	if config.WorkingDir != "" {
		p.Cwd = config.WorkingDir
	}
	for i, key := range slices.Sorted(maps.Keys(opts)) {
		p.Env = append(p.Env, fmt.Sprintf("BUILDKIT_FRONTEND_OPT_%d=%s=%s", i, key, opts[key]))
	}
	infos := make([]bkclient.WorkerInfo, len(workers))
	for i, w := range workers {
		infos[i] = bkclient.WorkerInfo{ID: w.ID, Labels: w.Labels, Platforms: w.Platforms}
	}
	data, err := json.Marshal(infos)
	if err != nil {
		return p, err
	}
	p.Env = append(p.Env, "BUILDKIT_SESSION_ID="+session, "BUILDKIT_WORKERS="+string(data), "BUILDKIT_EXPORTEDPRODUCT="+Product)
	return p, nil
}

// serveFrontend runs the frontend's container and serves the gateway API to it.
func (c *Client) serveFrontend(ctx context.Context, img *frontendImage) (_ *gwclient.Result, err error) {
	definition, err := img.definition.MarshalVT()
	if err != nil {
		return nil, err
	}
	metadata, err := c.Containers.FrontendDir(definition)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(metadata)) }()
	spec := op.ContainerSpec{
		Mounts: []*pb.Mount{{Dest: pb.RootMount, Input: 0}},
		Inputs: []snapshot.Snapshot{img.rootfs},
		Files: []executor.Mount{{
			Kind: executor.MountBind, Source: metadata, Target: "/run/config/buildkit/metadata", Readonly: true, NoExec: true,
		}},
	}
	if none, _ := strconv.ParseBool(img.config.Config.Labels["moby.buildkit.frontend.network.none"]); none {
		spec.Network = pb.NetMode_NONE
	}
	process, err := img.process(c.opts, c.SessionID, c.Workers)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ctr, err := c.Containers.New(ctx, c.env(), spec)
	if err != nil {
		return nil, fmt.Errorf("frontend %s: %w", img.name, err)
	}
	defer func() { err = errors.Join(err, ctr.Release()) }()

	bridge := NewBridge(ctx, c)
	defer func() { err = errors.Join(err, bridge.Close()) }()
	conn, stdin, stdout := newPipeConn()
	stop := serveBridge(bridge, conn)
	defer stop()
	stderr := &tail{}
	proc, err := ctr.Start(ctx, process, executor.IO{Stdin: stdin, Stdout: stdout, Stderr: stderr})
	if err != nil {
		return nil, fmt.Errorf("frontend %s: start: %w", img.name, err)
	}
	return bridge.finish(ctx, cancel, proc, img.name, stderr)
}

// errFrontendStays ends a frontend that goes on after it has returned.
var errFrontendStays = errors.New("the frontend has returned, but does not end")

// finish waits for the frontend's container. An error that the frontend has returned says more than that its process failed; and
// a process that failed more than a result.
func (b *Bridge) finish(ctx context.Context, cancel context.CancelCauseFunc, proc executor.Process, name string, stderr *tail) (*gwclient.Result, error) {
	ended := make(chan struct{})
	var exit executor.Exit
	var waitErr error
	go func() {
		defer close(ended)
		exit, waitErr = proc.Wait()
	}()
	killed := false
	select {
	case <-ended:
	case <-b.done:
		timeout := time.NewTimer(exitTimeout)
		defer timeout.Stop()
		select {
		case <-ended:
		case <-timeout.C:
			killed = true
			cancel(errFrontendStays)
			<-ended
		}
	}
	result, returned := (*gwclient.Result)(nil), false
	var returnedErr error
	select {
	case <-b.done:
		result, returnedErr, returned = b.result, b.err, true
	default:
	}
	switch {
	case returnedErr != nil:
		return nil, returnedErr
	case waitErr != nil:
		return nil, fmt.Errorf("frontend %s: %w", name, waitErr)
	case exit.Code != 0 && !killed:
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		what := ""
		if exit.OOMKilled {
			what = ": out of memory"
		}
		return nil, fmt.Errorf("frontend %s failed: exit code: %d%s%s", name, exit.Code, what, stderr)
	case !returned:
		return nil, fmt.Errorf("frontend %s has ended without a result%s", name, stderr)
	}
	return result, nil
}

// serveBridge serves the gateway API on one connection until stop is called, which waits for calls that are under way.
func serveBridge(b *Bridge, conn net.Conn) (stop func()) {
	server := grpc.NewServer(
		grpc.UnaryInterceptor(grpcerrors.UnaryServerInterceptor),
		grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(maxFrontendMessage),
		grpc.MaxSendMsgSize(maxFrontendMessage),
		grpc.WaitForHandlers(true),
	)
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	gwpb.RegisterLLBBridgeServer(server, b)
	listener := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	listener.conn <- conn
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	return func() {
		server.Stop()
		conn.Close()
		serving.Wait()
	}
}

// oneConn is a listener to which one client comes.
type oneConn struct {
	conn chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return pipeAddr{} }

// pipeConn is a connection made of the two standard streams of a container.
type pipeConn struct {
	io.Reader
	io.Writer
	close func()
}

// newPipeConn returns our end, and what the container reads and writes.
func newPipeConn() (conn net.Conn, stdin io.Reader, stdout io.Writer) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	return &pipeConn{Reader: outR, Writer: inW, close: func() {
		inW.Close()
		inR.Close()
		outR.Close()
		outW.Close()
	}}, inR, outW
}

func (c *pipeConn) Close() error {
	c.close()
	return nil
}

func (*pipeConn) LocalAddr() net.Addr              { return pipeAddr{} }
func (*pipeConn) RemoteAddr() net.Addr             { return pipeAddr{} }
func (*pipeConn) SetDeadline(time.Time) error      { return nil }
func (*pipeConn) SetReadDeadline(time.Time) error  { return nil }
func (*pipeConn) SetWriteDeadline(time.Time) error { return nil }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "frontend" }

// maxStderr is how much of a frontend's last words is kept.
const maxStderr = 4 << 10

// tail keeps the end of what a frontend writes to its standard error.
type tail struct {
	mu   sync.Mutex
	data []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, p...)
	if extra := len(t.data) - maxStderr; extra > 0 {
		t.data = slices.Clone(t.data[extra:])
	}
	return len(p), nil
}

// String is for the end of an error message.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimSpace(strings.ToValidUTF8(string(t.data), "?"))
	if text == "" {
		return ""
	}
	return ": " + text
}
