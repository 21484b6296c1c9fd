// SPDX-License-Identifier: Apache-2.0

// Package buildctltest builds the command-line clients that tests drive the engine with: BuildKit's own, at the version that go.mod names, and
// docker buildx.
package buildctltest

import (
	"bytes"
	"errors"
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
	return once(filepath.Join(version, name), func(work string) error {
		// The client's command line has dependencies that nothing of ours has; our own go.mod stays as it is.
		for _, f := range []string{"go.mod", "go.sum"} {
			data, err := os.ReadFile(filepath.Join(module, f))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(work, f), data, 0o600); err != nil {
				return err
			}
		}
		cmd := exec.Command("go", "build", "-trimpath", "-mod=mod", "-modfile="+filepath.Join(work, "go.mod"),
			"-ldflags", "-s -w -X github.com/moby/buildkit/version.Version="+version, "-o", filepath.Join(work, name), pkg)
		cmd.Dir = module
		return run(cmd)
	})
}

// BuildxVersion is the docker buildx that tests use. It is made for the BuildKit in our go.mod.
const BuildxVersion = "v0.38.2"

// Buildx returns the path of a docker-buildx, which works as a plugin of the docker command too. It is built the first time, from the module proxy,
// which takes minutes where Go's build cache has nothing of it yet: $SLIPWAY_TEST_BUILDX=0 refuses that, for machines whose time is short.
func Buildx() (string, error) {
	if os.Getenv("SLIPWAY_TEST_BUILDX") == "0" {
		return "", errors.New("$SLIPWAY_TEST_BUILDX is 0")
	}
	return once(filepath.Join("buildx-"+BuildxVersion, "docker-buildx"), func(work string) error {
		const module = "github.com/docker/buildx"
		cmd := exec.Command("go", "install", "-trimpath", "-ldflags", "-s -w -X "+module+"/version.Version="+BuildxVersion, module+"/cmd/buildx@"+BuildxVersion)
		cmd.Dir = work // no module: the client has its own versions
		cmd.Env = append(os.Environ(), "GOBIN="+work, "CGO_ENABLED=0")
		if err := run(cmd); err != nil {
			return err
		}
		return os.Rename(filepath.Join(work, "buildx"), filepath.Join(work, "docker-buildx"))
	})
}

func run(cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, stderr.Bytes())
	}
	return nil
}

// once returns the path of a program, which make puts into a directory by its name the first time.
func once(path string, make func(work string) error) (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("slipway-buildkit-for-tests-%d", os.Getuid()))
	bin := filepath.Join(dir, path)
	if err := os.MkdirAll(filepath.Dir(bin), 0o700); err != nil {
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
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	work, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if err := make(work); err != nil {
		return "", err
	}
	return bin, os.Rename(filepath.Join(work, filepath.Base(path)), bin)
}

// Buildkitd returns the path of a buildkitd, made in the same way. It is what the bench compares us with.
func Buildkitd() (string, error) {
	return install("github.com/moby/buildkit/cmd/buildkitd", "buildkitd")
}
