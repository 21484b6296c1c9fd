// SPDX-License-Identifier: Apache-2.0

// Package registrytest serves a real registry (distribution/distribution, in memory) on loopback for tests, with
// and without TLS, basic and token authentication, and with a Fault in front that breaks what it is told to.
package registrytest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd" // for Options.User
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // for Options.Dir
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"   // its storage
	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/bcrypt"
)

// Options say what kind of registry is wanted.
type Options struct {
	// User and Password must be given by clients when set.
	User, Password string
	// Token makes the registry want bearer tokens, which its token server gives to User; anonymous clients get
	// tokens to pull when AnonymousPull is set.
	Token         bool
	AnonymousPull bool
	// TokenUses is after how many requests the registry calls a token expired; 0 means never.
	TokenUses int
	// TLS serves HTTPS with a certificate of an authority of its own.
	TLS bool
	// Dir keeps everything in files of this directory instead of in memory: blobs are docker/registry/v2/blobs/sha256/XX/HEX/data.
	Dir string
	// Wrap, if set, is around the registry: it sees every request first.
	Wrap func(registry http.Handler) http.Handler
}

// Server is a running registry.
type Server struct {
	// Host is its host:port on loopback.
	Host string
	// CA is the PEM of the authority that vouches for it (TLS).
	CA []byte
	// Fault breaks requests.
	Fault *Fault

	mu       sync.Mutex // guards what follows
	requests []string
	ranges   []string
}

// Start serves a registry until the test ends.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	quiet.Do(func() { logrus.SetLevel(logrus.PanicLevel) }) // the registry's access log

	conf := &configuration.Configuration{Storage: configuration.Storage{
		"inmemory": nil,
		"delete":   configuration.Parameters{"enabled": true},
	}}
	if opts.Dir != "" {
		delete(conf.Storage, "inmemory")
		conf.Storage["filesystem"] = configuration.Parameters{"rootdirectory": opts.Dir}
	}
	conf.Catalog.MaxEntries = 100
	conf.HTTP.Secret = "test"
	conf.Log.AccessLog.Disabled = true
	if opts.User != "" && !opts.Token {
		hash, err := bcrypt.GenerateFromPassword([]byte(opts.Password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "htpasswd")
		if err := os.WriteFile(path, []byte(opts.User+":"+string(hash)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		conf.Auth = configuration.Auth{"htpasswd": {"realm": "test", "path": path}}
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var handler http.Handler = handlers.NewApp(ctx, conf)

	s := &Server{Fault: &Fault{}}
	if opts.Token {
		handler = newTokenAuth(opts, handler)
	}
	handler = s.Fault.wrap(handler)
	if opts.Wrap != nil {
		handler = opts.Wrap(handler)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Method+" "+r.URL.RequestURI())
		if part := r.Header.Get("Range"); part != "" {
			s.ranges = append(s.ranges, part)
		}
		s.mu.Unlock()
		handler.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = discard
	if opts.TLS {
		srv.StartTLS()
		s.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	s.Host = u.Host
	return s
}

var quiet sync.Once

// Requests returns the requests so far ("GET /v2/…") whose text contains part, and forgets none.
func (s *Server) Requests(part string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []string
	for _, r := range s.requests {
		if strings.Contains(r, part) {
			found = append(found, r)
		}
	}
	return found
}

// Ranges returns the Range headers of the requests so far ("bytes=100-").
func (s *Server) Ranges() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ranges)
}

// Forget empties the lists of requests and of ranges.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests, s.ranges = nil, nil
}

// CertDir writes the authority where registry.Options.CertDirs looks for it and returns the directory.
func (s *Server) CertDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, s.Host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, s.Host, "ca.crt"), s.CA, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// tokenAuth is the bearer-token protocol of registries: a realm that gives tokens for scopes.
type tokenAuth struct {
	opts Options
	next http.Handler

	mu     sync.Mutex // guards tokens
	tokens map[string]*token
}

type token struct {
	scopes []string
	uses   int
}

func newTokenAuth(opts Options, next http.Handler) *tokenAuth {
	return &tokenAuth{opts: opts, next: next, tokens: map[string]*token{}}
}

func (a *tokenAuth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		a.give(w, r)
		return
	}
	want := scopeOf(r)
	reason := ""
	if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		if reason = a.check(bearer, want); reason == "" {
			a.next.ServeHTTP(w, r)
			return
		}
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	challenge := fmt.Sprintf(`Bearer realm="%s://%s/token",service="test"`, scheme, r.Host)
	if want != "" {
		challenge += fmt.Sprintf(`,scope=%q`, want)
	}
	if reason != "" {
		challenge += fmt.Sprintf(`,error=%q`, reason)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
}

// scopeOf is what a request needs: "repository:NAME:pull" or "…:pull,push".
func scopeOf(r *http.Request) string {
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok || rest == "" {
		return ""
	}
	name := rest
	for _, sep := range []string{"/blobs/", "/manifests/", "/tags/"} {
		if i := strings.Index(rest, sep); i >= 0 {
			name = rest[:i]
		}
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return "repository:" + name + ":pull"
	}
	return "repository:" + name + ":pull,push"
}

func (a *tokenAuth) check(bearer, want string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tokens[bearer]
	if t == nil {
		return "invalid_token"
	}
	if t.uses++; a.opts.TokenUses > 0 && t.uses > a.opts.TokenUses {
		return "invalid_token"
	}
	if want == "" {
		return ""
	}
	for _, s := range t.scopes {
		if s == want || s == strings.TrimSuffix(want, ":pull")+":pull,push" {
			return ""
		}
	}
	return "insufficient_scope"
}

func (a *tokenAuth) give(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	user, password, ok := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password, ok = r.PostForm.Get("username"), r.PostForm.Get("password"), true
	}
	known := ok && user == a.opts.User && password == a.opts.Password
	if ok && !known || !ok && !a.opts.AnonymousPull {
		http.Error(w, `{"details":"incorrect username or password"}`, http.StatusUnauthorized)
		return
	}
	var scopes []string
	for _, s := range r.Form["scope"] {
		for _, s := range strings.Fields(s) {
			if !known {
				s = strings.TrimSuffix(s, ",push")
			}
			if !slices.Contains(scopes, s) {
				scopes = append(scopes, s)
			}
		}
	}
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	value := hex.EncodeToString(b)
	a.mu.Lock()
	a.tokens[value] = &token{scopes: scopes}
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"token": value, "access_token": value, "expires_in": 3600, "issued_at": time.Now().UTC().Format(time.RFC3339),
	})
}
