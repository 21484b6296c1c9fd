// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// testLayout is an OCI layout at the client.
type testLayout struct {
	t     *testing.T
	dir   string
	store content.Store
}

func newTestLayout(t *testing.T) testLayout {
	t.Helper()
	dir := t.TempDir()
	store, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return testLayout{t, dir, store}
}

func (l testLayout) put(b []byte) ocispec.Descriptor {
	l.t.Helper()
	d := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := content.WriteBlob(l.t.Context(), l.store, d.Digest.String(), bytes.NewReader(b), d); err != nil {
		l.t.Fatal(err)
	}
	return d
}

func (l testLayout) json(mediaType string, v any) ocispec.Descriptor {
	l.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	d := l.put(b)
	d.MediaType = mediaType
	return d
}

// image adds an image with one uncompressed layer, which has one file.
func (l testLayout) image(name, text string) ocispec.Descriptor {
	l.t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))})
	_, werr := io.WriteString(w, text)
	if err := errors.Join(err, werr, w.Close()); err != nil {
		l.t.Fatal(err)
	}
	d := l.put(layer.Bytes())
	d.MediaType = ocispec.MediaTypeImageLayer
	config := l.json(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Config:   ocispec.ImageConfig{Env: []string{"FROM=layout"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{d.Digest}},
	})
	return l.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{d},
	})
}

// tarOf builds with a frontend in this process, as buildx does, and returns the headers of the result's files and their content.
func (te *testEngine) tarOf(stores map[string]content.Store, build gwclient.BuildFunc) (map[string]*tar.Header, map[string]string, error) {
	te.t.Helper()
	var out bytes.Buffer
	_, err := te.client.Build(te.t.Context(), bkclient.SolveOpt{
		OCIStores: stores,
		Exports: []bkclient.ExportEntry{{Type: "tar", Output: func(map[string]string) (io.WriteCloser, error) {
			return struct {
				io.Writer
				io.Closer
			}{&out, io.NopCloser(nil)}, nil
		}}},
	}, "test", build, nil)
	if err != nil {
		return nil, nil, err
	}
	headers, texts := map[string]*tar.Header{}, map[string]string{}
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if err == io.EOF {
			return headers, texts, nil
		}
		if err != nil {
			te.t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			te.t.Fatal(err)
		}
		headers[h.Name], texts[h.Name] = h, string(b)
	}
}

// solved is a frontend that returns a state.
func solved(st llb.State) gwclient.BuildFunc {
	return func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		def, err := st.Marshal(ctx, llb.WithCaps(c.BuildOpts().LLBCaps))
		if err != nil {
			return nil, err
		}
		return c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB(), Evaluate: true})
	}
}

func TestLayoutThroughTheGateway(t *testing.T) {
	te := openTest(t)
	l := newTestLayout(t)
	d := l.image("hello", "from a layout")
	stores := map[string]content.Store{"mine": l.store}
	var config []byte
	_, texts, err := te.tarOf(stores, func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		session := c.BuildOpts().SessionID
		ref, dgst, raw, err := c.ResolveImageConfig(ctx, "anything@"+d.Digest.String(), sourceresolver.Opt{
			OCILayoutOpt: &sourceresolver.ResolveOCILayoutOpt{
				Store: sourceresolver.ResolveImageConfigOptStore{SessionID: session, StoreID: "mine"},
			},
		})
		if err != nil {
			return nil, err
		}
		if dgst != d.Digest {
			t.Errorf("resolved to %s, want %s", dgst, d.Digest)
		}
		config = raw
		return solved(llb.OCILayout(ref, llb.OCIStore(session, "mine")))(ctx, c)
	})
	if err != nil {
		t.Fatal(err)
	}
	if texts["hello"] != "from a layout" || !strings.Contains(string(config), "FROM=layout") {
		t.Errorf("files %v, config %s", texts, config)
	}
	// Another session, one that is not there.
	_, _, err = te.tarOf(stores, solved(llb.OCILayout("x@"+l.image("hello", "more").Digest.String(), llb.OCIStore("", "other"))))
	if err == nil || !strings.Contains(err.Error(), "no layout of that name") {
		t.Errorf("a store that is not offered: %v", err)
	}
}

func TestBlobSources(t *testing.T) {
	te := openTest(t)
	l := newTestLayout(t)
	data := []byte("the bytes of a blob")
	d := l.put(data)
	stores := map[string]content.Store{"mine": l.store}
	name := "layout@" + d.Digest.String()

	headers, texts, err := te.tarOf(stores, solved(llb.OCILayoutBlob(name, llb.ImageBlobOCIStore("", "mine"))))
	if err != nil {
		t.Fatal(err)
	}
	if h := headers[d.Digest.Encoded()]; h == nil || texts[h.Name] != string(data) || h.Mode != 0o600 || h.Uid != 0 || h.ModTime.Unix() != 0 {
		t.Errorf("got %+v %v", h, texts)
	}
	with := []llb.ImageBlobOption{llb.Filename("a/../b/tool"), llb.Chmod(0o755), llb.Chown(7, 8)}
	// The same blob under another name: nobody needs to be asked for it.
	headers, texts, err = te.tarOf(nil, solved(llb.OCILayoutBlob(name, append(with, llb.ImageBlobOCIStore("", "gone"))...)))
	if err != nil {
		t.Fatal(err)
	}
	if h := headers["tool"]; h == nil || texts["tool"] != string(data) || h.Mode != 0o755 || h.Uid != 7 || h.Gid != 8 {
		t.Errorf("got %+v %v", h, texts)
	}

	// From a registry.
	s := registrytest.Start(t, registrytest.Options{})
	more := []byte("a blob of a registry")
	md := digest.FromBytes(more)
	push(t, s, "tools", more)
	if headers, texts, err = te.tarOf(nil, solved(llb.ImageBlob(s.Host+"/tools@"+md.String(), with...))); err != nil {
		t.Fatal(err)
	}
	if h := headers["tool"]; h == nil || texts["tool"] != string(more) || h.Gid != 8 {
		t.Errorf("got %+v %v", h, texts)
	}

	for what, tc := range map[string]struct {
		st  llb.State
		say string
	}{
		"nowhere in the registry": {llb.ImageBlob(s.Host + "/tools@" + digest.FromString("x").String()), "tools"},
		"nowhere in the layout":   {llb.OCILayoutBlob("layout@"+digest.FromString("x").String(), llb.ImageBlobOCIStore("", "mine")), "no such blob"},
		"no store":                {llb.OCILayoutBlob(name), "oci.store"},
	} {
		if _, _, err := te.tarOf(stores, solved(tc.st)); err == nil || !strings.Contains(err.Error(), tc.say) {
			t.Errorf("%s: %v, want %q", what, err, tc.say)
		}
	}

	// Not what the digest says.
	bad := l.put([]byte("will be changed"))
	if err := os.Remove(filepath.Join(l.dir, "blobs/sha256", bad.Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, "blobs/sha256", bad.Digest.Encoded()), []byte("has been changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, _, err = te.tarOf(stores, solved(llb.OCILayoutBlob("layout@"+bad.Digest.String(), llb.ImageBlobOCIStore("", "mine"))))
	if err == nil || !strings.Contains(err.Error(), "digest does not match") {
		t.Errorf("changed bytes: %v", err)
	}
}

// push puts a blob into a repository of the registry.
func push(t *testing.T, s *registrytest.Server, repository string, b []byte) {
	t.Helper()
	do := func(method, url string, body []byte) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s", method, url, resp.Status)
		}
		return resp
	}
	at := do(http.MethodPost, "http://"+s.Host+"/v2/"+repository+"/blobs/uploads/", nil).Header.Get("Location")
	do(http.MethodPut, at+"&digest="+digest.FromBytes(b).String(), b)
}
