// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// solveError is the typed error that BuildKit's clients look for.
func solveError(t *testing.T, err error) *errdefs.SolveError {
	t.Helper()
	var se *errdefs.SolveError
	if !errors.As(err, &se) {
		t.Fatalf("no SolveError: %v", err)
	}
	return se
}

// debugMounts are what buildx's debugger asks for.
func debugMounts(exec *pb.ExecOp, ids []string) []gwclient.Mount {
	var mounts []gwclient.Mount
	for i, m := range exec.Mounts {
		mounts = append(mounts, gwclient.Mount{
			Selector: m.Selector, Dest: m.Dest, ResultID: ids[i], Readonly: m.Readonly, MountType: m.MountType,
			CacheOpt: m.CacheOpt, SecretOpt: m.SecretOpt, SSHOpt: m.SSHOpt,
		})
	}
	return mounts
}

// runIn runs a shell script in a container of those mounts, as the failed step would have run it.
func runIn(ctx context.Context, c gwclient.Client, op *pb.Op, mounts []gwclient.Mount, script string) (string, error) {
	exec := op.GetExec()
	req := gwclient.NewContainerRequest{Mounts: mounts, Platform: op.Platform, Constraints: op.Constraints, NetMode: exec.GetNetwork()}
	ctr, err := c.NewContainer(ctx, req)
	if err != nil {
		return "", err
	}
	defer ctr.Release(ctx)
	out := newOutBuffer()
	meta := exec.GetMeta()
	if meta == nil {
		meta = &pb.Meta{Cwd: "/", Env: []string{"PATH=/bin"}}
	}
	proc, err := ctr.Start(ctx, gwclient.StartRequest{
		Args: []string{"/bin/sh", "-c", script}, Env: meta.Env, User: meta.User, Cwd: meta.Cwd, SecretEnv: exec.GetSecretenv(),
		SecurityMode: exec.GetSecurity(), Stdout: out, Stderr: out,
	})
	if err != nil {
		return "", err
	}
	err = proc.Wait()
	return out.text(), err
}

// TestFailedStep drives a failed RUN as BuildKit's debugger does: during the build, in a later one, and after a restart.
func TestFailedStep(t *testing.T) {
	te := openTest(t)
	te.base()
	const dockerfile = `FROM base
RUN mkdir -p /etc /w && echo joe:x:1000:1000::/w:/bin/sh >> /etc/passwd && chown 1000 /w
WORKDIR /w
USER joe
ENV COLOUR=blue
RUN --mount=type=bind,target=/ctx --mount=type=bind,target=/scratch,rw --mount=type=cache,target=/kept,mode=0777 --mount=type=tmpfs,target=/fast \
  --mount=type=secret,id=word,target=/word,mode=0444 --mount=type=secret,id=word,env=WORD \
  echo half > done && cat /ctx/input >> done && cat /word >> /dev/null && echo c > /kept/c && exit 7
`
	const script = `cat done; echo $COLOUR; pwd; id -un; cat /ctx/input /kept/c; cat /word; echo /$WORD; test -d /fast; touch /ctx/x 2>/dev/null || echo read-only; touch w`
	const want = "half\ninput\nblue\n/w\njoe\ninput\nc\nhush-5f0c/hush-5f0c\nread-only\n"
	withSecret := []session.Attachable{secretsprovider.FromMap(map[string][]byte{"word": []byte("hush-5f0c")})}
	dir := t.TempDir()
	for name, text := range map[string]string{"Dockerfile": dockerfile, "input": "input\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	look := func(ctx context.Context, c gwclient.Client, se *errdefs.Solve) {
		t.Helper()
		exec := se.GetOp().GetExec()
		if exec == nil || len(se.MountIDs) != len(exec.Mounts) || len(se.InputIDs) != len(exec.Mounts) {
			t.Fatalf("the error does not describe the step: %v", se)
		}
		out, err := runIn(ctx, c, se.Op, debugMounts(exec, se.MountIDs), script)
		if err != nil || out != want {
			t.Errorf("what the command has left: %q, %v, want %q", out, err, want)
		}
		// A second one sees what the command has left, not what the first one has done.
		out, err = runIn(ctx, c, se.Op, debugMounts(exec, se.MountIDs), "ls")
		if err != nil || out != "done\n" {
			t.Errorf("a second look: %q, %v", out, err)
		}
		out, err = runIn(ctx, c, se.Op, debugMounts(exec, se.InputIDs), "ls; cat /ctx/input")
		if err != nil || out != "input\n" {
			t.Errorf("before the command: %q, %v", out, err)
		}
	}

	// In the build itself, which is how `buildx debug` works.
	opt, err := te.dirRequest(dir)
	if err != nil {
		t.Fatal(err)
	}
	opt.Session, opt.Ref = withSecret, "failing-build"
	_, err = te.client.Build(t.Context(), opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		_, err := c.Solve(ctx, gwclient.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: opt.FrontendAttrs, Evaluate: true})
		look(ctx, c, solveError(t, err).Solve)
		return nil, err
	}, nil)
	if se := solveError(t, err); len(se.MountIDs) == 0 || len(errdefs.Sources(err)) == 0 {
		t.Errorf("the build's own error: %+v", err)
	}

	// A frontend in the engine: what Solve returns is enough.
	opt, _ = te.dirRequest(dir)
	opt.Session, opt.Ref = withSecret, "failing-solve"
	_, err = te.client.Solve(t.Context(), nil, opt, nil)
	live := solveError(t, err).Solve

	te.stop()
	te = openAt(t, te.root)
	another := func(opt bkclient.SolveOpt, f func(context.Context, gwclient.Client)) {
		t.Helper()
		_, err := te.client.Build(t.Context(), opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			f(ctx, c)
			return gwclient.NewResult(), nil
		}, nil)
		if err != nil {
			t.Error(err)
		}
	}
	recorded := func(ref string) *errdefs.Solve {
		recs := te.history(&controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: true})
		if len(recs) != 1 {
			t.Fatalf("%d records of %s", len(recs), ref)
		}
		return buildkitapi.FailedStep(recs[0].Error)
	}
	another(bkclient.SolveOpt{Session: withSecret, Internal: true}, func(ctx context.Context, c gwclient.Client) {
		look(ctx, c, live)
		for _, ref := range []string{"failing-build", "failing-solve"} {
			kept := recorded(ref)
			if kept == nil {
				t.Fatalf("%s: the record names no files", ref)
			}
			look(ctx, c, kept)
			if name := kept.Description[buildkitapi.DescriptionName]; !strings.Contains(name, "RUN --mount") {
				t.Errorf("%s: the step is called %q", ref, name)
			}
		}
	})
	// Secrets are not kept: who wants them brings them.
	another(bkclient.SolveOpt{Internal: true}, func(ctx context.Context, c gwclient.Client) {
		if _, err := runIn(ctx, c, live.Op, debugMounts(live.Op.GetExec(), live.MountIDs), "cat /word"); err == nil || !strings.Contains(err.Error(), "word") {
			t.Errorf("without the secret: %v", err)
		}
		for _, id := range []string{"failed-0123-mount-0", "failed-" + strings.Repeat("0", 32) + "-mount-0", live.MountIDs[0] + "0", "../../x"} {
			_, err := c.NewContainer(ctx, gwclient.NewContainerRequest{Mounts: []gwclient.Mount{{Dest: "/", MountType: pb.MountType_BIND, ResultID: id}}})
			if err == nil || !strings.Contains(err.Error(), "no such ref") {
				t.Errorf("%s: %v", id, err)
			}
		}
	})
	te.noFileHas(t, "hush-5f0c")
	// A failure is never a result: the step runs again, and du tells what is kept.
	again, err := te.buildDir(t.Context(), request{session: withSecret}, dir)
	if err == nil || again.vertices == nil {
		t.Error("the failed step was found in the cache")
	}
	kept := slices.DeleteFunc(te.usage(), func(u *bkclient.UsageInfo) bool { return !strings.Contains(u.Description, "slipway debug") })
	if len(kept) != 3 || kept[0].Size == 0 {
		t.Errorf("disk usage: %+v", kept)
	}
	te.prune(bkclient.WithFilter([]string{"description~=debug"}))
	if se := recorded("failing-solve"); se == nil || se.Op != nil || len(se.MountIDs) == 0 {
		t.Errorf("after a prune the record says %v", se)
	}
	another(bkclient.SolveOpt{Session: withSecret, Internal: true}, func(ctx context.Context, c gwclient.Client) {
		if _, err := runIn(ctx, c, live.Op, debugMounts(live.Op.GetExec(), live.MountIDs), "true"); err == nil || !strings.Contains(err.Error(), cache.ErrNoFailedStep.Error()) {
			t.Errorf("after a prune: %v", err)
		}
	})
}

// dirRequest is a build of a directory, as `slipway build` asks for it.
func (te *testEngine) dirRequest(dir string) (bkclient.SolveOpt, error) {
	host, err := buildkitapi.HostID()
	return bkclient.SolveOpt{Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{
		buildkitapi.HostAttr: host, buildkitapi.LocalDirAttr + "context": dir, buildkitapi.LocalDirAttr + "dockerfile": dir,
	}}, err
}

// noFileHas looks for a word in the files of the state directory that are not layers or blobs of the base image.
func (te *testEngine) noFileHas(t *testing.T, word string) {
	t.Helper()
	for _, dir := range []string{"failed", "records", "layers"} {
		err := filepath.WalkDir(filepath.Join(te.root, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			if data, err := os.ReadFile(path); err == nil && strings.Contains(string(data), word) {
				t.Errorf("%s has %q", path, word)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestFailedStepsOfLLB has the shapes of BuildKit's own tests: mounts with and without outputs, file actions, and inputs that
// cannot be read.
func TestFailedStepsOfLLB(t *testing.T) {
	te := openTest(t)
	te.base()
	image := llb.Image("base")
	seeded := llb.Scratch().File(llb.Mkfile("foo", 0o600, []byte("seed\n")))
	failing := func(script string, opts ...llb.RunOption) llb.State {
		opts = append([]llb.RunOption{llb.Args([]string{"/bin/sh", "-c", script + "; exit 3"})}, opts...)
		return image.Run(opts...).Root()
	}
	for _, tc := range []struct {
		name           string
		state          llb.State
		inputs, mounts int
		script, want   string
		mountsOf       func(*errdefs.SolveError) []gwclient.Mount
	}{
		{"root", failing("echo a > /data"), 1, 1, "cat /data", "a\n", nil},
		{"command not found", image.Run(llb.Args([]string{"/nosuch"})).Root(), 1, 1, "echo here", "here\n", nil},
		{"scratch mount", failing("echo a > /rw/data", llb.AddMount("/rw", llb.Scratch())), 2, 2, "cat /rw/data", "a\n", nil},
		{"mount", failing("echo a > /rw/data", llb.AddMount("/rw", seeded)), 2, 2, "cat /rw/data /rw/foo", "a\nseed\n", nil},
		{"read-only scratch mount", failing("echo a > /data; touch /ro/foo", llb.AddMount("/ro", llb.Scratch(), llb.Readonly)), 2, 2, "cat /data; ls /ro", "a\n", nil},
		{"mount without output", failing("echo a > /rw/data", llb.AddMount("/rw", seeded, llb.ForceNoOutput)), 2, 2, "cat /rw/data /rw/foo", "a\nseed\n", nil},
		{
			"file actions", llb.Scratch().File(llb.Mkdir("/found", 0o700).Mkfile("/found/foo", 0o600, []byte("in\n")).Mkfile("/notfound/foo", 0o600, nil)),
			0, 3, "cat /input/found/foo", "in\n", nil,
		},
		{
			"copy from an input", image.File(llb.Copy(llb.Scratch().File(llb.Mkdir("/foo", 0o700).Mkfile("/foo/bar", 0o600, []byte("in\n"))), "/foo/bar", "/notfound/baz")),
			2, 1, "cat /secondary/foo/bar; ls /input/bin/sh", "in\n/input/bin/sh\n", nil,
		},
		{
			"copy from an action", image.File(llb.Copy(llb.Mkdir("/foo", 0o700).Mkfile("/foo/bar", 0o600, []byte("in\n")).WithState(llb.Scratch()), "/foo/bar", "/notfound/baz")),
			1, 3, "cat /secondary/foo/bar; ls /input/bin/sh", "in\n/input/bin/sh\n", nil,
		},
		{"unreadable input", failing("true", llb.AddMount("/src", seeded, llb.SourcePath("/notfound"), llb.Readonly)), 1, 0, "cat /input/foo", "seed\n", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := te.inBuild(t.Context(), bkclient.SolveOpt{}, func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error {
				def, err := tc.state.Marshal(ctx)
				if err != nil {
					return err
				}
				_, err = c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB(), Evaluate: true})
				se := solveError(t, err)
				if len(se.InputIDs) != tc.inputs || len(se.MountIDs) != tc.mounts {
					return fmt.Errorf("inputs %q, mounts %q", se.InputIDs, se.MountIDs)
				}
				root := gwclient.Mount{Dest: "/", MountType: pb.MountType_BIND, Ref: base}
				var mounts []gwclient.Mount
				switch subject := se.Subject.(type) {
				case *errdefs.Solve_File:
					action := se.Op.GetFile().Actions[subject.File.Index]
					mounts = append(mounts, root, gwclient.Mount{Dest: "/input", MountType: pb.MountType_BIND, ResultID: se.MountIDs[subject.File.Index]})
					if i := int(action.SecondaryInput); i >= 0 {
						id := append(slices.Clone(se.InputIDs), se.MountIDs...)[i]
						mounts = append(mounts, gwclient.Mount{Dest: "/secondary", MountType: pb.MountType_BIND, ResultID: id})
					}
				case *errdefs.Solve_Cache:
					mounts = append(mounts, root, gwclient.Mount{Dest: "/input", MountType: pb.MountType_BIND, ResultID: se.InputIDs[0]})
				default:
					mounts = debugMounts(se.Op.GetExec(), se.MountIDs)
				}
				out, err := runIn(ctx, c, &pb.Op{Platform: se.Op.Platform}, mounts, tc.script)
				if err != nil || out != tc.want {
					return fmt.Errorf("got %q, %w, want %q", out, err, tc.want)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	// What another build has called its files means nothing here, unless the store keeps them.
	if left, _ := filepath.Glob(filepath.Join(te.root, "failed", "*.json")); len(left) != 6 {
		t.Errorf("kept: %q", left)
	}
}

// TestFailedStepsAreFew lets more steps fail than are kept; those that are cancelled leave nothing.
func TestFailedStepsAreFew(t *testing.T) {
	te := openTest(t)
	te.base()
	for i := range cache.MaxFailedSteps + 2 {
		if _, err := te.build(t.Context(), request{files: map[string]string{"Dockerfile": fmt.Sprintf("FROM base\nRUN echo %d > /n; false\n", i)}}); err == nil {
			t.Fatal("no error")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := te.build(ctx, request{
		files: map[string]string{"Dockerfile": "FROM base\nRUN echo started; sleep 60\n"},
		status: func(s *bkclient.SolveStatus) {
			for _, l := range s.Logs {
				if strings.Contains(string(l.Data), "started") {
					cancel()
				}
			}
		},
	})
	if err == nil {
		t.Fatal("no error")
	}
	left, _ := filepath.Glob(filepath.Join(te.root, "failed", "*"))
	if len(left) != cache.MaxFailedSteps {
		t.Errorf("%d failed steps are kept: %q", len(left), left)
	}
}
