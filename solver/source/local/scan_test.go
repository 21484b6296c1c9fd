// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/solver"
)

// later is a clock by which everything has been as it is for an hour, so that all of it may be remembered.
func later() time.Time { return time.Now().Add(time.Hour) }

type scanned struct {
	tree    *tree
	changed bool
	read    int64 // bytes
}

func scanDir(t testing.TB, dir string, p patterns, now func() time.Time, old *tree, others ...*tree) scanned {
	t.Helper()
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &scan{root: r, patterns: p, now: now, progress: func(int64) {}}
	tr, changed, err := s.run(t.Context(), old, others)
	if err != nil {
		t.Fatal(err)
	}
	return scanned{tr, changed, s.read.Load()}
}

func entriesOf(t testing.TB, tr *tree) []index.Entry {
	t.Helper()
	x, _, err := tr.index()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Collect(x.All())
}

// namesOf lists what a tree has as lines.
func namesOf(t testing.TB, tr *tree) []string {
	var out []string
	for _, e := range entriesOf(t, tr)[1:] {
		out = append(out, fmt.Sprintf("%s %d %o %q %q", e.Path, e.Type, e.Mode, e.Target, e.HardLink))
	}
	return out
}

// fsutilNames is namesOf by fsutil's own filter.
func fsutilNames(t testing.TB, dir string, req solver.LocalRequest) ([]string, error) {
	fs, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	fs, err = fsutil.NewFilterFS(contextFS{fs}, &fsutil.FilterOpt{
		IncludePatterns: req.IncludePatterns, ExcludePatterns: req.ExcludePatterns, FollowPaths: req.FollowPaths,
	})
	if err != nil {
		return nil, err
	}
	type line struct{ path, text string }
	var lines []line
	first := map[string]string{}
	err = fs.Walk(t.Context(), "", func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*types.Stat)
		mode := os.FileMode(st.Mode)
		typ, perm, target, hard := index.File, uint32(mode.Perm()), "", ""
		switch {
		case mode.IsDir():
			typ = index.Dir
		case mode&os.ModeSymlink != 0:
			typ, perm, target = index.Symlink, 0o777, st.Linkname
		case mode&os.ModeNamedPipe != 0:
			typ = index.Fifo
		default:
			name := path
			if st.Linkname != "" {
				name = st.Linkname
			}
			if to, seen := first[name]; seen && st.Linkname != "" {
				hard = to
			} else {
				first[name] = path
			}
		}
		lines = append(lines, line{path, fmt.Sprintf("%s %d %o %q %q", path, typ, perm, target, hard)})
		return nil
	})
	slices.SortFunc(lines, func(a, b line) int { return index.Compare(a.path, b.path) })
	var out []string
	for _, l := range lines {
		out = append(out, l.text)
	}
	return out, err
}

var testNames = []string{"a", "b", "ab", "a.go", "b.txt", ".x", "[c]", "d e"}

func randomPath(r *rand.Rand) string {
	var parts []string
	for range 1 + r.IntN(3) {
		parts = append(parts, testNames[r.IntN(len(testNames))])
	}
	return strings.Join(parts, "/")
}

// mutate makes a few random changes in dir. What cannot be done is left out.
func mutate(t testing.TB, r *rand.Rand, dir string, n int) {
	for range n {
		p := filepath.Join(dir, randomPath(r))
		switch r.IntN(12) {
		case 0:
			_ = os.MkdirAll(p, 0o700|os.FileMode(r.IntN(0o100)))
		case 1:
			_ = os.Symlink([]string{"a", "../b", "/a/b", "nowhere", "a/b.txt"}[r.IntN(5)], p)
		case 2:
			_ = syscall.Mkfifo(p, 0o600)
		case 3:
			_ = syscall.Mknod(p, syscall.S_IFSOCK|0o600, 0)
		case 4:
			_ = os.Link(filepath.Join(dir, randomPath(r)), p)
		case 5:
			// Opening a fifo as if it were a directory would wait for ever.
			if info, err := os.Stat(filepath.Dir(p)); err == nil && info.IsDir() {
				_ = os.RemoveAll(p)
			}
		case 6:
			_ = os.Rename(filepath.Join(dir, randomPath(r)), p)
		case 7:
			_ = os.Chmod(p, 0o600|os.FileMode(r.IntN(0o200)))
		default:
			_ = os.MkdirAll(filepath.Dir(p), 0o755)
			// A fifo would wait for a reader, and a symlink may lead to one.
			if f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NONBLOCK, 0o644); err == nil {
				fmt.Fprint(f, r.IntN(1000))
				f.Close()
			}
		}
	}
}

func randomPatterns(r *rand.Rand, exceptions bool) []string {
	var out []string
	for range r.IntN(4) {
		parts := strings.Split(randomPath(r), "/")
		for i := range parts {
			switch r.IntN(8) {
			case 0:
				parts[i] = "**"
			case 1:
				parts[i] = "*"
			case 2:
				parts[i] = "*.go"
			case 3:
				parts[i] = "[ab]?"
			}
			parts[i] = strings.NewReplacer("[c]", `\[c\]`).Replace(parts[i])
		}
		p := strings.Join(parts, "/")
		if exceptions && r.IntN(3) == 0 {
			p = "!" + p
		}
		out = append(out, p)
	}
	return out
}

// TestScanLikeFsutil compares with fsutil's filter on random trees, and scans that know of earlier ones, with the same
// patterns and with others, with scans that know of nothing.
func TestScanLikeFsutil(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(1, uint64(seed)))
		dir := t.TempDir()
		mutate(t, r, dir, 30)
		type known struct {
			req  solver.LocalRequest
			tree *tree
		}
		views := make([]known, 4)
		for i := 1; i < len(views); i++ {
			req := &views[i].req
			req.IncludePatterns = randomPatterns(r, true)
			req.ExcludePatterns = randomPatterns(r, true)
			if r.IntN(3) == 0 {
				req.FollowPaths = []string{randomPath(r), "*"}[:1+r.IntN(2)]
			}
		}
		for step := range 4 {
			for i := range views {
				v := &views[i]
				p, err := patternsOf(dir, v.req)
				want, wantErr := fsutilNames(t, dir, v.req)
				if (err != nil) != (wantErr != nil) {
					t.Fatalf("seed %d: %+v: %v, fsutil: %v", seed, v.req, err, wantErr)
				}
				if err != nil {
					continue
				}
				fresh := scanDir(t, dir, p, later, nil)
				if diff := cmp.Diff(want, namesOf(t, fresh.tree)); diff != "" {
					t.Fatalf("seed %d, step %d: %+v: not as fsutil has it:\n%s", seed, step, v.req, diff)
				}
				if len(v.req.FollowPaths) > 0 {
					continue // the patterns depend on the tree
				}
				var others []*tree
				for j := range views {
					if j != i && views[j].tree != nil {
						others = append(others, views[j].tree)
					}
				}
				again := scanDir(t, dir, p, later, v.tree, others...)
				if diff := cmp.Diff(entriesOf(t, fresh.tree), entriesOf(t, again.tree)); diff != "" {
					t.Fatalf("seed %d, step %d: %+v: what was remembered is wrong:\n%s", seed, step, v.req, diff)
				}
				if v.tree != nil {
					same := cmp.Equal(entriesOf(t, v.tree), entriesOf(t, again.tree))
					if !same && !again.changed {
						t.Fatalf("seed %d, step %d: %+v: the change was not seen", seed, step, v.req)
					}
				}
				third := scanDir(t, dir, p, later, again.tree)
				if third.tree != again.tree || third.changed || third.read != 0 {
					t.Fatalf("seed %d, step %d: %+v: nothing has changed, but the tree is new: changed %v, read %d", seed, step, v.req, third.changed, third.read)
				}
				b := encodeViews(dir, []*view{{key: p.key(), tree: again.tree}})
				back, err := decodeViews(b, dir)
				if err != nil {
					t.Fatal(err)
				}
				fourth := scanDir(t, dir, p, later, back[0].tree)
				if fourth.tree != back[0].tree || fourth.read != 0 {
					t.Fatalf("seed %d, step %d: %+v: nothing has changed, but not so after a restart", seed, step, v.req)
				}
				v.tree = again.tree
			}
			mutate(t, r, dir, r.IntN(6))
		}
	}
}

// TestScanNotices is buildkit#4950 and its like: what looks the same and is not.
func TestScanNotices(t *testing.T) {
	for name, change := range map[string]func(path string, old os.FileInfo) error{
		"same size and time": func(path string, old os.FileInfo) error {
			return errors.Join(os.WriteFile(path, []byte("two"), 0o644), os.Chtimes(path, old.ModTime(), old.ModTime()))
		},
		"another file of the same name, size and time": func(path string, old os.FileInfo) error {
			tmp := path + ".new"
			return errors.Join(os.WriteFile(tmp, []byte("two"), 0o644), os.Chtimes(tmp, old.ModTime(), old.ModTime()), os.Rename(tmp, path))
		},
		"older than before": func(path string, old os.FileInfo) error {
			past := old.ModTime().Add(-time.Hour)
			return errors.Join(os.WriteFile(path, []byte("two"), 0o644), os.Chtimes(path, past, past))
		},
		"written through a hard link": func(path string, old os.FileInfo) error {
			other := path + ".link"
			return errors.Join(os.Link(path, other), os.WriteFile(other, []byte("two"), 0o644),
				os.Remove(other), os.Chtimes(path, old.ModTime(), old.ModTime()))
		},
	} {
		for _, clock := range []func() time.Time{time.Now, later} {
			dir := t.TempDir()
			path := filepath.Join(dir, "f")
			if err := os.WriteFile(path, []byte("one"), 0o644); err != nil {
				t.Fatal(err)
			}
			old, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			before := scanDir(t, dir, patterns{}, clock, nil)
			if err := change(path, old); err != nil {
				t.Fatal(err)
			}
			after := scanDir(t, dir, patterns{}, clock, before.tree)
			if !after.changed || entriesOf(t, after.tree)[1].Digest == entriesOf(t, before.tree)[1].Digest {
				t.Errorf("%s: was not noticed", name)
			}
		}
	}
}

// TestScanRacy: a file that has just been written is read again next time, however equal its stat.
func TestScanRacy(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	first := scanDir(t, dir, patterns{}, time.Now, nil)
	second := scanDir(t, dir, patterns{}, time.Now, first.tree)
	if second.read != 3 || second.changed {
		t.Errorf("read %d, changed %v", second.read, second.changed)
	}
	third := scanDir(t, dir, patterns{}, later, second.tree)
	fourth := scanDir(t, dir, patterns{}, later, third.tree)
	if third.read != 3 || fourth.read != 0 || fourth.tree != third.tree {
		t.Errorf("once it is old, the file is still read: %d, %d", third.read, fourth.read)
	}
}

// TestScanMapped: a file that is mapped for writing may change though its times do not, so it is read until nobody has it.
func TestScanMapped(t *testing.T) {
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		t.Skipf("SKIPPED: overlayfs does not tell who has a file mapped (%v)", err)
	}
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, 3, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	digest := func(s scanned) string { return entriesOf(t, s.tree)[1].Digest.Encoded() }
	copy(mapped, "two")
	before := scanDir(t, dir, patterns{}, later, nil)
	copy(mapped, "six") // the kernel has no reason to look at the time again
	after := scanDir(t, dir, patterns{}, later, before.tree)
	if err := unix.Munmap(mapped); err != nil {
		t.Fatal(err)
	}
	if after.read != 3 || !after.changed || digest(after) == digest(before) {
		t.Errorf("what was written through a mapping was not noticed (%d bytes read)", after.read)
	}
	alone := scanDir(t, dir, patterns{}, later, after.tree)
	if again := scanDir(t, dir, patterns{}, later, alone.tree); alone.read != 3 || again.read != 0 || digest(again) != digest(after) {
		t.Errorf("when nobody has it any more it is read %d, %d bytes", alone.read, again.read)
	}
}

func TestScanAttributes(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"f", "d/g"} {
		_ = os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	set := func(name, attr, value string) {
		t.Helper()
		if err := unix.Lsetxattr(filepath.Join(dir, name), attr, []byte(value), 0); err != nil {
			t.Skipf("no extended attributes here: %v", err)
		}
	}
	set("f", "user.one", "1")
	set("d", "user.two", strings.Repeat("2", 2000))
	set("d/g", "user.overlay.origin", "x")
	last := scanDir(t, dir, patterns{}, later, nil)
	got := func() map[string]map[string]string {
		out := map[string]map[string]string{}
		for _, e := range entriesOf(t, last.tree) {
			if e.Xattrs != nil {
				out[e.Path] = e.Xattrs
			}
		}
		return out
	}
	want := map[string]map[string]string{"f": {"user.one": "1"}, "d": {"user.two": strings.Repeat("2", 2000)}}
	if diff := cmp.Diff(want, got()); diff != "" {
		t.Error(diff)
	}
	set("d/g", "user.three", "3")
	set("d", "user.two", "22")
	last = scanDir(t, dir, patterns{}, later, last.tree)
	want["d/g"], want["d"]["user.two"] = map[string]string{"user.three": "3"}, "22"
	if diff := cmp.Diff(want, got()); diff != "" || !last.changed {
		t.Errorf("changed %v: %s", last.changed, diff)
	}
}

func TestScanErrors(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &scan{root: r, patterns: patterns{exclude: []string{"["}}, now: later, progress: func(int64) {}}
	if _, _, err := s.run(t.Context(), nil, nil); err == nil {
		t.Error("a malformed pattern is accepted")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	s = &scan{root: r, now: later, progress: func(int64) {}}
	if _, _, err := s.run(ctx, nil, nil); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
	if _, err := r.opener(nil)("../" + filepath.Base(dir) + "/f"); err == nil {
		t.Error("a path may leave the directory")
	}
	if err := os.Symlink("f", filepath.Join(dir, "l")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.opener(nil)("l"); err == nil {
		t.Error("a symlink was followed")
	}
}

// TestKnownDigest reads files of a scanned directory: those that have not been touched since need not be hashed again.
func TestKnownDigest(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"same", "d/deep", "written", "appended", "replaced", "touched", "chmod"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("as it was"), 0o644); err != nil {
			t.Fatal(err)
		}
		past := time.Unix(1700000000, 0)
		if err := os.Chtimes(path, past, past); err != nil {
			t.Fatal(err)
		}
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	scanned := scanDir(t, dir, patterns{}, later, nil).tree
	young := scanDir(t, dir, patterns{}, time.Now, nil).tree
	digestOf := func(tr *tree, path string) (digest.Digest, bool) {
		t.Helper()
		f, err := r.opener(tr)(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := io.Copy(io.Discard, f); err != nil {
			t.Fatal(err)
		}
		return f.(layer.Hashed).Digest()
	}
	for _, err := range []error{
		os.WriteFile(dir+"/written", []byte("AS IT WAS"), 0o644),
		os.WriteFile(dir+"/appended", []byte("as it was, and more"), 0o644),
		os.Rename(dir+"/written", dir+"/replaced"),
		os.WriteFile(dir+"/written", []byte("as it WAS"), 0o644),
		os.Chtimes(dir+"/touched", time.Now(), time.Now()),
		os.Chmod(dir+"/chmod", 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := digest.FromString("as it was")
	for path, known := range map[string]bool{
		"same": true, "d/deep": true, "written": false, "appended": false, "replaced": false, "touched": false, "chmod": false,
	} {
		if got, ok := digestOf(scanned, path); ok != known || ok && got != want {
			t.Errorf("%s: %q, %v", path, got, ok)
		}
		if got, ok := digestOf(young, path); ok {
			t.Errorf("%s, scanned right after it was written: %q", path, got)
		}
		if got, ok := digestOf(nil, path); ok {
			t.Errorf("%s, never scanned: %q", path, got)
		}
	}
}

func TestContexts(t *testing.T) {
	f := newFixture(t)
	f.write("a/b", "one")
	f.write("c", "two")
	dir := t.TempDir()
	var log bytes.Buffer
	open := func() *Contexts {
		c, err := OpenContexts(dir, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		c.now = later
		f.make = New(Deps{Layers: f.layers, Contexts: c})
		return c
	}
	run := func() (*view, []string) {
		t.Helper()
		c := open()
		defer c.Close()
		_, before := c.of(f.dir, patterns{}.key())
		s, err := f.run(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(before) == 0 {
			return nil, f.show(s)
		}
		return before[0], f.show(s)
	}
	if v, _ := run(); v != nil {
		t.Error("there is something in an empty directory")
	}
	v, first := run()
	if v == nil || v.tree.find("c").digest == "" || !v.tree.find("c").sure {
		t.Fatalf("nothing is remembered: %+v", v)
	}
	files, _ := os.ReadDir(dir)
	if len(files) != 1 {
		t.Fatalf("there are %d files", len(files))
	}
	name := filepath.Join(dir, files[0].Name())
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if v, again := run(); v != nil || !slices.Equal(again, first) || !strings.Contains(log.String(), "unreadable") {
		t.Errorf("damaged: %v, %q, log %q", v, again, log.String())
	}
	if v, _ := run(); v == nil {
		t.Error("a damaged file is not replaced")
	}

	// What is old goes when the engine starts.
	past := time.Now().Add(-2 * maxAge)
	if err := os.Chtimes(name, past, past); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tmp-x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open().Close()
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("%d files are left", len(files))
	}
}

// FuzzDecode feeds bytes past the checksum, which would otherwise stop nearly everything.
func FuzzDecode(f *testing.F) {
	dir := f.TempDir()
	_ = os.Mkdir(filepath.Join(dir, "d"), 0o755)
	_ = os.WriteFile(filepath.Join(dir, "d", "f"), []byte("x"), 0o644)
	_ = os.Symlink("x", filepath.Join(dir, "l"))
	s := scanDir(f, dir, patterns{exclude: []string{"z"}}, later, nil)
	b := encodeViews("/p", []*view{{tree: s.tree}, {tree: &tree{}}})
	f.Add(string(b[len(viewsMagic) : len(b)-32]))
	f.Add("")
	f.Add("\x02/p\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
	f.Fuzz(func(t *testing.T, body string) {
		views, err := decodeBody(body, "/p")
		if err != nil {
			return
		}
		again, err := decodeViews(encodeViews("/p", views), "/p")
		if err != nil {
			t.Fatalf("what was decoded cannot be decoded again: %v", err)
		}
		for i := range views {
			if views[i].key != again[i].key || !cmp.Equal(views[i].tree, again[i].tree, cmp.AllowUnexported(tree{}, node{}, stat{})) {
				t.Fatal("another tree after a round trip")
			}
		}
	})
}
