// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/pb"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// outBuffer takes a process's output; text may be called at any time.
type outBuffer struct {
	mu   sync.Mutex
	data bytes.Buffer
	grew chan struct{}
}

func newOutBuffer() *outBuffer { return &outBuffer{grew: make(chan struct{}, 1)} }

func (b *outBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data.Write(p)
	select {
	case b.grew <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (b *outBuffer) Close() error { return nil }

func (b *outBuffer) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.String()
}

// wait returns when the output contains part.
func (b *outBuffer) wait(t *testing.T, part string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for !strings.Contains(b.text(), part) {
		select {
		case <-b.grew:
		case <-timeout:
			t.Fatalf("no %q in %q", part, b.text())
		}
	}
}

// inBuild runs f as the frontend of a build, with the image "base" as a reference.
func (te *testEngine) inBuild(ctx context.Context, opt bkclient.SolveOpt, f func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error) error {
	_, err := te.client.Build(ctx, opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		def, err := llb.Image("base").Marshal(ctx)
		if err != nil {
			return nil, err
		}
		res, err := c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB()})
		if err != nil {
			return nil, err
		}
		if err := f(ctx, c, res.Ref); err != nil {
			return nil, err
		}
		return gwclient.NewResult(), nil
	}, nil)
	return err
}

// TestTmpfsOfContainer bounds a tmpfs in a frontend's container, for which BuildKit's Go client has no words.
func TestTmpfsOfContainer(t *testing.T) {
	te := openTest(t)
	te.base()
	client, err := bkclient.New(t.Context(), "unix://"+te.socket, bkclient.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if r, ok := req.(*gwpb.NewContainerRequest); ok {
				r.Mounts[1].TmpfsOpt = &pb.TmpfsOpt{Size: 64 << 10}
			}
			return next(ctx, method, req, reply, cc, opts...)
		})))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	te.client = client
	err = te.inBuild(t.Context(), bkclient.SolveOpt{}, func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error {
		ctr, err := c.NewContainer(ctx, gwclient.NewContainerRequest{Mounts: []gwclient.Mount{{Dest: "/", Ref: base}, {Dest: "/small", MountType: pb.MountType_TMPFS}}})
		if err != nil {
			return err
		}
		defer ctr.Release(ctx)
		p, err := ctr.Start(ctx, gwclient.StartRequest{Args: []string{"sh", "-c", "dd if=/dev/zero of=/fits bs=1k count=128 && ! dd if=/dev/zero of=/small/f bs=1k count=128"}, Env: []string{"PATH=/bin"}, Cwd: "/"})
		if err != nil {
			return err
		}
		return p.Wait()
	})
	if err != nil {
		t.Error(err)
	}
}

// TestFrontendContainers drives NewContainer as an interactive debugger does.
func TestFrontendContainers(t *testing.T) {
	te := openTest(t)
	te.base()
	opt := bkclient.SolveOpt{Session: []session.Attachable{secretsprovider.FromMap(map[string][]byte{"word": []byte("hush")})}}
	err := te.inBuild(t.Context(), opt, func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error {
		ctr, err := c.NewContainer(ctx, gwclient.NewContainerRequest{
			Hostname:   "debug",
			ExtraHosts: []*pb.HostIP{{Host: "there", IP: "10.1.2.3"}},
			Mounts: []gwclient.Mount{
				{Dest: "/", MountType: pb.MountType_BIND, Ref: base},
				{Dest: "/scratch", MountType: pb.MountType_TMPFS},
				{Dest: "/kept", MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "kept"}},
				{Dest: "/secret", MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "word", Mode: 0o400}},
			},
		})
		if err != nil {
			return err
		}
		// The first process holds the container open; it is a shell on a terminal.
		tty := newOutBuffer()
		stdin, typed := io.Pipe()
		shell, err := ctr.Start(ctx, gwclient.StartRequest{Args: []string{"sh"}, Env: []string{"PATH=/bin", "PS1=> "}, Cwd: "/", Tty: true, Stdin: stdin, Stdout: tty})
		if err != nil {
			return err
		}
		if err := shell.Resize(ctx, gwclient.WinSize{Rows: 33, Cols: 77}); err != nil {
			t.Error(err)
		}
		io.WriteString(typed, "until stty size | grep '33 77'; do sleep 0.05; done; hostname; cat /secret; grep there /etc/hosts; echo $TERM; echo mark > /root-file; echo k > /kept/f\n")
		tty.wait(t, "33 77\r\ndebug\r\nhush10.1.2.3\tthere\r\nxterm")

		run := func(req gwclient.StartRequest) (string, string, error) {
			out, errOut := newOutBuffer(), newOutBuffer()
			req.Stdout, req.Stderr = out, errOut
			req.Env = append(req.Env, "PATH=/bin")
			p, err := ctr.Start(ctx, req)
			if err != nil {
				t.Errorf("%q: %v", req.Args, err)
				return "", "", err
			}
			err = p.Wait()
			return out.text(), errOut.text(), err
		}
		sh := func(script string) gwclient.StartRequest {
			return gwclient.StartRequest{Args: []string{"sh", "-c", script}}
		}
		exitCode := func(err error) int {
			var exit *gwpb.ExitError
			if !errors.As(err, &exit) {
				return -1
			}
			return int(exit.ExitCode)
		}
		// Others join it.
		req := sh("cat; cat /root-file; echo $WORD; pwd; id -u; echo bad >&2; exit 42")
		req.Stdin, req.Cwd, req.User = io.NopCloser(strings.NewReader("in\n")), "/bin", "12"
		req.SecretEnv = []*pb.SecretEnv{{ID: "word", Name: "WORD"}}
		out, errOut, err := run(req)
		if out != "in\nmark\nhush\n/bin\n12\n" || errOut != "bad\n" || exitCode(err) != 42 {
			t.Errorf("got %q, %q, %v", out, errOut, err)
		}
		for _, tc := range []struct {
			arg  string
			code int
		}{{"true", -1}, {"false", 1}, {"nosuch", 127}, {"/bin", 126}} {
			if _, _, err := run(gwclient.StartRequest{Args: []string{tc.arg}}); exitCode(err) != tc.code || (err == nil) != (tc.code == -1) {
				t.Errorf("%s: %v, want exit code %d", tc.arg, err, tc.code)
			}
		}
		big := strings.Repeat("0123456789abcdef", 1<<16)
		req = sh("cat | md5sum; yes | head -c 3000000")
		req.Stdin = io.NopCloser(strings.NewReader(big))
		if out, _, err := run(req); err != nil || len(out) != 3000000+len("d41d8cd98f00b204e9800998ecf8427e  -\n") {
			t.Errorf("a megabyte in and three out: %d bytes, %v", len(out), err)
		}
		// Signals and cancelling reach one process.
		for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGKILL: 137, syscall.SIGUSR1: 5} {
			ready := newOutBuffer()
			p, err := ctr.Start(ctx, gwclient.StartRequest{Args: []string{"sh", "-c", "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done"}, Env: []string{"PATH=/bin"}, Stdout: ready})
			if err != nil {
				return err
			}
			ready.wait(t, "ready")
			if err := p.Signal(ctx, sig); err != nil {
				t.Errorf("%s: %v", sig, err)
			}
			if err := p.Wait(); exitCode(err) != code {
				t.Errorf("after %s: %v", sig, err)
			}
		}
		// Files as they are now.
		data, err := ctr.ReadFile(ctx, gwclient.ReadContainerRequest{ReadRequest: gwclient.ReadRequest{Filename: "/root-file", Range: &gwclient.FileRange{Offset: 1, Length: 2}}})
		if err != nil || string(data) != "ar" {
			t.Errorf("ReadFile: %q, %v", data, err)
		}
		if data, err = ctr.ReadFile(ctx, gwclient.ReadContainerRequest{ReadRequest: gwclient.ReadRequest{Filename: "/f"}, MountIndex: 2}); err != nil || string(data) != "k\n" {
			t.Errorf("ReadFile of a cache mount: %q, %v", data, err)
		}
		if _, _, err := run(sh("ln -s /proc/1/environ /out; ln -s ../../../../etc/shadow /up; mkfifo /fifo")); err != nil {
			t.Error(err)
		}
		for name, mount := range map[string]int{"/up": 0, "/fifo": 0, "/nosuch": 0, "/": 0, "relative": 0, "/x": 1, "/y": 9} {
			if data, err := ctr.ReadFile(ctx, gwclient.ReadContainerRequest{ReadRequest: gwclient.ReadRequest{Filename: name}, MountIndex: mount}); err == nil {
				t.Errorf("ReadFile %s of mount %d: %q", name, mount, data)
			}
		}
		st, err := ctr.StatFile(ctx, gwclient.StatContainerRequest{StatRequest: gwclient.StatRequest{Path: "/root-file"}})
		if err != nil || st.Size != 5 || st.Path != "root-file" {
			t.Errorf("StatFile: %+v, %v", st, err)
		}
		entries, err := ctr.ReadDir(ctx, gwclient.ReadDirContainerRequest{ReadDirRequest: gwclient.ReadDirRequest{Path: "/", IncludePattern: "root-*"}})
		if err != nil || len(entries) != 1 || entries[0].Path != "root-file" {
			t.Errorf("ReadDir: %v, %v", entries, err)
		}
		// What is not allowed.
		if _, err := c.NewContainer(ctx, gwclient.NewContainerRequest{NetMode: pb.NetMode_HOST, Mounts: []gwclient.Mount{{Dest: "/", Ref: base}}}); err == nil || !strings.Contains(err.Error(), "network.host is not allowed") {
			t.Errorf("host network: %v", err)
		}
		if _, err := c.NewContainer(ctx, gwclient.NewContainerRequest{Mounts: []gwclient.Mount{{Dest: "/x", Ref: base}}}); err == nil {
			t.Error("a container without a root")
		}
		// The shell ends, and with it the container.
		io.WriteString(typed, "exit 7\n")
		if err := shell.Wait(); exitCode(err) != 7 {
			t.Errorf("shell: %v", err)
		}
		if p, err := ctr.Start(ctx, sh("true")); err == nil && p.Wait() == nil {
			t.Error("a process runs in a container that has ended")
		}
		if err := ctr.Release(ctx); err != nil {
			t.Errorf("Release: %v", err)
		}

		// What stays when the build ends is removed.
		left, err := c.NewContainer(ctx, gwclient.NewContainerRequest{Mounts: []gwclient.Mount{{Dest: "/", Ref: base}}})
		if err != nil {
			return err
		}
		_, err = left.Start(ctx, gwclient.StartRequest{Args: []string{"sleep", "1000"}, Env: []string{"PATH=/bin"}})
		return err
	})
	if err != nil {
		t.Error(err)
	}
	te.stop() // checks that nothing is left
}

func TestFrontendContainerInsecure(t *testing.T) {
	te := openTest(t)
	te.base()
	caps := func(ctx context.Context, c gwclient.Client, base gwclient.Reference) (string, error) {
		ctr, err := c.NewContainer(ctx, gwclient.NewContainerRequest{Mounts: []gwclient.Mount{{Dest: "/", Ref: base}}})
		if err != nil {
			return "", err
		}
		defer ctr.Release(ctx)
		out := newOutBuffer()
		p, err := ctr.Start(ctx, gwclient.StartRequest{
			Args: []string{"grep", "CapEff", "/proc/self/status"}, Env: []string{"PATH=/bin"}, Stdout: out, SecurityMode: pb.SecurityMode_INSECURE,
		})
		if err != nil {
			return "", err
		}
		if err := p.Wait(); err != nil {
			return "", err
		}
		return out.text(), nil
	}
	err := te.inBuild(t.Context(), bkclient.SolveOpt{}, func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error {
		_, err := caps(ctx, c, base)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "security.insecure is not allowed") {
		t.Errorf("without the entitlement: %v", err)
	}
	err = te.inBuild(t.Context(), bkclient.SolveOpt{AllowedEntitlements: []string{"security.insecure"}}, func(ctx context.Context, c gwclient.Client, base gwclient.Reference) error {
		out, err := caps(ctx, c, base)
		if err == nil && strings.Contains(out, "00000000a80425fb") {
			t.Errorf("no more capabilities than others: %s", out)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// exportDir builds the Dockerfile of a directory.
func (te *testEngine) exportDir(dir string, export bkclient.ExportEntry) (*bkclient.SolveResponse, error) {
	te.t.Helper()
	files, err := fsutil.NewFS(dir)
	if err != nil {
		te.t.Fatal(err)
	}
	return te.client.Solve(te.t.Context(), nil, bkclient.SolveOpt{
		Frontend: "dockerfile.v0", Exports: []bkclient.ExportEntry{export},
		LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": files},
	}, nil)
}

// mustReadImage reads a file of an image in the store.
func (te *testEngine) mustReadImage(name, file string) string {
	te.t.Helper()
	var data []byte
	_, err := te.client.Build(te.t.Context(), bkclient.SolveOpt{}, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		def, err := llb.Image(name).Marshal(ctx)
		if err != nil {
			return nil, err
		}
		res, err := c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB()})
		if err != nil {
			return nil, err
		}
		data, err = res.Ref.ReadFile(ctx, gwclient.ReadRequest{Filename: file})
		return gwclient.NewResult(), err
	}, nil)
	if err != nil {
		te.t.Fatalf("read %s of %s: %v", file, name, err)
	}
	return string(data)
}

// testFrontend compiles the test frontend, once.
var testFrontend = sync.OnceValue(func() error {
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(binDir, "frontend"), "./testdata/frontend")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the frontend: %w: %s", err, out)
	}
	return nil
})

// frontendImage puts the test frontend it into an image and pushes it. It returns the image's name.
func (te *testEngine) frontendImage(labels string) string {
	te.t.Helper()
	if err := runner(); err != nil {
		te.t.Skipf("needs slipway-runner: %v", err)
	}
	dir := te.t.TempDir()
	if err := testFrontend(); err != nil {
		te.t.Fatal(err)
	}
	if err := os.Link(filepath.Join(binDir, "frontend"), filepath.Join(dir, "frontend")); err != nil {
		te.t.Fatal(err)
	}
	reg := registrytest.Start(te.t, registrytest.Options{})
	name := reg.Host + "/frontend:1"
	dockerfile := "FROM scratch\nCOPY frontend /frontend\nENTRYPOINT [\"/frontend\"]\n" + labels
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		te.t.Fatal(err)
	}
	// Only pushed: the build that uses it has to pull it.
	_, err := te.exportDir(dir, bkclient.ExportEntry{Type: "image", Attrs: map[string]string{
		"name": name, "push": "true", "store": "false",
	}})
	if err != nil {
		te.t.Fatal(err)
	}
	return name
}

func TestFrontendImage(t *testing.T) {
	te := openTest(t)
	te.base()
	image := te.frontendImage("LABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs,moby.buildkit.frontend.subrequests+x\n")
	read := func(name, file string) string {
		t.Helper()
		return te.mustReadImage(name, file)
	}
	files := map[string]string{"Dockerfile": "# syntax=" + image + "\nwhatever\n"}
	out := te.mustBuild(request{name: "by-syntax", files: files})
	if got := read("by-syntax", "text"); got != files["Dockerfile"] {
		t.Errorf("by the syntax line: %q\n%s", got, out.logs)
	}
	if got := read("by-syntax", "metadata"); got != "<nil>" {
		t.Errorf("the frontend's definition: %s", got)
	}
	files = map[string]string{"Dockerfile": "text only\n"}
	for name, attrs := range map[string]map[string]string{
		"by-source":       {"source": image, "frontend": "gateway.v0"},
		"by-build-arg":    {"build-arg:BUILDKIT_SYNTAX": image},
		"by-context":      {"source": "other/frontend:2", "frontend": "gateway.v0", "context:other/frontend:2": "docker-image://" + image},
		"stays":           {"source": image, "frontend": "gateway.v0", "mode": "stay"},
		"needed-cap-here": {"source": image, "frontend": "gateway.v0", "frontend.caps": "moby.buildkit.frontend.subrequests"},
	} {
		started := time.Now()
		te.mustBuild(request{name: name, files: files, attrs: attrs})
		if got := read(name, "text"); got != "text only\n" {
			t.Errorf("%s: %q", name, got)
		}
		if name == "stays" && time.Since(started) > 30*time.Second {
			t.Errorf("%s: took %s", name, time.Since(started))
		}
	}

	source := func(more map[string]string) map[string]string {
		attrs := map[string]string{"source": image, "frontend": "gateway.v0"}
		maps.Copy(attrs, more)
		return attrs
	}
	te.mustBuild(request{name: "container", files: files, attrs: source(map[string]string{"mode": "container", "image": "base", "command": "echo from a container"})})
	if got := read("container", "text"); got != "from a container\n" {
		t.Errorf("container in a frontend: %q", got)
	}
	te.mustBuild(request{name: "nested", files: map[string]string{"Dockerfile": "FROM base AS a\nRUN echo nested > /text\nFROM a\nRUN false\n"}, attrs: source(map[string]string{"mode": "nested", "target": "a"})})
	if got := read("nested", "text"); got != "nested\n" {
		t.Errorf("nested frontend: %q", got)
	}
	for _, tc := range []struct {
		what  string
		attrs map[string]string
		want  string
	}{
		{"crash", source(map[string]string{"mode": "crash"}), "exit code: 3: about to crash"},
		{"leaves", source(map[string]string{"mode": "leave"}), "has ended without a result"},
		{"returns an error", source(map[string]string{"mode": "error"}), "the frontend does not like it"},
		{"failing container", source(map[string]string{"mode": "container", "image": "base", "command": "false"}), "exit code: 1"},
		{"failing nested build", source(map[string]string{"mode": "nested"}), "file with no instructions"},
		{"lacks a capability", source(map[string]string{"frontend.caps": "no.such.cap"}), "unsupported frontend capability no.such.cap"},
		{"no source", map[string]string{"frontend": "gateway.v0"}, "no source specified for gateway"},
		{"no image", map[string]string{"frontend": "gateway.v0", "source": strings.Replace(image, "frontend:", "nosuch:", 1)}, "nosuch"},
	} {
		_, err := te.build(t.Context(), request{files: map[string]string{"Dockerfile": "# none\n"}, attrs: tc.attrs})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.what, err, tc.want)
		}
	}

	// Cancelled while it hangs: its container is killed.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := time.Now()
	_, err := te.build(ctx, request{files: files, attrs: source(map[string]string{"mode": "hang"}), status: func(s *bkclient.SolveStatus) {
		for _, v := range s.Vertexes {
			if v.Name == "reading the file" && v.Completed != nil {
				cancel()
			}
		}
	}})
	if err == nil || time.Since(started) > 30*time.Second {
		t.Errorf("cancelled: %v after %s", err, time.Since(started))
	}
	te.stop() // checks that nothing is left
}

// TestFrontendInputs gives states of this process to frontends.
func TestFrontendInputs(t *testing.T) {
	te := openTest(t)
	te.base()
	image := te.frontendImage("LABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs\n")
	input := llb.Scratch().File(llb.Mkfile("/text", 0o644, []byte("from an input\n")))
	for name, opt := range map[string]bkclient.SolveOpt{
		"image": {Frontend: "gateway.v0", FrontendAttrs: map[string]string{"source": image, "mode": "input"}, FrontendInputs: map[string]llb.State{"it": input}},
		"dockerfile": {Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"context:it": "input:it"}, FrontendInputs: map[string]llb.State{
			"it":         input,
			"dockerfile": llb.Scratch().File(llb.Mkfile("/Dockerfile", 0o644, []byte("FROM base\nCOPY --from=it /text /text\nCOPY more /more\n"))),
			"context":    llb.Scratch().File(llb.Mkfile("/more", 0o644, []byte("more"))),
		}},
	} {
		opt.Exports = []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": "inputs-" + name}}}
		if _, err := te.client.Solve(t.Context(), nil, opt, nil); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := te.mustReadImage("inputs-"+name, "text"); got != "from an input\n" {
			t.Errorf("%s: %q", name, got)
		}
	}
}
