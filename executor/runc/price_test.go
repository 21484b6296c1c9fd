// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
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
	rootfs := runctest.Rootfs(b)
	for _, v := range []struct {
		name     string
		mode     executor.NetworkMode
		standard bool
	}{
		{"host", executor.NetworkHost, false},
		{"none", executor.NetworkNone, false},
		{"bridge", executor.NetworkBridge, false},
		{"bridge, libcontainer's init", executor.NetworkBridge, true},
	} {
		b.Run(v.name, func(b *testing.B) {
			r, err := runc.New(runc.Options{StateDir: b.TempDir(), Network: n, StandardInit: v.standard})
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			var took []time.Duration
			i := 0
			cpu := cpuTime(b, r)
			for b.Loop() {
				i++
				start := time.Now()
				p, err := r.Start(b.Context(), executor.Spec{
					ID: fmt.Sprintf("b%d-%d", os.Getpid(), i), Rootfs: rootfs, Args: []string{"/bin/true"}, Env: []string{"PATH=/bin"},
					Cwd: "/", Network: v.mode,
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

// BenchmarkFloor is the least that a container can cost from Go: a process in namespaces of its own, changed to its root.
func BenchmarkFloor(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: SKIPPED")
	}
	rootfs := runctest.Rootfs(b)
	usage := func() time.Duration {
		var sum time.Duration
		for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			var u unix.Rusage
			if err := unix.Getrusage(who, &u); err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
		return sum
	}
	var took []time.Duration
	cpu := usage()
	for b.Loop() {
		start := time.Now()
		cmd := exec.Cmd{Path: "/bin/true", Dir: "/", SysProcAttr: &syscall.SysProcAttr{
			Chroot:     rootfs,
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		}}
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	b.ReportMetric(float64((usage()-cpu).Microseconds())/1000/float64(len(took)), "cpu-ms/step")
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/step(median)")
	b.ReportMetric(float64(took[0].Microseconds())/1000, "ms/step(min)")
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
