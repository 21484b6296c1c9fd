// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// testTime is the clock of the tests.
var testTime = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

// newDeps opens stores in a directory of the test's own.
func newDeps(t testing.TB) *Deps {
	t.Helper()
	dir := t.TempDir()
	layers, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := layers.Close(); err != nil {
			t.Error(err)
		}
	})
	snapshots, err := snapshot.Open(filepath.Join(dir, "snapshots"), layers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(snapshots.Close)
	return &Deps{
		Layers:    layers,
		Snapshots: snapshots,
		CacheDir:  filepath.Join(dir, "cachemounts"),
		TempDir:   filepath.Join(dir, "tmp"),
		Now:       func() time.Time { return testTime },
	}
}

// node is one entry of a tree as the tests write it: "/dir 0755", "/file 0644 1:2 =content", "/link -> target",
// "/name == /other" (a hard link). Mode and owner may be left out.
type node struct {
	index.Entry
	content string
}

func parseTree(t testing.TB, lines ...string) []node {
	t.Helper()
	var nodes []node
	for _, line := range lines {
		n := node{Entry: index.Entry{Type: index.Dir, Mode: 0o755, Offset: -1, ModTime: 1e18}}
		line, content, isFile := strings.Cut(line, " =")
		if isFile && !strings.HasPrefix(content, "= ") {
			n.Type, n.Mode, n.content = index.File, 0o644, content
		} else if isFile {
			n.Type, n.HardLink = index.File, content[2:]
		}
		fields := strings.Fields(line)
		n.Path = strings.TrimPrefix(fields[0], "/")
		for i := 1; i < len(fields); i++ {
			switch f := fields[i]; {
			case f == "->":
				n.Type, n.Mode, n.Target = index.Symlink, 0o777, fields[i+1]
				i++
			case strings.HasPrefix(f, "@"):
				fmt.Sscanf(f, "@%d", &n.ModTime)
				n.ModTime *= 1e9
			case strings.Contains(f, ":"):
				fmt.Sscanf(f, "%d:%d", &n.UID, &n.GID)
			default:
				fmt.Sscanf(f, "%o", &n.Mode)
			}
		}
		n.Size = int64(len(n.content))
		n.Digest = digest.FromString(n.content)
		if n.Type != index.File {
			n.Digest = ""
		}
		if n.HardLink != "" {
			first := nodes[slices.IndexFunc(nodes, func(o node) bool { return "/"+o.Path == n.HardLink })]
			first.Path, first.HardLink = n.Path, strings.TrimPrefix(n.HardLink, "/")
			n = first
		}
		nodes = append(nodes, n)
	}
	return nodes
}

func commitTree(t testing.TB, d *Deps, base snapshot.Snapshot, nodes []node) snapshot.Snapshot {
	t.Helper()
	if len(nodes) == 0 {
		return base
	}
	view, err := d.Snapshots.View(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	draft := d.Layers.NewDraft(view)
	for _, n := range nodes {
		draft.Put(n.Entry, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(n.content)), nil })
	}
	id, err := draft.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return with(base, id)
}

// tree makes a snapshot of one layer.
func tree(t testing.TB, d *Deps, lines ...string) snapshot.Snapshot {
	t.Helper()
	return commitTree(t, d, nil, parseTree(t, lines...))
}

// show lists a tree, one line an entry, in the form that tests write it.
func show(t testing.TB, files layer.Files) []string {
	t.Helper()
	var out []string
	err := index.Walk(files, "", func(e index.Entry) error {
		if e.Path == "" {
			return nil
		}
		s := fmt.Sprintf("/%s %#o %d:%d", e.Path, e.Mode, e.UID, e.GID)
		if e.Type != index.Dir {
			s += fmt.Sprintf(" @%d", e.ModTime/1e9)
		}
		for _, k := range slices.Sorted(mapKeys(e.Xattrs)) {
			s += fmt.Sprintf(" %s:%q", k, e.Xattrs[k])
		}
		switch e.Type {
		case index.File:
			r, err := files.OpenFile(t.Context(), e.Path)
			if err != nil {
				return err
			}
			defer r.Close()
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			if digest.FromBytes(b) != e.Digest {
				t.Errorf("%s: digest %s is not that of its bytes", e.Path, e.Digest)
			}
			if e.HardLink != "" {
				s += " == /" + e.HardLink
			} else {
				s += " =" + string(b)
			}
		case index.Symlink:
			s += " -> " + e.Target
		case index.Dir:
		default:
			s += fmt.Sprintf(" type %d %d:%d", e.Type, e.Major, e.Minor)
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func showSnapshot(t testing.TB, d *Deps, s snapshot.Snapshot) []string {
	t.Helper()
	v, err := d.Snapshots.View(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return show(t, v)
}

// writeNodes makes nodes in a real directory.
func writeNodes(t testing.TB, dir string, nodes []node) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		p := filepath.Join(dir, n.Path)
		if n.HardLink != "" {
			check(os.Link(filepath.Join(dir, n.HardLink), p))
			continue
		}
		switch n.Type {
		case index.Dir:
			check(os.Mkdir(p, 0o755))
		case index.File:
			check(os.WriteFile(p, []byte(n.content), 0o644))
		case index.Symlink:
			check(os.Symlink(n.Target, p))
		}
		check(os.Lchown(p, int(n.UID), int(n.GID)))
		if n.Type != index.Symlink {
			check(os.Chmod(p, fileMode(n.Mode)))
		}
	}
	for _, n := range slices.Backward(nodes) {
		check(setTime(filepath.Join(dir, n.Path), n.ModTime))
	}
}

// showDir lists a real directory like show.
func showDir(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel := p[len(dir):]
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		mode := unixMode(info.Mode())
		if info.Mode()&os.ModeSymlink != 0 {
			mode = 0o777
		}
		s := fmt.Sprintf("%s %#o %d:%d", rel, mode, st.Uid, st.Gid)
		if !d.IsDir() {
			s += fmt.Sprintf(" @%d", st.Mtim.Sec)
		}
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		case info.Mode().IsRegular():
			if to, ok := first[st.Ino]; ok && st.Nlink > 1 {
				s += " == " + to
				break
			}
			first[st.Ino] = rel
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += " =" + string(b)
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// recorder is a Progress that keeps what it gets.
type recorder struct {
	t     testing.TB
	mu    sync.Mutex
	log   bytes.Buffer
	warns []string
	peak  int64
}

func (r *recorder) Log(_ int, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.Write(data)
}

func (r *recorder) Warn(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.warns = append(r.warns, s)
}

func (r *recorder) Status(string, int64, int64, bool) {}

func (r *recorder) Usage(peak int64, _ time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peak = peak
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// client is a Session with some secrets.
type client struct {
	secrets map[string]string
	agent   string
}

func (c *client) Local(context.Context, solver.LocalRequest) (solver.LocalDir, error) {
	return solver.LocalDir{}, solver.ErrNotFound
}

func (c *client) Secret(_ context.Context, id string) ([]byte, error) {
	v, ok := c.secrets[id]
	if !ok {
		return nil, solver.ErrNotFound
	}
	return []byte(v), nil
}

func (c *client) SSHAgent(context.Context, string) (string, func(), error) {
	if c.agent == "" {
		return "", nil, solver.ErrNotFound
	}
	return c.agent, func() {}, nil
}

func (c *client) Credentials(context.Context, string) (string, string, error) { return "", "", nil }

func newEnv(t testing.TB) (*solver.Env, *recorder) {
	r := &recorder{t: t}
	return &solver.Env{Session: &client{}, Progress: r}, r
}

// vertex makes a vertex of an op with n inputs.
func vertex(o *pb.Op, n int) *solver.Vertex {
	o.Inputs = make([]*pb.Input, n)
	for i := range o.Inputs {
		o.Inputs[i] = &pb.Input{}
	}
	return &solver.Vertex{Op: o, Name: "test", Inputs: make([]solver.Edge, n)}
}

func diffLines(t testing.TB, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got:\n\t%s\nwant:\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}
