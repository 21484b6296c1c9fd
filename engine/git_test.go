// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
)

// gitServer is a repository that git's own server side hands out.
type gitServer struct {
	t         *testing.T
	dir, work string
	url       string
}

// serveGit makes an empty repository with the branch main.
func serveGit(t *testing.T) *gitServer {
	t.Helper()
	execPath, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Skip("git is not installed")
	}
	g := &gitServer{t: t, dir: t.TempDir()}
	g.work = filepath.Join(g.dir, "app.git")
	server := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(execPath)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + g.dir, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + g.dir},
	})
	t.Cleanup(server.Close)
	g.url = server.URL + "/app.git"
	g.git("init", "--quiet", g.work)
	return g
}

// git runs a command in the repository and returns what it prints.
func (g *gitServer) git(args ...string) string {
	g.t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=n", "-c", "user.email=e@example.test", "-c", "init.defaultBranch=main"}, args...)...)
	cmd.Dir = g.dir
	if _, err := os.Stat(g.work); err == nil {
		cmd.Dir = g.work
	}
	out, err := cmd.Output()
	if err != nil {
		g.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (g *gitServer) write(name, content string) {
	g.t.Helper()
	path := filepath.Join(g.work, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gitServer) commit() {
	g.t.Helper()
	g.git("add", ".")
	g.git("commit", "--quiet", "-m", "change")
}

// TestGitContext builds from a repository and follows its branch.
func TestGitContext(t *testing.T) {
	repo := serveGit(t)
	te := openTest(t)
	write, commit := repo.write, repo.commit
	write("Dockerfile", "FROM scratch\nCOPY file /\nADD "+repo.url+"#main:sub /sub/\n")
	write("file", "one")
	write("sub/x", "x")
	commit()

	build := func() result {
		t.Helper()
		return te.mustBuild(request{name: "fromgit", attrs: map[string]string{"context": repo.url + "#main"}})
	}
	copied := func(r result) bool {
		for name, v := range r.vertices {
			if strings.Contains(name, "COPY file /") {
				return !v.Cached
			}
		}
		t.Fatalf("no COPY among %v", r.vertices)
		return false
	}
	if !copied(build()) {
		t.Error("the first build copied nothing")
	}
	if copied(build()) {
		t.Error("the second build copied again")
	}
	write("file", "two")
	commit()
	if !copied(build()) {
		t.Error("the new commit was not noticed")
	}
	write("unrelated", "x")
	commit()
	if copied(build()) {
		t.Error("COPY ran for a commit that changes nothing that it reads")
	}

	// Its provenance has the commit as a material and as what the build is configured by.
	rec := te.history(&controlapi.BuildHistoryRequest{})[0]
	var p types.ProvenancePredicateSLSA1
	for _, d := range rec.Result.Attestations {
		if d.MediaType == "application/vnd.in-toto+json" {
			decode(t, te.blob(d), &p)
		}
	}
	commitID, uri := repo.git("rev-parse", "HEAD"), repo.url+"#main"
	if cs := p.BuildDefinition.ExternalParameters.ConfigSource; cs.URI != uri || cs.Digest["sha1"] != commitID {
		t.Errorf("config source %+v, want %s at %s", cs, uri, commitID)
	}
	if ms := p.BuildDefinition.ResolvedDependencies; len(ms) != 1 || ms[0].URI != uri || ms[0].Digest["sha1"] != commitID {
		t.Errorf("materials %+v", ms)
	}
	if md := p.RunDetails.Metadata; !md.Hermetic || !md.Completeness.ResolvedDependencies {
		t.Errorf("metadata %+v", md)
	}
}
