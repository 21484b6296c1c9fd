// SPDX-License-Identifier: Apache-2.0

package git

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/solver"
)

const token = "sesame"

// server serves the repositories below dir over HTTP by git's own backend; those below dir/private want the token.
func server(t *testing.T, dir string) string {
	t.Helper()
	execPath, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Skip("git is not installed")
	}
	backend := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(execPath)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "HOME=" + dir},
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); strings.HasPrefix(r.URL.Path, "/private/") && password != token {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// git runs git in dir and returns what it prints.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{
		"-c", "user.name=n", "-c", "user.email=e@example.test", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always",
		"-c", "http.extraHeader=Authorization: basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+token)),
	}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_COMMITTER_DATE=1700000000 +0000")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// session has one secret.
type session struct{ name, value string }

func (s session) Secret(_ context.Context, id string) ([]byte, error) {
	if id == s.name {
		return []byte(s.value), nil
	}
	return nil, fmt.Errorf("secret %q: %w", id, solver.ErrNotFound)
}

func (session) Local(context.Context, solver.LocalRequest) (solver.LocalDir, error) {
	return solver.LocalDir{}, solver.ErrNotFound
}

func (session) SSHAgent(context.Context, string) (string, func(), error) {
	return "", nil, solver.ErrNotFound
}

func (session) Credentials(context.Context, string) (user, secret string, err error) {
	return "", "", nil
}

// fixture is a store and a source function.
type fixture struct {
	t      *testing.T
	layers *layer.Store
	repos  string
	newOp  func(*solver.Vertex) (solver.Source, error)
}

func newFixture(t *testing.T) *fixture {
	layers, err := layer.Open(filepath.Join(t.TempDir(), "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := layers.Close(); err != nil {
			t.Error(err)
		}
	})
	repos := filepath.Join(t.TempDir(), "git")
	return &fixture{t: t, layers: layers, repos: repos, newOp: New(Deps{Layers: layers, Dir: repos})}
}

// get pins and checks out; it returns the pin's parts in one line and the tree as "path" or "path=content" lines.
func (f *fixture) get(url, fragment string, secrets session, opts ...llb.GitOption) (pin string, tree []string, entries *index.Index, err error) {
	f.t.Helper()
	def, err := llb.Git(url, fragment, opts...).Marshal(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	var op pb.Op
	if err := op.UnmarshalVT(def.Def[0]); err != nil {
		f.t.Fatal(err)
	}
	src, err := f.newOp(&solver.Vertex{Op: &op})
	if err != nil {
		return "", nil, nil, err
	}
	env := &solver.Env{Session: secrets, Progress: noProgress{}}
	p, err := src.Pin(f.t.Context(), env)
	if err != nil {
		return "", nil, nil, err
	}
	for _, part := range p.Parts {
		pin += part.Name + "=" + part.Value + " "
	}
	out, err := src.Run(f.t.Context(), env, nil)
	if err != nil {
		return pin, nil, nil, err
	}
	if len(out[0]) == 0 {
		return pin, nil, index.New(nil), nil
	}
	entries, err = f.layers.Index(f.t.Context(), out[0][0])
	if err != nil {
		f.t.Fatal(err)
	}
	for e := range entries.All() {
		line := e.Path
		if e.Type == index.File && !strings.HasPrefix(e.Path, ".git/") {
			r, err := f.layers.OpenFile(f.t.Context(), out[0][0], e.Path)
			if err != nil {
				f.t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				f.t.Fatal(err)
			}
			line += "=" + string(b)
		}
		if line != "" {
			tree = append(tree, line)
		}
	}
	return pin, tree, entries, nil
}

type noProgress struct{}

func (noProgress) Log(int, []byte)                   {}
func (noProgress) Status(string, int64, int64, bool) {}
func (noProgress) Warn(string)                       {}

// repo makes a repository "project.git" with two commits, a branch, tags, a link and a submodule "part".
func repo(t *testing.T, dir, url string) (first, second string) {
	t.Helper()
	part := filepath.Join(dir, "part.git")
	git(t, dir, "init", "--quiet", part)
	write(t, filepath.Join(part, "piece"), "of the whole")
	git(t, part, "add", ".")
	git(t, part, "commit", "--quiet", "-m", "part")

	work := filepath.Join(dir, "project.git")
	git(t, dir, "init", "--quiet", work)
	write(t, filepath.Join(work, "README"), "one")
	write(t, filepath.Join(work, "sub/dir/run.sh"), "#!/bin/sh")
	if err := os.Chmod(filepath.Join(work, "sub/dir/run.sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub/dir", filepath.Join(work, "link")); err != nil {
		t.Fatal(err)
	}
	git(t, work, "add", ".")
	git(t, work, "commit", "--quiet", "-m", "one")
	first = git(t, work, "rev-parse", "HEAD")
	git(t, work, "tag", "-a", "v1", "-m", "annotated")
	git(t, work, "branch", "old")
	write(t, filepath.Join(work, "README"), "two")
	git(t, work, "submodule", "--quiet", "add", url+"/part.git", "part")
	git(t, work, "add", ".")
	git(t, work, "commit", "--quiet", "-m", "two")
	second = git(t, work, "rev-parse", "HEAD")
	return first, second
}

func TestCheckout(t *testing.T) {
	dir := t.TempDir()
	url := server(t, dir)
	first, second := repo(t, dir, url)
	old := []string{"README=one", "link", "sub", "sub/dir", "sub/dir/run.sh=#!/bin/sh"}
	latest := []string{
		".gitmodules=[submodule \"part\"]\n\tpath = part\n\turl = " + url + "/part.git\n",
		"README=two", "link", "part", "part/piece=of the whole", "sub", "sub/dir", "sub/dir/run.sh=#!/bin/sh",
	}
	var withoutPart []string
	for _, line := range latest {
		if line != "part/piece=of the whole" {
			withoutPart = append(withoutPart, line)
		}
	}
	f := newFixture(t)
	for _, tc := range []struct {
		name, fragment string
		opts           []llb.GitOption
		commit         string
		tree           []string
		err            string
	}{
		{name: "default branch", commit: second, tree: latest},
		{name: "branch", fragment: "old", commit: first, tree: old},
		{name: "full name", fragment: "refs/heads/old", commit: first, tree: old},
		{name: "annotated tag", fragment: "v1", commit: first, tree: old},
		{name: "commit", fragment: first, commit: first, tree: old},
		{name: "subdirectory", fragment: "old:sub/dir", commit: first, tree: []string{"run.sh=#!/bin/sh"}},
		{name: "without submodules", opts: []llb.GitOption{llb.GitSkipSubmodules()}, commit: second, tree: withoutPart},
		{name: "checksum of the commit", fragment: "v1", opts: []llb.GitOption{llb.GitChecksum(first[:12])}, commit: first, tree: old},
		{name: "wrong checksum", fragment: "v1", opts: []llb.GitOption{llb.GitChecksum("abcdef123456")}, err: "does not have the checksum abcdef123456"},
		{name: "wrong checksum of a commit", fragment: first, opts: []llb.GitOption{llb.GitChecksum("abcdef123456")}, err: "does not have the checksum"},
		{name: "no such ref", fragment: "nowhere", err: `the repository has no ref "nowhere"`},
		{name: "no such commit", fragment: strings.Repeat("ab", 20), err: "abab"},
		{name: "no such directory", fragment: "old:nowhere", err: "the repository has no directory nowhere"},
		{name: "a link is no directory", fragment: "old:link", err: "the repository has no directory link"},
		{name: "attribute", opts: []llb.GitOption{llb.GitFetchByCommit()}, err: "git.fetchbycommit: not supported yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.t = t
			pin, tree, _, err := f.get(url+"/project.git", tc.fragment, session{}, tc.opts...)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || strings.Contains(err.Error(), "\n") {
					t.Fatalf("error %v; want one line with %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(pin, "commit="+tc.commit+" ") {
				t.Errorf("pin %q; want commit %s", pin, tc.commit)
			}
			if got, want := strings.Join(tree, "\n"), strings.Join(tc.tree, "\n"); got != want {
				t.Errorf("tree:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

func TestModesAndTimes(t *testing.T) {
	dir := t.TempDir()
	url := server(t, dir)
	repo(t, dir, url)
	f := newFixture(t)
	_, _, entries, err := f.get(url+"/project.git", "old", session{}, llb.GitMTimeCommit())
	if err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]uint32{"README": 0o644, "sub/dir": 0o755, "sub/dir/run.sh": 0o755} {
		e, ok := entries.Lookup(path)
		if !ok || e.Mode != mode || e.UID != 0 || e.ModTime != 1_700_000_000e9 {
			t.Errorf("%s: %+v; want mode %o, owner 0, the time of the commit", path, e, mode)
		}
	}
}

func TestKeepGitDir(t *testing.T) {
	dir := t.TempDir()
	url := server(t, dir)
	_, second := repo(t, dir, url)
	f := newFixture(t)
	pin, tree, entries, err := f.get(url+"/project.git", "main", session{}, llb.KeepGitDir())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(pin, "ref=refs/heads/main "+second) {
		t.Errorf("pin %q does not name the ref", pin)
	}
	if _, ok := entries.Lookup(".git/HEAD"); !ok {
		t.Errorf("no .git in %q", tree)
	}
	for _, name := range []string{".git/FETCH_HEAD", ".git/logs", ".git/modules/part/FETCH_HEAD", ".git/modules/part/logs"} {
		if _, ok := entries.Lookup(name); ok {
			t.Errorf("%s was kept", name)
		}
	}
	if _, ok := entries.Lookup(".git/modules/part/HEAD"); !ok {
		t.Errorf("no .git of the submodule in %q", tree)
	}
	// Another store gets the same.
	_, _, others, err := newFixture(t).get(url+"/project.git", "main", session{}, llb.KeepGitDir())
	if err != nil {
		t.Fatal(err)
	}
	for e := range entries.All() {
		if other, ok := others.Lookup(e.Path); !ok || other.Digest != e.Digest {
			t.Errorf("%s is not the same in another store", e.Path)
		}
	}
}

func TestToken(t *testing.T) {
	dir := t.TempDir()
	url := server(t, dir)
	if err := os.Mkdir(filepath.Join(dir, "private"), 0o755); err != nil {
		t.Fatal(err)
	}
	first, _ := repo(t, filepath.Join(dir, "private"), url+"/private")
	f := newFixture(t)
	remote := url + "/private/project.git"
	if _, _, _, err := f.get(remote, "old", session{}); err == nil || !strings.Contains(err.Error(), "GIT_AUTH_TOKEN") {
		t.Errorf("without a token: %v; want advice to give one", err)
	}
	if _, _, _, err := f.get(remote, "old", session{"GIT_AUTH_TOKEN", "wrong"}); err == nil || strings.Contains(err.Error(), "wrong") {
		t.Errorf("with a wrong token: %v; want an error without it", err)
	}
	host := strings.TrimPrefix(url, "http://")
	for _, name := range []string{"GIT_AUTH_TOKEN", "GIT_AUTH_TOKEN." + host} {
		pin, _, _, err := f.get(remote, "main", session{name, token})
		if err != nil {
			t.Fatalf("with %s: %v", name, err)
		}
		if strings.Contains(pin, token) {
			t.Errorf("the token is in the pin %q", pin)
		}
	}
	if pin, _, _, err := f.get(remote, first, session{"GIT_AUTH_TOKEN", token}); err != nil || !strings.Contains(pin, first) {
		t.Errorf("by commit: %q, %v", pin, err)
	}
	// Nothing of the token stays in the repositories that are kept.
	if out, err := exec.Command("grep", "-r", "-e", token, "-e", base64.StdEncoding.EncodeToString([]byte("x-access-token:"+token)), f.repos).CombinedOutput(); err == nil {
		t.Errorf("the token is kept:\n%s", out)
	}
}

// TestBrokenRepository shows that a repository which a killed fetch has left unusable is made again.
func TestBrokenRepository(t *testing.T) {
	dir := t.TempDir()
	url := server(t, dir)
	repo(t, dir, url)
	f := newFixture(t)
	if _, _, _, err := f.get(url+"/project.git", "old", session{}); err != nil {
		t.Fatal(err)
	}
	src, err := f.newOp(&solver.Vertex{Op: &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "git://" + url + "/project.git"}}}})
	if err != nil {
		t.Fatal(err)
	}
	bare, unlock, err := src.(*source).repos.lock(t.Context(), src.(*source).remote)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	write(t, filepath.Join(bare, "shallow.lock"), "")
	if _, err := os.Stat(filepath.Join(bare, "HEAD")); err != nil {
		t.Fatalf("the test looks at the wrong directory: %v", err)
	}
	_, whole, _, err := f.get(url+"/project.git", "main", session{})
	if err != nil {
		t.Fatalf("after a killed fetch: %v (tree %q)", err, whole)
	}
	// A power cut has emptied the files of what is in the commit: the commit itself is there.
	objects := git(t, bare, "cat-file", "--batch-check=%(objecttype) %(objectname)", "--batch-all-objects")
	emptied := 0
	for line := range strings.Lines(objects) {
		kind, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		path := filepath.Join(bare, "objects", name[:2], name[2:])
		if _, err := os.Stat(path); kind != "blob" || err != nil {
			continue
		}
		if err := errors.Join(os.Chmod(path, 0o644), os.Truncate(path, 0)); err != nil {
			t.Fatal(err)
		}
		emptied++
	}
	if emptied == 0 {
		t.Fatal("there are no such files: the test tests nothing")
	}
	if _, tree, _, err := f.get(url+"/project.git", "main", session{}); err != nil || !slices.Equal(tree, whole) {
		t.Errorf("after a power cut: %q, %v", tree, err)
	}
}

// TestWaitForRepository: who waits for a repository that somebody else uses can give up.
func TestWaitForRepository(t *testing.T) {
	r := NewRepositories(t.TempDir())
	_, unlock, err := r.lock(t.Context(), "https://example.test/a.git")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, _, err := r.lock(ctx, "https://example.test/a.git"); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestChoose(t *testing.T) {
	a, b, c := strings.Repeat("a", 40), strings.Repeat("b", 40), strings.Repeat("c", 40)
	answer := a + "\trefs/heads/x\n" + b + "\trefs/tags/x\n" + c + "\trefs/tags/x^{}\n" + b + "\trefs/heads/other/x\n"
	for _, tc := range []struct {
		ref, answer string
		want        pinned
		ok          bool
	}{
		{"x", answer, pinned{"refs/heads/x", a, a}, true},
		{"tags/x", answer, pinned{"refs/tags/x", b, c}, true},
		{"refs/tags/x", answer, pinned{"refs/tags/x", b, c}, true},
		{"y", answer, pinned{}, false},
		{"", "ref: refs/heads/trunk\tHEAD\n" + a + "\tHEAD\n", pinned{"refs/heads/trunk", a, a}, true},
		{"x", "not an id\trefs/heads/x\n", pinned{}, false},
	} {
		if got, ok := choose(tc.ref, tc.answer); got != tc.want || ok != tc.ok {
			t.Errorf("choose(%q) = %+v, %v; want %+v, %v", tc.ref, got, ok, tc.want, tc.ok)
		}
	}
}
