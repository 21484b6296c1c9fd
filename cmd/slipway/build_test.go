// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/tonistiigi/fsutil"

	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

func newSolveOpt() *bkclient.SolveOpt {
	return &bkclient.SolveOpt{FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{}}
}

func TestBuildAttrs(t *testing.T) {
	t.Setenv("FROM_ENV", "e=1")
	o := buildOptions{
		buildArgs: []string{"A=1=2", "FROM_ENV", "NOT_SET", "EMPTY="}, labels: []string{"l=v=w", "bare"},
		target: "t", noCacheFilter: []string{"a", "b"}, pull: true, platforms: []string{"linux/amd64"},
		addHosts: []string{"h:1.2.3.4", "six:[::1]", "eq=5.6.7.8"}, network: "host",
	}
	solve := newSolveOpt()
	if err := o.addAttrs(solve); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"build-arg:A": "1=2", "build-arg:FROM_ENV": "e=1", "build-arg:EMPTY": "", "label:l": "v=w", "label:bare": "",
		"target": "t", "no-cache": "a,b", "image-resolve-mode": "pull", "platform": "linux/amd64",
		"add-hosts": "h=1.2.3.4,six=::1,eq=5.6.7.8", "force-network-mode": "host",
	}
	if !maps.Equal(solve.FrontendAttrs, want) {
		t.Errorf("got  %v\nwant %v", solve.FrontendAttrs, want)
	}
	if !slices.Equal(solve.AllowedEntitlements, []string{"network.host"}) {
		t.Errorf("entitlements %v", solve.AllowedEntitlements)
	}
	for _, bad := range []buildOptions{
		{buildArgs: []string{"=x"}}, {labels: []string{"=x"}}, {noCache: true, noCacheFilter: []string{"a"}},
		{addHosts: []string{"h"}}, {addHosts: []string{"h:x"}}, {addHosts: []string{"h:host-gateway"}}, {network: "x"},
	} {
		if err := bad.addAttrs(newSolveOpt()); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

func TestBuildExport(t *testing.T) {
	for _, tc := range []struct {
		o    buildOptions
		want map[string]string // nil means an error
	}{
		{buildOptions{}, map[string]string{}},
		{buildOptions{tags: []string{"a", "localhost:5000/b:1"}}, map[string]string{"name": "docker.io/library/a:latest,localhost:5000/b:1"}},
		{buildOptions{tags: []string{"a"}, push: true}, map[string]string{"name": "docker.io/library/a:latest", "push": "true"}},
		{buildOptions{output: "type=registry,name=x/y"}, map[string]string{"name": "docker.io/x/y:latest", "push": "true"}},
		{buildOptions{push: true}, nil},
		{buildOptions{tags: []string{"UPPER"}}, nil},
		{buildOptions{output: "type=local,dest=x"}, nil},
		{buildOptions{output: "dir"}, nil},
		{buildOptions{output: "type=cacheonly", tags: []string{"a"}}, nil},
	} {
		solve := newSolveOpt()
		err := tc.o.addExport(solve)
		switch {
		case tc.want == nil:
			if err == nil {
				t.Errorf("%+v is accepted", tc.o)
			}
		case err != nil:
			t.Errorf("%+v: %v", tc.o, err)
		case !maps.Equal(solve.Exports[0].Attrs, tc.want):
			t.Errorf("%+v: %v", tc.o, solve.Exports[0].Attrs)
		}
	}
	solve := newSolveOpt()
	o := buildOptions{output: "type=cacheonly"}
	if err := o.addExport(solve); err != nil || len(solve.Exports) > 0 {
		t.Errorf("cacheonly: %v, %v", solve.Exports, err)
	}
}

func TestBuildContext(t *testing.T) {
	dir := t.TempDir()
	a := newApp(strings.NewReader("FROM scratch\n"), nil, &bytes.Buffer{})
	if _, err := a.addContext(newSolveOpt(), "", dir); err == nil || !strings.Contains(err.Error(), "no Dockerfile") {
		t.Errorf("without a Dockerfile: %v", err)
	}
	other := filepath.Join(t.TempDir(), "My.file")
	for _, path := range []string{filepath.Join(dir, "Dockerfile"), other} {
		if err := os.WriteFile(path, []byte("FROM scratch\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	local := buildkitapi.LocalDirAttr
	for _, tc := range []struct{ file, filename, dockerfileDir string }{
		{"", "Dockerfile", dir},
		{other, "My.file", filepath.Dir(other)},
	} {
		solve := newSolveOpt()
		if _, err := a.addContext(solve, tc.file, dir); err != nil {
			t.Fatal(err)
		}
		attrs := solve.FrontendAttrs
		if attrs["filename"] != tc.filename || attrs[local+"context"] != dir || attrs[local+"dockerfile"] != tc.dockerfileDir {
			t.Errorf("-f %q: %v", tc.file, attrs)
		}
	}
	solve := newSolveOpt()
	cleanup, err := a.addContext(solve, "-", dir)
	if err != nil {
		t.Fatal(err)
	}
	temp := solve.FrontendAttrs[local+"dockerfile"]
	if data, err := os.ReadFile(filepath.Join(temp, "Dockerfile")); err != nil || string(data) != "FROM scratch\n" {
		t.Errorf("-f -: %q, %v", data, err)
	}
	cleanup()
	if exists(temp) {
		t.Error("the Dockerfile from standard input is left behind")
	}
	for _, bad := range [][2]string{{"", "-"}, {"", filepath.Join(dir, "nothing")}, {"", other}, {filepath.Join(dir, "nothing"), dir}, {dir, dir}} {
		if _, err := a.addContext(newSolveOpt(), bad[0], bad[1]); err == nil {
			t.Errorf("-f %q %q is accepted", bad[0], bad[1])
		}
	}
	solve = newSolveOpt()
	if _, err := a.addContext(solve, "", "https://example.com/x.tar"); err != nil || solve.FrontendAttrs["context"] == "" || len(solve.LocalMounts) > 0 {
		t.Errorf("a URL: %v, %v", solve.FrontendAttrs, err)
	}
}

func TestNamedContexts(t *testing.T) {
	dir := t.TempDir()
	solve := newSolveOpt()
	for _, spec := range []string{"dir=" + dir, "base:latest=docker-image://x"} {
		if err := addNamedContext(solve, spec); err != nil {
			t.Fatal(err)
		}
	}
	if a := solve.FrontendAttrs; a["context:dir"] != "local:dir" || a["context:base"] != "docker-image://x" || solve.LocalMounts["dir"] == nil {
		t.Errorf("got %v", a)
	}
	for _, bad := range []string{"x", "=y", "x=", "x=/nothing", "x=oci-layout:///y", "X Y=" + dir} {
		if err := addNamedContext(newSolveOpt(), bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestSecretFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("A_SECRET", "y")
	for _, good := range []string{"id=a,src=" + file, "id=a,source=" + file + ",type=file", "id=a,env=A_SECRET", "id=A_SECRET", "id=a,type=env,src=A_SECRET"} {
		if _, err := secretProvider([]string{good}); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"src=" + file, "id=a,src=/nothing", "id=a,env=NOT_SET", "id=a,what=b", "id=a,type=x", "a"} {
		if _, err := secretProvider([]string{bad}); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}
