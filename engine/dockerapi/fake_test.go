// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	mobyregistry "github.com/moby/moby/api/types/registry"
	mobyclient "github.com/moby/moby/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
)

// The fakes here stand for the store, the registry and the executor where a test is about the API alone. real_test.go has
// the real ones.

type fakeImages struct {
	mu   sync.Mutex
	list []Image
}

func (f *fakeImages) List(context.Context) ([]Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list), nil
}

func (f *fakeImages) Get(_ context.Context, ref string) (Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name, _ := image.Normalize(ref)
	for _, img := range f.list {
		if slices.Contains(img.Names, name) || img.ID.String() == ref || strings.HasPrefix(img.ID.Encoded(), ref) {
			return img, nil
		}
	}
	return Image{}, fmt.Errorf("%w: %s", image.ErrNotFound, ref)
}

func (f *fakeImages) Tag(_ context.Context, img Image, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.list {
		f.list[i].Names = slices.DeleteFunc(slices.Clone(f.list[i].Names), func(n string) bool { return n == name })
		if f.list[i].ID == img.ID {
			f.list[i].Names = append(f.list[i].Names, name)
		}
	}
	return nil
}

func (f *fakeImages) Untag(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.list {
		f.list[i].Names = slices.DeleteFunc(slices.Clone(f.list[i].Names), func(n string) bool { return n == name })
	}
	return nil
}

func (f *fakeImages) Delete(_ context.Context, img Image) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = slices.DeleteFunc(f.list, func(o Image) bool { return o.ID == img.ID })
	return nil
}

func (f *fakeImages) LayerSizes(_ context.Context, img Image) ([]int64, error) {
	return make([]int64, len(img.Layers)), nil
}

// add puts in an image with that config.
func (f *fakeImages) add(t *testing.T, cfg ocispec.ImageConfig, names ...string) Image {
	t.Helper()
	created := time.Unix(1700000000, 0).UTC()
	raw, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: cfg, Created: &created,
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("layer")}},
		History: []ocispec.History{
			{CreatedBy: "ADD x /", Created: &created},
			{CreatedBy: "CMD x", EmptyLayer: true, Created: &created, Comment: "last"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	img := Image{ID: digest.FromBytes(raw), Config: raw, Layers: snapshot.Snapshot{"l1"}, Runnable: true, Created: created, Size: 1234}
	for _, n := range names {
		full, err := image.Normalize(n)
		if err != nil {
			t.Fatal(err)
		}
		img.Names = append(img.Names, full)
	}
	f.mu.Lock()
	f.list = append(f.list, img)
	f.mu.Unlock()
	return img
}

// fakeRoots mounts empty directories; its files are those of a tiny image.
type fakeRoots struct {
	t     *testing.T
	files map[string]string

	mu      sync.Mutex
	mounted int
}

type fakeMount struct {
	r    *fakeRoots
	path string
}

func (m *fakeMount) Path() string { return m.path }
func (m *fakeMount) Release() error {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	m.r.mounted--
	return nil
}

func (r *fakeRoots) Mount(context.Context, snapshot.Snapshot) (Mount, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mounted++
	return &fakeMount{r, r.t.TempDir()}, nil
}

func (r *fakeRoots) Files(context.Context, snapshot.Snapshot) (layer.Files, error) {
	var entries []index.Entry
	dirs := map[string]bool{}
	for path, data := range r.files {
		for d := index.Parent(path); !dirs[d]; d = index.Parent(d) {
			dirs[d] = true
			entries = append(entries, index.Entry{Path: d, Type: index.Dir, Mode: 0o755})
		}
		entries = append(entries, index.Entry{Path: path, Type: index.File, Size: int64(len(data)), Digest: digest.FromString(data)})
	}
	return &fakeFiles{index.Merge(index.New(entries)), r.files}, nil
}

type fakeFiles struct {
	index.Tree
	files map[string]string
}

func (f *fakeFiles) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(f.files[path])), nil
}

// fakeExecutor runs a Go function for each command.
type fakeExecutor struct {
	mu       sync.Mutex
	commands map[string]func(p *fakeProcess) int
	specs    []executor.Spec
}

type fakeProcess struct {
	ctx     context.Context
	spec    executor.Spec
	io      executor.IO
	signals chan syscall.Signal
	sizes   chan [2]uint16
	done    chan struct{}
	exit    executor.Exit
}

func (e *fakeExecutor) Start(ctx context.Context, s executor.Spec, stdio executor.IO) (executor.Process, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.specs = append(e.specs, s)
	f := e.commands[s.Args[0]]
	if f == nil {
		return nil, &executor.StartError{Code: 127, Err: fmt.Errorf("exec %q: not there", s.Args[0])}
	}
	p := &fakeProcess{ctx: ctx, spec: s, io: stdio, signals: make(chan syscall.Signal, 8), sizes: make(chan [2]uint16, 8), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.exit.Code = f(p)
	}()
	return p, nil
}

func (p *fakeProcess) Wait() (executor.Exit, error) { <-p.done; return p.exit, nil }
func (p *fakeProcess) Signal(s syscall.Signal) error {
	select {
	case <-p.done:
		return errors.New("ended")
	case p.signals <- s:
		return nil
	}
}

func (p *fakeProcess) Resize(rows, cols uint16) error { p.sizes <- [2]uint16{rows, cols}; return nil }

func (p *fakeProcess) Ports() []executor.Port {
	out := slices.Clone(p.spec.Ports)
	for i := range out {
		if out[i].HostPort == 0 {
			out[i].HostPort = uint16(40000 + i)
		}
	}
	return out
}
func (p *fakeProcess) IP() string { return "10.1.2.3" }

// commands are what the fake executor knows.
func commands() map[string]func(p *fakeProcess) int {
	return map[string]func(p *fakeProcess) int{
		"true": func(*fakeProcess) int { return 0 },
		"fail": func(*fakeProcess) int { return 42 },
		"both": func(p *fakeProcess) int {
			fmt.Fprint(p.io.Stdout, "to stdout\n")
			if p.io.Stderr != nil {
				fmt.Fprint(p.io.Stderr, "to stderr\n")
			}
			return 3
		},
		"cat": func(p *fakeProcess) int {
			if p.io.Stdin != nil {
				_, _ = io.Copy(p.io.Stdout, p.io.Stdin)
			}
			return 0
		},
		"sleep": func(p *fakeProcess) int {
			for {
				select {
				case s := <-p.signals:
					if s == syscall.SIGUSR1 { // one that it ignores
						fmt.Fprint(p.io.Stdout, "usr1\n")
						continue
					}
					return 128 + int(s)
				case size := <-p.sizes:
					fmt.Fprintf(p.io.Stdout, "size %d %d\n", size[0], size[1])
				case <-p.ctx.Done():
					return 137
				}
			}
		},
		"deaf": func(p *fakeProcess) int { <-p.ctx.Done(); return 137 },
	}
}

type fakeRegistry struct {
	images *fakeImages
	pull   func(ref string, auth *mobyregistry.AuthConfig, progress func(Transfer)) (digest.Digest, bool, error)
	pushed []string
}

func (f *fakeRegistry) Pull(_ context.Context, ref string, _ *ocispec.Platform, auth *mobyregistry.AuthConfig, progress func(Transfer)) (digest.Digest, bool, error) {
	return f.pull(ref, auth, progress)
}

func (f *fakeRegistry) Push(_ context.Context, ref string, auth *mobyregistry.AuthConfig, progress func(Transfer)) (ocispec.Descriptor, error) {
	if auth == nil || auth.Password != "right" {
		return ocispec.Descriptor{}, &registry.Error{Err: registry.ErrUnauthorized, Message: "push " + ref + ": log in first"}
	}
	f.pushed = append(f.pushed, ref)
	d := digest.FromString("blob")
	progress(Transfer{Digest: d, State: Waiting})
	progress(Transfer{Digest: d, State: Done})
	return ocispec.Descriptor{Digest: digest.FromString("manifest"), Size: 99}, nil
}

func (f *fakeRegistry) Login(_ context.Context, auth mobyregistry.AuthConfig) (string, error) {
	if auth.Password != "right" {
		return "", &registry.Error{Err: registry.ErrUnauthorized, Message: "log in to " + auth.ServerAddress + ": wrong"}
	}
	return "", nil
}

// fake is a server over fakes, with a client.
type fake struct {
	*Server
	cli      *mobyclient.Client
	images   *fakeImages
	roots    *fakeRoots
	exec     *fakeExecutor
	registry *fakeRegistry
	socket   string
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{
		images: &fakeImages{},
		roots:  &fakeRoots{t: t, files: map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh\nann:x:7:8::/home/ann:/bin/sh\n", "etc/group": "staff:x:50:\n"}},
		exec:   &fakeExecutor{commands: commands()},
	}
	f.registry = &fakeRegistry{images: f.images}
	s, err := New(Options{Images: f.images, Roots: f.roots, Registry: f.registry, Executor: f.exec, Dir: t.TempDir(), Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	f.Server = s
	f.cli, f.socket = serve(t, s)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		f.roots.mu.Lock()
		defer f.roots.mu.Unlock()
		if f.roots.mounted != 0 {
			t.Errorf("%d root file systems are still mounted", f.roots.mounted)
		}
	})
	return f
}

// serve serves h on a unix socket and returns a real client of it.
func serve(t *testing.T, h http.Handler) (*mobyclient.Client, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	srv.Start()
	cli, err := mobyclient.New(mobyclient.WithHost("unix://" + socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cli.Close()
		srv.CloseClientConnections()
		srv.Close()
	})
	return cli, socket
}

// raw makes a request without the client's help and returns status and body.
func (f *fake) raw(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", f.socket) }}}
	defer hc.CloseIdleConnections()
	req, err := http.NewRequest(method, "http://x"+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}
