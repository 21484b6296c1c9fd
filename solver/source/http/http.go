// SPDX-License-Identifier: Apache-2.0

// Package http is the source of files at http:// and https:// addresses: ADD https://…. Its pin is the digest of the
// bytes, so a file is fetched before anything that needs it is looked up. The server is asked first whether the file
// has changed since the last time; when it has not, and the bytes are still in the blob store, nothing is fetched. Only an
// ETag tells: a time of change has whole seconds, and for many servers any earlier one means "not changed", that of an older
// file put in the place of a newer one too.
package http

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Schemes are the schemes of the identifiers, which are the addresses.
var Schemes = []string{"http", "https"}

// The secrets that are asked for when a source names none: a whole Authorization header, or a bearer token, for a host.
const (
	AuthHeaderSecret = "HTTP_AUTH_HEADER_"
	AuthTokenSecret  = "HTTP_AUTH_TOKEN_"
)

const (
	bucket       = "http" // of record values
	userAgent    = "slipway"
	maxRedirects = 10
	// answerTimeout is how long a server may take to begin its answer; the body may take any time.
	answerTimeout = 2 * time.Minute
)

// Deps is what the source works with.
type Deps struct {
	Layers  *layer.Store
	Blobs   *blob.Store
	Records *record.Store
	// Transport makes the requests; nil means Go's default with the proxy settings of the environment.
	Transport http.RoundTripper
}

// New returns the function that makes sources of vertices.
func New(deps Deps) func(*solver.Vertex) (solver.Source, error) {
	if deps.Transport == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.ResponseHeaderTimeout = answerTimeout
		deps.Transport = t
	}
	client := &http.Client{
		Transport: deps.Transport,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) >= maxRedirects {
				return fmt.Errorf("stopped after %d redirects", maxRedirects)
			}
			if !mayKnow(via[0].URL, req.URL) {
				req.Header.Del("Authorization")
			}
			return nil
		},
	}
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		u, err := url.Parse(op.GetIdentifier())
		if err != nil {
			return nil, fmt.Errorf("source: %w", err)
		}
		if u.Host == "" || !slices.Contains(Schemes, u.Scheme) {
			return nil, fmt.Errorf("source %s: not an http address", u.Redacted())
		}
		s := &source{deps: deps, client: client, url: u, perm: 0o600, header: map[string]string{}}
		for _, key := range slices.Sorted(maps.Keys(op.Attrs)) {
			if err := s.attr(key, op.Attrs[key]); err != nil {
				return nil, fmt.Errorf("source %s: attribute %s: %w", u.Redacted(), key, err)
			}
		}
		return s, nil
	}
}

// mayKnow says whether what authorizes requests for one address may be sent to another, to which its server has redirected us: the same
// server, and not without TLS if there was TLS. (Go's client asks only for the host's name, or one below it.)
func mayKnow(from, to *url.URL) bool {
	if from.Scheme == "http" && to.Scheme == "https" && from.Port() == "" && to.Port() == "" {
		return from.Hostname() == to.Hostname()
	}
	return from.Scheme == to.Scheme && from.Host == to.Host
}

type source struct {
	deps       Deps
	client     *http.Client
	url        *url.URL
	checksum   digest.Digest
	filename   string
	perm       uint32
	uid, gid   uint32
	authSecret string
	header     map[string]string

	mu     sync.Mutex // guards pinned
	pinned *resource
}

// resource is what an address had when it was asked last. It is remembered as JSON.
type resource struct {
	Digest       digest.Digest `json:"digest"` // sha256, of the bytes
	Size         int64         `json:"size"`
	Filename     string        `json:"filename"`
	ETag         string        `json:"etag,omitempty"`
	LastModified string        `json:"last_modified,omitempty"`
	// Checksums are other digests that the bytes were found to have.
	Checksums []digest.Digest `json:"checksums,omitempty"`
}

func (s *source) attr(key, value string) error {
	number := func(to *uint32, limit uint64) error {
		n, err := strconv.ParseUint(value, 0, 32)
		if err != nil || n > limit {
			return fmt.Errorf("invalid number %q", value)
		}
		*to = uint32(n)
		return nil
	}
	switch key {
	case pb.AttrHTTPChecksum:
		d, err := digest.Parse(value)
		s.checksum = d
		return err
	case pb.AttrHTTPFilename:
		s.filename = value
	case pb.AttrHTTPPerm:
		if err := number(&s.perm, 0o7777); err != nil {
			return err
		}
		if s.perm == 0 {
			s.perm = 0o600
		}
	case pb.AttrHTTPUID:
		return number(&s.uid, 1<<32-2)
	case pb.AttrHTTPGID:
		return number(&s.gid, 1<<32-2)
	case pb.AttrHTTPAuthHeaderSecret:
		s.authSecret = value
	default:
		name, ok := strings.CutPrefix(key, pb.AttrHTTPHeaderPrefix)
		name = http.CanonicalHeaderKey(name)
		if !ok || name != "Accept" && name != "User-Agent" {
			return fmt.Errorf("not supported yet: %s", value)
		}
		s.header[name] = value
	}
	return nil
}

// Parts names the file that is asked for; which one it is now is in the pin.
func (s *source) Parts() []record.Part {
	p := []record.Part{
		{Name: "op", Value: "http"},
		{Name: "owner", Value: fmt.Sprintf("%d:%d", s.uid, s.gid)},
		{Name: "mode", Value: fmt.Sprintf("%#o", s.perm)},
	}
	if s.filename != "" {
		p = append(p, record.Part{Name: "file name", Value: s.filename})
	}
	if s.authSecret != "" {
		p = append(p, record.Part{Name: "authorization", Value: "secret " + s.authSecret})
	}
	for _, name := range slices.Sorted(maps.Keys(s.header)) {
		p = append(p, record.Part{Name: "header " + name, Value: s.header[name]})
	}
	return p
}

// InputDigest is never asked: a source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("%s has no inputs", s.url.Redacted())
}

// Pin finds out what the address has now. With a checksum nobody is asked.
func (s *source) Pin(ctx context.Context, env *solver.Env) (solver.Pin, error) {
	if s.checksum != "" {
		return solver.Pin{Resolved: s.checksum.String(), Parts: []record.Part{
			{Name: "checksum", Value: s.checksum.String()},
			{Name: "name", Value: s.name(nil)},
		}}, nil
	}
	s.mu.Lock()
	s.pinned = nil // of an earlier build, should there have been one
	s.mu.Unlock()
	r, err := s.current(ctx, env)
	if err != nil {
		return solver.Pin{}, err
	}
	parts := []record.Part{
		{Name: "digest", Value: r.Digest.String()},
		{Name: "name", Value: r.Filename},
	}
	if r.LastModified != "" {
		parts = append(parts, record.Part{Name: "last modified", Value: r.LastModified})
	}
	return solver.Pin{Parts: parts, Resolved: r.Digest.String()}, nil
}

// Run makes a snapshot with the file.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	s.mu.Lock()
	r := s.pinned
	s.mu.Unlock()
	if r == nil || !s.deps.Blobs.Has(r.Digest) {
		var err error
		if r, err = s.forRun(ctx, env); err != nil {
			return nil, err
		}
	}
	e := index.Entry{
		Path:   r.Filename,
		Type:   index.File,
		Mode:   s.perm,
		UID:    s.uid,
		GID:    s.gid,
		Size:   r.Size,
		Digest: r.Digest,
		Offset: -1,
	}
	if t, err := http.ParseTime(r.LastModified); err == nil {
		e.ModTime = t.UnixNano()
	}
	draft := s.deps.Layers.NewDraft(nil)
	draft.Put(e, func() (io.ReadCloser, error) {
		b, err := s.deps.Blobs.Open(r.Digest)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(b, 0, b.Size()), b}, nil
	})
	id, err := draft.Commit(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.url.Redacted(), err)
	}
	return []snapshot.Snapshot{{id}}, nil
}

// DescribePin implements solver.PinDescriber. The bytes come along, and are not fetched again in this build.
func (s *source) DescribePin(ctx context.Context, env *solver.Env) (solver.PinDescription, error) {
	r, err := s.current(ctx, env)
	if err != nil {
		return solver.PinDescription{}, err
	}
	d := solver.PinDescription{Digest: r.Digest, Filename: r.Filename}
	if t, err := http.ParseTime(r.LastModified); err == nil {
		d.LastModified = &t
	}
	return d, nil
}

// PinDigest implements solver.PinHasher.
func (s *source) PinDigest(ctx context.Context, env *solver.Env, algorithm digest.Algorithm, suffix []byte) (digest.Digest, error) {
	r, err := s.current(ctx, env)
	if err != nil {
		return "", err
	}
	b, err := s.deps.Blobs.Open(r.Digest)
	if err != nil {
		return "", fmt.Errorf("%s: %w", s.url.Redacted(), err)
	}
	defer b.Close()
	digester := algorithm.Digester()
	if _, err := io.Copy(digester.Hash(), io.NewSectionReader(b, 0, b.Size())); err != nil {
		return "", fmt.Errorf("hash %s: %w", s.url.Redacted(), err)
	}
	digester.Hash().Write(suffix)
	return digester.Digest(), nil
}

// forRun gets the bytes: those that were there before when they have the checksum, else from the server. When the
// pin has gone into a key already, it must still be right.
func (s *source) forRun(ctx context.Context, env *solver.Env) (*resource, error) {
	if s.checksum != "" {
		if old := s.remembered(); old != nil && (old.Digest == s.checksum || slices.Contains(old.Checksums, s.checksum)) {
			return old, nil
		}
	}
	s.mu.Lock()
	pinned := s.pinned
	if s.uploaded() && pinned != nil {
		s.mu.Unlock()
		return pinned, nil // the client sends it once
	}
	s.pinned = nil
	s.mu.Unlock()
	r, err := s.current(ctx, env)
	if err != nil {
		return nil, err
	}
	if pinned != nil && pinned.Digest != r.Digest {
		return nil, fmt.Errorf("%s has changed during the build: it was %s and is %s", s.url.Redacted(), pinned.Digest, r.Digest)
	}
	return r, nil
}

// current asks the server for the file, unless this build has already.
func (s *source) current(ctx context.Context, env *solver.Env) (*resource, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pinned != nil {
		return s.pinned, nil
	}
	r, err := s.fetch(ctx, env)
	if err != nil {
		// The address may carry a password, and net/http's errors the address.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		return nil, fmt.Errorf("fetch %s: %w", s.url.Redacted(), err)
	}
	s.pinned = r
	return r, nil
}

// key is under which the resource is remembered: what the request and the file's name depend on.
func (s *source) key() string {
	b, _ := json.Marshal([]any{s.url.String(), s.authSecret, s.header, s.filename, s.checksum != ""})
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// remembered is what the address had last, if its bytes are still here.
func (s *source) remembered() *resource {
	b, ok, err := s.deps.Records.GetValue(bucket, s.key())
	if err != nil || !ok {
		return nil
	}
	var r resource
	if json.Unmarshal(b, &r) != nil || r.Digest.Validate() != nil || !s.deps.Blobs.Has(r.Digest) {
		return nil
	}
	r.Filename = safeName(r.Filename)
	return &r
}

func (s *source) fetch(ctx context.Context, env *solver.Env) (*resource, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", userAgent)
	for name, value := range s.header {
		req.Header.Set(name, value)
	}
	if err := s.authorize(ctx, env, req); err != nil {
		return nil, err
	}
	old := s.remembered()
	if old != nil && (s.checksum != "" || old.ETag == "") {
		old = nil
	}
	if old != nil {
		req.Header.Set("If-None-Match", old.ETag)
	}
	var resp *http.Response
	if s.uploaded() {
		resp, err = s.upload(ctx, env)
	} else {
		resp, err = s.client.Do(req)
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotModified && old != nil:
		return old, nil
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return nil, fmt.Errorf("the server answered %s", resp.Status)
	}
	r, err := s.save(ctx, env, resp)
	if err != nil {
		return nil, err
	}
	if s.uploaded() {
		return r, nil // nobody will ask for this address again
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return r, s.deps.Records.PutValue(bucket, s.key(), b)
}

// sessionHost is the host of addresses that lead to the build's own client: it sends what it has promised under the path.
const sessionHost = "buildkit-session"

func (s *source) uploaded() bool { return s.url.Host == sessionHost }

func (s *source) upload(ctx context.Context, env *solver.Env) (*http.Response, error) {
	session, ok := env.Session.(solver.Uploader)
	if !ok {
		return nil, errors.New("the client has no session to send files")
	}
	body, err := session.Upload(ctx, s.url)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: body, ContentLength: -1}, nil
}

// save streams the body into the blob store.
func (s *source) save(ctx context.Context, env *solver.Env, resp *http.Response) (*resource, error) {
	w, err := s.deps.Blobs.Writer(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	to := []io.Writer{w}
	var other digest.Digester // for a checksum of another kind than the store's
	if s.checksum != "" && s.checksum.Algorithm() != digest.Canonical {
		other = s.checksum.Algorithm().Digester()
		to = append(to, other.Hash())
	}
	status := "downloading " + s.url.Redacted()
	p := &progress{env: env, id: status, total: max(resp.ContentLength, 0)}
	n, err := io.Copy(io.MultiWriter(append(to, p)...), resp.Body)
	env.Progress.Status(status, n, p.total, true)
	if err != nil {
		return nil, err
	}
	got := w.Digest()
	if other != nil {
		got = other.Digest()
	}
	if s.checksum != "" && got != s.checksum {
		return nil, fmt.Errorf("digest mismatch: got %s, expected %s", got, s.checksum)
	}
	if err := w.Commit(n, w.Digest()); err != nil {
		return nil, err
	}
	r := &resource{
		Digest:       w.Digest(),
		Size:         n,
		Filename:     s.name(resp),
		ETag:         resp.Header.Get("ETag"),
		LastModified: resp.Header.Get("Last-Modified"),
	}
	if _, err := http.ParseTime(r.LastModified); err != nil {
		r.LastModified = ""
	}
	if other != nil {
		r.Checksums = []digest.Digest{got}
	}
	return r, nil
}

type progress struct {
	env      *solver.Env
	id       string
	n, shown int64
	total    int64
}

func (p *progress) Write(b []byte) (int, error) {
	p.n += int64(len(b))
	if p.n-p.shown >= 1<<20 {
		p.shown = p.n
		p.env.Progress.Status(p.id, p.n, p.total, false)
	}
	return len(b), nil
}

// authorize adds the Authorization header that the client has for the source or its host.
func (s *source) authorize(ctx context.Context, env *solver.Env, req *http.Request) error {
	secret := func(name string) (string, error) {
		if env.Session == nil {
			return "", solver.ErrNotFound
		}
		b, err := env.Session.Secret(ctx, name)
		return string(b), err
	}
	if s.authSecret != "" {
		v, err := secret(s.authSecret)
		if err != nil {
			return fmt.Errorf("secret %s: %w", s.authSecret, err)
		}
		req.Header.Set("Authorization", v)
		return nil
	}
	for _, known := range []struct{ secret, prefix string }{{AuthTokenSecret, "Bearer "}, {AuthHeaderSecret, ""}} {
		v, err := secret(known.secret + s.url.Hostname())
		if errors.Is(err, solver.ErrNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("secret %s: %w", known.secret+s.url.Hostname(), err)
		}
		req.Header.Set("Authorization", known.prefix+v)
		return nil
	}
	return nil
}

// name is the file's name: the one asked for, the one that the server says, or the address's last component. With
// a checksum it is fixed before the server is asked, and the server's word does not count.
func (s *source) name(resp *http.Response) string {
	if s.filename != "" {
		return safeName(s.filename)
	}
	if resp != nil && s.checksum == "" {
		_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Disposition"))
		if name := params["filename"]; err == nil && name != "" && !strings.HasSuffix(name, "/") {
			return safeName(name)
		}
	}
	return safeName(path.Base(s.url.Path))
}

// safeName is the last component of name when it can be a file's name, and "download" otherwise.
func safeName(name string) string {
	name = path.Base(strings.TrimSpace(name))
	if name == "." || name == ".." || name == "/" || strings.ContainsFunc(name, unicode.IsControl) {
		return "download"
	}
	return name
}
