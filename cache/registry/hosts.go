// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// hosts gives every host that is spoken to (registries, token servers, the stores they redirect to) the
// connection settings that are configured for it.
type hosts struct {
	opts    Options
	uploads uploads

	mu     sync.Mutex // guards what follows
	byHost map[string]http.RoundTripper
	plain  *http.Transport
	files  map[string][]docker.RegistryHost // what a hosts.toml says of a registry; nil when there is none
}

func newHosts(opts Options) *hosts {
	return &hosts{opts: opts, uploads: uploads{now: map[uploading]*sending{}}, byHost: map[string]http.RoundTripper{}, files: map[string][]docker.RegistryHost{}}
}

// lastByte is the key of a context under which the last byte is that is wanted of a blob.
type lastByte struct{}

func withLastByte(ctx context.Context, last int64) context.Context {
	return context.WithValue(ctx, lastByte{}, last)
}

// bounded gives a request for all from some byte on the end that its context knows. The library asks without one, and what comes before
// it is told to stop fills the buffers of the connection, which cannot be used again then. Requests without a range stay: they may be for a token.
func bounded(req *http.Request) *http.Request {
	last, ok := req.Context().Value(lastByte{}).(int64)
	if from := req.Header.Get("Range"); ok && strings.HasSuffix(from, "-") {
		req = req.Clone(req.Context())
		req.Header.Set("Range", from+strconv.FormatInt(last, 10))
	}
	return req
}

// RoundTrip sends req with the settings of its host.
func (h *hosts) RoundTrip(req *http.Request) (*http.Response, error) {
	req = bounded(req)
	rt, err := h.transport(req.URL.Host)
	if err != nil {
		return nil, err
	}
	return rt.RoundTrip(req)
}

func (h *hosts) transport(host string) (http.RoundTripper, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if rt, ok := h.byHost[host]; ok {
		return rt, nil
	}
	rt, err := h.newRoundTripper(host)
	if err != nil {
		return nil, err
	}
	h.byHost[host] = rt
	return rt, nil
}

// newRoundTripper makes what speaks to host. mu is held.
func (h *hosts) newRoundTripper(host string) (http.RoundTripper, error) {
	var conf *tls.Config
	var own bool
	var err error
	settings, listed := h.settings(host)
	if listed {
		conf, own, err = settings.tls(host)
	} else {
		conf, own, err = tlsConfig(h.opts.CertDirs, host)
	}
	if err != nil {
		return nil, err
	}
	switch {
	case settings.insecure():
		conf.InsecureSkipVerify = true
		rt := http.RoundTripper(h.newTransport(conf))
		if settings.http(host) {
			rt = docker.NewHTTPFallback(rt)
		}
		return rt, nil
	case own:
		return h.newTransport(conf), nil
	case settings.HTTP == nil && h.lenient(host):
		// Like docker: TLS is tried first, without asking who vouches for it, then plain HTTP.
		return docker.NewHTTPFallback(h.newTransport(&tls.Config{InsecureSkipVerify: true})), nil
	}
	if h.plain == nil {
		h.plain = h.newTransport(&tls.Config{})
	}
	return h.plain, nil
}

func (h *hosts) lenient(host string) bool {
	return isLoopback(host) || h.opts.Insecure != nil && h.opts.Insecure(host)
}

// scheme returns how a registry on host is spoken to first.
func (h *hosts) scheme(host string) string {
	if h.opts.PlainHTTP != nil && h.opts.PlainHTTP(host) {
		return "http"
	}
	if s, ok := h.settings(host); ok && s.HTTP != nil && *s.HTTP && !s.insecure() {
		return "http"
	}
	return "https"
}

func (h *hosts) newTransport(conf *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{
			Timeout:   15 * time.Second,
			KeepAlive: 30 * time.Second,
		}).DialContext,
		MaxConnsPerHost:     h.opts.MaxConnsPerHost,
		MaxIdleConns:        32,
		MaxIdleConnsPerHost: 8, // as many as blobs are moved at once, so that none has to connect again
		IdleConnTimeout:     30 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
		TLSClientConfig:     conf,
		// A registry that hashes a large upload before it answers takes long; one that never answers must not hang a build.
		ResponseHeaderTimeout: 3 * time.Minute,
		ExpectContinueTimeout: time.Second,
		// Blobs are compressed already, and their bytes are what is verified.
		DisableCompression: true,
	}
}

// isLoopback says whether host ("name", "name:port", "[v6]:port") is this machine.
func isLoopback(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.Trim(name, "[]")
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return true
	}
	ip := net.ParseIP(name)
	return ip != nil && ip.IsLoopback()
}

// tlsConfig reads what dirs have for host: *.crt are authorities (beside the system's), *.cert with *.key a client
// certificate. own says that there was something.
func tlsConfig(dirs []string, host string) (conf *tls.Config, own bool, err error) {
	conf = &tls.Config{}
	for _, dir := range dirs {
		for _, name := range hostDirs(host) {
			d := filepath.Join(dir, name)
			files, err := os.ReadDir(d)
			if os.IsNotExist(err) {
				continue
			} else if err != nil {
				return nil, false, fmt.Errorf("certificates for %s: %w", host, err)
			}
			for _, f := range files {
				p := filepath.Join(d, f.Name())
				switch {
				case strings.HasSuffix(p, ".crt"):
					if err := addAuthority(conf, p); err != nil {
						return nil, false, err
					}
					own = true
				case strings.HasSuffix(p, ".cert"):
					pair, err := tls.LoadX509KeyPair(p, strings.TrimSuffix(p, ".cert")+".key")
					if err != nil {
						return nil, false, fmt.Errorf("client certificate %s: %w", p, err)
					}
					conf.Certificates = append(conf.Certificates, pair)
					own = true
				}
			}
			if own {
				return conf, true, nil // the most specific directory decides
			}
		}
	}
	return conf, false, nil
}

// hostDirs are the directories that may have the settings of host, the most specific first.
func hostDirs(host string) []string {
	if strings.ContainsAny(host, "/\\") || host == "" || host[0] == '.' {
		return nil
	}
	names := []string{host}
	if name, port, err := net.SplitHostPort(host); err == nil {
		names = append(names, name+"_"+port+"_", name) // containerd's spelling; docker's for every port
	}
	return names
}

func addAuthority(conf *tls.Config, path string) error {
	pem, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("certificate authority %s: %w", path, err)
	}
	if conf.RootCAs == nil {
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			conf.RootCAs = x509.NewCertPool()
		}
	}
	if !conf.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("certificate authority %s: no PEM certificate in it", path)
	}
	return nil
}
