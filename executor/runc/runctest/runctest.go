// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package runctest has what tests need to run real containers: the runner binary and a small root file system.
package runctest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc"
)

// runnerEnv is how package runc learns of a runner that is not embedded.
const runnerEnv = "SLIPWAY_RUNNER"

// BuildArgs are the arguments of the go command that build the runner, without the -o.
var BuildArgs = []string{
	"build", "-tags", "netgo osusergo seccomp", "-ldflags", "-s -w -linkmode external -extldflags -static",
}

var build struct {
	once sync.Once
	path string
	err  error
}

// Runner makes sure that containers can be run in this process: it skips the test without root, and when the runner
// is neither embedded nor named by SLIPWAY_RUNNER it builds it (once; the result is kept in the temporary directory
// and only linked again when it has changed) and names it.
func Runner(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("running containers needs root: SKIPPED")
	}
	if err := EnsureRunner(); err != nil {
		t.Fatalf("build slipway-runner: %v", err)
	}
}

// EnsureRunner is Runner for a TestMain.
func EnsureRunner() error {
	if os.Getenv(runnerEnv) != "" || runc.Embedded() {
		return nil
	}
	build.once.Do(func() { build.path, build.err = buildRunner() })
	if build.err != nil {
		return build.err
	}
	return os.Setenv(runnerEnv, build.path)
}

func buildRunner() (string, error) {
	module, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/seed-68981b69/slipway").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("slipway-runner-for-tests-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Tests of several packages run at once.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	// Built elsewhere and renamed only when it differs: a runner of another test may be running the old file.
	path, fresh := filepath.Join(dir, "slipway-runner"), filepath.Join(dir, "fresh", "slipway-runner")
	cmd := exec.Command("go", append(BuildArgs[:len(BuildArgs):len(BuildArgs)], "-o", fresh, "./cmd/slipway-runner")...)
	cmd.Dir = strings.TrimSpace(string(module))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	a, errA := os.ReadFile(path)
	b, errB := os.ReadFile(fresh)
	if errB != nil {
		return "", errB
	}
	if errA == nil && string(a) == string(b) {
		return path, nil
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o700); err != nil {
		return "", err
	}
	return path, os.Rename(tmp, path)
}

var inside struct {
	once sync.Once
	path string
	err  error
}

// Inside puts the test program runctest/inside into a root file system, as /bin/inside, and returns its path on the host. It is
// built once for a process.
func Inside(t testing.TB, rootfs string) string {
	t.Helper()
	inside.once.Do(func() { inside.path, inside.err = buildInside() })
	if inside.err != nil {
		t.Fatalf("build the test program: %v", inside.err)
	}
	if err := copyFile(filepath.Join(rootfs, "bin/inside"), inside.path); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(rootfs, "bin/inside")
}

func buildInside() (string, error) {
	path := filepath.Join(os.TempDir(), fmt.Sprintf("slipway-inside-for-tests-%d-%d", os.Getuid(), os.Getpid()))
	cmd := exec.Command("go", "build", "-o", path, "github.com/seed-68981b69/slipway/executor/runc/runctest/inside")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, nil
}

// RemoveInside removes what Inside has built. Call it at the end of a TestMain.
func RemoveInside() {
	if inside.path != "" {
		os.Remove(inside.path)
	}
}

// Applets are the commands in Rootfs.
var Applets = []string{
	"sh", "cat", "echo", "true", "false", "env", "id", "pwd", "ls", "sleep", "kill", "nc", "wget", "mkdir", "rm",
	"touch", "mount", "hostname", "stty", "ps", "ip", "httpd", "dd", "stat", "chmod", "chown", "find", "sync", "head",
	"tail", "test", "seq", "setsid", "nohup", "nslookup", "ulimit", "ln", "grep", "wc", "trap", "su", "mknod", "sed", "cp", "mv",
}

// Rootfs makes a root file system in a new directory: /bin with a static busybox, and nothing else. It skips the test
// when the machine has no static busybox.
func Rootfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	PopulateRootfs(t, dir)
	return dir
}

// PopulateRootfs is Rootfs in an existing directory.
func PopulateRootfs(t testing.TB, dir string) {
	t.Helper()
	const busybox = "/bin/busybox"
	if _, err := os.Stat(busybox); err != nil {
		t.Skip("needs busybox-static (apt install busybox-static): SKIPPED")
	}
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	if err := copyFile(filepath.Join(bin, "busybox"), busybox); err != nil {
		t.Fatal(err)
	}
	for _, a := range Applets {
		if err := os.Symlink("busybox", filepath.Join(bin, a)); err != nil {
			t.Fatal(err)
		}
	}
}

func copyFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
