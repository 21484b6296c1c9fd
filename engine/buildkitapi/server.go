// SPDX-License-Identifier: Apache-2.0

// Package buildkitapi serves BuildKit's Control API (moby.buildkit.v1) and the gateway API beside it over gRPC, so that
// buildctl, docker buildx and our own `slipway build` are clients alike. It checks every field of a request: what is not
// done here is refused by name, never ignored.
//
// One build is one Solve call. It ends when the call ends: a client that goes away takes its build with it.
package buildkitapi

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	_ "github.com/moby/buildkit/util/grpcutil/encoding/proto" // generated code instead of reflection, in client and engine
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/history"
	"github.com/seed-68981b69/slipway/engine/provenance"
	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/executor/cdi"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/dockerfile"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// BuildKitVersion is the release of BuildKit whose API this is; clients decide by it what they may ask for.
const BuildKitVersion = "v0.34.2"

// Package is the module that clients are told of beside the version.
const Package = "github.com/seed-68981b69/slipway"

// maxMessage is BuildKit's own bound for a gRPC message, in bytes.
const maxMessage = 16 << 20

// Options are what the API is made of.
type Options struct {
	Solver *solver.Solver
	// View opens a solved snapshot for reading.
	View    func(ctx context.Context, s snapshot.Snapshot) (gateway.Files, error)
	Images  gateway.ImageResolver
	Layouts gateway.LayoutResolver
	// Attestations finds what is said about images.
	Attestations gateway.AttestationResolver
	// Sources makes sources that are asked what they stand for, and Containers what frontends run.
	Sources    func(*pb.SourceOp) (solver.Source, error)
	Containers *op.Containers
	Exporters  exporter.Types
	// Caches are where builds import and export results.
	Caches *remotecache.Caches
	// DiskUsage lists what the store holds.
	DiskUsage func(ctx context.Context, filter cache.UsageFilter) ([]cache.Usage, error)
	// Prune deletes what policies say.
	Prune func(ctx context.Context, policies []cache.Policy) (cache.Pruned, error)
	// FailedStep finds what is kept of a failed step, by its ID; FailedResult what it has left, by the names in its error. They
	// may be nil.
	FailedStep   func(id string) (*cache.FailedStep, error)
	FailedResult func(ctx context.Context, resultID string) (snapshot.Snapshot, error)
	// Policies are by what the engine collects garbage itself.
	Policies []cache.Policy
	// Entitlements are what any client may ask for. OwnerEntitled lets a client on this host that is the engine's own user
	// ask for everything.
	Entitlements  []string
	OwnerEntitled bool
	// Devices are the host's CDI devices; nil when there are none.
	Devices *cdi.Devices
	// Platforms are what clients are told can be built for; none means what is found.
	Platforms []ocispec.Platform
	// Frontends says which frontends clients may ask for.
	Frontends Frontends
	// AuthTimeout is how long a client may take to give credentials; nil is BuildKit's default, and what is not positive no limit.
	AuthTimeout *time.Duration
	// Traces receives the spans of builds and those that clients send; nil keeps them for the history only.
	Traces sdktrace.SpanExporter
	// Dir is for directories that clients send; what is in it does not outlive the process.
	Dir string
	// WorkerID and Labels describe this engine to clients.
	WorkerID string
	Labels   func() map[string]string
	// Version is ours.
	Version string
	// Begin is called before every build and what it returns after it, however it ended. May be nil.
	Begin func(ref string) (end func())
	// ProvenanceEnvironment is what every provenance says of the machine; may be nil.
	ProvenanceEnvironment map[string]any
	// History keeps what is known of builds that have ended.
	History *history.Store
	// Collect is called when something has been deleted from the history: other blobs may not be needed any more. May be nil.
	Collect func()
	// Sweep deletes what nothing names any more. May be nil.
	Sweep func()
	// Idle is called when the last build has ended; none begins before it returns. May be nil.
	Idle func()
	Log  *slog.Logger
}

// Frontends says which frontends clients may ask for.
type Frontends struct {
	// NoDockerfile and NoGateway switch off "dockerfile.v0", and "gateway.v0" with frontends from images.
	NoDockerfile, NoGateway bool
	// Repositories are the only ones that frontends may come from, by name without tag; none means any.
	Repositories []string
}

// Server is the API. Its methods may be called concurrently.
type Server struct {
	controlapi.UnimplementedControlServer
	Options
	sessions *session.Manager
	builds   *builds
	requests *provenance.Requests
	bridges  *bridges
	health   *health.Server
	cleanups sync.WaitGroup
	traces   *traces
	pending  pendingTraces
	closing  chan struct{} // closed by Close
	shut     sync.Once
	stats    stats

	activity sync.Mutex // guards what follows
	running  int        // builds
	received []string   // directories that clients have sent for builds that have ended
	// unsettled are the builds that have answered while something is still written down; closed when it is.
	unsettled map[chan struct{}]bool
}

// enter begins a build.
func (s *Server) enter() {
	s.activity.Lock()
	defer s.activity.Unlock()
	s.running++
}

// settling says that a build is about to answer, and what it returns that nothing of it is left to do.
func (s *Server) settling() (ended func()) {
	done := make(chan struct{})
	s.activity.Lock()
	defer s.activity.Unlock()
	if s.unsettled == nil {
		s.unsettled = map[chan struct{}]bool{}
	}
	s.unsettled[done] = true
	return func() {
		s.activity.Lock()
		defer s.activity.Unlock()
		delete(s.unsettled, done)
		close(done)
	}
}

// settle waits for the builds that have answered before, so that nothing is in use because of them.
func (s *Server) settle(ctx context.Context) error {
	s.activity.Lock()
	unsettled := slices.Collect(maps.Keys(s.unsettled))
	s.activity.Unlock()
	for _, done := range unsettled {
		select {
		case <-done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// leave ends a build. Directories that were sent for it go with the last build: another one may have found that it
// needs the same content and be reading it from here.
func (s *Server) leave(received []string) {
	s.activity.Lock()
	defer s.activity.Unlock()
	s.running--
	s.received = append(s.received, received...)
	if s.running > 0 {
		return
	}
	if s.Idle != nil {
		s.Idle()
	}
	if dirs := s.received; len(dirs) > 0 {
		s.received = nil
		s.cleanups.Go(func() {
			for _, dir := range dirs {
				if err := os.RemoveAll(dir); err != nil {
					s.Log.Warn("remove received files", "error", err)
				}
			}
		})
	}
}

// New returns a server.
func New(opts Options) (*Server, error) {
	sessions, err := session.NewManager()
	if err != nil {
		return nil, err
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	opts.Dir = filepath.Clean(opts.Dir)
	if err := sweepTransfers(opts.Dir); err != nil {
		return nil, err
	}
	s := &Server{Options: opts, sessions: sessions, builds: newBuilds(), requests: provenance.NewRequests(), health: health.NewServer(), traces: newTraces(opts.Traces), closing: make(chan struct{}), stats: newStats()}
	s.bridges = &bridges{builds: s.builds}
	return s, nil
}

// NewGRPC returns a gRPC server with the API on it.
func (s *Server) NewGRPC() *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(PeerCredentials()),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(grpcerrors.UnaryServerInterceptor),
		grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
	)
	controlapi.RegisterControlServer(g, s)
	gwpb.RegisterLLBBridgeServer(g, s.bridges)
	contentapi.RegisterContentServer(g, &contentServer{history: s.History})
	tracev1.RegisterTraceServiceServer(g, s.traces)
	grpc_health_v1.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	return g
}

// Active is the number of running builds.
func (s *Server) Active() int { return s.builds.active() }

// Cancel ends all running builds.
func (s *Server) Cancel(cause error) {
	s.builds.cancelAll(cause)
	s.History.Close()
}

// Close waits for what goes on after builds. All builds must have ended.
func (s *Server) Close() error {
	s.health.Shutdown()
	s.shut.Do(func() { close(s.closing) })
	s.cleanups.Wait()
	return nil
}

// Info implements the Control API.
func (s *Server) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: s.version()}, nil
}

func (s *Server) version() *apitypes.BuildkitVersion {
	return &apitypes.BuildkitVersion{
		Package:           Package,
		Version:           BuildKitVersion,
		Revision:          s.Version,
		DockerfileVersion: dockerfile.Version(),
	}
}

// platforms are what images can be built for and their steps run on here.
func (s *Server) platforms() []ocispec.Platform {
	if len(s.Platforms) > 0 {
		return s.Platforms
	}
	return append([]ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())}, op.EmulatedPlatforms()...)
}

// devices are the CDI devices that builds can ask for.
func (s *Server) devices() []*apitypes.CDIDevice {
	if s.Devices == nil {
		return nil
	}
	list, err := s.Devices.List()
	if err != nil {
		s.Log.Warn("list devices", "error", err)
	}
	var out []*apitypes.CDIDevice
	for _, d := range list {
		out = append(out, &apitypes.CDIDevice{Name: d.Name, AutoAllow: d.AutoAllowed, Annotations: d.Annotations})
	}
	return out
}

func (s *Server) workers() []gwclient.WorkerInfo {
	return []gwclient.WorkerInfo{{ID: s.WorkerID, Labels: s.labels(), Platforms: s.platforms()}}
}

func (s *Server) labels() map[string]string {
	labels := maps.Clone(s.Options.Labels())
	labels[OptionsLabel] = ownOptions
	return labels
}

// ListWorkers implements the Control API: the engine is one worker.
func (s *Server) ListWorkers(_ context.Context, req *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	labels := s.labels()
	filter, err := filters.ParseAll(req.Filter...)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if !filter.Match(filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case len(path) == 1 && path[0] == "id":
			return s.WorkerID, true
		case len(path) > 1 && path[0] == "labels":
			value, ok := labels[strings.Join(path[1:], ".")]
			return value, ok
		}
		return "", false
	})) {
		return &controlapi.ListWorkersResponse{}, nil
	}
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID:              s.WorkerID,
		Labels:          labels,
		Platforms:       pb.PlatformsFromSpec(s.platforms()),
		GCPolicy:        gcPolicies(s.Policies),
		CDIDevices:      s.devices(),
		BuildkitVersion: s.version(),
	}}}, nil
}

// Session implements the Control API: the stream becomes a connection on which the client is the server.
func (s *Server) Session(stream controlapi.Control_SessionServer) error {
	conn, closed, opts := grpchijack.Hijack(stream)
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	go func() {
		select {
		case <-closed:
			cancel(errors.New("the client has closed its session"))
		case <-ctx.Done():
		}
	}()
	return s.sessions.HandleConn(ctx, conn, opts)
}

// ServeSession takes over the connection of an HTTP request as a client's session, which is how docker's clients offer theirs. It returns
// when the session has ended, and fails when the request is not one for a session.
func (s *Server) ServeSession(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	return s.sessions.HandleHTTPRequest(ctx, w, r)
}
