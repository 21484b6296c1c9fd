// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"github.com/opencontainers/go-digest"
)

func rule(action spb.PolicyAction, identifier, to string) *spb.Rule {
	r := &spb.Rule{Action: action, Selector: &spb.Selector{Identifier: identifier}}
	if to != "" {
		r.Updates = &spb.Update{Identifier: to}
	}
	return r
}

func TestSourcePolicies(t *testing.T) {
	te := openTest(t)
	te.base()
	const baseID = "docker-image://docker.io/library/base:latest"
	dockerfile := llb.Scratch().File(llb.Mkfile("/Dockerfile", 0o644, []byte("FROM nosuch\nCOPY --from=base /bin/true /true\n")))
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("served " + r.URL.Path)) }))
	t.Cleanup(files.Close)
	for _, tc := range []struct {
		name  string
		state llb.State // nil builds the Dockerfile
		rules []*spb.Rule
		want  string // in the error; "" for none
	}{
		{name: "none", state: llb.Image("base")},
		{name: "denied", state: llb.Image("base"), rules: []*spb.Rule{rule(spb.PolicyAction_DENY, baseID, "")}, want: `source "` + baseID + `" denied by policy`},
		{name: "denied in a Dockerfile", rules: []*spb.Rule{rule(spb.PolicyAction_DENY, "docker-image://*", "")}, want: "could not resolve image due to policy"},
		{name: "allowed after all", state: llb.Image("base"), rules: []*spb.Rule{rule(spb.PolicyAction_DENY, "*", ""), rule(spb.PolicyAction_ALLOW, baseID, "")}},
		{name: "converted in a Dockerfile", rules: []*spb.Rule{rule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/nosuch:*", baseID)}},
		{name: "converted below", state: llb.Image("nosuch").Run(llb.Shlex("/bin/true")).Root().File(llb.Mkfile("/x", 0o600, nil)), rules: []*spb.Rule{rule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/nosuch:latest", baseID)}},
		{name: "converted and denied", state: llb.Image("nosuch"), rules: []*spb.Rule{
			rule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/nosuch:latest", baseID), rule(spb.PolicyAction_DENY, baseID, ""),
		}, want: "denied by policy"},
		{name: "round and round", state: llb.Image("nosuch"), rules: []*spb.Rule{
			rule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/nosuch:latest", "docker-image://docker.io/library/other:latest"),
			rule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/other:latest", "docker-image://docker.io/library/nosuch:latest"),
		}, want: "too many operations"},
		{name: "checksum added", state: llb.HTTP(files.URL + "/f"), rules: []*spb.Rule{{
			Action: spb.PolicyAction_CONVERT, Selector: &spb.Selector{Identifier: files.URL + "/f"},
			Updates: &spb.Update{Attrs: map[string]string{pb.AttrHTTPChecksum: digest.FromString("something else").String()}},
		}}, want: "digest mismatch"},
		{name: "invalid", state: llb.Image("base"), rules: []*spb.Rule{{}}, want: "invalid nil selector in policy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opt := bkclient.SolveOpt{SourcePolicy: &spb.Policy{Version: 1, Rules: tc.rules}}
			if tc.state.Output() == nil {
				opt.Frontend, opt.FrontendInputs = "dockerfile.v0", map[string]llb.State{"dockerfile": dockerfile, "context": llb.Scratch()}
			}
			var def *llb.Definition
			if tc.state.Output() != nil {
				var err error
				if def, err = tc.state.Marshal(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			_, err := te.client.Solve(t.Context(), def, opt, nil)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}

	t.Run("of one request", func(t *testing.T) {
		deny := []*spb.Policy{{Version: 1, Rules: []*spb.Rule{rule(spb.PolicyAction_DENY, baseID, "")}}}
		_, err := te.client.Build(t.Context(), bkclient.SolveOpt{}, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			def, err := llb.Image("base").Marshal(ctx)
			if err != nil {
				return nil, err
			}
			if _, err := c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB(), SourcePolicies: deny, Evaluate: true}); err == nil || !strings.Contains(err.Error(), "denied by policy") {
				t.Errorf("Solve: %v", err)
			}
			if _, _, _, err := c.ResolveImageConfig(ctx, "docker.io/library/base:latest", sourceresolver.Opt{SourcePolicies: deny, ImageOpt: &sourceresolver.ResolveImageOpt{}}); err == nil || !strings.Contains(err.Error(), "denied by policy") {
				t.Errorf("ResolveImageConfig: %v", err)
			}
			// Others of the build are not concerned.
			return c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB(), Evaluate: true})
		}, nil)
		if err != nil {
			t.Error(err)
		}
	})

	t.Run("asked of the client", func(t *testing.T) {
		var asked []string
		policy := func(_ context.Context, req *policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gwpb.ResolveSourceMetaRequest, error) {
			source := req.Source.Source
			asked = append(asked, source.Identifier)
			switch {
			case strings.Contains(source.Identifier, "nosuch"):
				return &policysession.DecisionResponse{Action: spb.PolicyAction_CONVERT, Update: &pb.SourceOp{Identifier: baseID}}, nil, nil
			case req.Source.Image == nil:
				return nil, &gwpb.ResolveSourceMetaRequest{Source: source, Image: &gwpb.ResolveSourceImageRequest{}}, nil
			case !strings.Contains(string(req.Source.Image.Config), "linux"):
				return &policysession.DecisionResponse{Action: spb.PolicyAction_DENY}, nil, nil
			}
			return &policysession.DecisionResponse{Action: spb.PolicyAction_ALLOW}, nil, nil
		}
		solve := func(p policysession.PolicyCallback) error {
			def, err := llb.Image("nosuch").Marshal(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = te.client.Solve(t.Context(), def, bkclient.SolveOpt{SourcePolicyProvider: policysession.NewPolicyProvider(p)}, nil)
			return err
		}
		if err := solve(policy); err != nil || len(asked) != 3 {
			t.Errorf("%v, asked for %q", err, asked)
		}
		err := solve(func(context.Context, *policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gwpb.ResolveSourceMetaRequest, error) {
			return &policysession.DecisionResponse{Action: spb.PolicyAction_DENY, DenyMessages: []*policysession.DenyMessage{{Message: "not on a Monday"}}}, nil, nil
		})
		if err == nil || !strings.Contains(err.Error(), "not allowed by policy: action DENY") {
			t.Errorf("denied: %v", err)
		}
		if m := policysession.DenyMessages(err); len(m) != 1 || m[0].Message != "not on a Monday" {
			t.Errorf("messages %v", m)
		}
	})
}

// TestSourceMetadata asks what git and HTTP sources stand for.
func TestSourceMetadata(t *testing.T) {
	te := openTest(t)
	const modified = "Mon, 02 Jan 2006 15:04:05 GMT"
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Last-Modified", modified)
		w.Write([]byte("text"))
	}))
	t.Cleanup(files.Close)
	_, err := te.client.Build(t.Context(), bkclient.SolveOpt{}, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		md, err := c.ResolveSourceMetadata(ctx, &pb.SourceOp{Identifier: files.URL + "/name.txt"}, sourceresolver.Opt{})
		if err != nil {
			return nil, err
		}
		if h := md.HTTP; h == nil || h.Digest != digest.FromString("text") || h.Filename != "name.txt" || h.LastModified == nil || h.LastModified.Format(http.TimeFormat) != modified {
			t.Errorf("http: %+v", md.HTTP)
		}
		return gwclient.NewResult(), nil
	}, nil)
	if err != nil {
		t.Error(err)
	}
}
