// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cmd/slipway/clientgc"
	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/config"
)

func newDaemonCommand(a *app) *cobra.Command {
	var d daemonFlags
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the engine in the foreground, or look after one",
		Long: "Run the engine in the foreground, or look after one.\n\n" +
			"Settings come from --config, a buildkitd.toml; what flags say comes first. TCP is served with mutual TLS only.",
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if needsNamespace() && !a.standalone {
				return a.daemonInside(cmd.Context())
			}
			return a.daemon(cmd.Context(), d)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&d.addr, "addr", nil, "listen at this unix://PATH, tcp://HOST:PORT or fd:// (systemd); may be repeated (default: where other commands look)")
	f.StringVar(&d.group, "group", "", "group (name or number) that may use the unix sockets")
	f.StringVar(&d.debugAddr, "debugaddr", "", "serve profiles, variables and metrics at this HOST:PORT")
	f.StringVar(&d.otelSocket, "otel-socket-path", "", "collect OpenTelemetry traces at this socket")
	f.StringArrayVar(&d.entitlements, "allow-insecure-entitlement", nil, "let any client ask for network.host, security.insecure or device; may be repeated")
	f.DurationVar(&d.idle, "idle-timeout", 0, "stop after this long without connections, builds and containers (0: never)")
	f.BoolVar(&a.impatient, "impatient", false, "fail at once when the state directory is in use")
	_ = f.MarkHidden("impatient")
	f.IntVar(&a.jobs, "jobs", 0, "run so many build steps at once, all builds together [$SLIPWAY_JOBS]\n(default: the number of processors, or what a build asks for)")
	f.Var(&a.maxMemory, "max-memory", "memory for the build steps that run at once, like 512m or 2g [$SLIPWAY_MAX_MEMORY]\n(default: 80% of the machine's)")
	f.StringArrayVar(&a.extraCA, "extra-ca", nil, "PEM file with certificate authorities that build steps trust besides those of their images, and that are in no\nlayer; may be repeated [$SLIPWAY_EXTRA_CA, with colons between]")
	cmd.AddCommand(
		&cobra.Command{
			Use: "stop", Short: "Stop the engine and wait until it has ended", Args: args(0, 0),
			RunE: func(cmd *cobra.Command, _ []string) error { return a.daemonStop(cmd.Context()) },
		},
		&cobra.Command{
			Use: "status", Short: "Describe the engine", Args: args(0, 0),
			RunE: func(cmd *cobra.Command, _ []string) error { return a.daemonStatus(cmd.Context()) },
		},
	)
	return cmd
}

// daemonFlags are the flags of `slipway daemon`.
type daemonFlags struct {
	addr, entitlements           []string
	group, debugAddr, otelSocket string
	idle                         time.Duration
}

// daemon serves until a signal or until it has been idle for long enough.
func (a *app) daemon(ctx context.Context, d daemonFlags) error {
	if a.standalone {
		return errors.New("--standalone makes no sense for a daemon")
	}
	if d.idle < 0 {
		return fmt.Errorf("--idle-timeout %s: is negative", d.idle)
	}
	conf, err := a.loadConfig()
	if err != nil {
		return err
	}
	switch {
	case len(d.addr) > 0:
		conf.GRPC.Address = d.addr
	case len(conf.GRPC.Address) == 0 || a.host != "":
		conf.GRPC.Address = []string{a.address()}
	}
	if a.debug {
		conf.Log.Level = "debug"
	}
	if a.tls.ca != "" || a.tls.cert != "" || a.tls.key != "" || a.tls.dir != "" {
		t, err := a.tls.resolve()
		if err != nil {
			return err
		}
		conf.GRPC.TLS = config.TLS{CA: t.ca, Cert: t.cert, Key: t.key}
	}
	if d.group != "" {
		gid, err := groupID(d.group)
		if err != nil {
			return fmt.Errorf("--group: %w", err)
		}
		conf.GRPC.GID = &gid
	}
	conf.GRPC.DebugAddress = cmp.Or(d.debugAddr, conf.GRPC.DebugAddress)
	conf.OTEL.SocketPath = cmp.Or(d.otelSocket, conf.OTEL.SocketPath)
	if len(d.entitlements) > 0 {
		if err := config.CheckEntitlements(d.entitlements); err != nil {
			return fmt.Errorf("--allow-insecure-entitlement: %w", err)
		}
		conf.Entitlements = d.entitlements
	}
	options, err := engineOptions(&conf)
	if err != nil {
		return err
	}
	options.Root, options.OwnerEntitled = a.root, true
	a.limit(&options)
	return a.serve(ctx, &conf, options, d.idle, false)
}

// serve opens the engine and serves what the configuration names. With early clients can connect before the engine is open, and are
// answered when it is.
func (a *app) serve(ctx context.Context, conf *config.Config, options engine.Options, idle time.Duration, early bool) error {
	var listeners []engine.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	var err error
	if early {
		if listeners, err = openListeners(ctx, conf.GRPC); err != nil {
			return err
		}
	}
	exporter, err := spanExporter(ctx)
	if err != nil {
		return err
	}
	options.Traces = exporter
	e, err := openEngine(ctx, options, a.impatient)
	if err != nil {
		return err
	}
	if !early {
		listeners, err = openListeners(ctx, conf.GRPC)
	}
	if err == nil {
		err = a.serveEngine(ctx, e, conf, listeners, idle)
	}
	if closeErr := e.Close(); err == nil {
		err = closeErr
	}
	if exporter != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if shutErr := exporter.Shutdown(ctx); err == nil && shutErr != nil {
			err = fmt.Errorf("send the last spans: %w", shutErr)
		}
	}
	var stopped *signalError
	if errors.As(err, &stopped) {
		return nil // being told to end is how a daemon ends
	}
	return err
}

// serveEngine returns when the engine is to end.
func (a *app) serveEngine(ctx context.Context, e *engine.Engine, conf *config.Config, listeners []engine.Listener, idle time.Duration) error {
	if path := conf.OTEL.SocketPath; path != "" {
		l, err := listen(ctx, path, conf.GRPC)
		if err != nil {
			return fmt.Errorf("traces: %w", err)
		}
		defer e.ServeTraces(l)()
	}
	if address := conf.GRPC.DebugAddress; address != "" {
		stop, err := serveDebug(address, e)
		if err != nil {
			return err
		}
		defer stop()
	}
	for _, l := range listeners {
		e.Log().Info("running server", "at", l.Addr().Network()+"://"+l.Addr().String())
	}
	notify(daemon.SdNotifyReady)
	err := e.Serve(ctx, idle, listeners...)
	notify(daemon.SdNotifyStopping)
	return err
}

// openEngine waits a little for an engine that is just ending: a command may find its socket gone and its store still open.
func openEngine(ctx context.Context, options engine.Options, impatient bool) (*engine.Engine, error) {
	clientgc.End()
	deadline := time.Now().Add(10 * time.Second)
	if impatient {
		deadline = time.Now()
	}
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		e, err := engine.Open(ctx, options)
		if err == nil || !errors.Is(err, cache.ErrLocked) || time.Now().After(deadline) {
			return e, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// daemonPID finds the engine of this command line by its socket: the kernel knows who listens.
func (a *app) daemonPID(ctx context.Context) (int, error) {
	if a.standalone {
		return 0, errors.New("--standalone has no daemon")
	}
	if _, ok := tcpAddress(a.host); ok {
		return 0, fmt.Errorf("the engine at %s is reached over TCP: only an engine on a unix socket can be stopped or described", a.host)
	}
	conn, err := unixDialer(a.socket())(ctx)
	if err != nil {
		if nobodyListens(err) {
			return 0, fmt.Errorf("no engine listens at %s", a.socket())
		}
		return 0, fmt.Errorf("engine at %s: %w", a.socket(), reason(err))
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	if cred.Pid == 0 {
		return 0, fmt.Errorf("the engine at %s runs in another PID namespace", a.socket())
	}
	return int(cred.Pid), nil
}

func (a *app) daemonStop(ctx context.Context) error {
	pid, err := a.daemonPID(ctx)
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop the engine (process %d): %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop the engine (process %d): %w", pid, err)
	}
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 200) // wakes up to look at ctx
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the engine (process %d): %w", pid, err)
		}
		if n > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// newInfoCommand makes `slipway info`: what `daemon status` says, of an engine that is started when none runs.
func newInfoCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "info",
		Short: "Say what the engine has, what it cannot have here, and why",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := a.connect(cmd.Context()); err != nil {
				return err
			}
			return a.describe(cmd.Context(), 0)
		},
	}
}

func (a *app) daemonStatus(ctx context.Context) error {
	pid, err := a.daemonPID(ctx)
	if err != nil {
		return err
	}
	return a.describe(ctx, pid)
}

// describe prints what the engine says of itself; pid is left out when it is 0.
func (a *app) describe(ctx context.Context, pid int) error {
	client, err := a.buildkit(ctx)
	if err != nil {
		return err
	}
	info, err := client.Info(ctx)
	if err != nil {
		return err
	}
	workers, err := client.ListWorkers(ctx)
	if err != nil {
		return err
	}
	usage, err := client.DiskUsage(ctx)
	if err != nil {
		return err
	}
	a.printStatus(pid, info, workers, usage)
	return nil
}

func (a *app) printStatus(pid int, info *bkclient.Info, workers []*bkclient.WorkerInfo, usage []*bkclient.UsageInfo) {
	var size int64
	for _, u := range usage {
		size += u.Size
	}
	w := tabwriter.NewWriter(a.stdout(), 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s:\t%s\n", name, value)
		}
	}
	row("Address", a.address())
	if pid > 0 {
		row("Process", strconv.Itoa(pid))
	}
	row("Version", info.BuildkitVersion.Revision)
	row("BuildKit API", info.BuildkitVersion.Version)
	for _, worker := range workers {
		row("State directory", worker.Labels[engine.LabelRoot])
		row("Builds running", worker.Labels[engine.LabelBuilds])
		row("Layers", worker.Labels[engine.LabelLayers])
		row("Snapshots", worker.Labels[engine.LabelSnapshots])
		row("User", worker.Labels[engine.LabelUser])
		row("Network", worker.Labels[engine.LabelNetwork])
		row("Limits", worker.Labels[engine.LabelLimits])
	}
	row("Disk usage", units.HumanSize(float64(size)))
}
