// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/session/upload"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// sessionTimeout is how long a client may take between its Solve and the Session that goes with it.
const sessionTimeout = 10 * time.Second

// clientSession is what a build may ask its client for, over BuildKit's session protocol.
type clientSession struct {
	manager *session.Manager
	// authTimeout is how long the client may take to give credentials; what is not positive is no limit.
	authTimeout time.Duration
	id          string
	// localIDs are sessions of other clients for single local sources ("local-sessionid:NAME").
	localIDs map[string]string
	// direct are the directories that the engine reads itself.
	direct map[string]string
	// dir is where transferred directories go.
	dir string

	mu        sync.Mutex // guards transfers
	transfers []string
}

var _ interface {
	solver.TokenSession
	solver.Uploader
	remotecache.Session
} = (*clientSession)(nil)

// caller waits for the session with an ID.
func (s *clientSession) caller(ctx context.Context, id string) (session.Caller, error) {
	if id == "" {
		return nil, errors.New("the client has no session")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, sessionTimeout, errors.New("the client's session is gone"))
	defer cancel()
	c, err := s.manager.Get(ctx, id, false)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, err
	}
	return c, nil
}

// ContentStore implements remotecache.Session.
func (s *clientSession) ContentStore(ctx context.Context, id string) (content.Store, error) {
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return nil, fmt.Errorf("content store %q: %w", id, err)
	}
	return sessioncontent.NewCallerStore(caller, id), nil
}

// Local implements solver.Session.
func (s *clientSession) Local(ctx context.Context, req solver.LocalRequest) (solver.LocalDir, error) {
	if dir, ok := s.direct[req.Name]; ok {
		return solver.LocalDir{Path: dir}, nil
	}
	id := s.id
	if other, ok := s.localIDs[req.Name]; ok {
		id = other
	}
	caller, err := s.caller(ctx, id)
	if err != nil {
		return solver.LocalDir{}, fmt.Errorf("local source %q: %w", req.Name, err)
	}
	dir, err := s.newTransfer()
	if err != nil {
		return solver.LocalDir{}, fmt.Errorf("local source %q: %w", req.Name, err)
	}
	// Always into an empty directory: fsutil's incremental transfer trusts equal size and modification time, and so
	// may keep wrong content (buildkit#4950). Clients of this host do not come here at all.
	err = filesync.FSSync(ctx, caller, filesync.FSSendRequestOpt{
		Name:            req.Name,
		IncludePatterns: req.IncludePatterns,
		ExcludePatterns: req.ExcludePatterns,
		FollowPaths:     req.FollowPaths,
		DestDir:         dir,
		Differ:          fsutil.DiffNone,
		Filter: func(_ string, st *fstypes.Stat) bool {
			st.Uid, st.Gid = 0, 0
			return true
		},
	})
	if err != nil {
		if grpcerrors.Code(err) == codes.NotFound {
			return solver.LocalDir{}, fmt.Errorf("local source %q: the client does not offer it", req.Name)
		}
		return solver.LocalDir{}, fmt.Errorf("local source %q: transfer: %w", req.Name, err)
	}
	return solver.LocalDir{Path: dir, Filtered: true}, nil
}

func (s *clientSession) newTransfer() (string, error) {
	dir, err := os.MkdirTemp(s.dir, "context-")
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.transfers = append(s.transfers, dir)
	s.mu.Unlock()
	return dir, nil
}

// received are the directories that were transferred.
func (s *clientSession) received() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.transfers
}

// Secret implements solver.Session.
func (s *clientSession) Secret(ctx context.Context, id string) ([]byte, error) {
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return nil, fmt.Errorf("secret %q: %w", id, err)
	}
	data, err := secrets.GetSecret(ctx, caller, id)
	if errors.Is(err, secrets.ErrNotFound) {
		return nil, fmt.Errorf("secret %q: %w", id, solver.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("secret %q: %w", id, err)
	}
	return data, nil
}

// SSHAgent implements solver.Session.
func (s *clientSession) SSHAgent(ctx context.Context, id string) (string, func(), error) {
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return "", nil, fmt.Errorf("ssh agent %q: %w", id, err)
	}
	if err := sshforward.CheckSSHID(ctx, caller, id); err != nil {
		switch grpcerrors.Code(err) {
		case codes.Unimplemented, codes.NotFound, codes.Unknown: // BuildKit's provider has no code for a name that it does not know
			return "", nil, fmt.Errorf("ssh agent %q: %w", id, solver.ErrNotFound)
		}
		return "", nil, fmt.Errorf("ssh agent %q: %w", id, err)
	}
	if id == "" {
		id = sshforward.DefaultID
	}
	socket, stop, err := forwardAgent(ctx, caller, s.dir, id)
	if err != nil {
		return "", nil, fmt.Errorf("ssh agent %q: %w", id, err)
	}
	return socket, stop, nil
}

// authTimeout is how long clients may take to give credentials.
func (s *Server) authTimeout() time.Duration {
	if s.AuthTimeout != nil {
		return *s.AuthTimeout
	}
	return auth.SessionAuthTimeout
}

// answerIn bounds how long the client may take to answer a question for credentials or tokens.
func (s *clientSession) answerIn(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.authTimeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, s.authTimeout, errors.New("the client did not answer"))
}

// Credentials implements solver.Session.
func (s *clientSession) Credentials(ctx context.Context, host string) (string, string, error) {
	if s.id == "" {
		return "", "", nil
	}
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s: %w", host, err)
	}
	ctx, cancel := s.answerIn(ctx)
	defer cancel()
	response, err := auth.NewAuthClient(caller.Conn()).Credentials(caller.Context(ctx), &auth.CredentialsRequest{Host: host})
	switch {
	case grpcerrors.Code(err) == codes.Unimplemented:
		return "", "", nil
	case err != nil:
		return "", "", fmt.Errorf("credentials for %s: %w", host, err)
	}
	return response.Username, response.Secret, nil
}

// tokenSalt tells this process from others to clients that make keys for it.
var tokenSalt = sync.OnceValue(func() []byte {
	salt := make([]byte, 32)
	_, _ = rand.Read(salt)
	return salt
})

// HasTokens implements solver.TokenSession: a client that has an authority for a host fetches tokens for it.
func (s *clientSession) HasTokens(ctx context.Context, host string) (bool, error) {
	if s.id == "" {
		return false, nil
	}
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return false, err
	}
	ctx, cancel := s.answerIn(ctx)
	defer cancel()
	response, err := auth.NewAuthClient(caller.Conn()).GetTokenAuthority(caller.Context(ctx), &auth.GetTokenAuthorityRequest{Host: host, Salt: tokenSalt()})
	switch code := grpcerrors.Code(err); {
	case err == nil:
		return len(response.PublicKey) > 0, nil
	case code == codes.Unimplemented, code == codes.Unavailable:
		return false, nil
	}
	return false, err
}

// FetchToken implements solver.TokenSession.
func (s *clientSession) FetchToken(ctx context.Context, req registry.TokenRequest) (registry.Token, error) {
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return registry.Token{}, err
	}
	ctx, cancel := s.answerIn(ctx)
	defer cancel()
	response, err := auth.NewAuthClient(caller.Conn()).FetchToken(caller.Context(ctx), &auth.FetchTokenRequest{
		ClientID: "slipway", Host: req.Host, Realm: req.Realm, Service: req.Service, Scopes: req.Scopes,
	})
	if err != nil {
		return registry.Token{}, err
	}
	token := registry.Token{Value: response.Token}
	if response.ExpiresIn > 0 {
		issued := time.Now()
		if response.IssuedAt > 0 && time.Unix(response.IssuedAt, 0).Before(issued) {
			issued = time.Unix(response.IssuedAt, 0)
		}
		token.Expires = issued.Add(time.Duration(response.ExpiresIn) * time.Second)
	}
	return token, nil
}

// Upload implements solver.Uploader.
func (s *clientSession) Upload(ctx context.Context, u *url.URL) (io.ReadCloser, error) {
	caller, err := s.caller(ctx, s.id)
	if err != nil {
		return nil, fmt.Errorf("upload %s: %w", u.Path, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	up, err := upload.New(ctx, caller, u)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("upload %s: %w", u.Path, err)
	}
	r, w := io.Pipe()
	go func() {
		defer cancel(nil)
		_, err := up.WriteTo(w)
		w.CloseWithError(err)
	}()
	return r, nil
}

// verifier asks the client with a session about sources; nil for no session.
func (s *clientSession) verifier(id string) gateway.PolicyVerifier {
	if id == "" {
		return nil
	}
	return func(ctx context.Context, req *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error) {
		caller, err := s.caller(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("source policy: %w", err)
		}
		response, err := policysession.NewPolicyVerifierClient(caller.Conn()).CheckPolicy(caller.Context(ctx), req)
		if err != nil {
			return nil, fmt.Errorf("source policy: ask the client: %w", err)
		}
		return response, nil
	}
}
