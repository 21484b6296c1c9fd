// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// Host are the settings of one registry or mirror, as [registry."HOST"] of buildkitd.toml has them.
type Host struct {
	// Mirrors are asked first, in order, and only for pulls: "host[:port][/path]". A mirror that does not have something or
	// does not answer is passed over. Its own settings are those of its host.
	Mirrors []string
	// HTTP says that it speaks plain HTTP (true) or TLS (false). nil is TLS, except on loopback, where both are tried.
	HTTP *bool
	// Insecure accepts a certificate that nobody vouches for; together with HTTP, TLS is tried first.
	Insecure *bool
	// CAs are files with certificates of authorities that are trusted besides the system's.
	CAs []string
	// KeyPairs are client certificates.
	KeyPairs []KeyPair
	// TLSDirs have more of both: *.crt, and *.cert with *.key. A directory that is missing has none.
	TLSDirs []string
}

// KeyPair names the files of a client certificate.
type KeyPair struct{ Key, Cert string }

func (s Host) insecure() bool { return s.Insecure != nil && *s.Insecure }

// http says whether plain HTTP may be spoken.
func (s Host) http(host string) bool {
	if s.HTTP != nil {
		return *s.HTTP
	}
	return isLoopback(host)
}

// tls reads the certificates. own says that there were some.
func (s Host) tls(host string) (conf *tls.Config, own bool, err error) {
	conf = &tls.Config{}
	authorities, pairs := s.CAs, s.KeyPairs
	for _, dir := range s.TLSDirs {
		files, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, false, fmt.Errorf("certificates for %s: %w", host, err)
		}
		for _, f := range files {
			p := filepath.Join(dir, f.Name())
			if strings.HasSuffix(p, ".crt") {
				authorities = append(authorities[:len(authorities):len(authorities)], p)
			}
			if base, ok := strings.CutSuffix(p, ".cert"); ok {
				pairs = append(pairs[:len(pairs):len(pairs)], KeyPair{Cert: p, Key: base + ".key"})
			}
		}
	}
	for _, ca := range authorities {
		if err := addAuthority(conf, ca); err != nil {
			return nil, false, err
		}
	}
	for _, p := range pairs {
		pair, err := tls.LoadX509KeyPair(p.Cert, p.Key)
		if err != nil {
			return nil, false, fmt.Errorf("client certificate %s for %s: %w", p.Cert, host, err)
		}
		conf.Certificates = append(conf.Certificates, pair)
	}
	return conf, len(authorities)+len(pairs) > 0, nil
}

// settings returns what Options.Hosts says of host, by the name of the registry or of its API.
func (h *hosts) settings(host string) (Host, bool) {
	s, ok := h.opts.Hosts[host]
	if !ok && host == apiHost("docker.io") {
		s, ok = h.opts.Hosts["docker.io"]
	}
	return s, ok
}

// endpoints returns where the registry that names call host is reached, in the order in which the endpoints are asked: mirrors, then the
// registry itself.
func (r *Registry) endpoints(host string) ([]docker.RegistryHost, error) {
	settings, listed := r.hosts.settings(host)
	if !listed {
		list, err := r.hosts.fromFile(host)
		if err != nil {
			return nil, err
		}
		if list != nil {
			return r.authorize(list), nil
		}
	}
	var list []docker.RegistryHost
	for _, mirror := range settings.Mirrors {
		m, err := r.mirror(host, mirror)
		if err != nil {
			return nil, err
		}
		list = append(list, m)
	}
	itself, err := r.host(host)
	if err != nil {
		return nil, err
	}
	return append(list, itself), nil
}

// pushHost is the endpoint that takes pushes and logins.
func (r *Registry) pushHost(host string) (docker.RegistryHost, error) {
	list, err := r.endpoints(host)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	for _, h := range list {
		if h.Capabilities.Has(docker.HostCapabilityPush) {
			return h, nil
		}
	}
	return docker.RegistryHost{}, fmt.Errorf("registry %s: its hosts.toml has no host that takes pushes: %w", host, errdefs.ErrNotFound)
}

// mirror returns how a mirror of host is reached.
func (r *Registry) mirror(host, mirror string) (docker.RegistryHost, error) {
	u, err := url.Parse(mirror)
	if err != nil || u.Host == "" {
		u, err = url.Parse("//" + mirror)
	}
	if err != nil || u.Hostname() == "" {
		return docker.RegistryHost{}, fmt.Errorf("mirror %q of registry %s: want HOST[:PORT][/PATH]", mirror, host)
	}
	m, err := r.host(u.Host)
	if err != nil {
		return m, err
	}
	if u.Scheme == "http" {
		m.Scheme = "http"
	}
	// The next one is asked instead of this one again.
	m.Client = &http.Client{Transport: &retry{next: r.hosts, tries: 1, wait: r.opts.Wait}}
	m.Path = path.Join("/v2", u.Path)
	m.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve
	return m, nil
}

// host returns how the registry that names call host is reached itself, with the authorizer that keeps its tokens.
func (r *Registry) host(host string) (docker.RegistryHost, error) {
	addr := apiHost(host)
	// Fail here, with a good message, rather than in the middle of a request.
	if _, err := r.hosts.transport(addr); err != nil {
		return docker.RegistryHost{}, err
	}
	client := &http.Client{Transport: &retry{next: r.hosts, tries: r.opts.Tries, wait: r.opts.Wait}}
	return docker.RegistryHost{
		Client:       client,
		Authorizer:   r.authorizer(addr, client, nil),
		Host:         addr,
		Scheme:       r.hosts.scheme(addr),
		Path:         "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush | docker.HostCapabilityReferrers,
	}, nil
}

// authorizer returns the one of key, which is the host unless there are several ways to reach it.
func (r *Registry) authorizer(key string, client *http.Client, header http.Header) docker.Authorizer {
	r.mu.Lock()
	defer r.mu.Unlock()
	auth, ok := r.authorizers[key]
	if !ok {
		header = header.Clone()
		if header == nil {
			header = http.Header{}
		}
		header.Set("User-Agent", userAgent)
		auth = docker.NewDockerAuthorizer(
			docker.WithAuthClient(client),
			docker.WithAuthHeader(header),
			docker.WithAuthCreds(func(h string) (string, string, error) {
				// The library has no context for us; a client or helper that is gone must not hold a build up for ever.
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				return r.lookup(ctx, h)
			}),
		)
		if r.tokens != nil {
			auth = newTokenAuthorizer(auth, r.tokens)
		}
		r.authorizers[key] = auth
	}
	return auth
}

// authorize gives endpoints from a file our authorizers and retries.
func (r *Registry) authorize(list []docker.RegistryHost) []docker.RegistryHost {
	out := make([]docker.RegistryHost, len(list))
	for i, h := range list {
		tries := 1 // the next one is asked instead
		if i == len(list)-1 {
			tries = r.opts.Tries
		}
		h.Client = &http.Client{Transport: &retry{next: h.Client.Transport, tries: tries, wait: r.opts.Wait}}
		h.Authorizer = r.authorizer(fmt.Sprintf("%d %s%s", i, h.Host, h.Path), h.Client, h.Header)
		out[i] = h
	}
	return out
}

// fromFile returns the endpoints that a hosts.toml in one of Options.CertDirs gives for host, nil without such a file. containerd's
// reader goes on without a file that it cannot read; here that is an error.
func (h *hosts) fromFile(host string) ([]docker.RegistryHost, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if list, ok := h.files[host]; ok {
		return list, nil
	}
	dir := ""
	for _, d := range h.opts.CertDirs {
		names := append(hostDirs(host), "_default") // for all that have none of their own
		for _, name := range names {
			if _, err := os.Stat(filepath.Join(d, name, "hosts.toml")); err == nil && dir == "" {
				dir = filepath.Join(d, name)
			}
		}
	}
	if dir == "" {
		h.files[host] = nil
		return nil, nil
	}
	failed := &firstError{}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(failed)
	list, err := dockerconfig.ConfigureHosts(log.WithLogger(context.Background(), logrus.NewEntry(logger)), dockerconfig.HostOptions{
		HostDir: func(string) (string, error) { return dir, nil },
		UpdateClient: func(c *http.Client) error {
			if t, ok := c.Transport.(*http.Transport); ok {
				own := h.newTransport(t.TLSClientConfig)
				if t.DialContext != nil {
					own.DialContext = t.DialContext // it may have a time-out of its own
				}
				c.Transport = own
			}
			return nil
		},
	})(host)
	if err == nil {
		err = failed.get()
	}
	if err != nil {
		return nil, fmt.Errorf("registry settings for %s: %s: %w", host, filepath.Join(dir, "hosts.toml"), err)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("registry settings for %s: %s: no host in it", host, filepath.Join(dir, "hosts.toml"))
	}
	h.files[host] = list
	return list, nil
}

// firstError keeps the first error that is logged.
type firstError struct {
	mu  sync.Mutex // guards err
	err error
}

// Levels implements logrus.Hook.
func (*firstError) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (f *firstError) Fire(e *logrus.Entry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err, ok := e.Data[logrus.ErrorKey].(error); ok && f.err == nil {
		f.err = err
	}
	return nil
}

func (f *firstError) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}
