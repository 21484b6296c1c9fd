// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/engine/config"
)

func TestSocketPath(t *testing.T) {
	for _, tc := range []struct{ address, want, err string }{
		{"unix:///run/s", "/run/s", ""},
		{"/run/s", "/run/s", ""},
		{"tcp://127.0.0.1:1", "", "want unix://PATH or tcp://HOST:PORT"},
		{"s", "", "want unix://PATH"},
		{"unix://", "", "want unix://PATH"},
		{"unix:///" + strings.Repeat("x", 200), "", "at most"},
	} {
		got, err := socketPath(tc.address)
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %q, %v", tc.address, got, err)
		}
	}
}

func TestDefaultSocket(t *testing.T) {
	standard, err := defaultRoot()
	if err != nil {
		t.Fatal(err)
	}
	if got := defaultSocket(standard); filepath.Base(got) != "slipway.sock" || filepath.Dir(got) != runtimeDir() {
		t.Errorf("default root: %s", got)
	}
	if got := defaultSocket("/tmp/other"); got != "/tmp/other/slipway.sock" {
		t.Errorf("other root: %s", got)
	}
	a, b := "/"+strings.Repeat("a", 150), "/"+strings.Repeat("b", 150)
	if got := defaultSocket(a); len(got) > maxSocketPath || got == defaultSocket(b) {
		t.Errorf("long roots: %s and %s", got, defaultSocket(b))
	}
}

// TestReport: one line, and the exit code that belongs to the error.
func TestReport(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code int
		text string
	}{
		{nil, 0, ""},
		{errors.New("no"), 1, "slipway: no\n"},
		{&exitError{code: 7}, 7, ""},
		{&exitError{125, errors.New("no")}, 125, "slipway: no\n"},
		{&usageError{errors.New("bad flag"), "slipway x"}, 2, "slipway: bad flag (see 'slipway x --help')\n"},
		{&signalError{2}, 130, "slipway: interrupted\n"},
		{status.Error(codes.NotFound, "no such build"), 1, "slipway: no such build\n"},
	} {
		var out bytes.Buffer
		a := newApp(nil, nil, &out)
		if code := a.report(tc.err); code != tc.code || out.String() != tc.text {
			t.Errorf("%v: code %d, %q", tc.err, code, out.String())
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"nothing"}, {"build"}, {"build", "a", "b"}, {"build", "--nothing", "."}, {"--host", "tcp://x", "images"}} {
		var out bytes.Buffer
		a := newApp(nil, &out, &out)
		if code := a.report(a.run(t.Context(), args)); code == 0 || strings.Count(out.String(), "\n") != 1 {
			t.Errorf("%q: code %d, %q", args, code, out.String())
		}
	}
}

func TestListenReplacesOnlyDeadSockets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "s")
	l, err := listen(t.Context(), path, config.GRPC{})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := listen(t.Context(), path, config.GRPC{}); err == nil || !strings.Contains(err.Error(), "another engine") {
		t.Errorf("a second listener: %v", err)
	}
	l.SetUnlinkOnClose(false) // as after kill -9
	l.Close()
	l, err = listen(t.Context(), path, config.GRPC{})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
}

func TestDaemonEnv(t *testing.T) {
	got := daemonEnv([]string{"PATH=/bin", "SLIPWAY_STANDALONE=1", "SLIPWAY_RUNNER=/r", "SLIPWAY_ROOT=/x"})
	if !slices.Equal(got, []string{"PATH=/bin", "SLIPWAY_RUNNER=/r"}) {
		t.Errorf("got %q", got)
	}
}
