// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/peer"

	"github.com/seed-68981b69/slipway/exporter"
)

type fakeExporter struct{ attrs map[string]string }

func (fakeExporter) Name() string { return "fake" }
func (fakeExporter) Export(context.Context, exporter.Result, exporter.Options) (map[string]string, error) {
	return nil, nil
}

func testServer(t *testing.T) *Server {
	t.Helper()
	s, err := New(Options{Dir: t.TempDir(), Exporters: exporter.Types{"image": func(attrs map[string]string) (exporter.Exporter, error) {
		if attrs["bad"] != "" {
			return nil, errors.New("attribute not supported yet: bad")
		}
		return fakeExporter{attrs}, nil
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRequestsAreCheckedFieldByField: what is not done is refused with its name.
func TestRequestsAreCheckedFieldByField(t *testing.T) {
	def := &pb.Definition{Def: [][]byte{{}}}
	for _, tc := range []struct {
		name string
		req  *controlapi.SolveRequest
		want string // in the error; "" means accepted
	}{
		{"frontend", &controlapi.SolveRequest{Ref: "r", Frontend: "dockerfile.v0"}, ""},
		{"definition", &controlapi.SolveRequest{Ref: "r", Definition: def}, ""},
		{"client's frontend", &controlapi.SolveRequest{Ref: "r", Definition: &pb.Definition{}, Cache: &controlapi.CacheOptions{}}, ""},
		{"no ref", &controlapi.SolveRequest{Frontend: "dockerfile.v0"}, "ref"},
		{"both", &controlapi.SolveRequest{Ref: "r", Frontend: "dockerfile.v0", Definition: def}, "not both"},
		{"empty policy", &controlapi.SolveRequest{Ref: "r", SourcePolicy: &spb.Policy{}}, ""},
		{"policy", &controlapi.SolveRequest{Ref: "r", SourcePolicy: &spb.Policy{Rules: []*spb.Rule{{}}}}, "invalid nil selector"},
		{"internal", &controlapi.SolveRequest{Ref: "r", Internal: true}, ""},
		{"policy session", &controlapi.SolveRequest{Ref: "r", SourcePolicySession: "s"}, ""},
		{"proxy", &controlapi.SolveRequest{Ref: "r", ProxyNetwork: true}, "proxy network"},
		{"compatibility", &controlapi.SolveRequest{Ref: "r", CompatibilityVersion: 10}, "compatibility"},
		{"current compatibility", &controlapi.SolveRequest{Ref: "r", CompatibilityVersion: 30}, ""},
		{"cache export", &controlapi.SolveRequest{Ref: "r", Cache: &controlapi.CacheOptions{Exports: []*controlapi.CacheOptionsEntry{{Type: "inline"}}}}, ""},
		{"cache import", &controlapi.SolveRequest{Ref: "r", Cache: &controlapi.CacheOptions{Imports: []*controlapi.CacheOptionsEntry{{Type: "gha"}}}}, "cache import of type gha"},
		{"old cache export", &controlapi.SolveRequest{Ref: "r", Cache: &controlapi.CacheOptions{ExportRefDeprecated: "X"}}, "cache export"},
		{"old cache import", &controlapi.SolveRequest{Ref: "r", Cache: &controlapi.CacheOptions{ImportRefsDeprecated: []string{"X"}}}, "cache import"},
		{"attestation", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:sbom": "generator=x"}}, ""},
		{"unknown attestation", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:vsa": ""}}, "vsa"},
		{"no scanner", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:sbom": "generator="}}, "generator"},
		{"mode", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:provenance": "mode=most"}}, "mode=most: want min or max"},
		{"version", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:provenance": "version=v3"}}, "version=v3"},
		{"usage", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:provenance": "capture-usage=true"}}, "not supported yet: capture-usage=true"},
		{"file", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:provenance": "filename=../x"}}, "filename=../x"},
		{"disabled attestation", &controlapi.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:provenance": "disabled=true"}}, ""},
		{"image", &controlapi.SolveRequest{Ref: "r", Exporters: []*controlapi.Exporter{{Type: "image"}}}, ""},
		{"old exporter", &controlapi.SolveRequest{Ref: "r", ExporterDeprecated: "image"}, ""},
		{"unknown exporter", &controlapi.SolveRequest{Ref: "r", Exporters: []*controlapi.Exporter{{Type: "local"}}}, "local"},
		{"exporter attribute", &controlapi.SolveRequest{Ref: "r", Exporters: []*controlapi.Exporter{{Type: "image", Attrs: map[string]string{"bad": "1"}}}}, "bad"},
		{"two exporters", &controlapi.SolveRequest{Ref: "r", Exporters: []*controlapi.Exporter{{Type: "image"}, {Type: "image"}}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := testServer(t).parse(t.Context(), tc.req)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestSourceDateEpochReachesTheExporter(t *testing.T) {
	req := &controlapi.SolveRequest{
		Ref: "r", FrontendAttrs: map[string]string{"build-arg:SOURCE_DATE_EPOCH": "5"}, Exporters: []*controlapi.Exporter{{Type: "image"}},
	}
	r, err := testServer(t).parse(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.exporters[0].(fakeExporter).attrs["source-date-epoch"]; got != "5" {
		t.Errorf("got %q", got)
	}
}

func TestLocalDirsNeedOurUserOnOurHost(t *testing.T) {
	host, err := HostID()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, tc := range []struct {
		name     string
		host     string
		sameUser bool
		want     bool
	}{
		{"same user, same host", host, true, true},
		{"another user", host, false, false},
		{"another host", "elsewhere", true, false},
		{"no host", "", true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			attrs := map[string]string{HostAttr: tc.host, LocalDirAttr + "context": dir, "target": "x"}
			got, err := takeLocalDirs(attrs, tc.sameUser)
			if err != nil || (got["context"] == dir) != tc.want {
				t.Errorf("got %v, %v", got, err)
			}
			if len(attrs) != 1 || attrs["target"] != "x" {
				t.Errorf("the frontend would see %v", attrs)
			}
		})
	}
	for _, bad := range []string{"relative", dir + "/missing", "/proc/version"} {
		if _, err := takeLocalDirs(map[string]string{HostAttr: host, LocalDirAttr + "context": bad}, true); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}

func TestSamePeerUser(t *testing.T) {
	with := func(info peerInfo) context.Context {
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: info})
	}
	uid := uint32(os.Geteuid())
	if !samePeerUser(with(peerInfo{uid: uid, known: true})) {
		t.Error("our own user is not recognised")
	}
	if samePeerUser(with(peerInfo{uid: uid + 1, known: true})) || samePeerUser(with(peerInfo{uid: uid})) || samePeerUser(t.Context()) {
		t.Error("somebody else is taken for us")
	}
}
