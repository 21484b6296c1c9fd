// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
)

// TokenRequest is what a registry wants a token for, as its challenge says.
type TokenRequest struct {
	Host, Realm, Service string
	Scopes               []string
}

// Token is an answer. The zero Expires means that it is not known.
type Token struct {
	Value   string
	Expires time.Time
}

// TokenSource gets tokens without telling us the password: a build's client that fetches them itself.
type TokenSource interface {
	// HasTokens says whether it does so for a host; otherwise its credentials are asked for.
	HasTokens(ctx context.Context, host string) (bool, error)
	FetchToken(ctx context.Context, req TokenRequest) (Token, error)
}

// WithTokens is With for a client that may fetch tokens itself. Its password is asked for only where no token will do.
// tokens may be nil.
func (r *Registry) WithTokens(creds Credentials, tokens TokenSource) *Registry {
	with := r.With(creds)
	if tokens == nil {
		return with
	}
	if with == r {
		with = build(r.opts, r.hosts, r.creds)
	}
	with.tokens = tokens
	return with
}

// tokenAuthorizer answers a challenge for a token by the source's token, and leaves everything else to the Authorizer in it.
type tokenAuthorizer struct {
	docker.Authorizer
	source TokenSource

	mu         sync.Mutex              // guards what follows
	challenges map[string]TokenRequest // by host
	tokens     map[string]Token        // by host and scopes
}

func newTokenAuthorizer(inner docker.Authorizer, source TokenSource) *tokenAuthorizer {
	return &tokenAuthorizer{Authorizer: inner, source: source, challenges: map[string]TokenRequest{}, tokens: map[string]Token{}}
}

// tokenMargin is how long a token must still be valid to be used.
const tokenMargin = 5 * time.Second

// Authorize implements docker.Authorizer.
func (a *tokenAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	host := req.URL.Host
	a.mu.Lock()
	ask, ok := a.challenges[host]
	a.mu.Unlock()
	if !ok {
		return a.Authorizer.Authorize(ctx, req)
	}
	ask.Scopes = docker.GetTokenScopes(ctx, ask.Scopes)
	key := host + " " + strings.Join(ask.Scopes, " ")
	a.mu.Lock()
	token, ok := a.tokens[key]
	a.mu.Unlock()
	if !ok || !token.Expires.IsZero() && time.Until(token.Expires) < tokenMargin {
		var err error
		if token, err = a.source.FetchToken(ctx, ask); err != nil {
			return fmt.Errorf("fetch a token for %s: %w", host, err)
		}
		a.mu.Lock()
		a.tokens[key] = token
		a.mu.Unlock()
	}
	req.Header.Set("Authorization", "Bearer "+token.Value)
	return nil
}

// AddResponses implements docker.Authorizer.
func (a *tokenAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	host := last.Request.URL.Host
	for _, c := range auth.ParseAuthHeader(last.Header) {
		if c.Scheme != auth.BearerAuth {
			continue
		}
		has, err := a.source.HasTokens(ctx, host)
		if err != nil {
			return fmt.Errorf("ask the client whether it has tokens for %s: %w", host, err)
		}
		if !has {
			break
		}
		refused := 0
		for _, r := range responses {
			if r.Request.URL.Host == host && strings.HasPrefix(r.Request.Header.Get("Authorization"), "Bearer ") {
				refused++
			}
		}
		if refused > 1 {
			return fmt.Errorf("%s refuses the token that the client has fetched: %w", host, docker.ErrInvalidAuthorization)
		}
		options, err := auth.GenerateTokenOptions(ctx, host, "", "", c)
		if err != nil {
			return err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.challenges[host] = TokenRequest{Host: host, Realm: options.Realm, Service: options.Service, Scopes: options.Scopes}
		maps.DeleteFunc(a.tokens, func(key string, _ Token) bool { return refused > 0 && strings.HasPrefix(key, host+" ") })
		return nil
	}
	return a.Authorizer.AddResponses(ctx, responses)
}
