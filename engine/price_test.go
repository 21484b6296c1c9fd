// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"golang.org/x/sys/unix"
)

// BenchmarkChain is the price of a RUN that does nothing: one iteration solves a chain of twenty, uncached, through the
// engine's own API, and a step's time is the solve's divided by twenty. engine-cpu-ms/step leaves out the runner, which BenchmarkTrue of
// executor/runc has.
func BenchmarkChain(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: mounts and containers: SKIPPED")
	}
	if err := runner(); err != nil {
		b.Skipf("needs slipway-runner: %v: SKIPPED", err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		b.Skip("needs busybox (Debian: busybox-static): SKIPPED")
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		b.Fatal(err)
	}
	e, err := Open(b.Context(), Options{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			b.Error(err)
		}
	}()
	client, err := bkclient.New(b.Context(), "", bkclient.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return e.Dial(ctx) }))
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()

	const steps = 20
	var took []time.Duration
	var cpu time.Duration
	run := 0
	for b.Loop() {
		run++
		state := llb.Scratch().File(llb.Mkdir("/bin", 0o755)).File(llb.Mkfile("/bin/busybox", 0o755, data))
		for i := range steps {
			state = state.Run(llb.Args([]string{"/bin/busybox", "true"}), llb.AddEnv("STEP", fmt.Sprintf("%d-%d-%d", os.Getpid(), run, i))).Root()
		}
		def, err := state.Marshal(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		before, start := selfCPU(b), time.Now()
		if _, err := client.Solve(b.Context(), def, bkclient.SolveOpt{}, nil); err != nil {
			b.Fatal(err)
		}
		cpu += selfCPU(b) - before
		took = append(took, time.Since(start)/steps)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/step(median)")
	b.ReportMetric(float64(cpu.Microseconds())/1000/float64(steps*run), "engine-cpu-ms/step")
}

func selfCPU(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
