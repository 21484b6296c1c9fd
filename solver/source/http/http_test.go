// SPDX-License-Identifier: Apache-2.0

package http

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

type session struct {
	solver.Session
	secrets map[string]string
}

func (s *session) Secret(_ context.Context, id string) ([]byte, error) {
	if v, ok := s.secrets[id]; ok {
		return []byte(v), nil
	}
	return nil, fmt.Errorf("secret %s: %w", id, solver.ErrNotFound)
}

type quiet struct{}

func (quiet) Log(int, []byte)                   {}
func (quiet) Warn(string)                       {}
func (quiet) Status(string, int64, int64, bool) {}

// server is a site with one file, which counts how often it sends it.
type server struct {
	*httptest.Server
	mu      sync.Mutex
	content string
	header  http.Header
	auth    string // what it wants
	sent    int
	seen    http.Header
	handler http.HandlerFunc // answers instead, if set
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = r.Header.Clone()
	if s.handler != nil {
		s.handler(w, r)
		return
	}
	if strings.HasPrefix(r.URL.Path, "/redirect/") {
		http.Redirect(w, r, "/files/real.txt", http.StatusFound)
		return
	}
	if r.URL.Path == "/loop" {
		http.Redirect(w, r, "/loop", http.StatusFound)
		return
	}
	if !strings.HasPrefix(r.URL.Path, "/files/") {
		http.NotFound(w, r)
		return
	}
	if s.auth != "" && r.Header.Get("Authorization") != s.auth {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	for k, v := range s.header {
		w.Header()[k] = v
	}
	if et := s.header.Get("ETag"); et != "" && r.Header.Get("If-None-Match") == et {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	s.sent++
	io.WriteString(w, s.content)
}

type fixture struct {
	t    *testing.T
	deps Deps
	snap *snapshot.Store
	site *server
	env  *solver.Env
}

func newFixture(t *testing.T) *fixture {
	dir := t.TempDir()
	layers, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { layers.Close() })
	snaps, err := snapshot.Open(filepath.Join(dir, "snapshots"), layers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(snaps.Close)
	blobs, err := blob.Open(filepath.Join(dir, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	records, err := record.Open(filepath.Join(dir, "records"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	site := &server{content: "hello", header: http.Header{}}
	site.Server = httptest.NewServer(site)
	t.Cleanup(site.Close)
	return &fixture{
		t: t, deps: Deps{Layers: layers, Blobs: blobs, Records: records}, snap: snaps, site: site,
		env: &solver.Env{Session: &session{}, Progress: quiet{}},
	}
}

func (f *fixture) source(path string, attrs map[string]string) (solver.Source, error) {
	return New(f.deps)(&solver.Vertex{Op: &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: f.site.URL + path, Attrs: attrs}}}})
}

// get pins and runs a source, and describes the one file of the result.
func (f *fixture) get(path string, attrs map[string]string) (file, pin string, err error) {
	f.t.Helper()
	s, err := f.source(path, attrs)
	if err != nil {
		return "", "", err
	}
	p, err := s.Pin(f.t.Context(), f.env)
	if err != nil {
		return "", "", err
	}
	out, err := s.Run(f.t.Context(), f.env, nil)
	if err != nil {
		return "", "", err
	}
	v, err := f.snap.View(f.t.Context(), out[0])
	if err != nil {
		f.t.Fatal(err)
	}
	entries := v.ReadDir("")
	if len(entries) != 1 || entries[0].Type != index.File {
		f.t.Fatalf("got %+v", entries)
	}
	e := entries[0]
	r, err := v.OpenFile(f.t.Context(), e.Path)
	if err != nil {
		f.t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		f.t.Fatal(err)
	}
	return fmt.Sprintf("%s %o %d:%d @%d =%s", e.Path, e.Mode, e.UID, e.GID, e.ModTime/1e9, b), fmt.Sprint(p.Parts), nil
}

func (f *fixture) want(path string, attrs map[string]string, want string, sent int) (pin string) {
	f.t.Helper()
	got, pin, err := f.get(path, attrs)
	if err != nil {
		f.t.Fatal(err)
	}
	if got != want {
		f.t.Errorf("got %q, want %q", got, want)
	}
	if f.site.sent != sent {
		f.t.Errorf("the file was sent %d times, want %d", f.site.sent, sent)
	}
	return pin
}

func TestHTTP(t *testing.T) {
	f := newFixture(t)
	pin := f.want("/files/a.txt?x=1", nil, "a.txt 600 0:0 @0 =hello", 1)
	if !strings.Contains(pin, digest.FromString("hello").String()) {
		t.Errorf("pin %s", pin)
	}
	f.site.header.Set("ETag", `"v1"`)
	f.site.header.Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
	pin = f.want("/files/a.txt?x=1", nil, "a.txt 600 0:0 @1136214245 =hello", 2)
	if again := f.want("/files/a.txt?x=1", nil, "a.txt 600 0:0 @1136214245 =hello", 2); again != pin {
		t.Errorf("unchanged, but pinned to %s and %s", pin, again)
	}
	f.site.content = "changed"
	f.site.header.Set("ETag", `"v2"`)
	if again := f.want("/files/a.txt?x=1", nil, "a.txt 600 0:0 @1136214245 =changed", 3); again == pin {
		t.Error("changed, but pinned to the same")
	}
	// A blob that is gone is fetched again.
	if err := f.deps.Blobs.Delete(digest.FromString("changed")); err != nil {
		t.Fatal(err)
	}
	f.want("/files/a.txt?x=1", nil, "a.txt 600 0:0 @1136214245 =changed", 4)
	f.site.header = http.Header{}
	f.want("/files/b", map[string]string{pb.AttrHTTPFilename: "x/name", pb.AttrHTTPPerm: "0755", pb.AttrHTTPUID: "3", pb.AttrHTTPGID: "4"},
		"name 755 3:4 @0 =changed", 5)
	f.site.header.Set("Content-Disposition", `attachment; filename="../../evil"`)
	f.want("/files/b", nil, "evil 600 0:0 @0 =changed", 6)
	f.site.header = http.Header{}
	f.want("/redirect/x", nil, "x 600 0:0 @0 =changed", 7)
	f.want("/files/", nil, "files 600 0:0 @0 =changed", 8)
}

// TestHTTPOlderFile: a file that is replaced by one with an earlier time, as a rollback does, is noticed, also when the
// server has no ETags and takes every time that is not later for "not changed", as Go's and Python's do.
func TestHTTPOlderFile(t *testing.T) {
	f := newFixture(t)
	times := map[string]time.Time{"new": time.Unix(2e9, 0), "old": time.Unix(1e9, 0), "the same second": time.Unix(1e9, 5e8)}
	f.site.handler = func(w http.ResponseWriter, r *http.Request) {
		f.site.sent++
		http.ServeContent(w, r, "file", times[f.site.content], strings.NewReader(f.site.content))
	}
	for i, content := range []string{"new", "old", "the same second"} {
		f.site.content = content
		f.want("/files/a", nil, fmt.Sprintf("a 600 0:0 @%d =%s", times[content].Unix(), content), i+1)
	}
}

// TestHTTPChecksumFixesName: with a checksum the name is known before the server is asked, and does not change with what it
// said to others.
func TestHTTPChecksumFixesName(t *testing.T) {
	f := newFixture(t)
	f.site.header.Set("Content-Disposition", `attachment; filename="said"`)
	f.site.header.Set("ETag", `"v1"`)
	f.want("/files/a", nil, "said 600 0:0 @0 =hello", 1)
	f.want("/files/a", map[string]string{pb.AttrHTTPChecksum: digest.FromString("hello").String()}, "a 600 0:0 @0 =hello", 2)
	f.want("/files/a", nil, "said 600 0:0 @0 =hello", 2)
}

func TestHTTPChecksum(t *testing.T) {
	f := newFixture(t)
	right := map[string]string{pb.AttrHTTPChecksum: digest.FromString("hello").String()}
	s, err := f.source("/files/a", right)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pin(t.Context(), f.env); err != nil || f.site.seen != nil {
		t.Errorf("pinning asked the server: %v", err)
	}
	f.want("/files/a", right, "a 600 0:0 @0 =hello", 1)
	f.want("/files/a", right, "a 600 0:0 @0 =hello", 1)
	long := map[string]string{pb.AttrHTTPChecksum: digest.SHA512.FromString("hello").String()}
	f.want("/files/b", long, "b 600 0:0 @0 =hello", 2)
	f.want("/files/b", long, "b 600 0:0 @0 =hello", 2)
	_, _, err = f.get("/files/c", map[string]string{pb.AttrHTTPChecksum: digest.FromString("other").String()})
	if err == nil || !strings.Contains(err.Error(), "digest mismatch") {
		t.Errorf("got %v", err)
	}
}

func TestHTTPAuth(t *testing.T) {
	f := newFixture(t)
	f.site.auth = "Bearer tok"
	if _, _, err := f.get("/files/a", nil); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("got %v", err)
	}
	f.env.Session = &session{secrets: map[string]string{"HTTP_AUTH_TOKEN_127.0.0.1": "tok"}}
	f.want("/files/a", nil, "a 600 0:0 @0 =hello", 1)
	f.env.Session = &session{secrets: map[string]string{"mine": "Bearer tok"}}
	f.want("/files/b", map[string]string{pb.AttrHTTPAuthHeaderSecret: "mine", pb.AttrHTTPHeaderPrefix + "accept": "text/x"}, "b 600 0:0 @0 =hello", 2)
	if got := f.site.seen.Get("Accept"); got != "text/x" {
		t.Errorf("Accept: %q", got)
	}
	_, _, err := f.get("/files/c", map[string]string{pb.AttrHTTPAuthHeaderSecret: "none"})
	if err == nil || !strings.Contains(err.Error(), "secret none") {
		t.Errorf("got %v", err)
	}
}

// TestHTTPAuthRedirected: what authorizes requests is for the server that the address names, and not for one that it names in turn.
func TestHTTPAuthRedirected(t *testing.T) {
	f := newFixture(t)
	f.env.Session = &session{secrets: map[string]string{"HTTP_AUTH_TOKEN_127.0.0.1": "tok"}}
	f.want("/redirect/x", nil, "x 600 0:0 @0 =hello", 1)
	if got := f.site.seen.Get("Authorization"); got != "Bearer tok" {
		t.Errorf("the same server gets %q", got)
	}
	front := httptest.NewServer(http.RedirectHandler(f.site.URL+"/files/real.txt", http.StatusFound))
	defer front.Close()
	behind := f.site.Server
	f.site.Server = front
	f.want("/x", nil, "x 600 0:0 @0 =hello", 2)
	f.site.Server = behind
	if got := f.site.seen.Get("Authorization"); got != "" {
		t.Errorf("another server gets %q", got)
	}
	for _, tt := range []struct {
		from, to string
		want     bool
	}{
		{"https://a/x", "https://a/y", true},
		{"https://a/x", "http://a/y", false},
		{"http://a/x", "https://a/y", true},
		{"http://a:1/x", "https://a:2/y", false},
		{"https://a/x", "https://b.a/y", false},
		{"https://a:1/x", "https://a:2/y", false},
	} {
		from, _ := url.Parse(tt.from)
		to, _ := url.Parse(tt.to)
		if got := mayKnow(from, to); got != tt.want {
			t.Errorf("mayKnow(%s, %s) = %v", from, to, got)
		}
	}
}

func TestHTTPErrors(t *testing.T) {
	f := newFixture(t)
	for path, want := range map[string]string{"/nope": "404", "/loop": "redirects"} {
		if _, _, err := f.get(path, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", path, err)
		}
	}
	u := strings.Replace(f.site.URL, "http://", "http://ann:hunter2@", 1)
	f.site.Close()
	s, err := New(f.deps)(&solver.Vertex{Op: &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: u + "/x"}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pin(t.Context(), f.env); err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("got %v", err)
	}
	for key, value := range map[string]string{pb.AttrHTTPSignatureVerify: "x", pb.AttrHTTPHeaderPrefix + "cookie": "x", "http.new": ""} {
		if _, err := f.source("/x", map[string]string{key: value}); err == nil || !strings.Contains(err.Error(), "not supported yet") {
			t.Errorf("%s: got %v", key, err)
		}
	}
	for _, attrs := range []map[string]string{{pb.AttrHTTPPerm: "99999"}, {pb.AttrHTTPUID: "-1"}, {pb.AttrHTTPChecksum: "md5:x"}} {
		if _, err := f.source("/x", attrs); err == nil {
			t.Errorf("%v is accepted", attrs)
		}
	}
}
