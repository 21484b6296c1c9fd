// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine"
)

func newDaemonCommand(a *app) *cobra.Command {
	var addr string
	var idle time.Duration
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the engine in the foreground, or look after one",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.daemon(cmd.Context(), addr, idle)
		},
	}
	cmd.Flags().StringVar(&addr, "addr", "", "listen at this unix://PATH (default: where other commands look)")
	cmd.Flags().DurationVar(&idle, "idle-timeout", 0, "stop after this long without connections, builds and containers (0: never)")
	cmd.Flags().IntVar(&a.jobs, "jobs", 0, "run so many build steps at once, all builds together [$SLIPWAY_JOBS]\n(default: the number of processors, or what a build asks for)")
	cmd.Flags().Var(&a.maxMemory, "max-memory", "memory for the build steps that run at once, like 512m or 2g [$SLIPWAY_MAX_MEMORY]\n(default: 80% of the machine's)")
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

// daemon serves until a signal or until it has been idle for long enough.
func (a *app) daemon(ctx context.Context, addr string, idle time.Duration) error {
	if a.standalone {
		return errors.New("--standalone makes no sense for a daemon")
	}
	path := a.socket()
	if addr != "" {
		var err error
		if path, err = socketPath(addr); err != nil {
			return err
		}
	}
	if idle < 0 {
		return fmt.Errorf("--idle-timeout %s: is negative", idle)
	}
	e, err := openEngine(ctx, a.engineOptions())
	if err != nil {
		return err
	}
	listener, err := listen(ctx, path)
	if err != nil {
		return errors.Join(err, e.Close())
	}
	err = e.Serve(ctx, listener, idle)
	if closeErr := e.Close(); err == nil {
		err = closeErr
	}
	var stopped *signalError
	if errors.As(err, &stopped) {
		return nil // being told to end is how a daemon ends
	}
	return err
}

// openEngine waits a little for an engine that is just ending: a command may find its socket gone and its store still open.
func openEngine(ctx context.Context, options engine.Options) (*engine.Engine, error) {
	deadline := time.Now().Add(10 * time.Second)
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

// listen binds the socket. A file that an engine has left behind is replaced, one that is answered is not.
func listen(ctx context.Context, path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, pathReason(err))
	}
	if conn, err := unixDialer(path)(ctx); err == nil {
		conn.Close()
		return nil, fmt.Errorf("listen at %s: another engine listens there", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("listen at %s: %w", path, pathReason(err))
		}
	}
	// The socket must never be open to others, not even for the moment before a chmod.
	old := syscall.Umask(0o177)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, reason(err))
	}
	return listener, nil
}

// daemonPID finds the engine of this command line by its socket: the kernel knows who listens.
func (a *app) daemonPID(ctx context.Context) (int, error) {
	if a.standalone {
		return 0, errors.New("--standalone has no daemon")
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

func (a *app) daemonStatus(ctx context.Context) error {
	pid, err := a.daemonPID(ctx)
	if err != nil {
		return err
	}
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
	row("Address", "unix://"+a.socket())
	row("Process", strconv.Itoa(pid))
	row("Version", info.BuildkitVersion.Revision)
	row("BuildKit API", info.BuildkitVersion.Version)
	for _, worker := range workers {
		row("State directory", worker.Labels[engine.LabelRoot])
		row("Builds running", worker.Labels[engine.LabelBuilds])
		row("Layers", worker.Labels[engine.LabelLayers])
		row("Snapshots", worker.Labels[engine.LabelSnapshots])
	}
	row("Disk usage", units.HumanSize(float64(size)))
}
