// SPDX-License-Identifier: Apache-2.0

package provenance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseOptions(t *testing.T) {
	o, err := ParseOptions(map[string]string{})
	if want := (Options{Mode: Max, Version: types.ProvenanceSLSA1, Filename: "provenance.json"}); err != nil || o != want {
		t.Errorf("%+v, %v", o, err)
	}
	o, err = ParseOptions(map[string]string{
		"mode": "min", "version": "v0.2", "builder-id": "b", "reproducible": "true", "inline-only": "1", "filename": "f", "disabled": "false", "complete-materials": "true",
	})
	want := Options{Mode: Min, Version: types.ProvenanceSLSA02, BuilderID: "b", Reproducible: true, InlineOnly: true, Filename: "f", Complete: true}
	if err != nil || o != want {
		t.Errorf("%+v, %v", o, err)
	}
	for _, bad := range []string{"mode=all", "version=v2", "reproducible=perhaps", "filename=a/b", "filename=", "capture-usage=true", "nonsense=1"} {
		key, value, _ := strings.Cut(bad, "=")
		if _, err := ParseOptions(map[string]string{key: value}); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestCredentialsAreTakenOut(t *testing.T) {
	for in, want := range map[string]string{
		"https://u:p@h/x?y=%20#r": "https://xxxxx:xxxxx@h/x?y=%20#r", "ssh://git@h/x": "ssh://xxxxx@h/x", "git@h:x.git": "git@h:x.git",
		"u:p@h": "u:p@h", "a b %zz": "a b %zz", "": "", "http://h/u@v": "http://h/u@v",
	} {
		if got := redact(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	source := &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{
		Identifier: "git://https://u:p@h/x.git#main", Attrs: map[string]string{pb.AttrFullRemoteURL: "https://u:p@h/x.git", pb.AttrLocalUniqueID: "1"},
	}}}
	clean(source)
	if got := source.GetSource(); got.Identifier != "git://https://xxxxx:xxxxx@h/x.git#main" || len(got.Attrs) != 1 || got.Attrs[pb.AttrFullRemoteURL] != "https://xxxxx:xxxxx@h/x.git" {
		t.Errorf("%v", got)
	}
	exec := &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{Meta: &pb.Meta{
		Env: []string{"A=http://u:p@h", "B", "C=u:p@h"}, ProxyEnv: &pb.ProxyEnv{HttpProxy: "http://u:p@h"},
	}}}}
	clean(exec)
	if meta := exec.GetExec().Meta; meta.Env[0] != "A=http://xxxxx:xxxxx@h" || meta.Env[2] != "C=u:p@h" || meta.ProxyEnv.HttpProxy != "http://xxxxx:xxxxx@h" {
		t.Errorf("%v", meta)
	}
}

func TestMinimize(t *testing.T) {
	shared := map[string]string{"build-arg:A": "1", "target": "t"}
	p := &types.Parameters{
		Args: shared, Secrets: []*types.Secret{{ID: "s"}}, SSH: []*types.SSH{{ID: "a"}},
		Root: &types.RequestProvenance{Request: &types.Parameters{Args: map[string]string{"label:x": "y"}}},
	}
	if !minimize(p) || len(p.Args) != 1 || p.Args["target"] != "t" || p.Secrets != nil || p.SSH != nil || len(p.Root.Request.Args) != 0 {
		t.Errorf("%+v", p)
	}
	if len(shared) != 2 {
		t.Error("the request itself was changed")
	}
	if minimize(&types.Parameters{Args: map[string]string{"target": "t"}}) || minimize(nil) {
		t.Error("nothing was left out, and that counts as incomplete")
	}
}

func TestImagesOfOnePlatform(t *testing.T) {
	amd, arm := &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	all := []exptypes.Platform{{ID: "linux/amd64", Platform: *amd}, {ID: "linux/arm64", Platform: *arm}}
	images := []types.ImageSource{{Ref: "both", Platform: amd}, {Ref: "both", Platform: arm}, {Ref: "tool", Platform: amd}}
	for id, want := range map[string]string{"linux/amd64": "both/amd64 tool/amd64", "linux/arm64": "both/arm64 tool/amd64", "": "both/amd64 both/arm64 tool/amd64"} {
		var got []string
		for _, i := range ofPlatform(images, id, all) {
			got = append(got, i.Ref+"/"+i.Platform.Architecture)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", id, got, want)
		}
	}
}

func TestReadEnvironment(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("1.json", `{"host":"a","n":1}`)
	put("2.json", `{"host":"b"}`)
	put("other", `not JSON`)
	env, err := ReadEnvironment(dir)
	if diff := cmp.Diff(map[string]any{"host": "b", "n": 1.0}, env); diff != "" || err != nil {
		t.Errorf("%s, %v", diff, err)
	}
	if env, err := ReadEnvironment(filepath.Join(dir, "none")); env != nil || err != nil {
		t.Errorf("%v, %v", env, err)
	}
	put("3.json", `{"builderPlatform":"x"}`)
	if _, err := ReadEnvironment(dir); err == nil || !strings.Contains(err.Error(), "builderPlatform") {
		t.Errorf("got %v", err)
	}
	put("3.json", `[`)
	if _, err := ReadEnvironment(dir); err == nil || !strings.Contains(err.Error(), "3.json") {
		t.Errorf("got %v", err)
	}
}
