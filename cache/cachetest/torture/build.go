// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// variants is how many different images are built, again and again.
const variants = 5

const baseDockerfile = `FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
`

// The image of a variant: copies, steps of containers, two stages, and files that make packing and pushing take a moment.
const dockerfile = `FROM torture/base AS made
ARG V
COPY data /data
RUN mkdir -p /made/many && for i in $(seq 1 150); do echo "$V $i" >/made/many/$i; done
RUN seq 1 200000 | sed "s/$/ $V/" >/made/large && rm /data/10
FROM torture/base
ARG V
COPY --from=made /made /made
COPY data/1 data/2 /etc/conf/
RUN echo "$V" >/etc/variant && sha256sum /made/large >/etc/sum && ln /etc/sum /etc/sum2 && chmod 700 /made
CMD ["cat", "/etc/variant"]
`

// builder runs a slipway program on a store of its own.
type builder struct {
	t       *torture
	slipway string
	root    string
	work    string // contexts
	host    string // of the registry
	// want is the content of each variant's image.
	want [variants]digest.Digest
	// took is how long each command takes, about: kills come within that time.
	took map[string]time.Duration
}

func (b *builder) command(args ...string) *exec.Cmd {
	cmd := exec.Command(b.slipway, append([]string{"--standalone", "--root", b.root}, args...)...)
	cmd.Env = append(os.Environ(), "BUILDKIT_PROGRESS=quiet", "DOCKER_CONFIG="+filepath.Join(b.work, "docker"))
	return cmd
}

// run runs a command to its end.
func (b *builder) run(args ...string) error {
	cmd := b.command(args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("slipway %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

func variant(v int) string { return fmt.Sprintf("torture/v%d", v) }

func (b *builder) buildArgs(v int) []string {
	return []string{"build", "-t", variant(v), "--build-arg", fmt.Sprint("V=", v), filepath.Join(b.work, "context")}
}

// prepare writes the contexts and builds the base image.
func (b *builder) prepare() error {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("the base image needs a static busybox (Debian: busybox-static): %w", err)
	}
	for name, content := range map[string][]byte{
		"base/Dockerfile": []byte(baseDockerfile), "base/busybox": busybox, "context/Dockerfile": []byte(dockerfile),
	} {
		if err := write(filepath.Join(b.work, name), content); err != nil {
			return err
		}
	}
	for i := range 100 {
		if err := write(filepath.Join(b.work, "context/data", fmt.Sprint(i)), bytes.Repeat([]byte{byte(i), '\n'}, 50*i)); err != nil {
			return err
		}
	}
	return b.run("build", "-t", "torture/base", filepath.Join(b.work, "base"))
}

func write(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o755)
}

// content opens the store and returns the content digest of what an image shows.
func (b *builder) content(ctx context.Context, name string) (digest.Digest, error) {
	s, err := cache.Open(ctx, b.root)
	if err != nil {
		return "", err
	}
	defer s.Close()
	return contentOf(ctx, s, name)
}

func contentOf(ctx context.Context, s *cache.Store, name string) (digest.Digest, error) {
	m, err := s.Images.Get(ctx, name)
	if err != nil {
		return "", err
	}
	snap, ok, err := s.Images.Layers(ctx, m.Target.Digest)
	if err == nil && !ok {
		err = errors.New("its layers are not known")
	}
	if err != nil {
		return "", fmt.Errorf("image %s: %w", name, err)
	}
	return s.Snapshots.Content(ctx, snap)
}

// buildRuns kills slipway itself.
func (t *torture) buildRuns(ctx context.Context, root, slipway string, runs int) error {
	slipway, err := filepath.Abs(slipway)
	if err != nil {
		return err
	}
	if root, err = filepath.Abs(root); err != nil {
		return err
	}
	tb := &mainTB{}
	defer tb.cleanup()
	b := &builder{t: t, slipway: slipway, root: root, took: map[string]time.Duration{}, work: root + ".work", host: registrytest.Start(tb, registrytest.Options{}).Host}

	// What a slipway that nobody kills makes of it. It also fills the registry.
	reference := *b
	reference.root = root + ".reference"
	if err := reference.prepare(); err != nil {
		return err
	}
	for v := range variants {
		if err := reference.run(reference.buildArgs(v)...); err != nil {
			return err
		}
		if b.want[v], err = reference.content(ctx, variant(v)); err != nil {
			return err
		}
		if err := reference.run("tag", variant(v), b.host+"/"+variant(v)); err != nil {
			return err
		}
		if err := reference.run("push", b.host+"/"+variant(v)); err != nil {
			return err
		}
	}
	if err := b.prepare(); err != nil {
		return err
	}
	for range runs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.runs++
		if err := b.killOne(ctx); err != nil {
			t.violate("%v", err)
		}
		if len(t.violations) > 20 {
			return errors.New("too many violations")
		}
	}
	return nil
}

// killOne kills one command at a random point and looks at what it leaves.
func (b *builder) killOne(ctx context.Context) error {
	t := b.t
	v := t.rnd.IntN(variants)
	remote := b.host + "/" + variant(v)
	again := b.buildArgs(v)
	var args []string
	name := variant(v)
	switch t.rnd.IntN(9) {
	case 0, 1, 2:
		args = append(b.buildArgs(v), "--no-cache")
	case 3:
		args = b.buildArgs(v)
	case 4, 5:
		args, again, name = []string{"pull", remote}, []string{"pull", remote}, remote
	case 6:
		if err := b.run(again...); err != nil {
			return err
		}
		if err := b.run("tag", variant(v), b.host+"/pushed"); err != nil {
			return err
		}
		args = []string{"push", b.host + "/pushed"}
	case 7:
		if err := b.run(again...); err != nil {
			return err
		}
		args = []string{"rmi", "-f", variant(v)} // deletes and sweeps
	case 8:
		if err := b.run(again...); err != nil {
			return err
		}
		args = []string{"cache", "prune", "--all"}
	}
	what := args[0]
	if what == "cache" {
		what = "cache prune"
	}
	if took, ok := b.took[what]; !ok {
		b.took[what] = 300 * time.Millisecond
	} else {
		b.took[what] = took + took/20 // so that what is always killed gets further
	}
	cmd := b.command(args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	killed := make(chan bool, 1)
	begun := time.Now()
	timer := time.AfterFunc(time.Duration(t.rnd.Int64N(int64(b.took[what]))), func() { killed <- cmd.Process.Kill() == nil })
	err := cmd.Wait()
	switch {
	case timer.Stop() || !<-killed:
		t.survivors++
		b.took[what] = time.Since(begun)
		if err != nil {
			t.violate("slipway %s: %v: %s", strings.Join(args, " "), err, bytes.TrimSpace(out.Bytes()))
		}
	default:
		t.kills++
		t.killedIn("slipway " + what)
	}
	t.logf("slipway %s: %v", strings.Join(args, " "), err)

	// The next engine takes away what the killed one has left on the machine.
	if err := b.run("images"); err != nil {
		return err
	}
	b.leftovers()
	// What was finished before is there, and nothing is damaged.
	if err := b.check(ctx, "after the kill"); err != nil {
		return err
	}
	if err := b.run(again...); err != nil {
		return err
	}
	got, err := b.content(ctx, name)
	if err != nil {
		return err
	}
	if got != b.want[v] {
		t.violate("wrong result: %s has the content %s, want %s", name, got, b.want[v])
	}
	b.leftovers()
	return b.check(ctx, "after the next "+again[0])
}

// check sweeps the store and checks all of it.
func (b *builder) check(ctx context.Context, when string) error {
	s, err := cache.Open(ctx, b.root)
	if err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	defer s.Close()
	problems, err := sweepAndCheck(ctx, s)
	if err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	for _, p := range problems {
		b.t.violate("%s: %+v", when, p)
	}
	images, err := s.Images.List(ctx)
	if err != nil {
		return err
	}
	if _, err := s.Images.Get(ctx, "torture/base"); err != nil {
		return fmt.Errorf("%s: lost: %w", when, err)
	}
	for _, m := range images {
		for v := range variants {
			if !strings.HasSuffix(m.Name, variant(v)+":latest") {
				continue
			}
			got, err := contentOf(ctx, s, m.Name)
			if err != nil || got != b.want[v] {
				b.t.violate("%s: %s has the content %s (%v), want %s", when, m.Name, got, err, b.want[v])
			}
			b.t.checked++
		}
	}
	for _, dir := range []string{"content/ingest", "layers/tmp", "layers/uppers"} {
		b.t.verifyEmpty(filepath.Join(b.root, dir))
	}
	return nil
}

// leftovers looks for what an engine of this root may have left on the machine.
func (b *builder) leftovers() {
	deadline := time.Now().Add(3 * time.Second)
	for {
		found := b.lookForLeftovers()
		if len(found) == 0 {
			return
		}
		if time.Now().After(deadline) {
			b.t.violate("left: %v", found)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// hash is what the engine puts into the names of things on the machine.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:4])
}

func (b *builder) lookForLeftovers() []string {
	var found []string
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], b.root+"/") {
			found = append(found, "mount "+f[4])
		}
	}
	engine := "slipway-" + hash(filepath.Join(b.root, "executor"))
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == engine {
			found = append(found, "cgroup "+path)
			return fs.SkipDir
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join("/run", engine)); err == nil {
		found = append(found, "directory /run/"+engine)
	}
	id := hash(b.root)
	links, _ := os.ReadDir("/sys/class/net")
	for _, l := range links {
		if l.Name() == "slw"+id || strings.HasPrefix(l.Name(), "slv"+id[:6]+".") {
			found = append(found, "interface "+l.Name())
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range procs {
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue
		}
		exe, _ := os.Readlink(filepath.Join(dir, "exe"))
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if bytes.Contains(cmdline, []byte("\x00"+b.root+"\x00")) || strings.HasPrefix(exe, b.root+"/") || bytes.Contains(cgroup, []byte("/"+engine)) {
			found = append(found, fmt.Sprintf("process %s: %s", filepath.Base(dir), bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))))
		}
	}
	return found
}

// mainTB is what registrytest needs of a test.
type mainTB struct {
	testing.TB
	cleanups []func()
}

func (m *mainTB) Helper()          {}
func (m *mainTB) Cleanup(f func()) { m.cleanups = append(m.cleanups, f) }
func (m *mainTB) Fatal(v ...any)   { panic(fmt.Sprint(v...)) }
func (m *mainTB) Fatalf(format string, v ...any) {
	panic(fmt.Sprintf(format, v...))
}
func (m *mainTB) Error(v ...any)                 { fmt.Fprintln(os.Stderr, v...) }
func (m *mainTB) Errorf(format string, v ...any) { fmt.Fprintf(os.Stderr, format+"\n", v...) }
func (m *mainTB) Context() context.Context       { return context.Background() }

func (m *mainTB) cleanup() {
	for i := len(m.cleanups) - 1; i >= 0; i-- {
		m.cleanups[i]()
	}
}
