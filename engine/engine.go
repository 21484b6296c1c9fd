// SPDX-License-Identifier: Apache-2.0

// Package engine is the composition root: it opens the store, owns the executor and the solver, and serves BuildKit's
// gRPC API and the Docker Engine HTTP API on one socket. Nothing outlives an Engine that has been closed: no
// mount, no process, no namespace.
package engine

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	nethttp "net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
	"github.com/seed-68981b69/slipway/engine/history"
	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/cdi"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/userns"
	"github.com/seed-68981b69/slipway/exporter"
	imageexporter "github.com/seed-68981b69/slipway/exporter/image"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	localexporter "github.com/seed-68981b69/slipway/exporter/local"
	"github.com/seed-68981b69/slipway/exporter/ocilayout"
	registryexporter "github.com/seed-68981b69/slipway/exporter/registry"
	snapshotexporter "github.com/seed-68981b69/slipway/exporter/snapshot"
	tarexporter "github.com/seed-68981b69/slipway/exporter/tar"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
	"github.com/seed-68981b69/slipway/solver/source/blob"
	"github.com/seed-68981b69/slipway/solver/source/git"
	"github.com/seed-68981b69/slipway/solver/source/http"
	"github.com/seed-68981b69/slipway/solver/source/image"
	"github.com/seed-68981b69/slipway/solver/source/local"
	layoutsource "github.com/seed-68981b69/slipway/solver/source/ocilayout"
)

// Version is ours; release builds set it.
var Version = "dev"

// The labels by which an engine describes itself to clients of the BuildKit API.
const (
	LabelRoot      = "slipway.root"
	LabelBuilds    = "slipway.builds"
	LabelLayers    = "slipway.layers"
	LabelSnapshots = "slipway.snapshots"
	LabelUser      = "slipway.user"
	LabelNetwork   = "slipway.network"
	LabelLimits    = "slipway.limits"
	LabelHostname  = "org.mobyproject.buildkit.worker.hostname"
	LabelExecutor  = "org.mobyproject.buildkit.worker.executor"
	// LabelHostGateway is the address by which steps reach the engine's host, not there when they cannot; docker's own name for it, which
	// docker buildx reads.
	LabelHostGateway = "org.mobyproject.buildkit.worker.moby.host-gateway-ip"
	// What BuildKit's OCI worker says of itself.
	labelNetwork     = "org.mobyproject.buildkit.worker.network"
	labelSnapshotter = "org.mobyproject.buildkit.worker.snapshotter"
	labelProcesses   = "org.mobyproject.buildkit.worker.oci.process-mode"
	labelSELinux     = "org.mobyproject.buildkit.worker.selinux.enabled"
)

// Options say how to open an engine.
type Options struct {
	// Root is the state directory. One process at a time owns it.
	Root string
	// Jobs is how many build steps run at once; 0 means as many as there are processors, or as a build asks for.
	Jobs int
	// MaxMemory is how much memory, in bytes, the build steps that run at once may need together, as far as earlier runs
	// tell; 0 means what MachineMemory says less a fifth.
	MaxMemory int64
	// Debug logs what happens inside. Level says it more precisely; nil means warnings, or everything with Debug.
	Debug bool
	Level slog.Leveler
	// Log takes the engine's log, as JSON with LogJSON; nil means standard error.
	Log     io.Writer
	LogJSON bool
	// Warnings are logged first: what the owner should know of these options.
	Warnings []string
	// GC says how garbage is collected.
	GC GC

	// Registries are the settings of single registries, by host. RegistryConns bounds the connections to each; 0 is no bound.
	Registries    map[string]registry.Host
	RegistryConns int
	// Entitlements are what any client may ask for ("network.host"). OwnerEntitled lets clients that are the engine's own user
	// ask for everything: they could do it without the engine.
	Entitlements  []string
	OwnerEntitled bool
	// Network is what a step gets that names none; "" means a bridge. NetworkPool is how many namespaces are kept for
	// it; 0 is the default. DNS is how names are resolved instead of the host's way.
	Network     executor.NetworkMode
	NetworkPool int
	DNS         *network.DNS
	// ExtraCA are PEM files with certificate authorities that build steps trust besides those of their images.
	ExtraCA []string
	// CgroupParent is the cgroup of steps that name none, relative to the engine's.
	CgroupParent string
	// Devices are the host's CDI devices; nil lets no step have any.
	Devices *cdi.Devices
	// Labels are shown to clients besides our own, and Platforms instead of what is found.
	Labels    map[string]string
	Platforms []ocispec.Platform
	// History bounds what is kept of builds that have ended.
	History HistoryLimits
	// Frontends says which frontends clients may ask for.
	Frontends buildkitapi.Frontends
	// Provenance is what the provenance of every build says of this machine; may be nil.
	Provenance map[string]any
	// SessionAuthTimeout is how long a client may take to give credentials; nil is BuildKit's default, and what is not positive no limit.
	SessionAuthTimeout *time.Duration
	// Traces receives the spans of builds and those that clients send; nil keeps them for the history only.
	Traces sdktrace.SpanExporter
}

// HistoryLimits bound the history of builds.
type HistoryLimits struct {
	// MaxBuilds is how many are kept; 0 is the default.
	MaxBuilds int
	// MaxAge is for how long; 0 is no limit.
	MaxAge time.Duration
	// Off keeps nothing new.
	Off bool
}

// Engine is an open engine. Its methods may be called concurrently.
type Engine struct {
	log        *slog.Logger
	root       string
	store      *cache.Store
	network    containerNetwork // nil when there is none here, because of networkErr
	networkErr error
	executor   *runc.Runc
	buildkit   *buildkitapi.Server
	caches     *remotecache.Caches
	docker     *dockerapi.Server
	server     *server
	syncer     *syncer
	gc         *collector // nil when switched off
	contexts   *local.Contexts
	built      *built
	// extraLabels are the owner's.
	extraLabels map[string]string
	stepNetwork executor.NetworkMode
	// foreign are the mounts below root that are not the engine's: somebody keeps a part of the state on another disk.
	foreign []string
	sweeps  sync.WaitGroup
}

// Open opens the state directory and everything on top of it. It fails with an error that wraps cache.ErrLocked while
// another process has it open.
func Open(ctx context.Context, opts Options) (_ *Engine, err error) {
	root, err := filepath.Abs(opts.Root)
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e := &Engine{log: newLog(opts), root: root}
	defer func() {
		if err != nil {
			_ = e.Close()
		}
	}()
	for _, w := range opts.Warnings {
		e.log.Warn(w)
	}
	if e.store, err = cache.Open(ctx, root); err != nil {
		return nil, err
	}
	if err := checkIDs(root); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	if s := userns.Started(); s != nil && s.Note != "" {
		e.log.Warn(s.Note)
	}
	if e.networkErr = e.openNetwork(opts); e.networkErr != nil {
		e.log.Warn("containers have no network of their own", "error", e.networkErr)
	}
	runDir := "" // below /run
	if userns.Inside() {
		runDir = e.path("executor", "run") // where /run is, if it is there, belongs to root of the host
	}
	runcOptions := runc.Options{
		StateDir: e.path("executor"), RunDir: runDir, Network: e.network, NetworkError: e.networkErr, DNS: opts.DNS, Log: e.log,
	}
	if opts.Devices != nil {
		runcOptions.Devices = opts.Devices // not a typed nil
	}
	if e.executor, err = runc.New(runcOptions); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e.syncer = newSyncer(e.store.Sync, e.log)
	if e.contexts, err = local.OpenContexts(e.path("contexts-stat"), e.log); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	if err := e.openAPIs(opts); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	// What an engine that was killed has left is gone by now, and nothing of ours is mounted yet.
	if e.foreign, err = mountsUnder(root); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	return e, nil
}

func newLog(opts Options) *slog.Logger {
	w := opts.Log
	if w == nil {
		w = os.Stderr
	}
	level := opts.Level
	switch {
	case level != nil:
	case opts.Debug:
		level = slog.LevelDebug
	default:
		level = slog.LevelWarn
	}
	if opts.LogJSON {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

func (e *Engine) path(names ...string) string {
	return filepath.Join(append([]string{e.root}, names...)...)
}

// openAPIs puts together what serves the two APIs.
func (e *Engine) openAPIs(opts Options) error {
	st := e.store
	// The engine has no credentials of its own: every request brings those of its client.
	remote := registry.New(registry.Options{
		DockerConfigDir: e.path("no-docker-config"), Hosts: opts.Registries, MaxConnsPerHost: opts.RegistryConns,
	})
	sourceDeps := image.Deps{
		Blobs: st.Blobs, Layers: st.Layers, Snapshots: st.Snapshots, Images: st.Images, Records: st.Records, Registry: remote,
	}
	resolver, puller := image.NewResolver(sourceDeps), image.NewPuller(sourceDeps)
	layoutResolver := layoutsource.NewResolver(st.Blobs)
	layerBlobs := layerblob.New(layerblob.Deps{Layers: st.Layers, Blobs: st.Blobs, Records: st.Records, Registry: remote})
	pusher := registryexporter.New(registryexporter.Deps{
		Layers: st.Layers, Blobs: st.Blobs, Images: st.Images, Records: st.Records, Registry: remote, LayerBlobs: layerBlobs,
	})
	layouts := ocilayout.Deps{Layers: layerBlobs, Store: st.Layers, Blobs: st.Blobs, Records: st.Records}
	files := func(ctx context.Context, ref exporter.Ref) (layer.Files, error) {
		return st.Snapshots.View(ctx, ref.Snapshot)
	}

	httpSource := op.SourceFunc(http.New(http.Deps{Layers: st.Layers, Blobs: st.Blobs, Records: st.Records}))
	blobSource := op.SourceFunc(blob.New(blob.Deps{Layers: st.Layers, Blobs: st.Blobs, Registry: resolver.Registry}))
	caches := op.NewCacheMounts(e.path("mounts"))
	repositories := git.NewRepositories(e.path("git"))
	st.AddSource(caches)
	st.AddSource(repositories)
	st.AddSource(held{dir: e.path("contexts"), kind: cache.TypeLocal, description: "context sent by a client"})
	st.AddSource(held{dir: e.path("layers", "uppers"), kind: cache.TypeInternal, description: "files of a running step or container"})
	st.AddSource(held{dir: e.path("executor"), kind: cache.TypeInternal, description: "programs and containers of the engine", name: "executor"})
	st.AddSource(held{dir: e.path("contexts-stat"), kind: cache.TypeInternal, description: "what is remembered of context directories", name: "contexts"})
	extraCA, err := op.LoadExtraCA(e.path("extra-ca"), opts.ExtraCA)
	if err != nil {
		return err
	}
	opDeps := op.Deps{
		Snapshots: st.Snapshots,
		Layers:    st.Layers,
		Executor:  e.executor,
		Sources: map[string]op.SourceFunc{
			"docker-image":      image.New(resolver, puller),
			layoutsource.Scheme: layoutsource.New(layoutResolver, puller),
			blob.RegistryScheme: blobSource,
			blob.LayoutScheme:   blobSource,
			local.Scheme:        local.New(local.Deps{Layers: st.Layers, Contexts: e.contexts}),
			"http":              httpSource,
			"https":             httpSource,
			git.Scheme:          git.New(git.Deps{Layers: st.Layers, Repositories: repositories}),
		},
		Caches:              caches,
		TempDir:             e.path("tmp"),
		DefaultNetwork:      opts.Network,
		DefaultCgroupParent: opts.CgroupParent,
		KeepFailed:          st.KeepFailed,
		ExtraCA:             extraCA,
		// Definitions are checked when they are loaded, with what their own client allows.
		Allowed: func(*solver.Env, string) bool { return true },
	}
	if opts.Devices != nil {
		opDeps.Devices = opts.Devices // not a typed nil
	}
	newOp := op.New(opDeps)

	e.built = &built{
		Images: dockerapi.StoreImages(st.Images, st.Blobs, st.Layers), ensure: st.Layers.Ensure,
		lease: func(id string) func() { return st.Lease(id).Release },
	}
	policies, err := opts.GC.rules(st)
	if err != nil {
		return err
	}
	id, err := e.workerID()
	if err != nil {
		return err
	}
	e.extraLabels, e.stepNetwork = opts.Labels, opts.Network
	builds, err := history.Open(history.Options{
		Records: st.Records, Blobs: st.Blobs, MaxBuilds: opts.History.MaxBuilds, MaxAge: opts.History.MaxAge, Off: opts.History.Off, Log: e.log,
	})
	if err != nil {
		return err
	}
	images := imageexporter.New(imageexporter.Deps{
		Layers: st.Layers, Blobs: st.Blobs, Images: st.Images, Records: st.Records, Pusher: pusher, LayerBlobs: layerBlobs,
	})
	e.caches = remotecache.New(remotecache.Deps{
		Layers: st.Layers, Blobs: st.Blobs, Records: st.Records, Registry: remote, LayerBlobs: layerBlobs, Mounts: caches, Log: e.log,
	})
	st.Layers.OnFetch(remotecache.Scheme, e.caches.Fetch)
	e.buildkit, err = buildkitapi.New(buildkitapi.Options{
		Solver: solver.New(solver.Options{
			Layers: st.Layers, Records: sweepingRecords{st.Records, st.SweepSoon}, Blobs: st.Blobs, NewOp: newOp,
			Jobs: opts.Jobs, MaxMemory: opts.maxMemory(),
			Inputs: builds, Diff: st.Snapshots.Diff,
			Lease: func(id string) func() { return st.Lease(id).Release },
		}),
		View: func(ctx context.Context, s snapshot.Snapshot) (gateway.Files, error) {
			return st.Snapshots.View(ctx, s)
		},
		Images: func(ctx context.Context, env *solver.Env, ref string, p *ocispec.Platform, mode string) (digest.Digest, []byte, error) {
			dgst, config, _, err := resolver.ResolveConfig(ctx, env, ref, p, mode)
			return dgst, config, err
		},
		Layouts: func(ctx context.Context, env *solver.Env, ref, session, store string, p *ocispec.Platform) (digest.Digest, []byte, error) {
			return layoutResolver.ResolveConfig(ctx, env, ref, layoutsource.Layout{Session: session, Store: store}, p)
		},
		Attestations: resolver.Attestations,

		Sources:    func(source *pb.SourceOp) (solver.Source, error) { return op.NewSource(opDeps, source) },
		Containers: op.NewContainers(opDeps),
		Exporters: exporter.Types{
			"image":     images,
			"moby":      images, // what docker's clients call the image store of the engine that they are clients of
			"oci":       ocilayout.New(ocilayout.OCI, layouts),
			"docker":    ocilayout.New(ocilayout.Docker, layouts),
			"local":     localexporter.New(files),
			"tar":       tarexporter.New(files),
			"cacheonly": exporter.CacheOnly,

			snapshotexporter.Type: snapshotexporter.New(e.built.keep),
		},
		Caches:                e.caches,
		History:               builds,
		ProvenanceEnvironment: opts.Provenance,
		Collect:               e.collectSoon,
		DiskUsage:             st.DiskUsage,
		Prune:                 st.Prune,
		FailedStep:            st.FailedStep,
		FailedResult:          st.FailedResult,
		Policies:              policies,

		Entitlements: opts.Entitlements, OwnerEntitled: opts.OwnerEntitled, Devices: opts.Devices,
		Platforms: opts.Platforms, Frontends: opts.Frontends, AuthTimeout: opts.SessionAuthTimeout, Traces: opts.Traces,
		Dir:      e.path("contexts"),
		WorkerID: id,
		Labels:   e.labels,
		Version:  Version,
		Begin: func(ref string) func() {
			lease := st.Lease("build " + ref)
			if e.gc != nil {
				e.gc.begin()
			}
			return func() {
				lease.Release()
				e.syncer.request()
				e.collectSoon()
			}
		},
		Sweep: e.sweepSoon,
		Idle:  st.Layers.DropHeld, // contexts of builds that have ended
		Log:   e.log,
	})
	if err != nil {
		return err
	}
	e.docker, err = dockerapi.New(dockerapi.Options{
		Images:   sweeping{e.built, e},
		Roots:    dockerapi.StoreRoots(st.Snapshots),
		Registry: &remotes{store: st, registry: remote, puller: puller, pusher: pusher, synced: e.syncer.request},
		Archives: &archives{store: st, layers: layerBlobs, puller: puller, dir: e.path("tmp"), synced: e.syncer.request},
		Executor: e.executor,
		Builder:  builder{e},
		Dir:      e.root,
		Version:  Version,
		Rootless: userns.Inside(),
		NoLimits: e.executor.NoLimits() != "", NoEmulation: op.NoEmulation,
		Info: func() [][2]string {
			return [][2]string{
				{"Root Dir", e.root},
				{"Layers", e.layers()},
				{"Snapshots", e.snapshots()},
				{"User", e.user()},
				{"Network", e.networkKind()},
				{"Limits", e.limits()},
				// By this docker's clients know that OCI archives can be loaded, with several platforms and attestations.
				{"driver-type", "io.containerd.snapshotter.v1"},
			}
		},
		Log: e.log,
	})
	if err != nil {
		return err
	}
	if !opts.GC.Off {
		gc := opts.GC
		gc.Policies = policies
		e.gc = newCollector(gc, st, func() bool { return e.buildkit.Active() > 0 }, e.log)
		st.OnGrow(e.gc.add)
		e.gc.request()
	}
	e.server = newServer(e.buildkit.NewGRPC(), e.docker, e.log)
	return nil
}

// collectSoon collects garbage when the engine is idle.
func (e *Engine) collectSoon() {
	if e.gc != nil {
		e.gc.request()
	}
}

// Dial returns a connection to the engine inside this process.
func (e *Engine) Dial(context.Context) (net.Conn, error) {
	client, server, err := socketPair()
	if err != nil {
		return nil, err
	}
	e.server.handle(server)
	return client, nil
}

// Log is where the engine's own log goes.
func (e *Engine) Log() *slog.Logger { return e.log }

// Metrics are for a Prometheus registry.
func (e *Engine) Metrics() []prometheus.Collector { return e.buildkit.Metrics() }

// ServeTraces serves the OpenTelemetry trace service, and nothing else, until stop is called. It closes the listener.
func (e *Engine) ServeTraces(l net.Listener) (stop func()) {
	g := e.buildkit.NewTraceGRPC()
	var served sync.WaitGroup
	served.Go(func() {
		if err := g.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			e.log.Warn("collect traces", "error", err)
		}
	})
	return func() {
		g.Stop()
		served.Wait()
	}
}

// busy says whether anybody needs the engine.
func (e *Engine) busy() bool {
	return e.server.connections() > 0 || e.buildkit.Active() > 0 || e.docker.Running() > 0
}

// errStopping is why builds end when the engine does.
var errStopping = errors.New("the engine is stopping")

// Close cancels builds, kills containers, ends connections and closes the store. What was built so far is kept.
func (e *Engine) Close() error {
	var errs []error
	if e.buildkit != nil {
		e.buildkit.Cancel(errStopping)
	}
	if e.docker != nil {
		errs = append(errs, e.docker.Close())
	}
	if e.server != nil {
		e.server.close()
	}
	if e.buildkit != nil {
		errs = append(errs, e.buildkit.Close())
	}
	if e.built != nil {
		e.built.close()
	}
	e.sweeps.Wait()
	if e.gc != nil && e.gc.close() {
		if err := e.collectBeforeEnd(); err != nil {
			errs = append(errs, err)
		}
	}
	if e.contexts != nil {
		e.contexts.Close()
	}
	if e.syncer != nil {
		e.syncer.close()
	}
	if e.executor != nil {
		errs = append(errs, e.executor.Close())
	}
	if e.network != nil {
		errs = append(errs, e.network.Close())
	}
	if e.store != nil {
		errs = append(errs, e.store.Close(), e.detachMounts())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close engine: %w", err)
	}
	return nil
}

// builder gives connections that docker's clients have made through the Docker API to BuildKit's.
type builder struct{ engine *Engine }

func (b builder) ServeGRPC(conn net.Conn) {
	if !b.engine.server.grpcConns.put(conn) {
		conn.Close()
	}
}

func (b builder) ServeSession(ctx context.Context, w nethttp.ResponseWriter, r *nethttp.Request) error {
	return b.engine.buildkit.ServeSession(ctx, w, r)
}

// sweeping deletes what nothing names any more after an image was deleted, in the background.
type sweeping struct {
	dockerapi.Images
	engine *Engine
}

func (s sweeping) Delete(ctx context.Context, img dockerapi.Image) error {
	if err := s.Images.Delete(ctx, img); err != nil {
		return err
	}
	s.engine.sweepSoon()
	return nil
}

// sweepSoon deletes what nothing names any more, in the background.
func (e *Engine) sweepSoon() {
	e.sweeps.Go(func() {
		if _, err := e.store.Sweep(context.Background()); err != nil {
			e.log.Warn("delete what nothing names any more", "error", err)
		}
	})
}

// sweepingRecords sweeps when records cannot be written, on a full disk for instance: the layers that they would have named take
// room for nothing.
type sweepingRecords struct {
	solver.Records
	sweepSoon func()
}

func (r sweepingRecords) PutBatch(ctx context.Context, items []record.Item) error {
	err := r.Records.PutBatch(ctx, items)
	if err != nil {
		r.sweepSoon()
	}
	return err
}

// workerID is made once for a state directory.
func (e *Engine) workerID() (string, error) {
	const bucket, key = "engine", "worker-id"
	if id, ok, err := e.store.Records.GetValue(bucket, key); err != nil {
		return "", err
	} else if ok {
		return string(id), nil
	}
	id := strings.ToLower(rand.Text())
	return id, e.store.Records.PutValue(bucket, key, []byte(id))
}

// labels describe the engine as it is now.
func (e *Engine) labels() map[string]string {
	labels := map[string]string{
		LabelRoot:      e.root,
		LabelBuilds:    strconv.Itoa(e.buildkit.Active()),
		LabelLayers:    e.layers(),
		LabelSnapshots: e.snapshots(),
		LabelUser:      e.user(),
		LabelNetwork:   e.networkKind(),
		LabelLimits:    e.limits(),
		LabelExecutor:  "libcontainer",
	}
	if name, err := os.Hostname(); err == nil {
		labels[LabelHostname] = name
	}
	labels[labelNetwork] = string(cmp.Or(e.stepNetwork, executor.NetworkBridge))
	labels[labelSnapshotter], labels[labelProcesses], labels[labelSELinux] = "overlayfs", "sandbox", "false"
	switch {
	case e.stepNetwork == executor.NetworkHost:
		labels[LabelHostGateway] = "127.0.0.1"
	case e.network != nil && e.network.Host().IsValid():
		labels[LabelHostGateway] = e.network.Host().String()
	}
	maps.Copy(labels, e.extraLabels)
	return labels
}

// layers says in which form layers are kept, and why.
func (e *Engine) layers() string {
	info := e.store.Layers.Info()
	if info.Reason == "" {
		return "tar + EROFS"
	}
	return "directories (" + info.Reason + ")"
}

// snapshots says how snapshots are mounted, and why.
func (e *Engine) snapshots() string {
	info := e.store.Snapshots.Info()
	if info.Reason == "" {
		return info.Driver
	}
	return info.Driver + " (" + info.Reason + ")"
}
