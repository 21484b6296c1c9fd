// SPDX-License-Identifier: Apache-2.0

// Package buildctltest builds BuildKit's own command-line client, at the version that go.mod names, for tests that drive
// the engine with it.
package buildctltest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var build struct {
	once sync.Once
	path string
	err  error
}

// Buildctl returns the path of a buildctl. It is built the first time, which takes half a minute, and kept in the temporary
// directory for other tests and later runs. Its dependencies are those of our go.mod, and what that does not name is
// added to a copy of it: the Go proxy may have to be reachable the first time.
func Buildctl() (string, error) {
	build.once.Do(func() { build.path, build.err = install("github.com/moby/buildkit/cmd/buildctl", "buildctl") })
	return build.path, build.err
}

// install builds a command of the BuildKit module unless it is there already.
func install(pkg, name string) (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}\n{{.Version}}", "github.com/moby/buildkit", "github.com/seed-68981b69/slipway").Output()
	if err != nil {
		return "", fmt.Errorf("find the BuildKit module: %w", err)
	}
	lines := strings.Split(string(out), "\n")
	version, module := lines[1], lines[2]
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("slipway-buildkit-for-tests-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, version, name)
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
	// The client's command line has dependencies that nothing of ours has; our own go.mod stays as it is.
	for _, f := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(module, f))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(work, f), data, 0o600); err != nil {
			return "", err
		}
	}
	var stderr bytes.Buffer
	cmd := exec.Command("go", "build", "-trimpath", "-mod=mod", "-modfile="+filepath.Join(work, "go.mod"),
		"-ldflags", "-s -w -X github.com/moby/buildkit/version.Version="+version, "-o", filepath.Join(work, name), pkg)
	cmd.Dir, cmd.Stderr = module, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, stderr.Bytes())
	}
	if err := os.MkdirAll(filepath.Dir(bin), 0o700); err != nil {
		return "", err
	}
	return bin, os.Rename(filepath.Join(work, name), bin)
}

// Buildkitd returns the path of a buildkitd, made in the same way. It is what the bench compares us with.
func Buildkitd() (string, error) {
	return install("github.com/moby/buildkit/cmd/buildkitd", "buildkitd")
}
