// SPDX-License-Identifier: Apache-2.0

package dockerapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	mobyregistry "github.com/moby/moby/api/types/registry"
	mobyclient "github.com/moby/moby/client"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// These tests have a whole engine below them: real layers, mounts, containers, networks and a real registry.

func newEngine(t *testing.T) (*mobyclient.Client, string) {
	t.Helper()
	runctest.Runner(t)
	root := t.TempDir()
	addBusybox(t, root)
	e, err := engine.Open(t.Context(), engine.Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	cli, err := mobyclient.New(
		mobyclient.WithHost("unix:///nowhere"),
		mobyclient.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) { return e.Dial(ctx) }),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cli.Close()
		if err := e.Close(); err != nil {
			t.Errorf("close engine: %v", err)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(mounts), root) {
			t.Errorf("mounts are left below %s (%v)", root, err)
		}
	})
	return cli, root
}

// addBusybox puts an image with busybox, a user and a volume into the store at root.
func addBusybox(t *testing.T, root string) {
	t.Helper()
	ctx := t.Context()
	st, err := cache.Open(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	source := runctest.Rootfs(t)
	d := st.Layers.NewDraft(nil)
	text := func(path, data string, uid uint32) {
		d.Put(index.Entry{Path: path, Type: index.File, Mode: 0o644, UID: uid, Size: int64(len(data))}, func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(data)), nil
		})
	}
	d.Put(index.Entry{Path: "bin", Type: index.Dir, Mode: 0o755}, nil)
	entries, err := os.ReadDir(filepath.Join(source, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(source, "bin", e.Name())
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if target, err := os.Readlink(path); err == nil {
			d.Put(index.Entry{Path: "bin/" + e.Name(), Type: index.Symlink, Mode: 0o777, Target: target}, nil)
			continue
		}
		d.Put(index.Entry{Path: "bin/" + e.Name(), Type: index.File, Mode: 0o755, Size: info.Size()}, func() (io.ReadCloser, error) { return os.Open(path) })
	}
	d.Put(index.Entry{Path: "etc", Type: index.Dir, Mode: 0o755}, nil)
	text("etc/passwd", "root:x:0:0::/root:/bin/sh\nann:x:7:8::/home/ann:/bin/sh\n", 0)
	text("etc/group", "staff:x:50:\n", 0)
	d.Put(index.Entry{Path: "data", Type: index.Dir, Mode: 0o750, UID: 7, GID: 8}, nil)
	text("data/seed", "from the image\n", 7)
	id, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	info, err := st.Layers.Pack(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	created := time.Unix(1700000000, 0).UTC()
	put := func(mediaType string, v any) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := st.Blobs.PutBytes(ctx, mediaType, raw)
		if err != nil {
			t.Fatal(err)
		}
		return desc
	}
	config := put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Config:  ocispec.ImageConfig{Env: []string{"FROM_IMAGE=yes"}, Cmd: []string{"echo", "default"}, Volumes: map[string]struct{}{"/data": {}}},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{info.DiffID}},
		History: []ocispec.History{{CreatedBy: "test", Created: &created}},
	})
	tar, size, err := st.Layers.OpenTar(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	tar.Close()
	manifest := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: info.DiffID, Size: size}},
	})
	if err := st.Images.SetLayers(ctx, manifest.Digest, snapshot.Snapshot{id}); err != nil {
		t.Fatal(err)
	}
	if err := st.Images.Put(ctx, image.Image{Name: "busybox", Target: manifest}); err != nil {
		t.Fatal(err)
	}
}

// run runs a container to its end and returns its output, both streams in one, and its exit code.
func run(t *testing.T, cli *mobyclient.Client, config container.Config, host container.HostConfig, stdin string) (string, int64, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if config.Image == "" {
		config.Image = "busybox"
	}
	config.OpenStdin, config.StdinOnce = stdin != "", stdin != ""
	host.AutoRemove = true
	created, err := cli.ContainerCreate(ctx, mobyclient.ContainerCreateOptions{Config: &config, HostConfig: &host})
	if err != nil {
		return "", 0, err
	}
	conn, err := cli.ContainerAttach(ctx, created.ID, mobyclient.ContainerAttachOptions{Stream: true, Stdin: stdin != "", Stdout: true, Stderr: true})
	if err != nil {
		return "", 0, err
	}
	defer conn.Close()
	wait := cli.ContainerWait(ctx, created.ID, mobyclient.ContainerWaitOptions{Condition: container.WaitConditionRemoved})
	if _, err := cli.ContainerStart(ctx, created.ID, mobyclient.ContainerStartOptions{}); err != nil {
		return "", (<-wait.Result).StatusCode, err
	}
	go func() {
		_, _ = io.WriteString(conn.Conn, stdin)
		_ = conn.CloseWrite()
	}()
	var out bytes.Buffer
	if config.Tty {
		_, err = io.Copy(&out, conn.Reader)
	} else {
		_, err = stdcopy.StdCopy(&out, &out, conn.Reader)
	}
	if err != nil {
		return out.String(), 0, err
	}
	select {
	case res := <-wait.Result:
		return out.String(), res.StatusCode, nil
	case err := <-wait.Error:
		return out.String(), 0, err
	}
}

func TestRealContainers(t *testing.T) {
	cli, _ := newEngine(t)
	bind := t.TempDir()
	if err := os.WriteFile(filepath.Join(bind, "f"), []byte("bound\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) container.Config { return container.Config{Cmd: []string{"sh", "-c", script}} }
	with := func(c container.Config, f func(*container.Config)) container.Config { f(&c); return c }
	for _, tt := range []struct {
		name   string
		config container.Config
		host   container.HostConfig
		stdin  string
		out    string
		code   int64
		err    string
	}{
		{name: "image's command", out: "default\n"},
		{name: "exit code", config: sh("exit 42"), code: 42},
		{name: "killed by a signal", config: sh("kill -9 $$; sleep 5"), host: container.HostConfig{Init: ptr(true)}, code: 137},
		{name: "not found", config: container.Config{Cmd: []string{"nothere"}}, code: 127, err: "executable file not found in $PATH"},
		{name: "not executable", config: container.Config{Cmd: []string{"/etc/passwd"}}, code: 126, err: "permission denied"},
		{name: "stdin", config: container.Config{Cmd: []string{"cat"}}, stdin: strings.Repeat("line\n", 50_000), out: strings.Repeat("line\n", 50_000)},
		{name: "environment", config: with(sh("echo $FROM_IMAGE $OWN $HOME"), func(c *container.Config) { c.Env = []string{"OWN=1", "FROM_IMAGE=no"} }), out: "no 1 /root\n"},
		{name: "user and directory", config: with(sh("id -u; id -g; pwd; echo $HOME"), func(c *container.Config) { c.User, c.WorkingDir = "ann", "/made/here" }), out: "7\n8\n/made/here\n/home/ann\n"},
		{name: "no such user", config: with(sh("true"), func(c *container.Config) { c.User = "bob" }), code: 128, err: "bob"},
		{name: "groups", config: sh("id -G"), host: container.HostConfig{GroupAdd: []string{"staff", "77"}}, out: "0 50 77\n"},
		{name: "entrypoint", config: container.Config{Entrypoint: []string{"echo", "ep"}, Cmd: []string{"arg"}}, out: "ep arg\n"},
		{name: "hostname and hosts", config: with(sh("hostname; grep -c other /etc/hosts"), func(c *container.Config) { c.Hostname = "me" }), host: container.HostConfig{ExtraHosts: []string{"other:10.0.0.9"}}, out: "me\n1\n"},
		{name: "terminal", config: with(sh("stty size; test -t 0 && echo tty"), func(c *container.Config) { c.Tty = true }), host: container.HostConfig{ConsoleSize: [2]uint{33, 99}}, out: "tty\r\n"},
		{name: "bind", config: sh("cat /b/f; echo new > /b/g"), host: container.HostConfig{Binds: []string{bind + ":/b"}}, out: "bound\n"},
		{name: "read-only bind", config: sh("echo new 2>/dev/null > /b/h || echo refused"), host: container.HostConfig{Binds: []string{bind + ":/b:ro"}}, out: "refused\n"},
		{name: "missing bind is made", config: sh("ls /b"), host: container.HostConfig{Binds: []string{bind + "/made/dir:/b"}}},
		{name: "missing mount is not", config: sh("true"), host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: bind + "/nope", Target: "/b"}}}, err: "bind source path does not exist"},
		{name: "image's volume", config: sh("cat /data/seed; stat -c '%u:%g %a' /data; echo x > /data/new"), out: "from the image\n7:8 750\n"},
		{name: "its own each time", config: sh("ls /data"), out: "seed\n"},
		{name: "named volume", config: sh("cat /data/seed; echo kept > /data/new"), host: container.HostConfig{Binds: []string{"vol:/data"}}, out: "from the image\n"},
		{name: "named volume again", config: sh("cat /other/new"), host: container.HostConfig{Binds: []string{"vol:/other"}}, out: "kept\n"},
		{name: "read-only root and tmpfs", config: sh("echo x 2>/dev/null > /x || echo refused; echo y > /t/y && stat -c %a /t"), host: container.HostConfig{ReadonlyRootfs: true, Tmpfs: map[string]string{"/t": "size=1m,mode=0700"}}, out: "refused\n700\n"},
		{name: "no network", config: sh("ip -o link | grep -cv ' lo:'"), host: container.HostConfig{NetworkMode: "none"}, out: "0\n", code: 1},
		{name: "unknown network", config: sh("true"), host: container.HostConfig{NetworkMode: "mine"}, err: "network mine not found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, code, err := run(t, cli, tt.config, tt.host, tt.stdin)
			if tt.name == "terminal" { // the size comes right after the start
				_, out, _ = strings.Cut(out, "\n")
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if out != tt.out || code != tt.code {
				t.Errorf("got %.200q, code %d; want %.200q, code %d", out, code, tt.out, tt.code)
			}
		})
	}
	if data, err := os.ReadFile(filepath.Join(bind, "g")); err != nil || string(data) != "new\n" {
		t.Errorf("written through the bind mount: %q, %v", data, err)
	}
	list, err := cli.ContainerList(t.Context(), mobyclient.ContainerListOptions{All: true})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("containers are left: %+v, %v", list.Items, err)
	}
}

func ptr[T any](v T) *T { return &v }

func TestRealPortsAndRestart(t *testing.T) {
	cli, root := newEngine(t)
	ctx := t.Context()
	port := network.MustParsePort("8080/tcp")
	create := func(hostPort string) string {
		t.Helper()
		c, err := cli.ContainerCreate(ctx, mobyclient.ContainerCreateOptions{
			Config: &container.Config{Image: "busybox", Cmd: []string{"sh", "-c", "mkdir -p /w; echo run >> /w/index.html; exec httpd -f -p 8080 -h /w"}},
			HostConfig: &container.HostConfig{PortBindings: network.PortMap{
				port: {{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: hostPort}},
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return c.ID
	}
	page := func(id string) string {
		t.Helper()
		info, err := cli.ContainerInspect(ctx, id, mobyclient.ContainerInspectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		bound := info.Container.NetworkSettings.Ports[port]
		if len(bound) != 1 {
			t.Fatalf("published: %+v", info.Container.NetworkSettings)
		}
		url := fmt.Sprintf("http://127.0.0.1:%s/", bound[0].HostPort)
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // until httpd listens
			resp, err := http.Get(url)
			if err == nil {
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err == nil && resp.StatusCode == 200 {
					return string(body)
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v", url, err)
			}
		}
	}
	id := create("")
	if _, err := cli.ContainerStart(ctx, id, mobyclient.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := page(id); got != "run\n" {
		t.Errorf("page %q", got)
	}
	info, err := cli.ContainerInspect(ctx, id, mobyclient.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	second := create(info.Container.NetworkSettings.Ports[port][0].HostPort)
	if _, err := cli.ContainerStart(ctx, second, mobyclient.ContainerStartOptions{}); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("second container on the port: %v", err)
	}
	none := 0
	if _, err := cli.ContainerStop(ctx, id, mobyclient.ContainerStopOptions{Timeout: &none}); err != nil {
		t.Fatal(err)
	}
	// What it wrote is still there when it starts again.
	if _, err := cli.ContainerStart(ctx, id, mobyclient.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := page(id); got != "run\nrun\n" {
		t.Errorf("page after the second start %q", got)
	}
	volumes, err := os.ReadDir(filepath.Join(root, "volumes"))
	if err != nil || len(volumes) != 2 {
		t.Errorf("volumes of two containers: %v, %v", volumes, err)
	}
	for _, id := range []string{id, second} {
		if _, err := cli.ContainerRemove(ctx, id, mobyclient.ContainerRemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
			t.Error(err)
		}
	}
	if volumes, err := os.ReadDir(filepath.Join(root, "volumes")); err != nil || len(volumes) != 0 {
		t.Errorf("volumes are left: %v, %v", volumes, err)
	}
	// One that still runs when the engine closes must not survive it.
	if _, err := cli.ContainerStart(ctx, create(""), mobyclient.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestRealRegistry(t *testing.T) {
	cli, _ := newEngine(t)
	ctx := t.Context()
	reg := registrytest.Start(t, registrytest.Options{User: "u", Password: "right"})
	name := reg.Host + "/team/busybox:v1"
	header := func(password string) string {
		h, err := authconfig.Encode(mobyregistry.AuthConfig{Username: "u", Password: password})
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	messages := func(resp mobyclient.ImagePullResponse, err error) (string, error) {
		if err != nil {
			return "", err
		}
		var out []string
		for m, err := range resp.JSONMessages(ctx) {
			if err != nil {
				return "", err
			}
			if m.Error != nil {
				return "", (*jsonstream.Error)(m.Error)
			}
			out = append(out, m.Status)
		}
		return strings.Join(out, "\n"), nil
	}
	for password, ok := range map[string]bool{"right": true, "wrong": false} {
		_, err := cli.RegistryLogin(ctx, mobyclient.RegistryLoginOptions{Username: "u", Password: password, ServerAddress: reg.Host})
		if ok != (err == nil) || !ok && !errdefs.IsUnauthorized(err) {
			t.Errorf("login with the %s password: %v", password, err)
		}
	}
	if _, err := cli.ImageTag(ctx, mobyclient.ImageTagOptions{Source: "busybox", Target: name}); err != nil {
		t.Fatal(err)
	}
	before, err := cli.ImageInspect(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	push := func(password string) (string, error) {
		resp, err := cli.ImagePush(ctx, name, mobyclient.ImagePushOptions{RegistryAuth: header(password)})
		return messages(resp, err)
	}
	if _, err := push("wrong"); err == nil {
		t.Error("pushed with a wrong password")
	}
	if out, err := push("right"); err != nil || !strings.Contains(out, "v1: digest: sha256:") {
		t.Fatalf("push: %v\n%s", err, out)
	}
	for _, ref := range []string{name, "busybox"} {
		if _, err := cli.ImageRemove(ctx, ref, mobyclient.ImageRemoveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := cli.ImageList(ctx, mobyclient.ImageListOptions{}); err != nil || len(list.Items) != 0 {
		t.Fatalf("after rmi: %+v, %v", list, err)
	}
	pull := func(ref string) (string, error) {
		resp, err := cli.ImagePull(ctx, ref, mobyclient.ImagePullOptions{RegistryAuth: header("right")})
		return messages(resp, err)
	}
	if out, err := pull(name); err != nil || !strings.Contains(out, "Downloaded newer image") {
		t.Fatalf("pull: %v\n%s", err, out)
	}
	if out, err := pull(name); err != nil || !strings.Contains(out, "up to date") {
		t.Errorf("second pull: %v\n%s", err, out)
	}
	if _, err := pull(reg.Host + "/team/nope:v1"); !errdefs.IsNotFound(err) {
		t.Errorf("pull of nothing: %v", err)
	}
	after, err := cli.ImageInspect(ctx, name)
	if err != nil || after.ID != before.ID || after.RootFS.Layers[0] != before.RootFS.Layers[0] {
		t.Errorf("pulled image %s, want %s (%v)", after.ID, before.ID, err)
	}
	history, err := cli.ImageHistory(ctx, name)
	if err != nil || len(history.Items) != 1 || history.Items[0].Size < 100_000 {
		t.Errorf("history %+v, %v", history, err)
	}
	out, code, err := run(t, cli, container.Config{Image: name}, container.HostConfig{}, "")
	if out != "default\n" || code != 0 || err != nil {
		t.Errorf("run of the pulled image: %q, %d, %v", out, code, err)
	}
}
