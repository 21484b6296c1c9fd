// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/credentials"
	"github.com/docker/cli/cli/config/types"
)

// hubKey is the name under which docker's config.json keeps the credentials for Docker Hub.
const hubKey = "https://index.docker.io/v1/"

// configKey is the name under which docker's config.json keeps the credentials for a host.
func configKey(host string) string {
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		return hubKey
	}
	return host
}

// lookup finds credentials for host: first those that the Registry was given, then docker's.
func (r *Registry) lookup(ctx context.Context, host string) (user, secret string, err error) {
	if r.creds != nil {
		user, secret, err := r.creds(ctx, host)
		if err != nil {
			return "", "", fmt.Errorf("credentials for %s: %w", host, err)
		}
		if user != "" || secret != "" {
			return user, secret, nil
		}
	}
	return DockerCredentials(r.opts.DockerConfigDir)(ctx, host)
}

// DockerCredentials returns the credentials of docker's config.json in dir ("" for the default place): its auths,
// credsStore and credHelpers, and $DOCKER_AUTH_CONFIG. The file is read at each call, so a login counts at once.
func DockerCredentials(dir string) Credentials {
	return func(_ context.Context, host string) (string, string, error) {
		cfg, err := config.Load(dir)
		if err != nil {
			return "", "", err
		}
		key := configKey(host)
		auth, err := cfg.GetCredentialsStore(key).Get(key)
		if err != nil {
			return "", "", fmt.Errorf("credentials for %s (see %s): %w", host, cfg.Filename, err)
		}
		switch {
		case auth.IdentityToken != "":
			return "", auth.IdentityToken, nil
		case auth.RegistryToken != "":
			return "", "", fmt.Errorf("credentials for %s (see %s): not supported yet: registrytoken", host, cfg.Filename)
		}
		return auth.Username, auth.Password, nil
	}
}

// Login checks user and password with the registry on host and keeps them as docker does, in config.json or with
// the credential helper that it names. Nothing is kept when they are wrong: then the error wraps ErrUnauthorized.
func (r *Registry) Login(ctx context.Context, host, user, password string) error {
	host, err := loginHost(host)
	if err != nil {
		return err
	}
	if user == "" || password == "" {
		return fmt.Errorf("log in to %s: user name and password must not be empty", host)
	}
	if err := r.Verify(ctx, host, user, password); err != nil {
		return err
	}
	cfg, err := r.config(true)
	if err != nil {
		return fmt.Errorf("keep the credentials for %s: %w", host, err)
	}
	key := configKey(host)
	err = cfg.GetCredentialsStore(key).Store(types.AuthConfig{ServerAddress: key, Username: user, Password: password})
	if err != nil {
		return fmt.Errorf("keep the credentials for %s (see %s): %w", host, cfg.Filename, err)
	}
	return nil
}

// Logout forgets the credentials for host. Not having had any is an error that wraps ErrNotFound.
func (r *Registry) Logout(_ context.Context, host string) error {
	host, err := loginHost(host)
	if err != nil {
		return err
	}
	cfg, err := r.config(false)
	if err != nil {
		return fmt.Errorf("forget the credentials for %s: %w", host, err)
	}
	key := configKey(host)
	store := cfg.GetCredentialsStore(key)
	if auth, err := store.Get(key); err == nil && auth.Username == "" && auth.Password == "" && auth.IdentityToken == "" {
		return &Error{Err: ErrNotFound, Host: host, Message: "not logged in to " + host}
	}
	if err := store.Erase(key); err != nil {
		return fmt.Errorf("forget the credentials for %s (see %s): %w", host, cfg.Filename, err)
	}
	r.mu.Lock()
	delete(r.authorizers, apiHost(host)) // with its tokens
	r.mu.Unlock()
	return nil
}

// Verify asks the registry on host whether it knows user with this password. A registry that wants no login
// accepts everyone.
func (r *Registry) Verify(ctx context.Context, host, user, password string) error {
	host, err := loginHost(host)
	if err != nil {
		return err
	}
	who := build(r.opts, r.hosts, func(context.Context, string) (string, string, error) { return user, password, nil })
	rh, err := who.pushHost(host)
	if err == nil {
		u := &uploader{ctx: r.context(ctx), host: rh}
		var resp *http.Response
		resp, err = u.do(u.ctx, http.MethodGet, rh.Scheme+"://"+rh.Host+rh.Path+"/", nil)
		if err == nil {
			defer resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = remoteerrors.NewUnexpectedStatusErr(resp)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	e := who.diagnose(ctx, host, host, err)
	switch {
	case errors.Is(e, ErrUnauthorized):
		e.Message = fmt.Sprintf("%s does not accept the user name or password", host)
	case errors.Is(e, ErrNotFound):
		e.Message = fmt.Sprintf("%s is not a registry (it has no /v2/): check the name", host)
	}
	e.Message = fmt.Sprintf("log in to %s: %s", host, e.Message)
	return e
}

func (r *Registry) config(fresh bool) (*configfile.ConfigFile, error) {
	cfg, err := config.Load(r.opts.DockerConfigDir)
	if err != nil {
		return nil, err
	}
	if fresh && !cfg.ContainsAuth() {
		cfg.CredentialsStore = credentials.DetectDefaultStore(cfg.CredentialsStore)
	}
	return cfg, nil
}

// loginHost accepts what docker login does: a host, or a URL that begins with one.
func loginHost(host string) (string, error) {
	h := host
	for _, scheme := range []string{"https://", "http://"} {
		h = strings.TrimPrefix(h, scheme)
	}
	h, _, _ = strings.Cut(h, "/")
	switch h {
	case "", "docker.io", "index.docker.io", "registry-1.docker.io":
		if host != "" && h == "" {
			return "", fmt.Errorf("registry %q: no host name in it", host)
		}
		return "docker.io", nil
	}
	if strings.ContainsAny(h, " \t\n@?#") {
		return "", fmt.Errorf("registry %q: not a host name", host)
	}
	return h, nil
}
