// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// BenchmarkTrue is the price of a step that does nothing, from Start to the end of Wait, one after the other. The
// median says more than the mean: it is reported as ms/step.
func BenchmarkTrue(b *testing.B) {
	runctest.Runner(b)
	n, err := network.New(network.Options{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	r, err := runc.New(runc.Options{StateDir: b.TempDir(), Network: n})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	rootfs := runctest.Rootfs(b)
	for _, mode := range []executor.NetworkMode{executor.NetworkHost, executor.NetworkNone, executor.NetworkBridge} {
		b.Run(string(mode), func(b *testing.B) {
			var took []time.Duration
			i := 0
			cpu := cpuTime(b, r)
			for b.Loop() {
				i++
				start := time.Now()
				p, err := r.Start(b.Context(), executor.Spec{
					ID: fmt.Sprintf("b%d-%d", os.Getpid(), i), Rootfs: rootfs, Args: []string{"/bin/true"}, Env: []string{"PATH=/bin"},
					Cwd: "/", Network: mode, NoNewPrivileges: true,
				}, executor.IO{})
				if err != nil {
					b.Fatal(err)
				}
				if exit, err := p.Wait(); err != nil || exit.Code != 0 {
					b.Fatal(exit, err)
				}
				took = append(took, time.Since(start))
			}
			b.ReportMetric(float64((cpuTime(b, r)-cpu).Microseconds())/1000/float64(len(took)), "cpu-ms/step")
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/step(median)")
			b.ReportMetric(float64(took[0].Microseconds())/1000, "ms/step(min)")
		})
	}
}

// cpuTime is what this process, the runner and everything that the runner has waited for have used. Unlike the wall
// clock it says something on a busy machine.
func cpuTime(b *testing.B, r *runc.Runc) time.Duration {
	b.Helper()
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		b.Fatal(err)
	}
	total := time.Duration(own.Utime.Nano() + own.Stime.Nano())
	pid := runc.RunnerPID(r)
	if pid == 0 {
		return total
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		ticks, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		total += time.Duration(ticks) * 10 * time.Millisecond
	}
	return total
}
