// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// lazyWorld is a registry with a base image of two layers, and an engine that does not have it.
type lazyWorld struct {
	*testEngine
	reg    *registrytest.Server
	base   string   // HOST/base@DIGEST
	layers []string // digests of its blobs
}

func newLazyWorld(t *testing.T, opts registrytest.Options) *lazyWorld {
	t.Helper()
	w := &lazyWorld{reg: registrytest.Start(t, opts)}
	maker := openTest(t)
	maker.base()
	name := w.reg.Host + "/base:1"
	if _, err := maker.exportWith("FROM base", bkclient.SolveOpt{Session: login(w.reg, opts), Exports: []bkclient.ExportEntry{pushed(name)}}); err != nil {
		t.Fatal(err)
	}
	reg := registry.New(registry.Options{DockerConfigDir: t.TempDir(), Credentials: func(context.Context, string) (string, string, error) {
		return opts.User, opts.Password, nil
	}})
	_, desc, err := reg.Resolve(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := reg.FetchBytes(t.Context(), name, desc)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || len(m.Layers) != 2 {
		t.Fatalf("%v: %s", err, raw)
	}
	for _, l := range m.Layers {
		w.layers = append(w.layers, l.Digest.String())
	}
	w.base = w.reg.Host + "/base@" + desc.Digest.String()
	w.testEngine = openTest(t)
	w.reg.Forget()
	return w
}

// login is the session of a client that has the registry's password.
func login(reg *registrytest.Server, opts registrytest.Options) []session.Attachable {
	if opts.User == "" {
		return nil
	}
	return []session.Attachable{passwords{host: reg.Host, user: opts.User, secret: opts.Password}}
}

type passwords struct {
	auth.UnimplementedAuthServer
	host, user, secret string
}

func (p passwords) Register(s *grpc.Server) { auth.RegisterAuthServer(s, p) }

func (p passwords) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	if req.Host != p.host {
		return &auth.CredentialsResponse{}, nil
	}
	return &auth.CredentialsResponse{Username: p.user, Secret: p.secret}, nil
}

func pushed(name string) bkclient.ExportEntry {
	return bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": name, "push": "true"}}
}

// gets returns how often the layers of the base were downloaded.
func (w *lazyWorld) gets() (n int) {
	for _, l := range w.layers {
		n += len(w.reg.Requests("GET /v2/base/blobs/" + l))
	}
	return n
}

// must builds and pushes, and returns the digest of what is in the registry.
func (w *lazyWorld) must(dockerfile string, exports ...bkclient.ExportEntry) string {
	w.t.Helper()
	response, err := w.exportWith(dockerfile, bkclient.SolveOpt{Exports: exports})
	if err != nil {
		w.t.Fatal(err)
	}
	return response["containerimage.digest"]
}

// TestLazyBase: a base that a build only puts layers and settings on is not downloaded.
func TestLazyBase(t *testing.T) {
	w := newLazyWorld(t, registrytest.Options{})
	other := registrytest.Start(t, registrytest.Options{})
	stacked := "FROM " + w.base + "\nENV A=b\nLABEL c=d\nCOPY --link top /linked/top\nCMD [\"/bin/true\"]\n"
	attrs := map[string]string{"build-arg:SOURCE_DATE_EPOCH": "1700000000"}
	settings := "FROM " + w.base + "\nENV A=b\n"
	buildOf := func(te *testEngine, dockerfile string, exports ...bkclient.ExportEntry) string {
		t.Helper()
		response, err := te.exportWith(dockerfile, bkclient.SolveOpt{FrontendAttrs: attrs, Exports: exports})
		if err != nil {
			t.Fatal(err)
		}
		return response["containerimage.digest"]
	}
	build := func(te *testEngine, exports ...bkclient.ExportEntry) string {
		t.Helper()
		return buildOf(te, stacked, exports...)
	}

	// To the same registry the layers are mounted.
	there := build(w.testEngine, pushed(w.reg.Host+"/app:1"))
	if n := w.gets(); n != 0 {
		t.Errorf("%d layers were downloaded", n)
	}
	lazily := buildOf(w.testEngine, settings, pushed(w.reg.Host+"/settings:1"))
	if mounts := w.reg.Requests("mount="); len(mounts) != 4 {
		t.Errorf("mounts: %v", mounts)
	}
	// To another registry they are streamed, once.
	if elsewhere := build(w.testEngine, pushed(other.Host+"/app:1")); elsewhere != there {
		t.Errorf("%s there, %s in another registry", there, elsewhere)
	}
	if n := w.gets(); n != 2 {
		t.Errorf("%d downloads of 2 layers for another registry", n)
	}
	// An archive gets the blobs as they are.
	entry, archive := toBuffer("oci", nil)
	build(w.testEngine, entry)
	names := map[string]bool{}
	for tr := tar.NewReader(archive); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names[h.Name] = true
	}
	for _, l := range w.layers {
		if !names["blobs/sha256/"+strings.TrimPrefix(l, "sha256:")] {
			t.Errorf("layer %s is not in the archive: %v", l, names)
		}
	}
	if n := w.gets(); n != 4 {
		t.Errorf("%d downloads after an archive, want 4", n)
	}
	// The engine starts anew: it still knows them, and the image in its store can be pushed.
	w.stop()
	again := openAt(t, w.root)
	build(again, bkclient.ExportEntry{Type: "cacheonly"})
	if n := w.gets(); n != 4 {
		t.Errorf("%d downloads after a restart", n)
	}
	// Whoever looks into it brings it here, each layer once, and has the same image.
	if _, err := again.exportWith("FROM "+w.base+"\nRUN test -x /bin/sh && echo > /ran\n", bkclient.SolveOpt{}); err != nil {
		t.Fatal(err)
	}
	if n := w.gets(); n != 6 {
		t.Errorf("%d downloads after a RUN, want 6", n)
	}
	if now := build(again, pushed(w.reg.Host+"/app:2")); now != there {
		t.Errorf("%s lazily, %s when the layers are here", there, now)
	}
	if n := w.gets(); n != 6 {
		t.Errorf("%d downloads in the end, want 6", n)
	}
	// An engine that downloads first pushes the same.
	eager := openTest(t)
	if _, err := eager.exportWith("FROM "+w.base+"\nRUN true\n", bkclient.SolveOpt{}); err != nil {
		t.Fatal(err)
	}
	if got := buildOf(eager, settings, pushed(w.reg.Host+"/settings:2")); got != lazily {
		t.Errorf("%s lazily, %s eagerly", lazily, got)
	}
}

// TestLazyBaseWithoutRegistry: when the registry has gone, what is cached still is, and what needs the layers says so.
func TestLazyBaseWithoutRegistry(t *testing.T) {
	w := newLazyWorld(t, registrytest.Options{})
	settings := "FROM " + w.base + "\nENV A=b\n"
	nothing := bkclient.ExportEntry{Type: "cacheonly"}
	w.must(settings, nothing)
	w.reg.Fault.Break(registrytest.Drop, 1000, "", "/v2/")
	w.must(settings, nothing)
	_, err := w.exportWith(settings+"RUN true\n", bkclient.SolveOpt{})
	if err == nil || !strings.Contains(err.Error(), "cannot be fetched") || !strings.Contains(err.Error(), w.reg.Host) {
		t.Errorf("a step on it: %v", err)
	}
	w.reg.Fault.Heal()
	w.must(settings+"RUN true\n", nothing)
	w.reg.Fault.Break(registrytest.Drop, 1000, "", "/v2/")
	w.must(settings+"RUN true\n", nothing)
	if n := w.reg.Fault.Heal(); n == 1000 {
		t.Log("the cached build has asked nobody")
	}
}

// TestLazyBaseCredentials: layers are fetched with the rights of the one who needs them, and nobody else's.
func TestLazyBaseCredentials(t *testing.T) {
	for name, token := range map[string]bool{"basic": false, "token": true} {
		t.Run(name, func(t *testing.T) {
			opts := registrytest.Options{User: "ann", Password: "secret", Token: token}
			w := newLazyWorld(t, opts)
			ann := bkclient.SolveOpt{Session: login(w.reg, opts), Exports: []bkclient.ExportEntry{{Type: "cacheonly"}}}
			if _, err := w.exportWith("FROM "+w.base+"\nENV A=b\n", ann); err != nil {
				t.Fatal(err)
			}
			// The documents are here, so that nobody needs rights to name the image; but not its layers.
			step := "FROM " + w.base + "\nENV A=b\nRUN true\n"
			if _, err := w.exportWith(step, bkclient.SolveOpt{Exports: ann.Exports}); err == nil {
				t.Error("the layers were fetched for somebody without rights")
			}
			if _, err := w.exportWith(step, ann); err != nil {
				t.Error(err)
			}
			if n := len(w.reg.Requests("GET /v2/base/blobs/" + w.layers[0])); n < 1 {
				t.Error("nothing was fetched")
			}
		})
	}
}

// TestLazyImageIsRunnable: an image that is built to be run here has its layers here when the build has ended.
func TestLazyImageIsRunnable(t *testing.T) {
	w := newLazyWorld(t, registrytest.Options{})
	w.must("FROM "+w.base+"\nENV A=b\n", bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": "app"}})
	if n := w.gets(); n != 2 {
		t.Errorf("%d layers were downloaded", n)
	}
	w.reg.Fault.Break(registrytest.Drop, 1000, "", "/v2/")
	defer w.reg.Fault.Heal()
	w.must("FROM app\nRUN test \"$A\" = b\n", bkclient.ExportEntry{Type: "cacheonly"})
}
