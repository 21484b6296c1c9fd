// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

func ptr[T any](v T) *T { return &v }

// pull resolves ref and reads its manifest.
func pull(r *registry.Registry, ref string) error {
	ctx := context.Background()
	name, desc, err := r.Resolve(ctx, ref)
	if err != nil {
		return err
	}
	_, err = r.FetchBytes(ctx, name, desc)
	return err
}

// seed puts an image into a registry. Its content is the same each time only within one call for several registries.
func seed(t *testing.T, refs ...string) {
	t.Helper()
	for _, ref := range refs {
		if _, _, _, err := image(context.Background(), t, newRegistry(t, registry.Options{}), ref); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMirrors(t *testing.T) {
	const origin = "origin.invalid:5000"
	gone := httptest.NewServer(nil)
	gone.Close()
	down := strings.TrimPrefix(gone.URL, "http://")

	t.Run("a mirror is asked instead of the registry", func(t *testing.T) {
		mirror := registrytest.Start(t, registrytest.Options{})
		seed(t, mirror.Host+"/team/app:1")
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{origin: {Mirrors: []string{mirror.Host}}}})
		if err := pull(r, origin+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("mirrors that are down or do not have it are passed over", func(t *testing.T) {
		empty, itself := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
		seed(t, itself.Host+"/team/app:1")
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{itself.Host: {Mirrors: []string{down, empty.Host}}}})
		if err := pull(r, itself.Host+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		if len(empty.Requests("/v2/team/app/manifests/1")) == 0 {
			t.Error("the second mirror was not asked")
		}
	})
	t.Run("a path", func(t *testing.T) {
		mirror := registrytest.Start(t, registrytest.Options{})
		seed(t, mirror.Host+"/proxy/hub/team/app:1")
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{origin: {Mirrors: []string{mirror.Host + "/proxy/hub"}}}})
		if err := pull(r, origin+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		// A registry that several are mirrored by must be told which one is meant.
		if len(mirror.Requests("ns="+url.QueryEscape(origin))) == 0 {
			t.Errorf("no request names the registry: %q", mirror.Requests("GET"))
		}
	})
	t.Run("a push goes to the registry itself", func(t *testing.T) {
		mirror, itself := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{itself.Host: {Mirrors: []string{mirror.Host}}}})
		if _, _, _, err := image(context.Background(), t, r, itself.Host+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		if got := append(mirror.Requests("POST"), mirror.Requests("PUT")...); len(got) > 0 {
			t.Errorf("pushed to the mirror: %q", got)
		}
	})
	t.Run("not a host", func(t *testing.T) {
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{origin: {Mirrors: []string{":/"}}}})
		if err := pull(r, origin+"/a"); err == nil || !strings.Contains(err.Error(), `mirror ":/"`) {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("all fail", func(t *testing.T) {
		empty := registrytest.Start(t, registrytest.Options{})
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{empty.Host: {Mirrors: []string{down}}}})
		if err := pull(r, empty.Host+"/a:1"); !errors.Is(err, registry.ErrNotFound) && !errors.Is(err, registry.ErrUnreachable) {
			t.Errorf("error = %v", err)
		}
	})
}

func TestHostSettings(t *testing.T) {
	tls, plain := registrytest.Start(t, registrytest.Options{TLS: true}), registrytest.Start(t, registrytest.Options{})
	seed(t, tls.Host+"/a:1", plain.Host+"/a:1")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, tls.CA, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		host *registrytest.Server
		set  registry.Host
		want string // of the error
	}{
		{"its authority", tls, registry.Host{CAs: []string{ca}}, ""},
		{"a directory of authorities", tls, registry.Host{TLSDirs: []string{filepath.Join(tls.CertDir(t), tls.Host)}}, ""},
		{"TLS only, nobody vouches", tls, registry.Host{HTTP: ptr(false)}, "not trusted"},
		{"insecure", tls, registry.Host{HTTP: ptr(false), Insecure: ptr(true)}, ""},
		{"insecure and http: TLS", tls, registry.Host{HTTP: ptr(true), Insecure: ptr(true)}, ""},
		{"insecure and http: plain", plain, registry.Host{HTTP: ptr(true), Insecure: ptr(true)}, ""},
		{"plain HTTP", plain, registry.Host{HTTP: ptr(true)}, ""},
		{"TLS only, but it speaks plain HTTP", plain, registry.Host{HTTP: ptr(false)}, "plain HTTP"},
		{"plain HTTP, but it speaks TLS", tls, registry.Host{HTTP: ptr(true)}, "400"},
		{"no such authority", tls, registry.Host{CAs: []string{"/no/such.pem"}}, "/no/such.pem"},
		{"no such client certificate", tls, registry.Host{KeyPairs: []registry.KeyPair{{Key: "/no/key.pem", Cert: "/no/cert.pem"}}}, "/no/cert.pem"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{tc.host.Host: tc.set}})
			err := pull(r, tc.host.Host+"/a:1")
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error = %v, want %q", err, tc.want)
			}
		})
	}
}

func hostsToml(t *testing.T, dir, host, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, host), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestHostsToml(t *testing.T) {
	const origin = "origin.invalid:5000"
	t.Run("mirrors, settings and fall-back", func(t *testing.T) {
		dir := t.TempDir()
		empty := registrytest.Start(t, registrytest.Options{})
		mirror := registrytest.Start(t, registrytest.Options{TLS: true})
		seed(t, mirror.Host+"/team/app:1")
		if err := os.MkdirAll(filepath.Join(dir, "origin.invalid_5000_"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "origin.invalid_5000_", "mirror.crt"), mirror.CA, 0o600); err != nil {
			t.Fatal(err)
		}
		hostsToml(t, dir, "origin.invalid_5000_", fmt.Sprintf("server = \"https://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n"+
			"[host.\"https://%s\"]\nca = \"mirror.crt\"\n[host.\"https://%s\".header]\nx-test = \"yes\"\n", origin, empty.Host, mirror.Host, mirror.Host))
		r := newRegistry(t, registry.Options{CertDirs: []string{dir}})
		if err := pull(r, origin+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		if len(empty.Requests("/v2/team/app/")) == 0 {
			t.Error("the first mirror was not asked")
		}
	})
	t.Run("credentials and headers", func(t *testing.T) {
		dir := t.TempDir()
		mirror := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret", Token: true})
		if _, _, _, err := image(context.Background(), t, newRegistry(t, registry.Options{Credentials: as("mia", "s3cret")}), mirror.Host+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		target, _ := url.Parse("http://" + mirror.Host)
		seen := ""
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if h := r.Header.Get("X-Test"); h != "" {
				seen = h
			}
			httputil.NewSingleHostReverseProxy(target).ServeHTTP(w, r)
		}))
		defer proxy.Close()
		hostsToml(t, dir, origin, fmt.Sprintf("[host.%q]\n[host.%q.header]\nx-test = \"yes\"\n", proxy.URL, proxy.URL))
		r := newRegistry(t, registry.Options{CertDirs: []string{dir}, Credentials: as("mia", "s3cret")})
		if err := pull(r, origin+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		if seen != "yes" {
			t.Error("the mirror did not get its header")
		}
	})
	t.Run("who takes pushes", func(t *testing.T) {
		dir := t.TempDir()
		mirror, itself := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
		hostsToml(t, dir, origin, fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", itself.Host, mirror.Host))
		r := newRegistry(t, registry.Options{CertDirs: []string{dir}})
		if _, _, _, err := image(context.Background(), t, r, origin+"/team/app:1"); err != nil {
			t.Fatal(err)
		}
		if len(mirror.Requests("POST")) > 0 || len(itself.Requests("PUT")) == 0 {
			t.Error("pushed to the wrong one")
		}
	})
	t.Run("the settings of the engine come first", func(t *testing.T) {
		dir := t.TempDir()
		itself := registrytest.Start(t, registrytest.Options{})
		seed(t, itself.Host+"/a:1")
		hostsToml(t, dir, itself.Host, "server = \"https://nowhere.invalid\"\n")
		r := newRegistry(t, registry.Options{CertDirs: []string{dir}, Hosts: map[string]registry.Host{itself.Host: {}}})
		if err := pull(r, itself.Host+"/a:1"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("for all others", func(t *testing.T) {
		dir := t.TempDir()
		mirror := registrytest.Start(t, registrytest.Options{})
		seed(t, mirror.Host+"/a:1")
		hostsToml(t, dir, "_default", fmt.Sprintf("[host.\"http://%s\"]\n", mirror.Host))
		if err := pull(newRegistry(t, registry.Options{CertDirs: []string{dir}}), origin+"/a:1"); err != nil {
			t.Fatal(err)
		}
	})
	for name, text := range map[string]string{
		"not TOML": "server = ", "wrong capability": "capabilities = [\"fly\"]", "no such authority": "ca = \"missing.crt\"",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			hostsToml(t, dir, origin, text)
			err := pull(newRegistry(t, registry.Options{CertDirs: []string{dir}}), origin+"/a:1")
			if err == nil || !strings.Contains(err.Error(), "hosts.toml") {
				t.Errorf("error = %v", err)
			}
		})
	}
}

func TestMaxConnsPerHost(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	seed(t, s.Host+"/a:1")
	target, _ := url.Parse("http://" + s.Host)
	var mu sync.Mutex
	open, most := 0, 0
	proxy := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(20 * time.Millisecond) // so that the others come meanwhile, if they may
		httputil.NewSingleHostReverseProxy(target).ServeHTTP(w, r)
	}))
	proxy.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		switch state {
		case http.StateNew:
			open++
			most = max(most, open)
		case http.StateClosed:
			open--
		}
	}
	proxy.Start()
	defer proxy.Close()
	host := strings.TrimPrefix(proxy.URL, "http://")
	plain := map[string]registry.Host{host: {HTTP: ptr(true)}}
	for _, limit := range []int{1, 0} {
		mu.Lock()
		most = open
		before := open
		mu.Unlock()
		r := newRegistry(t, registry.Options{MaxConnsPerHost: limit, Hosts: plain})
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				if err := pull(r, host+"/a:1"); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		mu.Lock()
		used := most - before
		mu.Unlock()
		if limit == 1 && used != 1 || limit == 0 && used < 2 {
			t.Errorf("limit %d: %d connections at once", limit, used)
		}
	}
}
