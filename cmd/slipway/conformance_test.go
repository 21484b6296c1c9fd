// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/rogpeppe/go-internal/txtar"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/engine/buildkitapi/buildctltest"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// TestConformance builds testdata/conformance/*.txtar with a buildkitd of the version in go.mod and with our engine, through
// the same client, and compares what comes out: the image with its config, history and annotations, every entry of every layer,
// warnings, answers and errors. What BuildKit does is right, except where a case says why not.
//
// A case is a context (with setup.sh, which is run in it first and is no part of it, for what an archive of texts cannot hold).
// Its comment says what is done with it, a line each; words are split at blanks outside of single quotes, and $WORK, $CTX, $HTTP, $REGISTRY and $CGROUP stand for
// the case's directory, the context in it, a server of the files in $WORK/www, a registry, and a cgroup; $OWN is a directory of each engine's own:
//
//	build [logs] WORD...        builds. NAME=VALUE is an option of the frontend; -o, --local, --oci-layout, --secret, --ssh, --allow, --import-cache and --export-cache
//	                            are buildctl's; -C DIR is another context. Without -o the output is an OCI archive. With logs what steps print is compared
//	fail REGEXP [WORD...]       a build that must fail in both, in the same place, with errors that match
//	refused REGEXP WORD...      a build that only we refuse, on purpose, with an error that matches
//	call REQUEST [WORD...]      a request to the frontend (frontend.lint, frontend.outline…)
//	base NAME [WORD...]         makes an image (of BuildKit's) that later builds of this case know as NAME
//	sh WORD...                  runs a shell command in the context
//	except REGEXP REASON...     lines of the difference that match are so on purpose; there must be some
//	sometimes REGEXP REASON...  the same, where it depends on what BuildKit happens to have
func TestConformance(t *testing.T) {
	switch {
	case os.Geteuid() != 0:
		t.Skip("comparing with buildkitd needs root: SKIPPED")
	case os.Getenv("SLIPWAY_TEST_BUILDX") == "0":
		t.Skip("$SLIPWAY_TEST_BUILDX is 0, so no buildkitd is built: SKIPPED")
	}
	for _, program := range []string{"runc", "busybox", "git"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("comparing with buildkitd needs %s: SKIPPED", program)
		}
	}
	program, err := buildctltest.Buildkitd()
	if err != nil {
		t.Fatal(err)
	}
	if err := runctest.EnsureRunner(); err != nil {
		t.Fatalf("build slipway-runner: %v", err)
	}
	files, err := filepath.Glob("../../testdata/conformance/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	c := &conformance{dir: t.TempDir()}
	t.Setenv("HOME", c.dir)
	t.Setenv("DOCKER_CONFIG", filepath.Join(c.dir, ".docker"))
	c.theirs = startBuildkitd(t, program, filepath.Join(c.dir, "bk"))
	c.ours = startOurs(t, filepath.Join(c.dir, "sw"))
	c.makeBase(t)
	t.Run("cases", func(t *testing.T) { // ends when all parallel cases have
		for _, file := range files {
			t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
				t.Parallel()
				c.run(t, file)
			})
		}
	})
}

// conformance is the two engines and the base image that both get.
type conformance struct {
	dir          string
	theirs, ours *bkclient.Client
}

// startBuildkitd starts a buildkitd that uses runc, overlayfs and the host's network, and has its cgroups below one of its own.
func startBuildkitd(t *testing.T, program, dir string) *bkclient.Client {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cgroup := conformanceCgroup(dir)
	config := filepath.Join(dir, "toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "insecure-entitlements = [\"network.host\", \"security.insecure\"]\n[worker.oci]\ndefaultCgroupParent = %q\n", "/"+cgroup), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(program, "--addr", "unix://"+socket, "--root", filepath.Join(dir, "root"), "--config", config, "--otel-socket-path", filepath.Join(dir, "otel"),
		"--containerd-worker=false", "--oci-worker=true", "--oci-worker-binary", "runc", "--oci-worker-snapshotter", "overlayfs", "--oci-worker-net", "host", "--oci-worker-gc=false")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		log.Close()
		for _, pattern := range []string{"/sys/fs/cgroup/%s*", "/sys/fs/cgroup/*/%s*"} {
			tops, _ := filepath.Glob(fmt.Sprintf(pattern, cgroup))
			for _, top := range tops {
				removeCgroups(t, top)
			}
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
				t.Errorf("buildkitd has left the mount %s", f[4])
				_ = syscall.Unmount(f[4], syscall.MNT_DETACH)
			}
		}
	})
	return connectTo(t, socket, func() string { text, _ := os.ReadFile(log.Name()); return string(text) })
}

// conformanceCgroup is the cgroup of steps of the buildkitd in dir.
func conformanceCgroup(dir string) string { return "slipway-conformance-" + shortHash(dir) }

// removeCgroups removes empty cgroups, the inner ones first.
func removeCgroups(t *testing.T, top string) {
	var dirs []string
	_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("buildkitd has left the cgroup %s: %v", dir, err)
		}
	}
}

func startOurs(t *testing.T, root string) *bkclient.Client {
	t.Helper()
	config := root + ".toml"
	if err := os.WriteFile(config, []byte("insecure-entitlements = [\"network.host\", \"security.insecure\"]\n[worker.oci]\nnetworkMode = \"host\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("slipway", "--root", root, "daemon", "--config", config)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the engine: %v\n%s", err, log.Bytes())
		}
		stopAndCheck(t, root)
	})
	return connectTo(t, (&app{root: root}).socket(), func() string { return "(its log is printed when it has ended)" })
}

// connectTo waits until the engine answers.
func connectTo(t *testing.T, socket string, log func() string) *bkclient.Client {
	t.Helper()
	client, err := bkclient.New(t.Context(), "unix://"+socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	deadline := time.Now().Add(patience)
	for {
		_, err := client.Info(t.Context())
		if err == nil {
			return client
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not answer: %v\n%s", socket, err, log())
		}
		time.Sleep(10 * time.Millisecond) // until another process listens
	}
}

// makeBase makes the base image: busybox, of testdata/bases, as an OCI layout.
func (c *conformance) makeBase(t *testing.T) {
	t.Helper()
	work := filepath.Join(c.dir, "base")
	ctx := filepath.Join(work, "ctx")
	if err := os.MkdirAll(ctx, 0o755); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"/bin/busybox": "busybox", "../../testdata/bases/busybox.Dockerfile": "Dockerfile"} {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Skipf("needs %s: SKIPPED: %v", from, err)
		}
		if err := os.WriteFile(filepath.Join(ctx, to), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := &conformanceCase{conformance: c, work: work, context: ctx, layouts: map[string]string{}}
	if err := b.base(t.Context(), "busybox", nil); err != nil {
		t.Fatalf("make the base image: %v", err)
	}
}

// conformanceCase is one archive of testdata/conformance.
type conformanceCase struct {
	*conformance
	work, context string
	http          string
	registries    map[string]string // each engine has its own, without anything in it
	layouts       map[string]string // directories of OCI layouts, by the names that builds know them by
	exceptions    []*exception
}

type exception struct {
	pattern *regexp.Regexp
	reason  string
	used    bool
}

func (c *conformance) run(t *testing.T, file string) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b := &conformanceCase{conformance: c, work: t.TempDir(), layouts: map[string]string{"busybox": filepath.Join(c.dir, "base", "busybox.layout")}}
	b.context = filepath.Join(b.work, "ctx")
	server := httptest.NewServer(http.FileServer(http.Dir(filepath.Join(b.work, "www"))))
	defer server.Close()
	b.http = server.URL
	b.registries = map[string]string{"theirs": registrytest.Start(t, registrytest.Options{}).Host, "ours": registrytest.Start(t, registrytest.Options{}).Host}
	if err := b.unpack(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	for number, line := range strings.Split(string(archive.Comment), "\n") {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		words := splitWords(line)
		for i, w := range words {
			words[i] = os.Expand(w, b.variable)
		}
		if err := b.do(t, words); err != nil {
			t.Errorf("%s:%d: %s: %v", file, number+1, line, err)
		}
	}
	for _, e := range b.exceptions {
		if !e.used && !t.Failed() {
			t.Errorf("%s: nothing differs as in the exception %s (%s): take it out", file, e.pattern, e.reason)
		}
	}
}

func (b *conformanceCase) variable(name string) string {
	switch name {
	case "WORK":
		return b.work
	case "CTX":
		return b.context
	case "CGROUP":
		return conformanceCgroup(filepath.Join(b.dir, "bk")) + "-other"
	case "HTTP":
		return strings.TrimPrefix(b.http, "http://")
	}
	return "$" + name // a regular expression's
}

// splitWords splits at blanks outside of single quotes, which are taken away.
func splitWords(line string) []string {
	var words []string
	var word strings.Builder
	inWord, quoted := false, false
	for _, r := range line {
		switch {
		case r == '\'':
			quoted, inWord = !quoted, true
		case r == ' ' && !quoted:
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words
}

// contextTime is when the files of a context were changed.
var contextTime = time.Date(2021, 3, 4, 5, 6, 7, 0, time.UTC)

// unpack writes the files of the archive, runs setup.sh and sets the times.
func (b *conformanceCase) unpack(ctx context.Context, archive *txtar.Archive) error {
	if err := os.MkdirAll(b.context, 0o755); err != nil {
		return err
	}
	setup := false
	for _, f := range archive.Files {
		path := filepath.Join(b.context, f.Name)
		if f.Name == "setup.sh" {
			path, setup = filepath.Join(b.work, f.Name), true
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, 0o644); err != nil {
			return err
		}
	}
	if setup {
		if err := b.shell(ctx, ". ../setup.sh"); err != nil {
			return err
		}
	}
	var paths []string
	if err := filepath.WalkDir(b.context, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	}); err != nil {
		return err
	}
	for _, path := range paths {
		if err := setTime(path, contextTime); err != nil {
			return err
		}
	}
	return nil
}

// shell runs a command of a case in its context.
func (b *conformanceCase) shell(ctx context.Context, command string) error {
	cmd := exec.CommandContext(ctx, "sh", "-euc", command)
	cmd.Dir = b.context
	cmd.Env = append(os.Environ(), "WORK="+b.work, "CTX="+b.context,
		"GIT_AUTHOR_NAME=n", "GIT_AUTHOR_EMAIL=e@example.com", "GIT_COMMITTER_NAME=n", "GIT_COMMITTER_EMAIL=e@example.com",
		"GIT_AUTHOR_DATE=2021-03-04T05:06:07Z", "GIT_COMMITTER_DATE=2021-03-04T05:06:07Z")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// do does one line of a case.
func (b *conformanceCase) do(t *testing.T, words []string) error {
	verb, words := words[0], words[1:]
	take := func() (string, error) {
		if len(words) == 0 {
			return "", fmt.Errorf("%s: a word is missing", verb)
		}
		word := words[0]
		words = words[1:]
		return word, nil
	}
	switch verb {
	case "sh":
		return b.shell(t.Context(), strings.Join(words, " "))
	case "except", "sometimes":
		pattern, err := take()
		if err != nil {
			return err
		}
		if len(words) == 0 {
			return fmt.Errorf("%s: why?", verb)
		}
		re, err := regexp.Compile(pattern)
		b.exceptions = append(b.exceptions, &exception{pattern: re, reason: strings.Join(words, " "), used: verb == "sometimes"})
		return err
	case "base":
		name, err := take()
		if err != nil {
			return err
		}
		return b.base(t.Context(), name, words)
	case "build":
		r := conformanceRequest{verb: verb}
		if len(words) > 0 && words[0] == "logs" {
			r.logs, words = true, words[1:]
		}
		r.words = words
		return b.compare(t, r)
	case "fail", "refused", "call":
		what, err := take()
		if err != nil {
			return err
		}
		return b.compare(t, conformanceRequest{verb: verb, what: what, words: words})
	}
	return fmt.Errorf("%s: no such verb", verb)
}

// conformanceRequest is what both engines are asked.
type conformanceRequest struct {
	verb  string
	what  string // the error, or the name of the call
	words []string
	logs  bool
}

// compare asks both engines and reports what differs.
func (b *conformanceCase) compare(t *testing.T, r conformanceRequest) error {
	var theirs, ours *observation
	var group errgroup.Group
	group.Go(func() (err error) {
		theirs, err = b.observe(t.Context(), b.theirs, r, "theirs")
		return err
	})
	group.Go(func() (err error) {
		ours, err = b.observe(t.Context(), b.ours, r, "ours")
		return err
	})
	if err := group.Wait(); err != nil {
		return err
	}
	if err := errors.Join(r.checkEnd("BuildKit", theirs), r.checkEnd("Slipway", ours)); err != nil {
		return err
	}
	if r.verb == "fail" || r.verb == "refused" {
		t.Logf("BuildKit: %v\nSlipway: %v", theirs.failure, ours.failure)
	}
	if r.verb == "refused" {
		return nil
	}
	var different []string
	for _, line := range difference(theirs.lines, ours.lines) {
		excepted := false
		for _, e := range b.exceptions {
			if e.pattern.MatchString(line) {
				e.used, excepted = true, true
			}
		}
		if !excepted {
			different = append(different, line)
		}
	}
	if dir := os.Getenv("SLIPWAY_CONFORMANCE_DUMP"); dir != "" {
		for who, o := range map[string]*observation{"theirs": theirs, "ours": ours} {
			if err := os.WriteFile(filepath.Join(dir, who), []byte(strings.Join(o.lines, "\n")), 0o644); err != nil {
				return err
			}
		}
	}
	if len(different) > 0 {
		return fmt.Errorf("differs (- BuildKit, + Slipway):\n%s", strings.Join(different, "\n"))
	}
	return nil
}

// checkEnd says whether a request has ended as it should.
func (r conformanceRequest) checkEnd(who string, o *observation) error {
	fails := r.verb == "fail" || r.verb == "refused" && who == "Slipway"
	switch {
	case !fails && o.failure != nil:
		return fmt.Errorf("%s: %w", who, o.failure)
	case fails && o.failure == nil:
		return fmt.Errorf("%s: no error", who)
	case fails:
		if matched, err := regexp.MatchString(r.what, o.failure.Error()); err != nil || !matched {
			return fmt.Errorf("%s: the error is not like %q: %w (%v)", who, r.what, o.failure, err)
		}
	}
	return nil
}

// difference lists what only one of two lists of distinct lines has, in the order of the lists.
func difference(theirs, ours []string) []string {
	var out []string
	for _, line := range theirs {
		if !slices.Contains(ours, line) && !onlyTimeOfDirectory(line, ours) {
			out = append(out, "- "+line)
		}
	}
	for _, line := range ours {
		if strings.HasPrefix(line, "error at ") {
			continue // more places than BuildKit knows
		}
		if other, _, ok := cutDirectoryTime(line); !slices.Contains(theirs, line) && (!ok || !slices.Contains(theirs, other+now)) {
			out = append(out, "+ "+line)
		}
	}
	slices.SortStableFunc(out, func(x, y string) int { return strings.Compare(x[2:], y[2:]) })
	return out
}

// now is how a time is written that is later than the beginning of the tests.
const now = " mtime=NOW"

// cutDirectoryTime cuts the time off what is said about a directory.
func cutDirectoryTime(line string) (rest, when string, ok bool) {
	i := strings.LastIndex(line, " mtime=")
	if i < 0 || !strings.Contains(line, " type=5 ") && !strings.Contains(line, " type=d") {
		return "", "", false
	}
	return line[:i], line[i:], true
}

// onlyTimeOfDirectory says that a directory differs only because BuildKit took the time of the build. A directory that COPY or ADD
// makes on the way gets no time of the build from us, so that the same inputs give the same layer; what it gets is not specified.
func onlyTimeOfDirectory(theirs string, ours []string) bool {
	rest, when, ok := cutDirectoryTime(theirs)
	return ok && when == now && slices.ContainsFunc(ours, func(line string) bool {
		other, _, ok := cutDirectoryTime(line)
		return ok && other == rest
	})
}
