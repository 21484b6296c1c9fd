// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// clientCertificate makes one that vouches for itself, in DIR/client.cert and DIR/client.key.
func clientCertificate(t *testing.T, dir string) (pair registry.KeyPair, raw []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mia"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pair = registry.KeyPair{Cert: filepath.Join(dir, "client.cert"), Key: filepath.Join(dir, "client.key")}
	raw = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	err = errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(pair.Cert, raw, 0o600),
		os.WriteFile(pair.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return pair, raw
}

// TestClientCertificates: a registry that wants one gets it, wherever it is configured, and who has none is told.
func TestClientCertificates(t *testing.T) {
	behind := registrytest.Start(t, registrytest.Options{})
	seed(t, behind.Host+"/a:1")
	dir := t.TempDir()
	pair, raw := clientCertificate(t, filepath.Join(dir, "pair"))
	other, _ := clientCertificate(t, filepath.Join(dir, "other"))
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(raw)
	front := httptest.NewUnstartedServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: behind.Host}))
	front.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: trusted}
	front.Config.ErrorLog = log.New(io.Discard, "", 0) // of refused handshakes
	front.StartTLS()
	defer front.Close()
	host := strings.TrimPrefix(front.URL, "https://")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})

	// As docker and BuildKit have it: a directory for each registry.
	certs := filepath.Join(dir, "certs.d")
	clientDir := filepath.Join(certs, host)
	for _, name := range []string{"client.cert", "client.key"} {
		b, err := os.ReadFile(filepath.Join(dir, "pair", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.MkdirAll(clientDir, 0o700), os.WriteFile(filepath.Join(clientDir, name), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	caFile := filepath.Join(clientDir, "ca.crt")
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	toml := filepath.Join(dir, "toml")
	hostsToml(t, toml, host, fmt.Sprintf("server = %q\n[host.%q]\nca = %q\nclient = [[%q, %q]]\n", front.URL, front.URL, caFile, pair.Cert, pair.Key))

	with := func(h registry.Host) registry.Options {
		return registry.Options{Hosts: map[string]registry.Host{host: h}}
	}
	for _, tc := range []struct {
		name string
		opts registry.Options
		want string // of the error
	}{
		{"key pair", with(registry.Host{CAs: []string{caFile}, KeyPairs: []registry.KeyPair{pair}}), ""},
		{"directory of the registry", with(registry.Host{TLSDirs: []string{clientDir}}), ""},
		{"certs.d", registry.Options{CertDirs: []string{certs}}, ""},
		{"hosts.toml", registry.Options{CertDirs: []string{toml}}, ""},
		{"none", with(registry.Host{CAs: []string{caFile}, HTTP: ptr(false)}), "certificate required"},
		{"another", with(registry.Host{CAs: []string{caFile}, HTTP: ptr(false), KeyPairs: []registry.KeyPair{other}}), "tls:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := pull(newRegistry(t, tc.opts), host+"/a:1")
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error = %v, want %q", err, tc.want)
			}
		})
	}
}

// forwardProxy is an HTTP proxy that knows one name: it leads to host.
type forwardProxy struct {
	name, host string

	mu   sync.Mutex // guards seen
	seen []string
}

func (p *forwardProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.seen = append(p.seen, r.Method+" "+r.Host)
	p.mu.Unlock()
	if r.Host != p.name {
		http.Error(w, "unknown host "+r.Host, http.StatusBadGateway)
		return
	}
	if r.Method != http.MethodConnect {
		(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", p.host }}).ServeHTTP(w, r)
		return
	}
	to, err := net.Dial("tcp", p.host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer to.Close()
	from, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer from.Close()
	_, _ = io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(to, buffered)
		_ = to.Close()
	}()
	_, _ = io.Copy(from, to)
}

// TestProxy: registries are reached through the proxy that the environment names. The environment is read once in a process, so that each
// case is one.
func TestProxy(t *testing.T) {
	if ref := os.Getenv("SLIPWAY_TEST_PROXIED"); ref != "" {
		host := registry.Host{}
		if ca := os.Getenv("SLIPWAY_TEST_CA"); ca != "" {
			host.CAs = []string{ca}
		} else {
			host.HTTP = ptr(true)
		}
		name, _, _ := strings.Cut(ref, "/")
		r := newRegistry(t, registry.Options{Hosts: map[string]registry.Host{name: host}})
		if err := pull(r, ref+":1"); err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := image(context.Background(), t, r, ref+"/pushed:1"); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprint("TLS ", secure), func(t *testing.T) {
			server := registrytest.Start(t, registrytest.Options{TLS: secure})
			seedTLS(t, server, "/a:1")
			_, port, err := net.SplitHostPort(server.Host)
			if err != nil {
				t.Fatal(err)
			}
			proxy := &forwardProxy{name: "example.com:" + port, host: server.Host} // a name of the certificate
			front := httptest.NewServer(proxy)
			defer front.Close()
			cmd := exec.Command(os.Args[0], "-test.run=^TestProxy$", "-test.count=1")
			cmd.Env = append(os.Environ(), "SLIPWAY_TEST_PROXIED="+proxy.name+"/a", "HTTP_PROXY="+front.URL, "HTTPS_PROXY="+front.URL, "NO_PROXY=")
			want := "GET " + proxy.name
			if secure {
				ca := filepath.Join(t.TempDir(), "ca.pem")
				if err := os.WriteFile(ca, server.CA, 0o600); err != nil {
					t.Fatal(err)
				}
				cmd.Env = append(cmd.Env, "SLIPWAY_TEST_CA="+ca)
				want = "CONNECT " + proxy.name
			}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			proxy.mu.Lock()
			defer proxy.mu.Unlock()
			if !strings.Contains(strings.Join(proxy.seen, "\n"), want) {
				t.Errorf("the proxy has seen %q, want %q among that", proxy.seen, want)
			}
			if len(server.Requests("PUT /v2/a/pushed/manifests")) == 0 {
				t.Error("nothing was pushed")
			}
		})
	}
}

// seedTLS is seed for a registry that may have a certificate of its own authority.
func seedTLS(t *testing.T, s *registrytest.Server, ref string) {
	t.Helper()
	opts := registry.Options{}
	if s.CA != nil {
		opts.CertDirs = []string{s.CertDir(t)}
	}
	r := newRegistry(t, opts)
	if _, _, _, err := image(context.Background(), t, r, s.Host+ref); err != nil {
		t.Fatal(err)
	}
}
