// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"testing"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/testutil"
	"google.golang.org/grpc"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// silentAuth is a client that does not answer.
type silentAuth struct{ auth.UnimplementedAuthServer }

func (s silentAuth) Register(g *grpc.Server) { auth.RegisterAuthServer(g, s) }

func (silentAuth) Credentials(ctx context.Context, _ *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (silentAuth) GetTokenAuthority(ctx context.Context, _ *auth.GetTokenAuthorityRequest) (*auth.GetTokenAuthorityResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (silentAuth) FetchToken(ctx context.Context, _ *auth.FetchTokenRequest) (*auth.FetchTokenResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestAuthTimeout: sessionAuthTimeout bounds every question about who the client is.
func TestAuthTimeout(t *testing.T) {
	manager, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	client, err := session.NewSession(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	client.Allow(silentAuth{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = client.Run(t.Context(), session.Dialer(testutil.TestStream(testutil.Handler(manager.HandleConn))))
	}()
	t.Cleanup(func() {
		client.Close()
		<-ended
	})
	s := &clientSession{manager: manager, authTimeout: 50 * time.Millisecond, id: client.ID()}
	for what, ask := range map[string]func(context.Context) error{
		"credentials": func(ctx context.Context) error { _, _, err := s.Credentials(ctx, "host.test"); return err },
		"authority":   func(ctx context.Context) error { _, err := s.HasTokens(ctx, "host.test"); return err },
		"token": func(ctx context.Context) error {
			_, err := s.FetchToken(ctx, registry.TokenRequest{Host: "host.test"})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := ask(ctx)
		if err == nil || ctx.Err() != nil {
			t.Errorf("%s: %v", what, err)
		}
		cancel()
	}
}
