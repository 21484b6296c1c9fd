// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// newExecutor returns an executor that is closed, with its traces checked, at the end of the test.
func newExecutor(t *testing.T, opts runc.Options) *runc.Runc {
	t.Helper()
	runctest.Runner(t)
	if opts.StateDir == "" {
		opts.StateDir = t.TempDir()
	}
	r, err := runc.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return r
}

// spec is a container that runs a shell script in the host's network.
func spec(rootfs, script string) executor.Spec {
	return executor.Spec{
		ID:      "t1",
		Rootfs:  rootfs,
		Args:    []string{"/bin/sh", "-c", script},
		Env:     []string{"PATH=/bin"},
		Cwd:     "/",
		Network: executor.NetworkNone,
	}
}

type result struct {
	exit           executor.Exit
	stdout, stderr string
}

// run runs s to its end.
func run(t *testing.T, r *runc.Runc, s executor.Spec, stdin ...string) result {
	t.Helper()
	res, err := tryRun(t.Context(), r, s, stdin...)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func tryRun(ctx context.Context, r *runc.Runc, s executor.Spec, stdin ...string) (result, error) {
	var out, errOut bytes.Buffer
	stdio := executor.IO{Stdout: &out, Stderr: &errOut}
	if len(stdin) > 0 {
		stdio.Stdin = strings.NewReader(stdin[0])
	}
	p, err := r.Start(ctx, s, stdio)
	if err != nil {
		return result{}, err
	}
	exit, err := p.Wait()
	return result{exit, out.String(), errOut.String()}, err
}

func TestExitCodes(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	rootfs := runctest.Rootfs(t)
	for name, content := range map[string]string{"script": "#!/no/such/interpreter\n", "garbage": "\x7fELFgarbage", "notexec": "#!/bin/sh\n"} {
		mode := os.FileMode(0o755)
		if name == "notexec" {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(rootfs, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		args  []string
		init  bool
		code  int
		start bool // reported by Start
	}{
		{args: []string{"/bin/true"}, code: 0},
		{args: []string{"false"}, code: 1},
		{args: []string{"sh", "-c", "exit 42"}, code: 42},
		{args: []string{"sh", "-c", "exit 255"}, code: 255},
		{args: []string{"sh", "-c", "kill -9 $$"}, init: true, code: 137},
		{args: []string{"sh", "-c", "kill -TERM $$"}, init: true, code: 143},
		{args: []string{"sh", "-c", "exit 7"}, init: true, code: 7},
		{args: []string{"nosuch"}, code: 127, start: true},
		{args: []string{"/no/such/file"}, code: 127, start: true},
		{args: []string{"/notexec"}, code: 126, start: true},
		{args: []string{"/bin"}, code: 126, start: true},
		{args: []string{"/script"}, code: 127},
		{args: []string{"/garbage"}, code: 126},
		{args: []string{"nosuch"}, init: true, code: 127},
		{args: []string{"/notexec"}, init: true, code: 126},
		{args: nil, code: 127, start: true},
	} {
		t.Run(fmt.Sprint(tc.args, tc.init), func(t *testing.T) {
			s := spec(rootfs, "")
			s.Args, s.Init = tc.args, tc.init
			res, err := tryRun(t.Context(), r, s)
			var startErr *executor.StartError
			if errors.As(err, &startErr) != tc.start {
				t.Fatalf("error %v, want a start error: %v", err, tc.start)
			}
			code := res.exit.Code
			if startErr != nil {
				code = startErr.Code
			}
			if code != tc.code {
				t.Errorf("code %d, want %d; err %v, stderr %q", code, tc.code, err, res.stderr)
			}
		})
	}
}

func TestProcess(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	rootfs := runctest.Rootfs(t)

	t.Run("streams", func(t *testing.T) {
		res := run(t, r, spec(rootfs, "echo out; echo err >&2; cat"), "typed\n")
		if res.stdout != "out\ntyped\n" || res.stderr != "err\n" {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
	})
	t.Run("no stdin is an empty one", func(t *testing.T) {
		if res := run(t, r, spec(rootfs, "cat; echo end")); res.stdout != "end\n" {
			t.Errorf("stdout %q", res.stdout)
		}
	})
	t.Run("large output", func(t *testing.T) {
		res := run(t, r, spec(rootfs, "dd if=/dev/zero bs=1024 count=3000 2>/dev/null"))
		if len(res.stdout) != 3000*1024 {
			t.Errorf("got %d bytes, want %d", len(res.stdout), 3000*1024)
		}
	})
	t.Run("background process does not hold the output", func(t *testing.T) {
		start := time.Now()
		res := run(t, r, spec(rootfs, "sleep 100 & setsid sleep 100 & echo started"))
		if res.stdout != "started\n" || time.Since(start) > 10*time.Second {
			t.Errorf("stdout %q after %v", res.stdout, time.Since(start))
		}
	})
	t.Run("environment", func(t *testing.T) {
		s := spec(rootfs, "env")
		s.Env = []string{"PATH=/bin", "HOME=/root", "A=b=c d", "EMPTY="}
		lines := strings.Split(strings.TrimSpace(run(t, r, s).stdout), "\n")
		for _, want := range append(s.Env, "PWD=/") {
			if !slices.Contains(lines, want) {
				t.Errorf("%q is not among %q", want, lines)
			}
		}
	})
	t.Run("working directory is created and stays", func(t *testing.T) {
		s := spec(rootfs, "pwd; stat -c '%u:%g %a' /work /work/dir")
		s.Cwd, s.User = "/work/dir", executor.User{UID: 5, GID: 6}
		if res := run(t, r, s); res.stdout != "/work/dir\n5:6 755\n5:6 755\n" {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
		if _, err := os.Stat(filepath.Join(rootfs, "work/dir")); err != nil {
			t.Error(err)
		}
		s.Cwd = "/bin/busybox"
		var startErr *executor.StartError
		if _, err := tryRun(t.Context(), r, s); !errors.As(err, &startErr) || !strings.Contains(err.Error(), `working directory "/bin/busybox"`) {
			t.Errorf("a file as working directory: error %v", err)
		}
	})
	t.Run("user", func(t *testing.T) {
		s := spec(rootfs, "id -u; id -g; id -G; touch /owned 2>/dev/null || echo refused; echo ok >/dev/stderr")
		s.User = executor.User{UID: 1000, GID: 1001, AdditionalGroups: []uint32{27, 44}}
		res := run(t, r, s)
		if res.stdout != "1000\n1001\n1001 27 44\nrefused\n" || res.stderr != "ok\n" {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		s := spec(rootfs, "test -t 0 && test -t 1 && test -t 2 && echo tty; read line; stty size; echo got $line; cat")
		s.Terminal = true
		in, typing := io.Pipe()
		var out lockedBuffer
		p, err := r.Start(t.Context(), s, executor.IO{Stdin: in, Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Resize(33, 101); err != nil {
			t.Error(err)
		}
		io.WriteString(typing, "hello\n")
		typing.Close() // cat sees the end
		exit, err := p.Wait()
		if err != nil || exit.Code != 0 {
			t.Fatalf("exit %+v, error %v", exit, err)
		}
		if got, want := out.String(), "tty\r\n"; !strings.Contains(got, want) || !strings.Contains(got, "33 101\r\ngot hello\r\n") {
			t.Errorf("output %q", got)
		}
		if err := p.Resize(1, 1); err == nil {
			t.Error("Resize after the end: no error")
		}
	})
	t.Run("signal", func(t *testing.T) {
		s := spec(rootfs, "trap 'echo caught; exit 3' USR1; echo ready; while true; do sleep 0.01; done")
		ready := newWaitFor("ready\n")
		p, err := r.Start(t.Context(), s, executor.IO{Stdout: ready})
		if err != nil {
			t.Fatal(err)
		}
		ready.wait(t)
		if err := p.Signal(syscall.SIGUSR1); err != nil {
			t.Error(err)
		}
		exit, err := p.Wait()
		if err != nil || exit.Code != 3 || ready.String() != "ready\ncaught\n" {
			t.Errorf("exit %+v, error %v, output %q", exit, err, ready.String())
		}
		if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Signal after the end: %v", err)
		}
	})
	t.Run("init forwards signals and reaps", func(t *testing.T) {
		s := spec(rootfs, "trap 'exit 4' TERM; (sleep 0.05 &) ; sleep 0.2; echo ready; while true; do sleep 0.01; done")
		s.Init = true
		ready := newWaitFor("ready\n")
		p, err := r.Start(t.Context(), s, executor.IO{Stdout: ready})
		if err != nil {
			t.Fatal(err)
		}
		ready.wait(t)
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if exit, err := p.Wait(); err != nil || exit.Code != 4 {
			t.Errorf("exit %+v, error %v", exit, err)
		}
	})
	t.Run("init with a terminal", func(t *testing.T) {
		s := spec(rootfs, "read line; echo got $line; exit 6")
		s.Init, s.Terminal = true, true
		var out lockedBuffer
		p, err := r.Start(t.Context(), s, executor.IO{Stdin: strings.NewReader("hello\n"), Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := p.Wait(); err != nil || exit.Code != 6 || !strings.Contains(out.String(), "got hello\r\n") {
			t.Errorf("exit %+v, error %v, output %q", exit, err, out.String())
		}
	})
	t.Run("cancel kills everything", func(t *testing.T) {
		// Ignores signals, forks on and on, and has left its session.
		s := spec(rootfs, `trap '' TERM HUP INT; i=0; while [ $i -lt 50 ]; do setsid nohup sh -c 'trap "" TERM; while true; do sleep 1; done' & i=$((i+1)); done; echo ready; while true; do sleep 1; done`)
		ctx, cancel := context.WithCancelCause(t.Context())
		ready := newWaitFor("ready\n")
		p, err := r.Start(ctx, s, executor.IO{Stdout: ready})
		if err != nil {
			t.Fatal(err)
		}
		ready.wait(t)
		cancel(errors.New("enough"))
		if exit, err := p.Wait(); err != nil || exit.Code != 137 {
			t.Errorf("exit %+v, error %v", exit, err)
		}
	})
	t.Run("cancelled before the start", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		enough := errors.New("enough")
		cancel(enough)
		if _, err := r.Start(ctx, spec(rootfs, "true"), executor.IO{}); !errors.Is(err, enough) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("usage", func(t *testing.T) {
		res := run(t, r, spec(rootfs, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"))
		if res.exit.CPUTime < time.Millisecond || res.exit.PeakMemoryBytes < 100<<10 {
			t.Errorf("cpu %v, peak memory %d", res.exit.CPUTime, res.exit.PeakMemoryBytes)
		}
		if res.exit.Started.IsZero() || res.exit.Ended.Before(res.exit.Started) {
			t.Errorf("started %v, ended %v", res.exit.Started, res.exit.Ended)
		}
	})
	t.Run("disk", func(t *testing.T) {
		if all, _ := os.ReadFile("/sys/fs/cgroup/blkio/blkio.throttle.io_service_bytes"); os.Getenv(cgroup2Env) != "" || string(all) == "Total 0\n" {
			t.Skip("this kernel does not count for cgroup v1: SKIPPED") // newer ones only where something is throttled
		}
		// Past the page cache: what the cache writes back later is nobody's.
		s := spec(rootfs, "dd if=/dev/zero of=/big bs=1M count=8 oflag=direct 2>/dev/null && dd if=/big of=/dev/null bs=1M iflag=direct 2>/dev/null; rm /big")
		res := run(t, r, s)
		if res.exit.Code != 0 || res.exit.WrittenBytes < 8<<20 || res.exit.ReadBytes < 8<<20 {
			t.Errorf("read %d, written %d bytes; %+v", res.exit.ReadBytes, res.exit.WrittenBytes, res)
		}
	})
	t.Run("out of memory", func(t *testing.T) {
		s := spec(rootfs, "dd if=/dev/zero of=/dev/shm/big bs=1M count=200")
		s.ShmSize = 300 << 20
		s.Resources.MemoryBytes = 32 << 20
		if res := run(t, r, s); !res.exit.OOMKilled || res.exit.Code == 0 {
			t.Errorf("exit %+v, stderr %q", res.exit, res.stderr)
		}
	})
	t.Run("pids limit", func(t *testing.T) {
		s := spec(rootfs, "i=0; while [ $i -lt 30 ]; do sleep 5 & i=$((i+1)); done; echo all started")
		s.Resources.PidsLimit = 10
		if res := run(t, r, s); strings.Contains(res.stdout, "all started") && !strings.Contains(res.stderr, "fork") {
			t.Errorf("30 processes ran under a limit of 10: stderr %q", res.stderr)
		}
	})
	t.Run("ulimit", func(t *testing.T) {
		s := spec(rootfs, "ulimit -n; ulimit -c")
		s.Ulimits = []executor.Ulimit{{Name: "nofile", Soft: 123, Hard: 456}, {Name: "core"}}
		if res := run(t, r, s); res.stdout != "123\n0\n" {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
	})
	t.Run("same name twice", func(t *testing.T) {
		p, err := r.Start(t.Context(), spec(rootfs, "sleep 100"), executor.IO{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Start(t.Context(), spec(rootfs, "true"), executor.IO{}); err == nil || !strings.Contains(err.Error(), "exists") {
			t.Errorf("error %v", err)
		}
		p.Signal(syscall.SIGKILL)
		if exit, err := p.Wait(); err != nil || exit.Code != 137 {
			t.Errorf("exit %+v, error %v", exit, err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() {
				s := spec(rootfs, fmt.Sprintf("echo %d; exit %d", i, i))
				s.ID = fmt.Sprintf("many-%d", i)
				res, err := tryRun(t.Context(), r, s)
				if err != nil || res.exit.Code != i || res.stdout != fmt.Sprintf("%d\n", i) {
					t.Errorf("%d: %+v, %v", i, res, err)
				}
			})
		}
		wg.Wait()
	})
}

// lockedBuffer is a buffer for several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// waitFor is a buffer that tells when a text has been written.
type waitFor struct {
	lockedBuffer
	text string
	once sync.Once
	seen chan struct{}
}

func newWaitFor(text string) *waitFor { return &waitFor{text: text, seen: make(chan struct{})} }

func (w *waitFor) Write(p []byte) (int, error) {
	n, err := w.lockedBuffer.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.once.Do(func() { close(w.seen) })
	}
	return n, err
}

func (w *waitFor) wait(t *testing.T) {
	t.Helper()
	select {
	case <-w.seen:
	case <-time.After(20 * time.Second):
		t.Fatalf("waited for %q, got %q", w.text, w.String())
	}
}
