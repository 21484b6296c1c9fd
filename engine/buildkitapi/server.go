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
	"os"
	"path/filepath"
	"slices"
	"sync"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/history"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/dockerfile"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// BuildKitVersion is the release of BuildKit whose API this is; clients decide by it what they may ask for.
const BuildKitVersion = "v0.34.2"

// maxMessage is BuildKit's own bound for a gRPC message, in bytes.
const maxMessage = 16 << 20

// Options are what the API is made of.
type Options struct {
	Solver *solver.Solver
	// View opens a solved snapshot for reading.
	View    func(ctx context.Context, s snapshot.Snapshot) (gateway.Files, error)
	Images  gateway.ImageResolver
	Layouts gateway.LayoutResolver
	// Sources makes sources that are asked what they stand for, and Containers what frontends run.
	Sources    func(*pb.SourceOp) (solver.Source, error)
	Containers *op.Containers
	Exporters  exporter.Types
	// DiskUsage lists what the store holds.
	DiskUsage func(ctx context.Context, filter cache.UsageFilter) ([]cache.Usage, error)
	// Prune deletes what policies say.
	Prune func(ctx context.Context, policies []cache.Policy) (cache.Pruned, error)
	// Policies are by what the engine collects garbage itself.
	Policies []cache.Policy
	// Dir is for directories that clients send; what is in it does not outlive the process.
	Dir string
	// Jobs bounds the steps that one build runs at once; 0 is the solver's default.
	Jobs int
	// WorkerID and Labels describe this engine to clients.
	WorkerID string
	Labels   func() map[string]string
	// Version is ours.
	Version string
	// Begin is called before every build and what it returns after it, however it ended. May be nil.
	Begin func(ref string) (end func())
	// History keeps what is known of builds that have ended.
	History *history.Store
	// Collect is called when something has been deleted from the history: other blobs may not be needed any more. May be nil.
	Collect func()
	// Idle is called when the last build has ended; none begins before it returns. May be nil.
	Idle func()
	Log  *slog.Logger
}

// Server is the API. Its methods may be called concurrently.
type Server struct {
	controlapi.UnimplementedControlServer
	Options
	sessions *session.Manager
	builds   *builds
	bridges  *bridges
	health   *health.Server
	cleanups sync.WaitGroup

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
	s := &Server{Options: opts, sessions: sessions, builds: newBuilds(), health: health.NewServer()}
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
	grpc_health_v1.RegisterHealthServer(g, s.health)
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
	s.cleanups.Wait()
	return nil
}

// Info implements the Control API.
func (s *Server) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: s.version()}, nil
}

func (s *Server) version() *apitypes.BuildkitVersion {
	return &apitypes.BuildkitVersion{
		Package:           "github.com/seed-68981b69/slipway",
		Version:           BuildKitVersion,
		Revision:          s.Version,
		DockerfileVersion: dockerfile.Version(),
	}
}

// Platforms are what images can be built for and their steps run on here.
func Platforms() []ocispec.Platform {
	return append([]ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())}, op.EmulatedPlatforms()...)
}

func (s *Server) workers() []gwclient.WorkerInfo {
	return []gwclient.WorkerInfo{{ID: s.WorkerID, Labels: s.Options.Labels(), Platforms: Platforms()}}
}

// ListWorkers implements the Control API: the engine is one worker.
func (s *Server) ListWorkers(_ context.Context, req *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	if len(req.Filter) > 0 {
		return nil, status.Error(codes.Unimplemented, "not supported yet: filters for workers")
	}
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID:              s.WorkerID,
		Labels:          s.Options.Labels(),
		Platforms:       pb.PlatformsFromSpec(Platforms()),
		GCPolicy:        gcPolicies(s.Policies),
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
