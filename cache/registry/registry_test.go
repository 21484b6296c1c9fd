// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// newRegistry returns a client that looks at no files of this machine and does not wait between tries.
func newRegistry(t *testing.T, opts registry.Options) *registry.Registry {
	t.Helper()
	if opts.DockerConfigDir == "" {
		opts.DockerConfigDir = t.TempDir()
	}
	if opts.CertDirs == nil {
		opts.CertDirs = []string{}
	}
	if opts.Wait == nil {
		opts.Wait = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	}
	return registry.New(opts)
}

func as(user, secret string) registry.Credentials {
	return func(context.Context, string) (string, string, error) { return user, secret, nil }
}

func blobOf(t *testing.T, size int) (ocispec.Descriptor, []byte) {
	t.Helper()
	b := make([]byte, size)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return describe(ocispec.MediaTypeImageLayer, b), b
}

func describe(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// image pushes config, one layer and the manifest, and returns the manifest and the layer.
func image(ctx context.Context, t *testing.T, r *registry.Registry, ref string) (manifest, layer ocispec.Descriptor, layerBytes []byte, err error) {
	t.Helper()
	layer, layerBytes = blobOf(t, 300<<10)
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["` + layer.Digest.String() + `"]}}`)
	configDesc := describe(ocispec.MediaTypeImageConfig, config)
	m, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: configDesc, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest = describe(ocispec.MediaTypeImageManifest, m)
	if err := r.Push(ctx, ref, layer, opener(layerBytes), nil); err != nil {
		return manifest, layer, layerBytes, err
	}
	if err := r.Push(ctx, ref, configDesc, opener(config), nil); err != nil {
		return manifest, layer, layerBytes, err
	}
	return manifest, layer, layerBytes, r.Tag(ctx, ref, manifest, m)
}

func TestPushAndPull(t *testing.T) {
	for _, tc := range []struct {
		name   string
		server registrytest.Options
		login  bool
		config func(*registrytest.Server, *registry.Options)
	}{
		{name: "plain HTTP on loopback"},
		{name: "TLS on loopback, nobody vouches for it", server: registrytest.Options{TLS: true}},
		{name: "TLS with its authority", server: registrytest.Options{TLS: true}, config: func(s *registrytest.Server, o *registry.Options) {
			o.CertDirs = []string{s.CertDir(t)}
		}},
		{name: "basic", server: registrytest.Options{User: "mia", Password: "s3cret"}, login: true},
		{name: "basic and TLS", server: registrytest.Options{User: "mia", Password: "s3cret", TLS: true}, login: true},
		{name: "token", server: registrytest.Options{User: "mia", Password: "s3cret", Token: true}, login: true},
		{name: "token that expires in the middle", server: registrytest.Options{User: "mia", Password: "s3cret", Token: true, TokenUses: 2}, login: true},
		{name: "forced plain HTTP", config: func(_ *registrytest.Server, o *registry.Options) {
			o.PlainHTTP = func(string) bool { return true }
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			s := registrytest.Start(t, tc.server)
			opts := registry.Options{}
			if tc.config != nil {
				tc.config(s, &opts)
			}
			if tc.login {
				opts.Credentials = as("mia", "s3cret")
			}
			r := newRegistry(t, opts)
			ref := s.Host + "/team/app:1"
			manifest, layer, want, err := image(ctx, t, r, ref)
			if err != nil {
				t.Fatal(err)
			}
			name, got, err := r.Resolve(ctx, ref)
			if err != nil {
				t.Fatal(err)
			}
			if name != ref || got.Digest != manifest.Digest || got.Size != manifest.Size || got.MediaType != manifest.MediaType {
				t.Fatalf("Resolve = %s %+v, want %+v", name, got, manifest)
			}
			if _, err := r.FetchBytes(ctx, ref, got); err != nil {
				t.Fatal(err)
			}
			b, err := r.FetchBytes(ctx, ref, layer)
			if err != nil || !bytes.Equal(b, want) {
				t.Fatalf("layer: %d bytes, %v", len(b), err)
			}
		})
	}
}

func TestPushSendsOnlyWhatIsMissing(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{})
	desc, b := blobOf(t, 1<<20)
	var last int64
	progress := func(n int64) { last = n }
	if err := r.Push(ctx, s.Host+"/a", desc, opener(b), progress); err != nil {
		t.Fatal(err)
	}
	if last != desc.Size {
		t.Errorf("progress ended at %d of %d", last, desc.Size)
	}
	never := func() (io.ReadCloser, error) { return nil, errors.New("must not be read") }
	last = 0
	if err := r.Push(ctx, s.Host+"/a", desc, never, progress); err != nil {
		t.Fatalf("present blob: %v", err)
	}
	if last != desc.Size {
		t.Errorf("progress of a present blob ended at %d", last)
	}
	desc.Annotations = map[string]string{registry.SourceAnnotation + s.Host: "b,a"}
	if err := r.Push(ctx, s.Host+"/a2", desc, never, nil); err == nil {
		t.Fatal("mounted from a repository that does not have it")
	}
	desc.Annotations = map[string]string{registry.SourceAnnotation + s.Host: "a"}
	if err := r.Push(ctx, s.Host+"/c", desc, never, nil); err != nil {
		t.Fatalf("mount: %v", err)
	}
}

func TestPushEmptyBlob(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{})
	desc := describe(ocispec.MediaTypeImageLayer, nil)
	if err := r.Push(ctx, s.Host+"/a", desc, opener(nil), nil); err != nil {
		t.Fatal(err)
	}
	if b, err := r.FetchBytes(ctx, s.Host+"/a", desc); err != nil || len(b) != 0 {
		t.Errorf("%q, %v", b, err)
	}
}

func TestPushRefusesDamagedBlob(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{})
	desc, b := blobOf(t, 200<<10)
	bad := bytes.Clone(b)
	bad[7] ^= 1
	for name, content := range map[string][]byte{"changed": bad, "short": b[:1000]} {
		err := r.Push(ctx, s.Host+"/a", desc, opener(content), nil)
		if !errors.Is(err, registry.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
	if _, err := r.FetchBytes(ctx, s.Host+"/a", desc); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("the registry has it: %v", err)
	}
}

// TestFaults breaks one request after the other: either all is well in the end, or an error says so; nothing
// wrong is taken for right.
func TestFaults(t *testing.T) {
	type fault struct {
		kind         registrytest.Kind
		n            int
		method, part string
	}
	for _, tc := range []struct {
		name       string
		push, pull []fault
		err        error // of push, else of pull; nil means that it must work
	}{
		{name: "HEAD dropped twice", push: []fault{{registrytest.Drop, 2, "HEAD", "/blobs/"}}},
		{name: "upload cannot begin at first", push: []fault{{registrytest.Gone, 2, "POST", "/uploads/"}}},
		{name: "upload breaks in the middle twice", push: []fault{{registrytest.DropBody, 2, "PUT", "/uploads/"}}},
		{name: "upload answered 500 twice", push: []fault{{registrytest.Fail, 2, "PUT", "/uploads/"}}},
		{name: "upload answered 429 twice", push: []fault{{registrytest.Busy, 2, "PUT", "/uploads/"}}},
		{name: "manifest answered 503", push: []fault{{registrytest.Gone, 2, "PUT", "/manifests/"}}},
		{name: "manifest stored under another digest", push: []fault{{registrytest.WrongName, 1, "PUT", "/manifests/"}}, err: errAny},
		{name: "blob stored under another digest", push: []fault{{registrytest.WrongName, 1, "PUT", "/uploads/"}}, err: errAny},
		{name: "upload never works", push: []fault{{registrytest.Fail, 99, "PUT", "/uploads/"}}, err: registry.ErrUnavailable},
		{name: "never a connection", push: []fault{{registrytest.Drop, 99, "", "/v2/"}}, err: registry.ErrUnreachable},
		{name: "pull: 429 twice", pull: []fault{{registrytest.Busy, 2, "GET", "/blobs/"}}},
		{name: "pull: 500 twice", pull: []fault{{registrytest.Fail, 2, "HEAD", "/manifests/"}}},
		{name: "pull: dropped twice", pull: []fault{{registrytest.Drop, 2, "GET", "/blobs/"}}},
		{name: "pull: breaks in the middle twice", pull: []fault{{registrytest.Truncate, 2, "GET", "/blobs/"}}},
		{name: "pull: ends early once", pull: []fault{{registrytest.Short, 1, "GET", "/blobs/"}}},
		{name: "pull: always ends early", pull: []fault{{registrytest.Short, 99, "GET", "/blobs/"}}, err: errAny},
		{name: "pull: one bit", pull: []fault{{registrytest.Corrupt, 1, "GET", "/blobs/"}}, err: registry.ErrCorrupt},
		{name: "pull: one bit of the manifest", pull: []fault{{registrytest.Corrupt, 1, "GET", "/manifests/"}}, err: registry.ErrCorrupt},
		{name: "pull: always 429", pull: []fault{{registrytest.Busy, 99, "", "/v2/"}}, err: registry.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			s := registrytest.Start(t, registrytest.Options{})
			r := newRegistry(t, registry.Options{})
			ref := s.Host + "/team/app:1"
			for _, f := range tc.push {
				s.Fault.Break(f.kind, f.n, f.method, f.part)
			}
			_, layer, want, err := image(ctx, t, r, ref)
			if tc.push != nil && tc.err != nil {
				check(t, err, tc.err)
				s.Fault.Heal()
				if _, _, err := r.Resolve(ctx, ref); tc.err != errAny && !errors.Is(err, registry.ErrNotFound) {
					t.Errorf("the tag is there after a failed push: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatalf("push: %v", err)
			}
			if left := s.Fault.Heal(); left != 0 {
				t.Fatalf("%d requests were not broken", left)
			}
			for _, f := range tc.pull {
				s.Fault.Break(f.kind, f.n, f.method, f.part)
			}
			_, m, err := r.Resolve(ctx, ref)
			if err == nil {
				_, err = r.FetchBytes(ctx, ref, m)
			}
			var b []byte
			if err == nil {
				b, err = r.FetchBytes(ctx, ref, layer)
			}
			if tc.err != nil {
				check(t, err, tc.err)
				return
			}
			if err != nil || !bytes.Equal(b, want) {
				t.Fatalf("pull: %d bytes, %v", len(b), err)
			}
			if left := s.Fault.Heal(); left != 0 {
				t.Errorf("%d requests were not broken", left)
			}
		})
	}
}

// errAny stands for an error without a class.
var errAny = errors.New("any")

func check(t *testing.T, err, want error) {
	t.Helper()
	if err == nil || want != errAny && !errors.Is(err, want) {
		t.Fatalf("error = %v, want %v", err, want)
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
	t.Log(err)
}

func TestErrorsSayWhatToDo(t *testing.T) {
	ctx := context.Background()
	basic := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret"})
	token := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret", Token: true, AnonymousPull: true})
	tls := registrytest.Start(t, registrytest.Options{TLS: true})
	other := registrytest.Start(t, registrytest.Options{TLS: true})
	certs := other.CertDir(t) // an authority for tls.Host that is not tls's
	if err := os.Rename(filepath.Join(certs, other.Host), filepath.Join(certs, tls.Host)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(certs, tls.Host, "ca.crt"), otherCA(t), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	if err := os.Mkdir(filepath.Join(certs, token.Host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(certs, token.Host, "ca.crt"), otherCA(t), 0o644); err != nil {
		t.Fatal(err)
	}
	tomls := t.TempDir()
	if err := os.Mkdir(filepath.Join(tomls, basic.Host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tomls, basic.Host, "hosts.toml"), []byte("server = "), 0o644); err != nil {
		t.Fatal(err)
	}

	for _, tc := range []struct {
		name string
		opts registry.Options
		do   func(*registry.Registry) error
		is   error
		says []string
	}{
		{
			"no password",
			registry.Options{},
			resolve(basic.Host + "/a:1"), registry.ErrUnauthorized,
			[]string{"pull " + basic.Host + "/a:1", "wants a user name and password", "slipway login " + basic.Host},
		},
		{
			"wrong password",
			registry.Options{Credentials: as("mia", "no")},
			resolve(basic.Host + "/a:1"), registry.ErrUnauthorized,
			[]string{"does not accept the user name or password", "slipway login " + basic.Host},
		},
		{
			"wrong password, token",
			registry.Options{Credentials: as("mia", "no")},
			resolve(token.Host + "/a:1"), registry.ErrUnauthorized,
			[]string{"does not accept the user name or password"},
		},
		{"anonymous push", registry.Options{}, func(r *registry.Registry) error {
			_, _, _, err := image(ctx, t, r, token.Host+"/a:1")
			return err
		}, registry.ErrUnauthorized, []string{"push " + token.Host + "/a:1", "slipway login"}},
		{
			"no such image",
			registry.Options{Credentials: as("mia", "s3cret")},
			resolve(basic.Host + "/no:such"), registry.ErrNotFound,
			[]string{"/no:such", "not found", "check the name"},
		},
		{
			"nobody there",
			registry.Options{},
			resolve(closed + "/a"), registry.ErrUnreachable,
			[]string{"nothing answers at " + closed, "is the registry running"},
		},
		{
			"no such host",
			registry.Options{},
			resolve("registry.invalid/a"), registry.ErrUnreachable,
			[]string{"registry.invalid"},
		},
		{
			"wrong authority",
			registry.Options{CertDirs: []string{certs}},
			resolve(tls.Host + "/a"), registry.ErrUnreachable,
			[]string{"is not trusted", "/etc/docker/certs.d/" + tls.Host},
		},
		{
			"plain HTTP where an authority is configured",
			registry.Options{CertDirs: []string{certs}},
			resolve(token.Host + "/a"), registry.ErrUnreachable,
			[]string{"speaks plain HTTP"},
		},
		{
			"settings that cannot be read",
			registry.Options{CertDirs: []string{tomls}},
			resolve(basic.Host + "/a"), nil,
			[]string{"registry settings for " + basic.Host, "hosts.toml"},
		},
		{"bad name", registry.Options{}, resolve("host.invalid/UPPER"), nil, []string{"host.invalid/UPPER", "lowercase"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.do(newRegistry(t, tc.opts))
			if err == nil || tc.is != nil && !errors.Is(err, tc.is) {
				t.Fatalf("error = %v, want %v", err, tc.is)
			}
			for _, s := range tc.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			t.Log(err)
		})
	}
}

func resolve(ref string) func(*registry.Registry) error {
	return func(r *registry.Registry) error {
		_, _, err := r.Resolve(context.Background(), ref)
		return err
	}
}

func TestCancel(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	s.Fault.Break(registrytest.Gone, 1000, "", "/")
	why := errors.New("the user pressed Ctrl-C")
	ctx, cancel := context.WithCancelCause(context.Background())
	r := newRegistry(t, registry.Options{Wait: func(ctx context.Context, _ time.Duration) error {
		cancel(why)
		return context.Cause(ctx)
	}})
	if _, _, err := r.Resolve(ctx, s.Host+"/a"); !errors.Is(err, why) {
		t.Errorf("Resolve: %v", err)
	}
	desc, b := blobOf(t, 10)
	if err := r.Push(ctx, s.Host+"/a", desc, opener(b), nil); !errors.Is(err, why) {
		t.Errorf("Push: %v", err)
	}
}

func TestTokensAreNotShared(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret", Token: true})
	r := newRegistry(t, registry.Options{})
	mia := r.With(as("mia", "s3cret"))
	if _, _, _, err := image(ctx, t, mia, s.Host+"/a:1"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Resolve(ctx, s.Host+"/a:1"); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("without credentials, after another had them: %v", err)
	}
}
