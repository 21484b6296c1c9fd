// SPDX-License-Identifier: Apache-2.0

// Package s3test runs a real S3 server for tests: VersityGW, which keeps the objects as files below a directory, checks signatures and the hashes of bodies, and has
// conditional writes. MinIO's server cannot be had as a Go module any more, and the fakes that can check none of that.
package s3test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// version is that of the server. It is built outside our module, of whose dependencies it must not become one.
const version = "v1.8.0"

// Server is a running server with one bucket.
type Server struct {
	Endpoint, Bucket, AccessKey, SecretKey string
	// Dir has an object PREFIX/NAME as the file Dir/PREFIX/NAME.
	Dir string

	cmd    *exec.Cmd
	stderr bytes.Buffer
	ended  chan struct{}
}

// New starts a server that ends with the test. The test is skipped, loudly, where it cannot be built.
func New(t testing.TB) *Server {
	t.Helper()
	s, err := Start(t.TempDir())
	if err != nil {
		t.Skipf("NO S3 SERVER, SO NOTHING IS TESTED HERE: %v", err)
	}
	t.Cleanup(s.Stop)
	return s
}

// Start starts a server that keeps its objects below dir.
func Start(dir string) (*Server, error) {
	bin, err := build()
	if err != nil {
		return nil, fmt.Errorf("s3 server: %w", err)
	}
	s := &Server{Bucket: "caches", AccessKey: "slipway-test", SecretKey: "slipway-test-secret", Dir: filepath.Join(dir, "caches")}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	s.Endpoint = "http://" + addr
	s.cmd = exec.Command(bin, "--port", addr, "--access", s.AccessKey, "--secret", s.SecretKey, "--quiet", "posix", dir)
	s.cmd.Stderr = &s.stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.ended = make(chan struct{})
	started := make(chan error)
	go func() {
		defer close(s.ended)
		runtime.LockOSThread() // the signal comes when the thread ends that has started it
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			_ = s.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			c.Close()
			tick.Stop()
			return s, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			s.Stop()
			return nil, fmt.Errorf("s3 server does not answer: %w\n%s", err, s.stderr.Bytes())
		}
	}
}

// Stop ends the server.
func (s *Server) Stop() {
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// build returns the path of the server's program. It is built the first time, which takes one to three minutes on two processors, and kept in the temporary directory for other
// tests and later runs; the Go proxy has to be reachable the first time.
func build() (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("slipway-s3-for-tests-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "versitygw-"+version)
	// Tests of several packages run at once.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	work, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	mod := "module scratch\n\ngo 1.26\n\nrequire github.com/versity/versitygw " + version + "\n"
	if err := os.WriteFile(filepath.Join(work, "go.mod"), []byte(mod), 0o600); err != nil {
		return "", err
	}
	var stderr bytes.Buffer
	cmd := exec.Command("go", "build", "-trimpath", "-mod=mod", "-ldflags", "-s -w", "-o", bin+".new", "github.com/versity/versitygw/cmd/versitygw")
	cmd.Dir, cmd.Stderr = work, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build versitygw: %w\n%s", err, stderr.Bytes())
	}
	return bin, os.Rename(bin+".new", bin)
}
