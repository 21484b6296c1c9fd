// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// runSession reaches the clients of those who want the run now, in the order in which they came: the build that began it may be gone,
// and one that is just going answers with an error, which is not to fail the others.
type runSession struct{ run *run }

// client returns the session to ask next, of the first build that is not in tried, and adds that; nil when there is none.
func (s *runSession) client(tried map[*Build]bool) Session {
	r := s.run
	r.solver.mu.Lock()
	defer r.solver.mu.Unlock()
	for _, n := range r.waiters {
		b := n.walk.build
		if b.session != nil && n.walk.ctx.Err() == nil && !tried[b] {
			tried[b] = true
			return b.session
		}
	}
	return nil
}

// ask asks one client after the other until one has an answer. Without one it returns the first error, or none when there is no client.
func ask[T any](ctx context.Context, s *runSession, none error, question func(Session) (T, error)) (T, error) {
	tried := map[*Build]bool{}
	var first error
	for c := s.client(tried); c != nil; c = s.client(tried) {
		answer, err := question(c)
		if err == nil || ctx.Err() != nil {
			return answer, err
		}
		if first == nil {
			first = err
		}
	}
	var nothing T
	if first == nil {
		first = none
	}
	return nothing, first
}

// Local implements Session.
func (s *runSession) Local(ctx context.Context, req LocalRequest) (LocalDir, error) {
	none := fmt.Errorf("directory %q of the client: %w", req.Name, ErrNotFound)
	return ask(ctx, s, none, func(c Session) (LocalDir, error) { return c.Local(ctx, req) })
}

// Secret implements Session.
func (s *runSession) Secret(ctx context.Context, id string) ([]byte, error) {
	none := fmt.Errorf("secret %q: %w", id, ErrNotFound)
	return ask(ctx, s, none, func(c Session) ([]byte, error) { return c.Secret(ctx, id) })
}

// SSHAgent implements Session.
func (s *runSession) SSHAgent(ctx context.Context, id string) (string, func(), error) {
	type agent struct {
		socket  string
		release func()
	}
	none := fmt.Errorf("ssh agent %q: %w", id, ErrNotFound)
	a, err := ask(ctx, s, none, func(c Session) (a agent, err error) {
		a.socket, a.release, err = c.SSHAgent(ctx, id)
		return a, err
	})
	return a.socket, a.release, err
}

// Credentials implements Session.
func (s *runSession) Credentials(ctx context.Context, host string) (user, secret string, err error) {
	type pair struct{ user, secret string }
	p, err := ask(ctx, s, nil, func(c Session) (p pair, err error) {
		p.user, p.secret, err = c.Credentials(ctx, host)
		return p, err
	})
	return p.user, p.secret, err
}

// LayoutBlob implements LayoutSession.
func (s *runSession) LayoutBlob(ctx context.Context, session, store string, dgst digest.Digest) (LayoutBlob, error) {
	none := fmt.Errorf("the client offers no OCI layouts: %w", ErrNotFound)
	return ask(ctx, s, none, func(c Session) (LayoutBlob, error) { return OpenLayoutBlob(ctx, c, session, store, dgst) })
}

// Upload implements Uploader.
func (s *runSession) Upload(ctx context.Context, u *url.URL) (io.ReadCloser, error) {
	none := fmt.Errorf("the client cannot send %s", u.Path)
	return ask(ctx, s, none, func(c Session) (io.ReadCloser, error) {
		if up, ok := c.(Uploader); ok {
			return up.Upload(ctx, u)
		}
		return nil, none
	})
}

// HasTokens implements TokenSession.
func (s *runSession) HasTokens(ctx context.Context, host string) (bool, error) {
	return ask(ctx, s, nil, func(c Session) (bool, error) {
		if t, ok := c.(TokenSession); ok {
			return t.HasTokens(ctx, host)
		}
		return false, nil
	})
}

// errNoTokens is that of a client that is asked for a token and has none for any host.
var errNoTokens = errors.New("the client fetches no tokens")

// FetchToken implements TokenSession.
func (s *runSession) FetchToken(ctx context.Context, req registry.TokenRequest) (registry.Token, error) {
	none := fmt.Errorf("token for %s: %w", req.Host, errNoTokens)
	return ask(ctx, s, none, func(c Session) (registry.Token, error) {
		if t, ok := c.(TokenSession); ok {
			return t.FetchToken(ctx, req)
		}
		return registry.Token{}, none
	})
}
