// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command slipway-runner is the small process that calls libcontainer. libcontainer runs its own executable again
// inside every container, so this one holds nothing else and starts fast. An engine starts one runner and speaks to
// it over a socket (executor/runc/wire); when the engine's end closes, the runner kills and removes all its
// containers and exits.
//
// It has three faces: without arguments it serves; "init" is the first process in a container, started by libcontainer,
// which makes the container as the runner has planned it (setup.go) or, without a plan, as libcontainer does; "reap" is
// the small init that users ask for with --init.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	_ "github.com/opencontainers/cgroups/devices" // device filters of cgroups, on both versions
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // must run before the Go runtime starts threads
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

func init() {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case "init": // neither of the two returns
		resetTimerSlack()
		if planned() {
			runPlan()
		}
		libcontainer.Init()
	case "reap":
		os.Exit(reap(os.Args[2:]))
	}
}

// timerSlack is the kernel's own, in nanoseconds: what processes of containers have.
const timerSlack = 50_000

// resetTimerSlack gives this thread, which will be the user's command, the kernel's timer slack instead of the runner's. The
// threads of Go's runtime keep the runner's.
func resetTimerSlack() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, timerSlack, 0, 0, 0) }

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "slipway-runner: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	var st unix.Stat_t
	if err := unix.Fstat(wire.SocketFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("this program is started by slipway and has no use on its own")
	}
	unix.CloseOnExec(wire.SocketFD)
	conn, err := wire.Conn(os.NewFile(wire.SocketFD, "engine"))
	if err != nil {
		return err
	}
	// Standard error goes to the engine's log. Warnings of libcontainer are about hosts, not about steps.
	logrus.SetOutput(os.Stderr)
	logrus.SetLevel(logrus.WarnLevel)

	// libcontainer hands this on to the first processes of containers, and nothing else: theirs is the work of one thread, and a runtime
	// that need not find out how many processors its cgroup has starts faster. This process has counted its own already.
	os.Setenv("GOMAXPROCS", "1")

	// The terminal's Ctrl-C is for the engine to decide about.
	// Caught and not ignored: what is ignored stays so across exec, and no container could handle its own Ctrl-C.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	return newServer(conn).serve(ctx)
}
