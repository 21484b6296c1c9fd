// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/jsonstream"
	mobyregistry "github.com/moby/moby/api/types/registry"
	mobyclient "github.com/moby/moby/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
)

func TestPingVersionAndUnknownEndpoints(t *testing.T) {
	f := newFake(t)
	ctx := t.Context()
	ping, err := f.cli.Ping(ctx, mobyclient.PingOptions{NegotiateAPIVersion: true})
	if err != nil || ping.APIVersion != MaxVersion || ping.OSType != "linux" || ping.BuilderVersion != "2" {
		t.Fatalf("ping = %+v, %v", ping, err)
	}
	if v, err := f.cli.ServerVersion(ctx, mobyclient.ServerVersionOptions{}); err != nil || v.Version != "test" || v.APIVersion != MaxVersion {
		t.Fatalf("version = %+v, %v", v, err)
	}
	if info, err := f.cli.Info(ctx, mobyclient.InfoOptions{}); err != nil || info.Info.NCPU < 1 || info.Info.MemTotal == 0 {
		t.Fatalf("info = %+v, %v", info, err)
	}
	for _, tt := range []struct {
		method, path string
		status       int
		message      string
	}{
		{"GET", "/v1.24/_ping", 200, "OK"},
		{"GET", "/v1.56/version", 200, ""},
		{"GET", "/v1.57/version", 400, "client version 1.57 is too new. Maximum supported API version is 1.56"},
		{"GET", "/v1.23/version", 400, "client version 1.23 is too old. Minimum supported API version is 1.24, please upgrade"},
		{"GET", "/v99999999999999999999.1/version", 400, "is too new"},
		{"POST", "/v1.50/containers/x/exec", 501, "not supported yet: POST /containers/x/exec"},
		{"GET", "/v1.50/networks", 501, "not supported yet: GET /networks"},
		{"GET", "/nonsense", 501, "not supported yet: GET /nonsense"},
		{"PUT", "/containers/json", 501, "not supported yet: PUT /containers/json"},
		{"DELETE", "/images/", 501, "not supported yet"},
		{"GET", "/containers//json", 501, "not supported yet"},
		{"GET", "/containers/nope/json", 404, "No such container: nope"},
		{"GET", "/images/a/b/c/json", 404, "No such image: a/b/c:latest"},
		{"GET", "/images/json?filters=%7B%22x%22%3A%7B%22y%22%3Atrue%7D%7D", 400, "invalid filter 'x'"},
		{"GET", "/containers/json?filters=nonsense", 400, "invalid filters"},
		{"GET", "/images/json?shared-size=1", 501, "not supported yet: query parameter shared-size"},
		{"POST", "/containers/create", 400, "invalid JSON"},
	} {
		status, body := f.raw(t, tt.method, tt.path, "")
		if status != tt.status || !strings.Contains(body, tt.message) {
			t.Errorf("%s %s = %d %q, want %d %q", tt.method, tt.path, status, body, tt.status, tt.message)
		}
		if status >= 400 {
			var e struct{ Message *string }
			if err := json.Unmarshal([]byte(body), &e); err != nil || e.Message == nil {
				t.Errorf("%s %s: no message in %q", tt.method, tt.path, body)
			}
		}
	}
}

// result is what a foreground run saw.
type result struct {
	stdout, stderr string
	code           int64
	message        string
}

// runContainer does what docker run does: create, attach, wait, start.
func runContainer(t *testing.T, cli *mobyclient.Client, opts mobyclient.ContainerCreateOptions, stdin string) (result, string, error) {
	t.Helper()
	ctx := t.Context()
	if opts.Config == nil {
		opts.Config = &container.Config{}
	}
	withStdin := stdin != ""
	opts.Config.OpenStdin, opts.Config.StdinOnce, opts.Config.AttachStdin = withStdin, withStdin, withStdin
	created, err := cli.ContainerCreate(ctx, opts)
	if err != nil {
		return result{}, "", err
	}
	conn, err := cli.ContainerAttach(ctx, created.ID, mobyclient.ContainerAttachOptions{Stream: true, Stdin: withStdin, Stdout: true, Stderr: true})
	if err != nil {
		return result{}, created.ID, err
	}
	defer conn.Close()
	condition := container.WaitConditionNextExit
	if opts.HostConfig != nil && opts.HostConfig.AutoRemove {
		condition = container.WaitConditionRemoved
	}
	wait := cli.ContainerWait(ctx, created.ID, mobyclient.ContainerWaitOptions{Condition: condition})
	if _, err := cli.ContainerStart(ctx, created.ID, mobyclient.ContainerStartOptions{}); err != nil {
		res := <-wait.Result
		return result{code: res.StatusCode}, created.ID, err
	}
	if withStdin {
		go func() {
			_, _ = io.WriteString(conn.Conn, stdin) // what is lost is missing in the output
			_ = conn.CloseWrite()
		}()
	}
	var out, errOut bytes.Buffer
	if opts.Config.Tty {
		_, err = io.Copy(&out, conn.Reader)
	} else {
		_, err = stdcopy.StdCopy(&out, &errOut, conn.Reader)
	}
	if err != nil {
		return result{}, created.ID, err
	}
	select {
	case res := <-wait.Result:
		r := result{stdout: out.String(), stderr: errOut.String(), code: res.StatusCode}
		if res.Error != nil {
			r.message = res.Error.Message
		}
		return r, created.ID, nil
	case err := <-wait.Error:
		return result{}, created.ID, err
	}
}

func TestForegroundRun(t *testing.T) {
	f := newFake(t)
	f.images.add(t, ocispec.ImageConfig{Cmd: []string{"true"}}, "busybox")
	for _, tt := range []struct {
		name  string
		cmd   []string
		stdin string
		tty   bool
		want  result
	}{
		{"image's command", nil, "", false, result{}},
		{"two streams and a code", []string{"both"}, "", false, result{stdout: "to stdout\n", stderr: "to stderr\n", code: 3}},
		{"stdin to its end", []string{"cat"}, "hello", false, result{stdout: "hello"}},
		{"large", []string{"cat"}, strings.Repeat("0123456789", 100_000), false, result{stdout: strings.Repeat("0123456789", 100_000)}},
		{"terminal is raw", []string{"both"}, "", true, result{stdout: "to stdout\nto stderr\n", code: 3}},
	} {
		for _, remove := range []bool{true, false} {
			t.Run(tt.name, func(t *testing.T) {
				got, id, err := runContainer(t, f.cli, mobyclient.ContainerCreateOptions{
					Config: &container.Config{Image: "busybox", Cmd: tt.cmd, Tty: tt.tty}, HostConfig: &container.HostConfig{AutoRemove: remove},
				}, tt.stdin)
				if err != nil {
					t.Fatal(err)
				}
				if got != tt.want {
					t.Errorf("got %.80v, want %.80v", got, tt.want)
				}
				info, err := f.cli.ContainerInspect(t.Context(), id, mobyclient.ContainerInspectOptions{})
				if remove {
					if !errdefs.IsNotFound(err) {
						t.Errorf("a container with --rm is still there: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if s := info.Container.State; s.Status != container.StateExited || int64(s.ExitCode) != tt.want.code || s.Running {
					t.Errorf("state after the end: %+v", s)
				}
				if _, err := f.cli.ContainerRemove(t.Context(), id, mobyclient.ContainerRemoveOptions{}); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestCommandNotFound(t *testing.T) {
	f := newFake(t)
	f.images.add(t, ocispec.ImageConfig{}, "busybox")
	for _, remove := range []bool{true, false} {
		got, id, err := runContainer(t, f.cli, mobyclient.ContainerCreateOptions{
			Config: &container.Config{Image: "busybox", Cmd: []string{"nothere"}}, HostConfig: &container.HostConfig{AutoRemove: remove},
		}, "")
		if err == nil || !strings.Contains(err.Error(), "executable file not found in $PATH") || !errdefs.IsInvalidArgument(err) {
			t.Errorf("start: %v", err)
		}
		if got.code != 127 {
			t.Errorf("code %d, want 127", got.code)
		}
		_, err = f.cli.ContainerInspect(t.Context(), id, mobyclient.ContainerInspectOptions{})
		if remove != errdefs.IsNotFound(err) {
			t.Errorf("remove=%v, then inspect: %v", remove, err)
		}
	}
	if _, err := f.cli.ContainerCreate(t.Context(), mobyclient.ContainerCreateOptions{Image: "busybox"}); err == nil || !strings.Contains(err.Error(), "no command specified") {
		t.Errorf("create without a command: %v", err)
	}
}

func TestNames(t *testing.T) {
	f := newFake(t)
	f.images.add(t, ocispec.ImageConfig{Cmd: []string{"true"}}, "busybox")
	create := func(name string) (string, error) {
		res, err := f.cli.ContainerCreate(t.Context(), mobyclient.ContainerCreateOptions{Image: "busybox", Name: name})
		return res.ID, err
	}
	id, err := create("web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create("web"); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), `The container name "/web" is already in use by container "`+id+`"`) {
		t.Errorf("second web: %v", err)
	}
	if _, err := create("no spaces"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad name: %v", err)
	}
	if _, err := f.cli.ContainerRemove(t.Context(), "web", mobyclient.ContainerRemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := create("web"); err != nil {
		t.Errorf("web after rm: %v", err)
	}
	seen := map[string]bool{}
	for range 20 {
		id, err := create("")
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.cli.ContainerInspect(t.Context(), id[:20], mobyclient.ContainerInspectOptions{})
		if err != nil || seen[info.Container.Name] || len(info.Container.Name) < 4 {
			t.Fatalf("random name %q: %v", info.Container.Name, err)
		}
		seen[info.Container.Name] = true
	}
}

func TestSignalsStopAndRemove(t *testing.T) {
	f := newFake(t)
	f.images.add(t, ocispec.ImageConfig{StopSignal: "SIGINT"}, "busybox")
	ctx := t.Context()
	start := func(cmd string) string {
		t.Helper()
		c, err := f.cli.ContainerCreate(ctx, mobyclient.ContainerCreateOptions{Config: &container.Config{Image: "busybox", Cmd: []string{cmd}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.cli.ContainerStart(ctx, c.ID, mobyclient.ContainerStartOptions{}); err != nil {
			t.Fatal(err)
		}
		return c.ID
	}
	code := func(id string) int64 {
		t.Helper()
		wait := f.cli.ContainerWait(ctx, id, mobyclient.ContainerWaitOptions{})
		select {
		case res := <-wait.Result:
			return res.StatusCode
		case err := <-wait.Error:
			t.Fatal(err)
			return 0
		}
	}
	id := start("sleep")
	if f.Running() != 1 {
		t.Errorf("%d running, want 1", f.Running())
	}
	if _, err := f.cli.ContainerRemove(ctx, id, mobyclient.ContainerRemoveOptions{}); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "container is running") {
		t.Errorf("rm of a running container: %v", err)
	}
	if _, err := f.cli.ImageRemove(ctx, "busybox", mobyclient.ImageRemoveOptions{Force: true}); !errdefs.IsConflict(err) {
		t.Errorf("rmi -f of a running container's image: %v", err)
	}
	for _, sig := range []string{"USR1", "SIGUSR1", "10"} {
		if _, err := f.cli.ContainerKill(ctx, id, mobyclient.ContainerKillOptions{Signal: sig}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.cli.ContainerKill(ctx, id, mobyclient.ContainerKillOptions{Signal: "SIGNONSENSE"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown signal: %v", err)
	}
	if _, err := f.cli.ContainerStop(ctx, id, mobyclient.ContainerStopOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := code(id); got != 130 {
		t.Errorf("after stop with the image's signal: %d, want 130", got)
	}
	if _, err := f.cli.ContainerKill(ctx, id, mobyclient.ContainerKillOptions{}); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "is not running") {
		t.Errorf("kill of a stopped container: %v", err)
	}
	if _, err := f.cli.ImageRemove(ctx, "busybox", mobyclient.ImageRemoveOptions{}); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "must force") {
		t.Errorf("rmi of a stopped container's image: %v", err)
	}
	// Started once more it is the same container.
	if _, err := f.cli.ContainerStart(ctx, id, mobyclient.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.cli.ContainerRemove(ctx, id, mobyclient.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	id = start("deaf")
	none := 0
	if _, err := f.cli.ContainerStop(ctx, id, mobyclient.ContainerStopOptions{Timeout: &none}); err != nil {
		t.Fatal(err)
	}
	if got := code(id); got != 137 {
		t.Errorf("after a stop that was not heard: %d, want 137", got)
	}
	list, err := f.cli.ContainerList(ctx, mobyclient.ContainerListOptions{})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("running: %v, %v", list.Items, err)
	}
	list, err = f.cli.ContainerList(ctx, mobyclient.ContainerListOptions{All: true})
	if err != nil || len(list.Items) != 1 || !strings.HasPrefix(list.Items[0].Status, "Exited (137)") {
		t.Errorf("all: %+v, %v", list.Items, err)
	}
	if f.Running() != 0 {
		t.Errorf("%d running, want 0", f.Running())
	}
	// What runs when the server closes is killed; the test's cleanup checks that nothing is left.
	start("deaf")
}

// A client that stops reading holds the process up, but not its end.
func TestClientThatDoesNotRead(t *testing.T) {
	f := newFake(t)
	f.images.add(t, ocispec.ImageConfig{}, "busybox")
	f.exec.commands["flood"] = func(p *fakeProcess) int {
		for p.ctx.Err() == nil {
			_, _ = p.io.Stdout.Write(make([]byte, 1<<16))
		}
		return 137
	}
	ctx := t.Context()
	c, err := f.cli.ContainerCreate(ctx, mobyclient.ContainerCreateOptions{Config: &container.Config{Image: "busybox", Cmd: []string{"flood"}}})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := f.cli.ContainerAttach(ctx, c.ID, mobyclient.ContainerAttachOptions{Stream: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := f.cli.ContainerStart(ctx, c.ID, mobyclient.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.cli.ContainerRemove(ctx, c.ID, mobyclient.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
}

func TestImageEndpoints(t *testing.T) {
	f := newFake(t)
	ctx := t.Context()
	one := f.images.add(t, ocispec.ImageConfig{Cmd: []string{"one"}, Labels: map[string]string{"k": "v"}}, "one", "host:5000/repo/one:v1")
	f.images.add(t, ocispec.ImageConfig{Cmd: []string{"two"}})
	list, err := f.cli.ImageList(ctx, mobyclient.ImageListOptions{})
	if err != nil || len(list.Items) != 2 {
		t.Fatalf("list: %+v, %v", list, err)
	}
	for filter, want := range map[string]int{"dangling=true": 1, "dangling=false": 1, "label=k": 1, "label=k=x": 0, "reference=one": 1, "reference=host:5000/*/*": 1, "reference=nope*": 0} {
		name, value, _ := strings.Cut(filter, "=")
		list, err := f.cli.ImageList(ctx, mobyclient.ImageListOptions{Filters: make(mobyclient.Filters).Add(name, value)})
		if err != nil || len(list.Items) != want {
			t.Errorf("filter %s: %d images, want %d (%v)", filter, len(list.Items), want, err)
		}
	}
	info, err := f.cli.ImageInspect(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	if info.ID != one.ID.String() || !slices.Equal(info.RepoTags, []string{"one:latest", "host:5000/repo/one:v1"}) || info.Architecture != "amd64" || info.Os != "linux" ||
		info.Created != "2023-11-14T22:13:20Z" || len(info.RootFS.Layers) != 1 || info.Config.Cmd[0] != "one" || info.Size != 1234 {
		t.Errorf("inspect = %+v", info.InspectResponse)
	}
	history, err := f.cli.ImageHistory(ctx, one.ID.Encoded()[:12])
	if err != nil || len(history.Items) != 2 || history.Items[0].CreatedBy != "CMD x" || history.Items[0].ID != one.ID.String() || history.Items[1].ID != "<missing>" {
		t.Errorf("history = %+v, %v", history, err)
	}
	if _, err := f.cli.ImageTag(ctx, mobyclient.ImageTagOptions{Source: "one", Target: "three:x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.cli.ImageTag(ctx, mobyclient.ImageTagOptions{Source: "nope", Target: "x"}); !errdefs.IsNotFound(err) {
		t.Errorf("tag of nothing: %v", err)
	}
	// By ID, three repositories.
	if _, err := f.cli.ImageRemove(ctx, one.ID.String(), mobyclient.ImageRemoveOptions{}); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "multiple repositories") {
		t.Errorf("rmi by ID: %v", err)
	}
	res, err := f.cli.ImageRemove(ctx, "three:x", mobyclient.ImageRemoveOptions{})
	if err != nil || len(res.Items) != 1 || res.Items[0].Untagged != "three:x" {
		t.Errorf("rmi of one name: %+v, %v", res, err)
	}
	res, err = f.cli.ImageRemove(ctx, one.ID.String(), mobyclient.ImageRemoveOptions{Force: true})
	if err != nil || len(res.Items) != 3 || res.Items[2].Deleted != one.ID.String() {
		t.Errorf("rmi -f by ID: %+v, %v", res, err)
	}
	if _, err := f.cli.ImageRemove(ctx, "one", mobyclient.ImageRemoveOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("rmi of nothing: %v", err)
	}
}

func TestPullAndPush(t *testing.T) {
	f := newFake(t)
	ctx := t.Context()
	var gotRef string
	var gotAuth *mobyregistry.AuthConfig
	f.registry.pull = func(ref string, auth *mobyregistry.AuthConfig, progress func(Transfer)) (digest.Digest, bool, error) {
		gotRef, gotAuth = ref, auth
		if strings.Contains(ref, "secret") {
			return "", false, &registry.Error{Err: registry.ErrUnauthorized, Message: "pull " + ref + ": log in"}
		}
		d := digest.FromString("l")
		progress(Transfer{Digest: d, State: Waiting})
		if strings.Contains(ref, "broken") {
			return "", false, errors.New("it broke")
		}
		progress(Transfer{Digest: d, State: Running, Current: 5, Total: 10})
		progress(Transfer{Digest: d, State: Running, Current: 6, Total: 10}) // too soon to be shown
		progress(Transfer{Digest: d, State: Done})
		return digest.FromString("m"), true, nil
	}
	header, err := authconfig.Encode(mobyregistry.AuthConfig{Username: "u", Password: "right"})
	if err != nil {
		t.Fatal(err)
	}
	pull := func(ref string) ([]jsonstream.Message, error) {
		resp, err := f.cli.ImagePull(ctx, ref, mobyclient.ImagePullOptions{RegistryAuth: header})
		if err != nil {
			return nil, err
		}
		return collect(t, ctx, resp)
	}
	messages, err := pull("host:5000/a/b:v1")
	if err != nil || gotRef != "host:5000/a/b:v1" || gotAuth == nil || gotAuth.Password != "right" {
		t.Fatalf("pull of %q with %+v: %v", gotRef, gotAuth, err)
	}
	var lines []string
	for _, m := range messages {
		lines = append(lines, m.ID+" "+m.Status)
	}
	layer := digest.FromString("l").Encoded()[:12]
	want := []string{
		"v1 Pulling from a/b", layer + " Pulling fs layer", layer + " Downloading", layer + " Pull complete",
		" Digest: " + digest.FromString("m").String(), " Status: Downloaded newer image for host:5000/a/b:v1",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("messages:\n%s\nwant:\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if _, err := pull("busybox@" + digest.FromString("d").String()); err != nil || gotRef != "docker.io/library/busybox@"+digest.FromString("d").String() {
		t.Errorf("by digest: %q, %v", gotRef, err)
	}
	if _, err := pull("broken"); err == nil || !strings.Contains(err.Error(), "it broke") {
		t.Errorf("a pull that breaks off: %v", err)
	}
	if _, err := pull("secret"); !errdefs.IsUnauthorized(err) {
		t.Errorf("a pull without permission: %v", err)
	}
	if status, body := f.raw(t, "POST", "/images/create?fromImage=busybox", ""); status != 501 || !strings.Contains(body, "all tags") {
		t.Errorf("pull of all tags: %d %s", status, body)
	}

	f.images.add(t, ocispec.ImageConfig{}, "host:5000/a:v1", "host:5000/a:v2")
	resp, err := f.cli.ImagePush(ctx, "host:5000/a:v1", mobyclient.ImagePushOptions{RegistryAuth: header})
	if err != nil {
		t.Fatal(err)
	}
	messages, err = collect(t, ctx, resp)
	if err != nil || messages[0].Status != "The push refers to repository [host:5000/a]" || messages[len(messages)-1].Aux == nil {
		t.Errorf("push: %+v, %v", messages, err)
	}
	if resp, err = f.cli.ImagePush(ctx, "host:5000/a", mobyclient.ImagePushOptions{RegistryAuth: header, All: true}); err == nil {
		_, err = collect(t, ctx, resp)
	}
	if want := []string{"host:5000/a:v1", "host:5000/a:v1", "host:5000/a:v2"}; err != nil || !slices.Equal(f.registry.pushed, want) {
		t.Errorf("pushed %q, want %q (%v)", f.registry.pushed, want, err)
	}
	if _, err := f.cli.ImagePush(ctx, "host:5000/a:v1", mobyclient.ImagePushOptions{}); !errdefs.IsUnauthorized(err) {
		t.Errorf("push without credentials: %v", err)
	}
	if _, err := f.cli.ImagePush(ctx, "nope:v1", mobyclient.ImagePushOptions{RegistryAuth: header}); err == nil || !strings.Contains(err.Error(), "does not exist locally") {
		t.Errorf("push of nothing: %v", err)
	}
	if _, err := f.cli.RegistryLogin(ctx, mobyclient.RegistryLoginOptions{Username: "u", Password: "right", ServerAddress: "host:5000"}); err != nil {
		t.Error(err)
	}
	if _, err := f.cli.RegistryLogin(ctx, mobyclient.RegistryLoginOptions{Username: "u", Password: "wrong", ServerAddress: "host:5000"}); !errdefs.IsUnauthorized(err) {
		t.Errorf("login with a wrong password: %v", err)
	}
}

func collect(t *testing.T, ctx context.Context, resp mobyclient.ImagePullResponse) ([]jsonstream.Message, error) {
	t.Helper()
	var out []jsonstream.Message
	for m, err := range resp.JSONMessages(ctx) {
		if err != nil {
			return out, err
		}
		if m.Error != nil {
			return out, m.Error
		}
		out = append(out, m)
	}
	return out, nil
}

func TestRequestsAfterClose(t *testing.T) {
	f := newFake(t)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if status, body := f.raw(t, http.MethodGet, "/images/json", ""); status != http.StatusServiceUnavailable {
		t.Errorf("after close: %d %s", status, body)
	}
}
