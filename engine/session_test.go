// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/auth/authprovider"
	sessionexporter "github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/session/exporter/exporterprovider"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// watchedAuth is docker's own answers to questions for credentials and tokens, counted.
type watchedAuth struct {
	auth.AuthServer
	mu     sync.Mutex
	asked  map[string]int
	plain  bool // like a client of old, has no tokens
	broken bool // fetches tokens that are none
	unsure bool // cannot say whether it has tokens
}

func (a *watchedAuth) Register(s *grpc.Server) { auth.RegisterAuthServer(s, a) }

func (a *watchedAuth) count(what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked[what]++
}

func (a *watchedAuth) Credentials(ctx context.Context, r *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	a.count("password")
	return a.AuthServer.Credentials(ctx, r)
}

func (a *watchedAuth) FetchToken(ctx context.Context, r *auth.FetchTokenRequest) (*auth.FetchTokenResponse, error) {
	a.count("token")
	if a.broken {
		return &auth.FetchTokenResponse{Token: "none"}, nil
	}
	return a.AuthServer.FetchToken(ctx, r)
}

func (a *watchedAuth) GetTokenAuthority(ctx context.Context, r *auth.GetTokenAuthorityRequest) (*auth.GetTokenAuthorityResponse, error) {
	if a.unsure {
		return nil, status.Error(codes.Internal, "the keys cannot be read")
	}
	if a.plain {
		return auth.UnimplementedAuthServer{}.GetTokenAuthority(ctx, r)
	}
	return a.AuthServer.GetTokenAuthority(ctx, r)
}

// TestClientKeepsItsPassword pushes to and pulls from registries that want to know who comes.
func TestClientKeepsItsPassword(t *testing.T) {
	te := openTest(t)
	for _, tc := range []struct {
		name     string
		token    bool // the registry gives tokens; otherwise it wants the password itself
		password string
		plain    bool
		broken   bool
		unsure   bool
		asked    string // what the client was asked for
		fails    bool
	}{
		{name: "token", token: true, password: "ahoy", asked: "token"},
		{name: "token from a client of old", token: true, password: "ahoy", plain: true, asked: "password"},
		{name: "password", password: "ahoy", asked: "password"},
		{name: "wrong password", token: true, password: "wrong", asked: "token", fails: true},
		{name: "client that cannot say", token: true, password: "ahoy", unsure: true, fails: true},
		{name: "token that is none", token: true, password: "ahoy", broken: true, asked: "token", fails: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("XDG_CONFIG_HOME", t.TempDir()) // where the provider keeps its seeds
			t.Setenv("DOCKER_CONFIG", t.TempDir())
			reg := registrytest.Start(t, registrytest.Options{User: "sailor", Password: "ahoy", Token: tc.token})
			config := configfile.New("")
			config.AuthConfigs[reg.Host] = types.AuthConfig{Username: "sailor", Password: tc.password, ServerAddress: reg.Host}
			provider := authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{AuthConfigProvider: authprovider.LoadAuthConfig(config)})
			watched := &watchedAuth{AuthServer: provider.(auth.AuthServer), asked: map[string]int{}, plain: tc.plain, broken: tc.broken, unsure: tc.unsure}
			solve := func(dockerfile string, exports ...bkclient.ExportEntry) error {
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
					t.Fatal(err)
				}
				files, err := fsutil.NewFS(dir)
				if err != nil {
					t.Fatal(err)
				}
				_, err = te.client.Solve(t.Context(), nil, bkclient.SolveOpt{
					Frontend: "dockerfile.v0", Exports: exports, Session: []session.Attachable{watched},
					LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": files},
				}, nil)
				return err
			}
			name := reg.Host + "/private:1"
			// Two steps: the layer of the first is sent before the build ends, the other one at its end.
			err := solve("FROM scratch\nCOPY Dockerfile /"+strings.ReplaceAll(tc.name, " ", "-")+"\nCOPY Dockerfile /last\n", bkclient.ExportEntry{Type: "image", Attrs: map[string]string{
				"name": name, "push": "true", "store": "false",
			}})
			if (err != nil) != tc.fails {
				t.Errorf("push: %v", err)
			}
			if err == nil {
				err = solve("FROM " + name + "\nCOPY Dockerfile /more\n")
				if err != nil {
					t.Errorf("pull: %v", err)
				}
			}
			if tc.asked == "" && len(watched.asked) > 0 || tc.asked != "" && (len(watched.asked) != 1 || watched.asked[tc.asked] == 0) {
				t.Errorf("asked for %v, want only %s", watched.asked, tc.asked)
			}
		})
	}
}

// TestSessionExporters has the client choose its outputs when it has seen the result.
func TestSessionExporters(t *testing.T) {
	te := openTest(t)
	te.base()
	def, err := llb.Image("base").File(llb.Mkfile("/made", 0o644, nil)).Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var refs []string
	var told map[string]string
	var refused error
	solve := func(chosen ...*sessionexporter.ExporterRequest) (*bkclient.SolveResponse, error) {
		provider := exporterprovider.New(func(_ context.Context, _ map[string][]byte, of []string) ([]*sessionexporter.ExporterRequest, error) {
			refs = of
			return chosen, nil
		}, exporterprovider.WithFinalizeCallback(func(_ context.Context, response map[string]string) error {
			told = response
			return refused
		}))
		return te.client.Solve(t.Context(), def, bkclient.SolveOpt{EnableSessionExporter: true, Session: []session.Attachable{provider}}, nil)
	}
	chosen := &sessionexporter.ExporterRequest{Type: "image", Attrs: map[string]string{"name": "chosen:1"}}
	res, err := solve(chosen)
	if err != nil {
		t.Fatal(err)
	}
	if len(refs) != 1 || res.ExporterResponse["image.name"] != "chosen:1" || told["containerimage.digest"] == "" || told["containerimage.digest"] != res.ExporterResponse["containerimage.digest"] {
		t.Errorf("refs %q, told %v, response %v", refs, told, res.ExporterResponse)
	}
	if !strings.Contains(te.get(t, "/v1.50/images/json"), "chosen:1") {
		t.Error("there is no image")
	}
	if _, err := solve(&sessionexporter.ExporterRequest{Type: "floppy"}); err == nil || !strings.Contains(err.Error(), "floppy") {
		t.Errorf("unknown type: %v", err)
	}
	if _, err := solve(); err != nil {
		t.Errorf("nothing chosen: %v", err)
	}
	refused = errors.New("not what I wanted")
	if _, err := solve(chosen); err == nil || !strings.Contains(err.Error(), "not what I wanted") {
		t.Errorf("refused: %v", err)
	}
}
