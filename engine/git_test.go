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

// TestGitContext builds from a repository that git's own server side hands out, and follows its branch.
func TestGitContext(t *testing.T) {
	execPath, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Skip("git is not installed")
	}
	te := openTest(t)
	dir := t.TempDir()
	work := filepath.Join(dir, "app.git")
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(work, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(execPath)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + dir},
	})
	defer server.Close()
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-c", "user.name=n", "-c", "user.email=e@example.test", "-c", "init.defaultBranch=main"}, args...)...)
		cmd.Dir = dir
		if _, err := os.Stat(work); err == nil {
			cmd.Dir = work
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	git("init", "--quiet", work)
	commit := func() {
		t.Helper()
		git("add", ".")
		git("commit", "--quiet", "-m", "change")
	}
	write("Dockerfile", "FROM scratch\nCOPY file /\nADD "+server.URL+"/app.git#main:sub /sub/\n")
	write("file", "one")
	write("sub/x", "x")
	commit()

	build := func() result {
		t.Helper()
		return te.mustBuild(request{name: "fromgit", attrs: map[string]string{"context": server.URL + "/app.git#main"}})
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
	head, err := exec.Command("git", "-C", work, "rev-parse", "HEAD").Output()
	if err != nil {
		t.Fatal(err)
	}
	commitID, uri := strings.TrimSpace(string(head)), server.URL+"/app.git#main"
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
