// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
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
		addHosts: []string{"h:1.2.3.4", "six:[::1]", "eq=5.6.7.8", "up:host-gateway"}, network: "host",
	}
	solve := newSolveOpt()
	if err := o.addAttrs(solve, func() (string, error) { return "9.9.9.9", nil }); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"build-arg:A": "1=2", "build-arg:FROM_ENV": "e=1", "build-arg:EMPTY": "", "label:l": "v=w", "label:bare": "",
		"target": "t", "no-cache": "a,b", "image-resolve-mode": "pull", "platform": "linux/amd64",
		"add-hosts": "h=1.2.3.4,six=::1,eq=5.6.7.8,up=9.9.9.9", "force-network-mode": "host",
	}
	if !maps.Equal(solve.FrontendAttrs, want) {
		t.Errorf("got  %v\nwant %v", solve.FrontendAttrs, want)
	}
	if !slices.Equal(solve.AllowedEntitlements, []string{"network.host"}) {
		t.Errorf("entitlements %v", solve.AllowedEntitlements)
	}
	for _, bad := range []buildOptions{
		{buildArgs: []string{"=x"}},
		{labels: []string{"=x"}},
		{noCache: true, noCacheFilter: []string{"a"}},
		{addHosts: []string{"h"}},
		{addHosts: []string{"h:x"}},
		{addHosts: []string{"h:host-gateway"}},
		{network: "x"},
	} {
		if err := bad.addAttrs(newSolveOpt(), (&app{}).hostGateway(t.Context(), "none")); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

func TestBuildOutputs(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		o    buildOptions
		want string // type, attributes and directory of each; or error
	}{
		{buildOptions{}, "image{}"},
		{buildOptions{tags: []string{"a", "localhost:5000/b:1"}}, "image{name=docker.io/library/a:latest,localhost:5000/b:1}"},
		{buildOptions{tags: []string{"a"}, push: true}, "image{name=docker.io/library/a:latest push=true}"},
		{buildOptions{outputs: []string{"type=registry,name=x/y"}}, "image{name=docker.io/x/y:latest push=true}"},
		{buildOptions{push: true}, "error: a push needs a name"},
		{buildOptions{tags: []string{"UPPER"}}, "error: image name"},
		{buildOptions{outputs: []string{"type=local,dest=x"}}, "local{} dir x"},
		{buildOptions{outputs: []string{"dir"}}, "local{} dir dir"},
		{buildOptions{outputs: []string{"type=local,dest=x,mode=delete,platform-split=true"}}, "local{mode=delete platform-split=true} dir x"},
		{buildOptions{outputs: []string{"-"}}, "tar{} stdout"},
		{buildOptions{outputs: []string{"type=tar,dest=t.tar"}}, "tar{} t.tar"},
		{buildOptions{outputs: []string{"type=oci"}}, "oci{} stdout"},
		{buildOptions{outputs: []string{"type=oci,dest=a.tar"}, tags: []string{"a"}}, "oci{name=docker.io/library/a:latest} a.tar"},
		{buildOptions{outputs: []string{"type=oci,tar=false,dest=layout"}}, "oci{tar=false} dir layout"},
		{buildOptions{outputs: []string{"type=docker,dest=a.tar,compression=zstd"}}, "docker{compression=zstd} a.tar"},
		{buildOptions{outputs: []string{"type=docker"}}, "image{}"},
		{buildOptions{outputs: []string{"out", "type=oci,dest=a.tar"}, load: true}, "local{} dir out; oci{} a.tar; image{}"},
		{buildOptions{outputs: []string{"out"}, push: true, tags: []string{"a"}}, "local{} dir out; image{name=docker.io/library/a:latest push=true}"},
		{buildOptions{outputs: []string{"type=image"}, push: true, load: true, tags: []string{"a"}}, "image{name=docker.io/library/a:latest push=true}"},
		{buildOptions{outputs: []string{"type=cacheonly"}}, ""},
		{buildOptions{outputs: []string{"type=cacheonly"}, load: true}, "image{}"},
		{buildOptions{outputs: []string{"type=cacheonly"}, tags: []string{"a"}}, "error: none of the outputs"},
		{buildOptions{outputs: []string{"type=cacheonly,dest=x"}}, "error: has no attributes"},
		{buildOptions{outputs: []string{"out"}, tags: []string{"a"}}, "error: none of the outputs"},
		{buildOptions{outputs: []string{"-", "type=oci"}}, "error: two outputs cannot both go"},
		{buildOptions{outputs: []string{"type=oci,dest=a", "type=tar,dest=./a"}}, "error: two outputs cannot both be"},
		{buildOptions{outputs: []string{"type=local"}}, "error: want dest=DIR"},
		{buildOptions{outputs: []string{"type=local,dest=-"}}, "error: a directory cannot go"},
		{buildOptions{outputs: []string{"file"}}, "error: not a directory"},
		{buildOptions{outputs: []string{"type=tar,dest=."}}, "error: is a directory"},
		{buildOptions{outputs: []string{"type=image,dest=x"}}, "error: has no dest"},
		{buildOptions{outputs: []string{"dest=x"}}, "error: has no type"},
		{buildOptions{outputs: []string{""}}, "error: empty"},
		{buildOptions{outputs: []string{"type=oci,tar=maybe"}}, "error: tar=maybe"},
	} {
		var got []string
		out, err := tc.o.readOutputs(&bytes.Buffer{})
		if err != nil {
			got = []string{"error: " + err.Error()}
		} else {
			files := 0
			for _, e := range out.exports {
				var attrs []string
				for _, k := range slices.Sorted(maps.Keys(e.Attrs)) {
					attrs = append(attrs, k+"="+e.Attrs[k])
				}
				text := e.Type + "{" + strings.Join(attrs, " ") + "}"
				switch {
				case e.OutputDir != "":
					text += " dir " + e.OutputDir
				case e.Output != nil && files < len(out.files):
					text += " " + filepath.Base(out.files[files].path)
					files++
				case e.Output != nil && out.toStdout:
					text += " stdout"
				}
				got = append(got, text)
			}
		}
		text := strings.Join(got, "; ")
		if reason, ok := strings.CutPrefix(tc.want, "error: "); ok && strings.HasPrefix(text, "error: ") && strings.Contains(text, reason) {
			continue
		}
		if text != tc.want {
			t.Errorf("%q -t %q push %v load %v: %s, want %s", tc.o.outputs, tc.o.tags, tc.o.push, tc.o.load, text, tc.want)
		}
	}
}

// TestOutputFile: a file has its name only when the build has ended well.
func TestOutputFile(t *testing.T) {
	dir := t.TempDir()
	dest := filepath.Join(dir, "new", "a.tar")
	for _, good := range []bool{true, false} {
		out := &outputs{}
		if err := out.add(map[string]string{"type": "tar", "dest": dest}, nil); err != nil {
			t.Fatal(err)
		}
		w, err := out.exports[0].Output(nil)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(w, "good %v", good)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if good {
			if err := out.commit(); err != nil {
				t.Fatal(err)
			}
		}
		out.discard()
		if b, err := os.ReadFile(dest); err != nil || string(b) != "good true" {
			t.Errorf("%q, %v", b, err)
		}
		if files, err := os.ReadDir(filepath.Dir(dest)); err != nil || len(files) != 1 {
			t.Errorf("%v, %v", files, err)
		}
	}
}

func TestMirrorSparesTheContext(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	for dest, ok := range map[string]bool{dir: false, src: false, filepath.Join(src, "out"): true, filepath.Join(dir, "out"): true} {
		out := &outputs{}
		if err := out.add(map[string]string{"type": "local", "dest": dest, "mode": "delete"}, nil); err != nil {
			t.Fatal(err)
		}
		if err := out.checkMirrors(src); (err == nil) != ok {
			t.Errorf("%s: %v", dest, err)
		}
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
	from, err := a.addContext(solve, "-", dir)
	if err != nil {
		t.Fatal(err)
	}
	temp := solve.FrontendAttrs[local+"dockerfile"]
	if data, err := os.ReadFile(filepath.Join(temp, "Dockerfile")); err != nil || string(data) != "FROM scratch\n" {
		t.Errorf("-f -: %q, %v", data, err)
	}
	from.cleanup()
	if exists(temp) {
		t.Error("the Dockerfile from standard input is left behind")
	}
	for _, bad := range [][2]string{{"-", "-"}, {"", filepath.Join(dir, "nothing")}, {"", other}, {filepath.Join(dir, "nothing"), dir}, {dir, dir}} {
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
