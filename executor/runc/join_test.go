// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// joinable starts a container whose first process runs until its standard input ends.
func joinable(t *testing.T, ctx context.Context, r *runc.Runc, change func(*executor.Spec)) (executor.Joiner, func()) {
	t.Helper()
	s := spec(runctest.Rootfs(t), "echo ready; cat; exit 3")
	s.Joinable = true
	if change != nil {
		change(&s)
	}
	stdin, end := io.Pipe()
	ready, out := io.Pipe()
	p, err := r.Start(ctx, s, executor.IO{Stdin: stdin, Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ready.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, ready)
	return p.(executor.Joiner), func() { end.Close() }
}

// join runs a further process to its end.
func join(t *testing.T, p executor.Joiner, s executor.ProcessSpec) result {
	t.Helper()
	if s.Env == nil {
		s.Env = []string{"PATH=/bin"}
	}
	var out, errOut bytes.Buffer
	j, err := p.Join(t.Context(), s, executor.IO{Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatal(err)
	}
	exit, err := j.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return result{exit, out.String(), errOut.String()}
}

func TestJoin(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	p, end := joinable(t, t.Context(), r, nil)
	sh := func(script string) executor.ProcessSpec {
		return executor.ProcessSpec{Args: []string{"sh", "-c", script}}
	}
	if res := join(t, p, sh("echo out; echo err >&2; cat /proc/1/cmdline | tr '\\0' ' '; exit 9")); res.exit.Code != 9 ||
		!strings.HasPrefix(res.stdout, "out\n") || res.stderr != "err\n" || !strings.Contains(res.stdout, "cat; exit 3") {
		t.Errorf("got %+v", res)
	}
	// It is as confined as the first process, and without capabilities when it is not root.
	for _, field := range []string{"Seccomp:", "CapBnd:", "NoNewPrivs:"} {
		s := "grep " + field + " /proc/1/status; grep " + field + " /proc/self/status"
		lines := strings.Fields(join(t, p, sh(s)).stdout)
		if len(lines) != 4 || lines[1] != lines[3] {
			t.Errorf("%s: first process and joined process: %q", field, lines)
		}
		if field == "Seccomp:" && lines[3] != "2" {
			t.Errorf("no seccomp filter: %q", lines)
		}
	}
	user := sh("id -u; id -g; grep CapEff: /proc/self/status; pwd")
	user.User, user.Cwd = executor.User{UID: 7, GID: 8}, "/bin"
	if got := strings.Fields(join(t, p, user).stdout); strings.Join(got, " ") != "7 8 CapEff: 0000000000000000 /bin" {
		t.Errorf("as a user: %q", got)
	}
	tty := sh("test -t 0 && echo terminal")
	tty.Terminal = true
	if res := join(t, p, tty); !strings.Contains(res.stdout, "terminal") {
		t.Errorf("with a terminal: %+v", res)
	}
	for arg, code := range map[string]int{"nosuch": 127, "/bin": 126} {
		_, err := p.Join(t.Context(), executor.ProcessSpec{Args: []string{arg}, Env: []string{"PATH=/bin"}}, executor.IO{})
		if start, ok := errors.AsType[*executor.StartError](err); !ok || start.Code != code {
			t.Errorf("%s: %v, want a StartError with %d", arg, err, code)
		}
	}
	if _, err := p.Join(t.Context(), executor.ProcessSpec{Args: []string{"true"}, Cwd: "/nosuch"}, executor.IO{}); err == nil {
		t.Error("a working directory that is not there has no error")
	}

	// A signal and a cancelled context reach only the process they are for.
	sleep, err := p.Join(t.Context(), executor.ProcessSpec{Args: []string{"/bin/sleep", "1000"}}, executor.IO{})
	if err != nil {
		t.Fatal(err)
	}
	if err := sleep.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if exit, err := sleep.Wait(); err != nil || exit.Code != 143 {
		t.Errorf("after SIGTERM: %+v, %v", exit, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if sleep, err = p.Join(ctx, executor.ProcessSpec{Args: []string{"/bin/sleep", "1000"}}, executor.IO{}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if exit, err := sleep.Wait(); err != nil || exit.Code != 137 {
		t.Errorf("after cancel: %+v, %v", exit, err)
	}

	// The first process takes the others with it.
	if sleep, err = p.Join(t.Context(), executor.ProcessSpec{Args: []string{"/bin/sleep", "1000"}}, executor.IO{}); err != nil {
		t.Fatal(err)
	}
	end()
	if exit, err := p.Wait(); err != nil || exit.Code != 3 {
		t.Errorf("first process: %+v, %v", exit, err)
	}
	if exit, err := sleep.Wait(); err != nil || exit.Code != 137 {
		t.Errorf("joined process at the end of the first: %+v, %v", exit, err)
	}
	if _, err := p.Join(t.Context(), sh("true"), executor.IO{}); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("after the end: %v", err)
	}
}

func TestJoinNeedsJoinable(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	p, end := joinable(t, t.Context(), r, func(s *executor.Spec) { s.Joinable = false })
	if _, err := p.Join(t.Context(), executor.ProcessSpec{Args: []string{"true"}}, executor.IO{}); err == nil {
		t.Error("a container that was not started to be joined was joined")
	}
	end()
	if _, err := p.Wait(); err != nil {
		t.Error(err)
	}
}

// TestCloseWithJoined: what has joined ends with the executor.
func TestCloseWithJoined(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	p, _ := joinable(t, t.Context(), r, nil)
	j, err := p.Join(t.Context(), executor.ProcessSpec{Args: []string{"/bin/sleep", "1000"}}, executor.IO{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	ended := make(chan struct{})
	go func() { j.Wait(); p.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a process goes on after Close")
	}
}
