// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// TestRealWorld builds the projects in testdata/realworld as their owners would: base images of the names that real
// Dockerfiles use, packages from apt and npm, modules from the Go proxy. The first run of a machine makes the base images (minutes);
// the Debian root file system they begin with is kept in .tmp/bases of the repository.
func TestRealWorld(t *testing.T) {
	switch {
	case testing.Short():
		t.Skip("-short: building real projects takes minutes: SKIPPED")
	case os.Geteuid() != 0:
		t.Skip("building real projects needs root: SKIPPED")
	}
	for _, program := range []string{"apt-get", "mmdebstrap", "go"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("building real projects needs %s: SKIPPED", program)
		}
	}
	if err := runctest.EnsureRunner(); err != nil {
		t.Fatalf("build slipway-runner: %v", err)
	}
	repository, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(repository, ".tmp")
	if err := os.MkdirAll(temp, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.MkdirTemp(temp, "realworld-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopAndCheck(t, root)
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	w := &realWorld{root: root, projects: filepath.Join(repository, "testdata", "realworld")}

	start := time.Now()
	bases := exec.Command("sh", filepath.Join(repository, "testdata", "bases", "bases.sh"), root, filepath.Join(temp, "bases"), "debian", "golang", "node")
	bases.Env = append(os.Environ(), "SLIPWAY=slipway")
	out, err := bases.CombinedOutput()
	if err != nil {
		t.Fatalf("make the base images: %v\n%s", err, out)
	}
	t.Logf("base images: %s", time.Since(start).Round(time.Millisecond))

	t.Run("go-service", w.goService)
	t.Run("node-app", w.nodeApp)
	t.Run("c-project", w.cProject)
}

type realWorld struct{ root, projects string }

// slipway runs the program and returns what it printed.
func (w *realWorld) slipway(t *testing.T, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	cmd := exec.Command("slipway", args...)
	cmd.Env = append(os.Environ(), "SLIPWAY_ROOT="+w.root, "BUILDKIT_PROGRESS=plain", "NO_COLOR=1")
	var outBuffer, errBuffer bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &outBuffer, &errBuffer
	if err := cmd.Run(); err != nil {
		t.Fatalf("slipway %s: %v\n%s%s", strings.Join(args, " "), err, outBuffer.String(), errBuffer.String())
	}
	return outBuffer.String(), errBuffer.String()
}

// patience is how long a build may take that downloads packages.
const patience = 5 * time.Minute

// try runs slipway and returns what it shows, and whether it ended by itself. Any other failure ends the test.
func (w *realWorld) try(t *testing.T, args []string) (output string, ended bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "slipway", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	cmd.Env = append(os.Environ(), "SLIPWAY_ROOT="+w.root, "BUILDKIT_PROGRESS=plain", "NO_COLOR=1")
	var buffer bytes.Buffer
	cmd.Stderr = &buffer
	err := cmd.Run()
	if ctx.Err() != nil {
		return buffer.String(), false
	}
	if err != nil {
		t.Fatalf("slipway %s: %v\n%s", strings.Join(args, " "), err, buffer.String())
	}
	return buffer.String(), true
}

// build builds and returns the names of the steps that ran and of those that were cached.
func (w *realWorld) build(t *testing.T, image, dir string, flags ...string) (ran, cached []string) {
	t.Helper()
	start := time.Now()
	args := append(append([]string{"build", "-t", image}, flags...), dir)
	output, ended := w.try(t, args)
	if !ended {
		// A package manager that waits for ever for its network is not what is tested here, once.
		t.Logf("LOUD: slipway %s had not ended after %s and is tried again without the cache:\n%s", strings.Join(args, " "), patience, output)
		if output, ended = w.try(t, append([]string{"build", "--no-cache"}, args[1:]...)); !ended {
			t.Fatalf("slipway %s does not end:\n%s", strings.Join(args, " "), output)
		}
	}
	for _, s := range buildSteps(output) {
		switch s.state {
		case "ran":
			ran = append(ran, s.name)
		case "cached":
			cached = append(cached, s.name)
		default:
			t.Errorf("step %s: %s", s.name, s.state)
		}
	}
	t.Logf("build %s %v: %d steps ran, %d were cached, %s", image, flags, len(ran), len(cached), time.Since(start).Round(time.Millisecond))
	return ran, cached
}

// cold builds for the first time, then again: everything must be cached.
func (w *realWorld) cold(t *testing.T, image, dir string, steps int) {
	t.Helper()
	if ran, _ := w.build(t, image, dir); len(ran) != steps {
		t.Errorf("cold build ran %d steps, want %d: %q", len(ran), steps, ran)
	}
	if ran, cached := w.build(t, image, dir); len(ran) != 0 || len(cached) != steps {
		t.Errorf("second build ran %q and had %d of %d steps cached", ran, len(cached), steps)
	}
}

// imageConfig is what the tests look at.
type imageConfig struct {
	User, WorkingDir, StopSignal string
	Env, Cmd, Entrypoint         []string
	ExposedPorts, Volumes        map[string]struct{}
	Labels                       map[string]string
	Healthcheck                  struct {
		Test              []string
		Interval, Timeout time.Duration
		Retries           int
	}
}

func (w *realWorld) config(t *testing.T, image string) (c imageConfig) {
	t.Helper()
	out, _ := w.slipway(t, "", "inspect", "-f", "{{json .Config}}", image)
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return c
}

// project copies a project, so that its files may be changed.
func (w *realWorld) project(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(w.projects, name))); err != nil {
		t.Fatal(err)
	}
	// Modification times as after a checkout some time ago.
	if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		past := time.Now().Add(-time.Hour)
		return os.Chtimes(path, past, past)
	}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(want)
	if !bytes.Equal(a, b) {
		t.Errorf("%s: got %s, want %s", what, a, b)
	}
}

func replaceInFile(t *testing.T, path, old, replacement string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, []byte(old)) {
		t.Fatalf("%s does not contain %q", path, old)
	}
	if err := os.WriteFile(path, bytes.Replace(data, []byte(old), []byte(replacement), 1), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (w *realWorld) goService(t *testing.T) {
	dir := w.project(t, "go-service")
	w.cold(t, "greeter", dir, 6) // WORKDIR, mod download, build; groupadd, two COPY

	c := w.config(t, "greeter")
	equal(t, "USER", c.User, "app")
	equal(t, "EXPOSE", c.ExposedPorts, map[string]struct{}{"8080/tcp": {}})
	equal(t, "ENTRYPOINT", c.Entrypoint, []string{"greeter"})
	equal(t, "CMD", c.Cmd, []string{"-serve"})
	equal(t, "STOPSIGNAL", c.StopSignal, "SIGINT")
	equal(t, "HEALTHCHECK", c.Healthcheck.Test, []string{"CMD", "greeter", "-check"})
	equal(t, "interval", []any{c.Healthcheck.Interval, c.Healthcheck.Timeout, c.Healthcheck.Retries}, []any{30 * time.Second, 3 * time.Second, 2})
	equal(t, "LABEL", c.Labels["org.opencontainers.image.title"], "greeter")

	// An entrypoint given to run takes the image's CMD away: the program prints its message.
	out, _ := w.slipway(t, "", "run", "--rm", "--entrypoint", "greeter", "greeter")
	equal(t, "greeting", out, "Hello from the slipway\n")
	out, _ = w.slipway(t, "", "run", "--rm", "greeter", "-version")
	equal(t, "version", out, "dev\n")
	out, _ = w.slipway(t, "", "run", "--rm", "--entrypoint", "sh", "greeter", "-c", "id -u; stat -c %U:%a /etc/greeter/message /usr/local/bin/greeter")
	equal(t, "owners", out, "10001\napp:644\nroot:755\n")

	// One changed file: the compiler runs, the copy of what it makes and the copy on top of that. The stages `test` and
	// `test-report` are not needed.
	replaceInFile(t, filepath.Join(dir, "greeting", "greeting.go"), "strings.TrimSpace(string(text))", `"Ahoy! " + strings.TrimSpace(string(text))`)
	ran, cached := w.build(t, "greeter", dir)
	if len(ran) != 3 || len(cached) != 3 || !strings.Contains(strings.Join(ran, "\n"), "go build") || !strings.Contains(strings.Join(ran, "\n"), "COPY --from=build") {
		t.Errorf("after a change ran %q", ran)
	}
	out, _ = w.slipway(t, "", "run", "--rm", "--entrypoint", "greeter", "greeter")
	equal(t, "greeting", out, "Ahoy! Hello from the slipway\n")

	// A file that .dockerignore names is none of the build's business.
	if err := os.WriteFile(filepath.Join(dir, "NOTES.md"), []byte("notes"), 0o644); err != nil {
		t.Fatal(err)
	}
	if ran, _ := w.build(t, "greeter", dir); len(ran) != 0 {
		t.Errorf("after a change of an ignored file ran %q", ran)
	}

	// Another stage and a build argument: the tests run with the cache mounts of before.
	replaceInFile(t, filepath.Join(dir, "greeting", "greeting_test.go"), `got != "ahoy"`, `got != "Ahoy! ahoy"`)
	if ran, _ := w.build(t, "report", dir, "--target", "test-report"); !strings.Contains(strings.Join(ran, "\n"), "go test") {
		t.Errorf("the tests did not run: %q", ran)
	}
	w.build(t, "greeter:v2", dir, "--build-arg", "VERSION=v2")
	out, _ = w.slipway(t, "", "run", "--rm", "greeter:v2", "-version")
	equal(t, "version", out, "v2\n")
}

func (w *realWorld) nodeApp(t *testing.T) {
	dir := w.project(t, "node-app")
	w.cold(t, "node-app", dir, 6) // WORKDIR (the same in both stages), COPY, npm; COPY, COPY, node --check

	c := w.config(t, "node-app")
	equal(t, "USER", c.User, "nobody")
	equal(t, "WORKDIR", c.WorkingDir, "/app")
	equal(t, "EXPOSE", c.ExposedPorts, map[string]struct{}{"3000/tcp": {}})
	equal(t, "CMD", c.Cmd, []string{"node", "server.js"})
	equal(t, "NODE_ENV", c.Env[len(c.Env)-1], "NODE_ENV=production")
	out, _ := w.slipway(t, "", "run", "--rm", "node-app", "node", "server.js", "--print")
	equal(t, "page", out, "Next high water: soon\n")

	// The program changes, the dependencies do not.
	replaceInFile(t, filepath.Join(dir, "server.js"), "when: 'soon'", "when: 'at noon'")
	ran, cached := w.build(t, "node-app", dir)
	if len(ran) != 2 || len(cached) != 4 || strings.Contains(strings.Join(ran, "\n"), "npm") {
		t.Errorf("after a change ran %q", ran)
	}
	out, _ = w.slipway(t, "", "run", "--rm", "node-app", "node", "server.js", "--print")
	equal(t, "page", out, "Next high water: at noon\n")
}

func (w *realWorld) cProject(t *testing.T) {
	dir := w.project(t, "c-project")
	w.cold(t, "crc", dir, 8)

	equal(t, "ENTRYPOINT", w.config(t, "crc").Entrypoint, []string{"crcsum"})
	out, _ := w.slipway(t, "123456789", "run", "-i", "--rm", "crc")
	equal(t, "checksum", out, "cbf43926\n")
	// The packages went through cache mounts: no lists and no archives in the image.
	out, _ = w.slipway(t, "", "run", "--rm", "--entrypoint", "sh", "crc", "-c", "ls /var/lib/apt/lists /var/cache/apt/archives 2>/dev/null | grep -c deb || true")
	if n, err := strconv.Atoi(strings.TrimSpace(out)); err == nil && n > 0 {
		t.Errorf("%d files of apt are in the image", n)
	}

	replaceInFile(t, filepath.Join(dir, "main.c"), `"%08lx\n"`, `"crc %08lx\n"`)
	replaceInFile(t, filepath.Join(dir, "Makefile"), "= cbf43926", `= "crc cbf43926"`)
	ran, cached := w.build(t, "crc", dir)
	if len(ran) != 4 || len(cached) != 4 || strings.Contains(strings.Join(ran, "\n"), "apt-get") {
		t.Errorf("after a change ran %q", ran)
	}
	out, _ = w.slipway(t, "123456789", "run", "-i", "--rm", "crc")
	equal(t, "checksum", out, "crc cbf43926\n")
}
