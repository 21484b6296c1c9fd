// SPDX-License-Identifier: Apache-2.0

// Package registry is the remote blob store: it resolves names, fetches and pushes blobs and manifests over the
// OCI distribution API, logs in and out, and says in one line what went wrong.
//
// Nothing is believed: every body is checked against the digest and the size of its descriptor, in both
// directions. Requests that fail for a reason that may pass (a reset connection, 408, 429, 5xx) are tried again
// with a growing pause; a broken download goes on where it stopped. What is not here: what a manifest means
// (solver/source/image, exporter/registry) and where blobs are kept (cache/blob).
package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// Credentials returns the user and secret for a registry host ("host:port"; Docker Hub is "registry-1.docker.io").
// An empty user with a secret means that the secret is an identity token; both empty mean that none are known.
type Credentials func(ctx context.Context, host string) (user, secret string, err error)

// Options configure a Registry. The zero value works for public registries and for those on loopback.
type Options struct {
	// Credentials is asked first; what it does not know is looked up in docker's config.json.
	Credentials Credentials
	// DockerConfigDir is where config.json is; "" means $DOCKER_CONFIG or ~/.docker.
	DockerConfigDir string
	// PlainHTTP says which hosts are spoken to without TLS at all.
	PlainHTTP func(host string) bool
	// Insecure says which hosts may have a certificate that nobody vouches for, or speak plain HTTP. Hosts on
	// loopback without a CA directory of their own always may.
	Insecure func(host string) bool
	// Hosts are the settings of single registries and mirrors, by the host that images name ("docker.io" is Docker Hub).
	// A host that is listed here is not looked up in CertDirs.
	Hosts map[string]Host
	// CertDirs are searched for HOST/hosts.toml (containerd's: mirrors with their settings), or else for HOST/*.crt (authorities) and
	// HOST/*.cert with *.key (client certificates). nil means /etc/docker/certs.d and /etc/containerd/certs.d.
	CertDirs []string
	// MaxConnsPerHost bounds the connections to one host; 0 is no bound.
	MaxConnsPerHost int
	// Tries is how often a request is made at most; 0 means 3.
	Tries int
	// RangeSize is the size, in bytes, of the parts in which large blobs are fetched, several at once, where that helps; 0 means
	// 16 MB. Blobs of eight parts or more are large.
	RangeSize int64
	// Wait pauses between tries; nil waits on the clock. Tests set it.
	Wait func(ctx context.Context, d time.Duration) error
}

// Registry speaks to registries. Its methods may be called concurrently; it keeps connections and tokens.
type Registry struct {
	opts    Options
	hosts   *hosts
	creds   Credentials
	tokens  TokenSource // may be nil
	resolve remotes.Resolver
	// ranges is resolve for large blobs; nil if the library has lost the ability.
	ranges remotes.Resolver

	mu          sync.Mutex // guards authorizers
	authorizers map[string]docker.Authorizer
}

// New returns a Registry.
func New(opts Options) *Registry {
	if opts.Tries <= 0 {
		opts.Tries = 3
	}
	if opts.Wait == nil {
		opts.Wait = wait
	}
	if opts.CertDirs == nil {
		opts.CertDirs = []string{"/etc/docker/certs.d", "/etc/containerd/certs.d"}
	}
	if opts.RangeSize <= 0 {
		opts.RangeSize = 16 << 20
	}
	return build(opts, newHosts(opts), opts.Credentials)
}

// Large blobs are fetched by several range requests at once if the first part comes slowly: one connection to a registry's storage
// often gets only a part of the bandwidth that there is. Elsewhere it would cost more connections for nothing. What comes early is
// kept in memory, so that there is a bound: maxRanged blobs in the process, rangesAtOnce parts of each.
const (
	largeBlob    = 8 // parts
	rangesAtOnce = 3
	maxRanged    = 1
	slowRate     = 40e6 // bytes a second
)

var ranged = make(chan struct{}, maxRanged)

// With returns a Registry that asks creds first, before the credentials that r knows. It shares the connections
// of r but none of its tokens. A build makes one for the credentials of its client.
func (r *Registry) With(creds Credentials) *Registry {
	if creds == nil {
		return r
	}
	before := r.creds
	with := build(r.opts, r.hosts, func(ctx context.Context, host string) (string, string, error) {
		user, secret, err := creds(ctx, host)
		if err != nil || user != "" || secret != "" || before == nil {
			return user, secret, err
		}
		return before(ctx, host)
	})
	with.tokens = r.tokens
	return with
}

// Lenient returns a Registry that speaks to any host as if it were listed as insecure: its certificate is not checked, or there is
// none. It shares neither connections nor tokens with r.
func (r *Registry) Lenient() *Registry {
	opts := r.opts
	opts.Insecure = func(string) bool { return true }
	return build(opts, newHosts(opts), r.creds)
}

func build(opts Options, h *hosts, creds Credentials) *Registry {
	r := &Registry{opts: opts, hosts: h, creds: creds, authorizers: map[string]docker.Authorizer{}}
	resolver := docker.ResolverOptions{
		Headers: http.Header{"User-Agent": {userAgent}},
		Hosts:   r.endpoints,
	}
	r.resolve = docker.NewResolver(resolver)
	ranges := docker.NewResolver(resolver)
	if o, ok := ranges.(interface {
		SetOptions(...transfer.ImageResolverOption)
	}); ok {
		o.SetOptions(transfer.WithMaxConcurrentDownloads(rangesAtOnce), transfer.WithConcurrentLayerFetchBuffer(int(opts.RangeSize)))
		r.ranges = ranges
	}
	return r
}

const userAgent = "slipway"

// Parse returns ref in its full form: with host, repository, and tag or digest ("latest" when it has neither).
func Parse(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w", ref, err)
	}
	return reference.TagNameOnly(named), nil
}

// Resolve asks the registry what ref stands for now. name is ref in its full form.
func (r *Registry) Resolve(ctx context.Context, ref string) (name string, desc ocispec.Descriptor, err error) {
	named, err := Parse(ref)
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	ctx = r.context(ctx)
	_, desc, err = r.resolve.Resolve(ctx, named.String())
	if err != nil {
		return "", ocispec.Descriptor{}, r.explain(ctx, "pull", named, err)
	}
	return named.String(), desc, nil
}

// Fetch opens the content of desc in ref's repository. Reading ends with an error wrapping ErrCorrupt when the
// bytes are not those that desc names, with ErrNotFound when the registry does not have them.
func (r *Registry) Fetch(ctx context.Context, ref string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	d, err := r.open(ctx, ref, desc, 0)
	if err != nil {
		return nil, err
	}
	d.hash = desc.Digest.Algorithm().Hash()
	return d, nil
}

// FetchFrom is Fetch from that byte on, by a range request; a registry that does not know ranges sends everything, and what
// comes before is dropped. The caller has the bytes before offset, so only the caller can verify the whole, and does: nothing is
// verified here but the size.
func (r *Registry) FetchFrom(ctx context.Context, ref string, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return r.open(ctx, ref, desc, offset)
}

// FetchRange is FetchFrom for so many bytes: no more are asked for (but from the beginning of a blob), so that the connection serves the next request,
// too. A registry that does not know ranges sends everything.
func (r *Registry) FetchRange(ctx context.Context, ref string, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	d, err := r.open(withLastByte(ctx, offset+length-1), ref, desc, offset)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(d, length), d}, nil
}

func (r *Registry) open(ctx context.Context, ref string, desc ocispec.Descriptor, offset int64) (*download, error) {
	named, err := Parse(ref)
	if err != nil {
		return nil, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("fetch %q from %s: %w", desc.Digest, named, err)
	}
	ctx = r.context(ctx)
	// URLs are for "foreign" layers and come from whoever wrote the manifest; only the registry is asked.
	desc.URLs = nil
	d := &download{ctx: ctx, r: r, named: named, desc: desc, read: offset, start: offset}
	if d.rc, err = d.openBy(r.resolve); err != nil {
		return nil, err
	}
	return d, nil
}

// MaxDocument is the most that FetchBytes reads: manifests and configs are far smaller.
const MaxDocument = 16 << 20

// FetchBytes returns the content of desc, which must be a manifest, an index or a config.
func (r *Registry) FetchBytes(ctx context.Context, ref string, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > MaxDocument {
		return nil, fmt.Errorf("fetch %s from %s: %d bytes are too many for a manifest or config", desc.Digest, ref, desc.Size)
	}
	rc, err := r.Fetch(ctx, ref, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// context keeps the libraries' own log lines off the engine's standard error: what matters is in the error.
func (r *Registry) context(ctx context.Context) context.Context {
	return log.WithLogger(ctx, quiet)
}

var quiet = func() *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.PanicLevel)
	return logrus.NewEntry(l)
}()
