// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
)

// TestSystemd starts buildkitd as systemd does: with a socket that is open already and a socket to be told at.
func TestSystemd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an engine needs root: SKIPPED")
	}
	dir := t.TempDir()
	short, err := os.MkdirTemp("", "sd") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, buildkitdName)
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(short, "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	told, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(short, "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer told.Close()
	expect := func(want string) {
		t.Helper()
		buffer := make([]byte, 100)
		_ = told.SetReadDeadline(time.Now().Add(scriptPatience))
		n, err := told.Read(buffer)
		if err != nil || string(buffer[:n]) != want {
			t.Fatalf("told %q, %v; want %q", buffer[:n], err, want)
		}
	}

	root := filepath.Join(dir, "root")
	// LISTEN_PID is the process that the sockets are for.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, program, "--addr", "fd://", "--root", root, "--config", filepath.Join(dir, "none.toml"))
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "NOTIFY_SOCKET="+filepath.Join(short, "n"))
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	file.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	expect("READY=1")
	client, err := bkclient.New(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	if workers, err := client.ListWorkers(t.Context()); err != nil || len(workers) != 1 {
		t.Errorf("workers %v, %v", workers, err)
	}
	client.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("systemd's socket is gone: %v", err)
	}
	for _, l := range leftovers(t, root) {
		t.Errorf("left behind: %s", l)
	}
}

// TestReadiness: clients can connect to a buildkitd long before its store is open. The aim is 100 ms on a quiet machine.
func TestReadiness(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an engine needs root: SKIPPED")
	}
	dir, err := os.MkdirTemp("", "ready")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, path := filepath.Join(dir, buildkitdName), filepath.Join(dir, "s")
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--addr", "unix://"+path, "--root", filepath.Join(dir, "root"), "--config", filepath.Join(dir, "none.toml"))
	cmd.Stderr = os.Stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			break
		}
		if time.Since(start) > scriptPatience {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Microsecond) // until another process listens
	}
	accepted := time.Since(start)
	client, err := bkclient.New(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("accepts after %v, answers after %v", accepted, time.Since(start))
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v", err)
	}
}
