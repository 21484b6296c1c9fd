// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

type client struct {
	solver.Session
	dir      string
	filtered bool
	req      solver.LocalRequest
}

func (c *client) Local(_ context.Context, req solver.LocalRequest) (solver.LocalDir, error) {
	c.req = req
	return solver.LocalDir{Path: c.dir, Filtered: c.filtered}, nil
}

type progress struct{ bytes int64 }

func (*progress) Log(int, []byte) {}
func (*progress) Warn(string)     {}
func (p *progress) Status(_ string, n, _ int64, done bool) {
	if done {
		p.bytes = n
	}
}

type fixture struct {
	t      testing.TB
	dir    string
	layers *layer.Store
	snaps  *snapshot.Store
	make   func(*solver.Vertex) (solver.Source, error)
	sent   int64
}

func newFixture(t testing.TB) *fixture {
	tmp := t.TempDir()
	layers, err := layer.Open(filepath.Join(tmp, "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { layers.Close() })
	snaps, err := snapshot.Open(filepath.Join(tmp, "snapshots"), layers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(snaps.Close)
	dir := filepath.Join(tmp, "context")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return &fixture{t: t, dir: dir, layers: layers, snaps: snaps, make: New(Deps{Layers: layers})}
}

func (f *fixture) write(name, content string) {
	f.t.Helper()
	p := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func vertex(attrs map[string]string) *solver.Vertex {
	return &solver.Vertex{Op: &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "local://context", Attrs: attrs}}}}
}

func list(values ...string) string {
	b, _ := json.Marshal(values)
	return string(b)
}

func (f *fixture) run(attrs map[string]string, c *client) (snapshot.Snapshot, error) {
	f.t.Helper()
	s, err := f.make(vertex(attrs))
	if err != nil {
		return nil, err
	}
	if c == nil {
		c = &client{dir: f.dir}
	}
	p := &progress{}
	pin, err := s.Pin(f.t.Context(), nil)
	if err != nil || !pin.ByContent {
		f.t.Fatalf("pin %+v, %v", pin, err)
	}
	out, err := s.Run(f.t.Context(), &solver.Env{Session: c, Progress: p}, nil)
	if err != nil {
		return nil, err
	}
	f.sent = p.bytes
	return out[0], nil
}

// show lists the names and contents of a snapshot.
func (f *fixture) show(s snapshot.Snapshot) []string {
	f.t.Helper()
	v, err := f.snaps.View(f.t.Context(), s)
	if err != nil {
		f.t.Fatal(err)
	}
	var out []string
	err = index.Walk(v, "", func(e index.Entry) error {
		switch {
		case e.Path == "":
			return nil
		case e.UID != 0 || e.GID != 0:
			f.t.Errorf("%s belongs to %d:%d", e.Path, e.UID, e.GID)
		}
		s := e.Path
		switch e.Type {
		case index.Dir:
			s += "/"
		case index.Symlink:
			s += " -> " + e.Target
		case index.File:
			r, err := v.OpenFile(f.t.Context(), e.Path)
			if err != nil {
				return err
			}
			defer r.Close()
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			s += " =" + string(b)
			if e.HardLink != "" {
				s += " == " + e.HardLink
			}
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

func (f *fixture) want(attrs map[string]string, want ...string) {
	f.t.Helper()
	s, err := f.run(attrs, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	if got := f.show(s); !slices.Equal(got, want) {
		f.t.Errorf("%v: got %q, want %q", attrs, got, want)
	}
}

func TestLocal(t *testing.T) {
	f := newFixture(t)
	f.want(nil) // an empty context is fine
	f.write("a.txt", "a")
	f.write("dir/b.txt", "b")
	f.write("dir/c.go", "c")
	f.write("deep/er/d.go", "")
	for _, link := range [][2]string{{"dir/b.txt", "link"}, {"/abs/olute", "abs"}} {
		if err := os.Symlink(link[0], filepath.Join(f.dir, link[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(f.dir, "a.txt"), filepath.Join(f.dir, "hard")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(f.dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mknod(filepath.Join(f.dir, "sock"), syscall.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	os.Chown(filepath.Join(f.dir, "a.txt"), 1000, 1000)
	f.want(nil, "a.txt =a", "abs -> /abs/olute", "deep/", "deep/er/", "deep/er/d.go =", "dir/", "dir/b.txt =b", "dir/c.go =c",
		"hard =a == a.txt", "link -> dir/b.txt", "pipe")
	if f.sent != 4 {
		t.Errorf("status says %d bytes", f.sent)
	}
	f.want(map[string]string{pb.AttrExcludePatterns: list("**/*.txt", "deep", "pipe", "abs")}, "dir/", "dir/c.go =c", "hard =a", "link -> dir/b.txt")
	f.want(map[string]string{pb.AttrExcludePatterns: list("*", "!dir/c.go")}, "dir/", "dir/c.go =c")
	f.want(map[string]string{pb.AttrIncludePatterns: list("deep/er")}, "deep/", "deep/er/", "deep/er/d.go =")
	f.want(map[string]string{pb.AttrFollowPaths: list("link")}, "dir/", "dir/b.txt =b", "link -> dir/b.txt")

	// What was transferred is taken as it is.
	c := &client{dir: f.dir, filtered: true}
	s, err := f.run(map[string]string{pb.AttrIncludePatterns: list("nothing"), pb.AttrSharedKeyHint: "hint", pb.AttrLocalSessionID: "pre:abc"}, c)
	if err != nil {
		t.Fatal(err)
	}
	if len(f.show(s)) != 11 {
		t.Errorf("got %q", f.show(s))
	}
	if c.req.Name != "pre-context" || c.req.SharedKey != "hint" || !slices.Equal(c.req.IncludePatterns, []string{"nothing"}) {
		t.Errorf("request %+v", c.req)
	}
}

func TestLocalAgain(t *testing.T) {
	f := newFixture(t)
	f.write("a", "one")
	f.write("b", "two")
	old := time.Now().Add(-time.Hour)
	first, err := f.run(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	same, err := f.run(nil, nil)
	if err != nil || !slices.Equal(same, first) {
		t.Errorf("the same directory is %v and %v, %v", first, same, err)
	}
	// Same size, same time: the content decides.
	if err := os.WriteFile(filepath.Join(f.dir, "a"), []byte("ONE"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(f.dir, "a"), old, old); err != nil {
		t.Fatal(err)
	}
	changed, err := f.run(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := f.show(changed); !slices.Equal(got, []string{"a =ONE", "b =two"}) {
		t.Errorf("got %q", got)
	}
	// A held layer whose file changes before it is written says so.
	f.write("a", "not what was hashed")
	err = f.layers.Ensure(t.Context(), changed...)
	if err == nil || !strings.Contains(err.Error(), "changed while it was being copied") {
		t.Errorf("got %v", err)
	}
}

func TestLocalRefused(t *testing.T) {
	f := newFixture(t)
	for key, value := range map[string]string{
		pb.AttrMetadataTransfer: "true", pb.AttrLocalDiffer: "magic", "local.new": "1", pb.AttrMetadataTransferExclude: list("x"),
	} {
		if _, err := f.make(vertex(map[string]string{key: value})); err == nil || !strings.Contains(err.Error(), key+": not supported yet") {
			t.Errorf("%s: got %v", key, err)
		}
	}
	if _, err := f.make(vertex(map[string]string{pb.AttrIncludePatterns: "["})); err == nil {
		t.Error("bad JSON is accepted")
	}
	if _, err := f.run(nil, &client{dir: filepath.Join(f.dir, "nope")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
