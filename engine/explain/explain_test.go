// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// step is a RUN on line 3 that ran, with the parts "name=value".
func step(parts ...string) *Step {
	s := &Step{
		Number: 1, Vertex: "v", Name: "[build 2/3] RUN make", Stage: "build", File: "Dockerfile", Line: 3, Kind: "exec",
		Outcome: solver.Ran, RecipeKey: strings.Join(parts, ";"),
	}
	for _, p := range parts {
		name, value, _ := strings.Cut(p, "=")
		s.Parts = append(s.Parts, record.Part{Name: name, Value: value})
	}
	return s
}

func document(build string, steps ...*Step) *Document {
	return &Document{Build: build, Project: "p", Steps: steps}
}

func noFiles(digest.Digest) (io.ReadCloser, error) { return nil, errors.New("not kept") }

// TestReasons: for each kind of edit the reason names what was edited and nothing else.
func TestReasons(t *testing.T) {
	base := []string{"op=exec", "arg[0]=/bin/sh", "arg[1]=-c", "arg[2]=make", "env PATH=/bin", "env V=1", "user=root", "mount /=bind, input 0"}
	edited := func(from, to string) *Step {
		parts := make([]string, 0, len(base))
		for _, p := range base {
			if p == from {
				p = to
			}
			if p != "" {
				parts = append(parts, p)
			}
		}
		return step(parts...)
	}
	for _, c := range []struct {
		name   string
		now    *Step
		before *Step
		want   string
	}{
		{"command", edited("arg[2]=make", "arg[2]=make all"), step(base...), "command: make -> make all"},
		{"argument", edited("env V=1", "env V=2"), step(base...), "argument V: 1 -> 2"},
		{"new argument", step(base...), edited("env V=1", ""), "argument V is new: 1"},
		{"argument gone", edited("env V=1", ""), step(base...), "argument V is gone; it was 1"},
		{"variable", edited("env PATH=/bin", "env PATH=/usr/bin"), step(base...), "variable PATH: /bin -> /usr/bin"},
		{"user", edited("user=root", "user=1"), step(base...), "user: root -> 1"},
		{"mount", edited("mount /=bind, input 0", "mount /=bind, input 0, read-only"), step(base...), "mount /: bind, input 0 -> bind, input 0, read-only"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := document("now", c.now)
			d.Arguments = []string{"V"}
			d.Explain([]*Document{document("before", c.before)}, noFiles)
			if c.now.Reason.Why != Changed || c.now.Reason.Build != "before" {
				t.Fatalf("the reason is %+v", c.now.Reason)
			}
			if got := differences(t, d); len(got) != 1 || got[0] != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// differences are the lines of the text that name some.
func differences(t *testing.T, d *Document) []string {
	t.Helper()
	var b strings.Builder
	if err := d.Text(&b, time.Now(), func(*Step) bool { return true }); err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "    ") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// TestNearest: what a step is compared with.
func TestNearest(t *testing.T) {
	at := func(line int, name string) *Step {
		s := step("op=exec", "arg[0]="+name)
		s.Line, s.Name = line, "[build 2/3] "+name
		return s
	}
	other := document("other", at(3, "RUN make"))
	other.Project = "q"
	elsewhere := at(3, "RUN make")
	elsewhere.Stage = "test"
	for _, c := range []struct {
		name    string
		earlier []*Document
		want    string // build:line of the step
	}{
		{"same line", []*Document{document("b", at(2, "RUN a"), at(3, "RUN make -j")), document("a", at(3, "RUN make"))}, "b:3"},
		{"moved", []*Document{document("b", at(3, "RUN new"), at(4, "RUN make"))}, "b:4"},
		{"nearest line", []*Document{document("b", at(1, "RUN x"), at(5, "RUN y"), at(9, "RUN z"))}, "b:1"},
		{"same project first", []*Document{other, document("a", at(3, "RUN make all"))}, "a:3"},
		{"another project at last", []*Document{other}, "other:3"},
		{"another stage", []*Document{document("b", elsewhere)}, ""},
		{"another command", []*Document{document("b", at(3, "COPY a b"))}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := document("now")
			in, s := d.nearest(at(3, "RUN make"), c.earlier)
			got := ""
			if s != nil {
				got = in.Build + ":" + string(rune('0'+s.Line))
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestReasonsWithoutChange: equal keys that were no hit.
func TestReasonsWithoutChange(t *testing.T) {
	failed := step("op=exec")
	failed.Outcome = solver.Failed
	fresh := step("op=exec")
	fresh.Fresh = true
	for _, c := range []struct {
		name   string
		now    *Step
		before *Step
		want   string
	}{
		{"failed", step("op=exec"), failed, FailedBefore},
		{"gone", step("op=exec"), step("op=exec"), Gone},
		{"told", fresh, step("op=exec"), Told},
	} {
		d := document("now", c.now)
		d.Explain([]*Document{document("before", c.before)}, noFiles)
		if c.now.Reason.Why != c.want {
			t.Errorf("%s: %q", c.name, c.now.Reason.Why)
		}
	}
}

// TestOriginOnce: a graph with very many paths is explained in time that grows with its steps.
func TestOriginOnce(t *testing.T) {
	build := func(id string) *Document {
		d := document(id)
		for i := range 60 {
			s := step("op=merge")
			s.Vertex, s.Outcome, s.RecipeKey = string(rune('A'+i)), solver.Found, id
			if i > 0 {
				below := string(rune('A' + i - 1))
				s.Inputs = []Input{{Vertex: below, Recipe: id}, {Vertex: below, Recipe: id}}
			}
			d.Steps = append(d.Steps, s)
		}
		d.Steps[59].Outcome = solver.Ran
		return d
	}
	d := build("now")
	d.Explain([]*Document{build("before")}, noFiles)
	if _, err := json.Marshal(d); err != nil || d.Steps[59].Reason.Why != Changed {
		t.Errorf("%v, %v", d.Steps[59].Reason, err)
	}
}

// TestRedaction: no secret is in a document, and it can still be seen that one has changed.
func TestRedaction(t *testing.T) {
	make := func(token, url string) *Document {
		op := &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{}}}
		v := &solver.Vertex{Digest: "sha256:v", Op: op, Name: "[2/2] RUN curl -H " + token + " " + url}
		return New(context.Background(), Info{
			Build: "b", Project: url + "|Dockerfile", Salt: "salt", Attrs: map[string]string{"build-arg:NPM_TOKEN": token}, Err: errors.New("fetch " + url + " with " + token),
		}, []solver.Report{{Vertex: v, Outcome: solver.Failed, Err: errors.New(token), RecipeParts: []record.Part{
			{Name: "env NPM_TOKEN", Value: token},
			{Name: "arg[0]", Value: "curl " + url},
			{Name: "header authorization_token", Value: "Bearer"},
			{Name: "env PUBLIC_KEY", Value: "shown"},
		}}}, func(context.Context, string) (*record.Record, bool, error) { return nil, false, nil })
	}
	a := make("hunter2hunter2", "https://me:hunter3@example.com/x")
	b := make("swordfish", "https://me:hunter3@example.com/x")
	data, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"hunter2", "hunter3", "Bearer"} {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("%s is in %s", secret, data)
		}
	}
	if !bytes.Contains(data, []byte("shown")) || !bytes.Contains(data, []byte("example.com")) {
		t.Errorf("too much is gone: %s", data)
	}
	if a.Steps[0].Parts[0] == b.Steps[0].Parts[0] {
		t.Error("the change of a secret cannot be seen")
	}
	if a.Steps[0].Parts[0] != make("hunter2hunter2", "").Steps[0].Parts[0] {
		t.Error("equal secrets have different marks")
	}
	attrs := Attrs(map[string]string{"build-arg:NPM_TOKEN": "hunter2", "context": "https://u:p@host/x.git"}, "salt")
	if strings.Contains(attrs["build-arg:NPM_TOKEN"], "hunter2") || attrs["context"] != "https://xxxxx@host/x.git" {
		t.Errorf("attributes are %v", attrs)
	}
}

// TestRedactionOfCaches: clients tell the frontend of the caches to import, with the keys that open them.
func TestRedactionOfCaches(t *testing.T) {
	const key = `wJalr<&>"XUtnFEMI`
	imports, err := json.Marshal([]map[string]any{
		{"Type": "registry", "Attrs": map[string]string{"ref": "reg.test/cache"}},
		{"Type": "s3", "Attrs": map[string]string{"bucket": "ours", "secret_access_key": key, "session_token": "FwoGZXIvYXdzEBYa"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	attrs := map[string]string{"cache-imports": string(imports)}
	shown := Attrs(attrs, "salt")["cache-imports"]
	text := NewRedactor("salt", attrs, nil).Text("403 for " + key + " and FwoGZXIvYXdzEBYa at ours")
	for _, s := range []string{shown, text} {
		if strings.Contains(s, "XUtnFEMI") || strings.Contains(s, "FwoGZX") || !strings.Contains(s, "ours") {
			t.Errorf("shown: %s", s)
		}
	}
	if attrs["cache-imports"] != string(imports) {
		t.Error("the request itself has been changed")
	}
}

func TestArguments(t *testing.T) {
	src := &pb.SourceInfo{Data: []byte("ARG BASE=x\nFROM $BASE\narg A B=1\nENV C=1 D=2\nENV E f g\nARG C\n# ARG NO\n")}
	got := arguments([]solver.Report{{Vertex: &solver.Vertex{Sources: []*pb.SourceInfo{src, src}}}})
	if strings.Join(got, " ") != "A B BASE" {
		t.Errorf("got %q", got)
	}
}
