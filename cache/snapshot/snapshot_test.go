// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var _ layer.Files = (*View)(nil)

// fixture is a snapshot store over a real layer store. When the test ends nothing may be mounted below it.
type fixture struct {
	*Store
	t      *testing.T
	layers *layer.Store
	dir    string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return newFixtureWith(t, Options{})
}

// drivers runs a test with overlay mounts and with copies.
func drivers(t *testing.T, test func(t *testing.T, f *fixture)) {
	t.Run("overlay", func(t *testing.T) {
		f := newFixture(t)
		if info := f.Info(); info.Driver != DriverOverlay {
			t.Skip("SKIPPED: no overlay here: " + info.Reason)
		}
		test(t, f)
	})
	t.Run("copy", func(t *testing.T) {
		f := newFixtureWith(t, Options{Copy: true})
		if info := f.Info(); info.Driver != DriverCopy {
			t.Fatal(info)
		}
		test(t, f)
	})
}

func newFixtureWith(t *testing.T, opt Options) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
	f := &fixture{t: t, dir: t.TempDir()}
	var err error
	if f.layers, err = layer.Open(filepath.Join(f.dir, "layers"), layer.Options{}); err != nil {
		t.Fatal(err)
	}
	if f.Store, err = OpenWith(filepath.Join(f.dir, "snapshots"), f.layers, opt); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		if err := f.layers.Close(); err != nil {
			t.Error(err)
		}
		left, err := mountsBelow(f.dir)
		if err != nil || len(left) > 0 {
			t.Errorf("left mounted: %v (%v)", left, err)
		}
		for _, dir := range []string{filepath.Join(f.dir, "layers", "uppers"), f.mountpoints()} {
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left in %s: %v (%v)", dir, left, err)
			}
		}
	})
	return f
}

// untar makes a layer of a tar whose entries have these names: "dir/" or "file=content".
func (f *fixture) untar(entries ...string) layer.ID {
	f.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		name, content, _ := strings.Cut(e, "=")
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		if strings.HasSuffix(name, "/") {
			h.Mode, h.Typeflag = 0o755, tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			f.t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			f.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.t.Fatal(err)
	}
	id, err := f.layers.Unpack(f.t.Context(), &b, "", nil)
	if err != nil {
		f.t.Fatal(err)
	}
	return id
}

func (f *fixture) mount(s Snapshot, writable bool) *Mount {
	f.t.Helper()
	m, err := f.Mount(f.t.Context(), s, MountOptions{Writable: writable})
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

// step mounts s, lets do change it, and commits.
func (f *fixture) step(s Snapshot, do func(root string)) Snapshot {
	f.t.Helper()
	m := f.mount(s, true)
	defer m.Release()
	do(m.Path())
	next, err := m.Commit(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return next
}

// tree lists what is below root on disk, one line an entry: path, type, mode, owner, content or target.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			what = "dir"
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what = "file=" + string(b)
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what = "->" + target
		default:
			what = fmt.Sprintf("%o/%d", st.Mode&unix.S_IFMT, st.Rdev)
		}
		out = append(out, fmt.Sprintf("/%s %04o %d:%d %s", strings.TrimPrefix(rel, "."), st.Mode&0o7777, st.Uid, st.Gid, what))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// viewTree is tree, from the view.
func (f *fixture) viewTree(s Snapshot) []string {
	f.t.Helper()
	v, err := f.View(f.t.Context(), s)
	if err != nil {
		f.t.Fatal(err)
	}
	var out []string
	err = index.Walk(v, "", func(e index.Entry) error {
		what := ""
		switch e.Type {
		case index.Dir:
			what = "dir"
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
			what = "file=" + string(b)
		case index.Symlink:
			what = "->" + e.Target
		case index.Fifo:
			what = "10000/0"
		default:
			what = fmt.Sprint("type ", e.Type)
		}
		out = append(out, fmt.Sprintf("/%s %04o %d:%d %s", e.Path, e.Mode, e.UID, e.GID, what))
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// same checks that s shows the same through its view, a read-only and a writable mount, and returns that.
func (f *fixture) same(s Snapshot) []string {
	f.t.Helper()
	want := f.viewTree(s)
	for _, writable := range []bool{false, true} {
		m := f.mount(s, writable)
		if diff := cmp.Diff(want, tree(f.t, m.Path())); diff != "" {
			f.t.Errorf("writable=%v: (-view +mount):\n%s", writable, diff)
		}
		if err := os.Mkdir(filepath.Join(m.Path(), "new"), 0o755); writable != (err == nil) {
			f.t.Errorf("writable=%v: mkdir: %v", writable, err)
		}
		m.Release()
	}
	return want
}

func write(t *testing.T, path ...string) {
	t.Helper()
	name, content := filepath.Join(path[:len(path)-1]...), path[len(path)-1]
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func ok(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSteps(t *testing.T) { drivers(t, checkSteps) }

func checkSteps(t *testing.T, f *fixture) {
	base := Snapshot{f.untar("bin/", "bin/sh=shell", "etc/", "etc/conf=1", "etc/gone=x", "opt/", "opt/old/", "opt/old/deep=y", "link/", "link/file=z")}
	files := f.same(base)
	if len(files) != 11 {
		t.Errorf("base: %q", files)
	}
	for _, c := range []struct {
		name string
		do   func(root string)
		want []string // lines that must be there; with "!", paths that must not
	}{
		{"write and overwrite", func(root string) {
			write(t, root, "etc/new", "n")
			write(t, root, "etc/conf", "2")
		}, []string{"/etc/new 0644 0:0 file=n", "/etc/conf 0644 0:0 file=2", "/bin/sh 0644 0:0 file=shell"}},
		{"append", func(root string) {
			file, err := os.OpenFile(filepath.Join(root, "etc/conf"), os.O_APPEND|os.O_WRONLY, 0)
			ok(t, err)
			_, err = file.WriteString("+")
			ok(t, err, file.Close())
		}, []string{"/etc/conf 0644 0:0 file=1+"}},
		{"delete a file", func(root string) { ok(t, os.Remove(filepath.Join(root, "etc/gone"))) }, []string{"!/etc/gone", "/etc/conf 0644 0:0 file=1"}},
		{"delete a directory", func(root string) { ok(t, os.RemoveAll(filepath.Join(root, "opt"))) }, []string{"!/opt", "!/opt/old/deep"}},
		{"replace a directory", func(root string) {
			ok(t, os.RemoveAll(filepath.Join(root, "opt/old")), os.Mkdir(filepath.Join(root, "opt/old"), 0o700))
			write(t, root, "opt/old/fresh", "f")
		}, []string{"!/opt/old/deep", "/opt/old 0700 0:0 dir", "/opt/old/fresh 0644 0:0 file=f"}},
		{"directory becomes a file", func(root string) {
			ok(t, os.RemoveAll(filepath.Join(root, "opt")))
			write(t, root, "opt", "file now")
		}, []string{"!/opt/old", "/opt 0644 0:0 file=file now"}},
		{"file becomes a directory", func(root string) {
			ok(t, os.Remove(filepath.Join(root, "etc/conf")), os.MkdirAll(filepath.Join(root, "etc/conf/d"), 0o755))
		}, []string{"/etc/conf/d 0755 0:0 dir"}},
		{"directory becomes a symlink", func(root string) {
			ok(t, os.RemoveAll(filepath.Join(root, "link")), os.Symlink("/bin", filepath.Join(root, "link")))
		}, []string{"!/link/file", "/link 0777 0:0 ->/bin"}},
		{"rename a lower directory", func(root string) {
			// Overlay answers EXDEV, as mv expects: the tree is copied.
			err := os.Rename(filepath.Join(root, "opt/old"), filepath.Join(root, "moved"))
			if f.Info().Driver == DriverCopy {
				ok(t, err)
				return
			}
			if !errors.Is(err, unix.EXDEV) {
				t.Errorf("rename of a lower directory: %v", err)
			}
			ok(t, os.CopyFS(filepath.Join(root, "moved"), os.DirFS(filepath.Join(root, "opt/old"))), os.RemoveAll(filepath.Join(root, "opt/old")))
		}, []string{"!/opt/old", "/moved/deep 0644 0:0 file=y"}},
		{"metadata", func(root string) {
			ok(t, os.Chmod(filepath.Join(root, "bin/sh"), 0o755|os.ModeSetuid), os.Chown(filepath.Join(root, "etc"), 12, 34))
			ok(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
		}, []string{"/bin/sh 4755 0:0 file=shell", "/etc 0755 12:34 dir", "/fifo 0600 0:0 10000/0", "/etc/conf 0644 0:0 file=1"}},
		{"hard link", func(root string) {
			ok(t, os.Link(filepath.Join(root, "bin/sh"), filepath.Join(root, "bin/bash")))
		}, []string{"/bin/sh 0644 0:0 file=shell", "/bin/bash 0644 0:0 file=shell"}},
		{"xattr", func(root string) {
			ok(t, unix.Setxattr(filepath.Join(root, "etc/conf"), "user.odd", []byte("v"), 0))
		}, []string{"/etc/conf 0644 0:0 file=1"}},
		{"same size and time", func(root string) {
			path := filepath.Join(root, "etc/conf")
			var st unix.Stat_t
			ok(t, unix.Stat(path, &st))
			write(t, path, "7")
			ok(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, 0))
		}, []string{"/etc/conf 0644 0:0 file=7"}},
		{"the root itself", func(root string) { ok(t, os.Chmod(root, 0o711), os.Chown(root, 5, 6)) }, []string{"/ 0711 5:6 dir", "/etc/conf 0644 0:0 file=1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.t = t
			next := f.step(base, c.do)
			if len(next) != 2 || next[0] != base[0] {
				t.Fatalf("committed %v over %v", next, base)
			}
			// The step's result, and that of one more step on it, whose "/" must be what this one left.
			for _, s := range []Snapshot{next, f.step(next, func(root string) { write(t, root, "later", "l") })} {
				got := f.same(s)
				for _, line := range c.want {
					if path, not := strings.CutPrefix(line, "!"); not {
						if slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, path+" ") }) {
							t.Errorf("%s is still there:\n%s", path, strings.Join(got, "\n"))
						}
					} else if !slices.Contains(got, line) {
						t.Errorf("no %q in\n%s", line, strings.Join(got, "\n"))
					}
				}
			}
		})
	}
	f.t = t
}

func TestScratchAndEmptyCommit(t *testing.T) { drivers(t, checkScratchAndEmptyCommit) }

func checkScratchAndEmptyCommit(t *testing.T, f *fixture) {
	if got := f.same(nil); len(got) != 1 {
		t.Errorf("scratch shows %q", got)
	}
	if got := f.step(nil, func(string) {}); len(got) != 0 {
		t.Errorf("nothing written to scratch gives %v", got)
	}
	one := f.step(nil, func(root string) { write(t, root, "a", "1") })
	if got := f.step(one, func(root string) { os.ReadFile(filepath.Join(root, "a")) }); !slices.Equal(got, one) {
		t.Errorf("nothing written to %v gives %v", one, got)
	}
	// A written file that is gone again leaves nothing either.
	if got := f.step(one, func(root string) {
		write(t, root, "tmp", "x")
		ok(t, os.Remove(filepath.Join(root, "tmp")))
	}); !slices.Equal(got, one) {
		t.Errorf("written and removed gives %v", got)
	}
	f.same(one)
}

// A step that only had mount points made for it, /etc/hosts and the like, leaves no layer: overlayfs copies the directory
// up, but nothing in it has changed.
func TestCopiedUpDirectoryIsNoChange(t *testing.T) { drivers(t, checkCopiedUpDirectoryIsNoChange) }

func checkCopiedUpDirectoryIsNoChange(t *testing.T, f *fixture) {
	tree := f.step(nil, func(root string) { ok(t, os.MkdirAll(filepath.Join(root, "run/lock"), 0o711)) })
	base := append(slices.Clone(tree), f.untar("etc/", "etc/ssl/", "bin/sh=x"))
	mountPoint := func(root, dir string) {
		t.Helper()
		dir = filepath.Join(root, dir)
		var before unix.Stat_t
		ok(t, unix.Stat(dir, &before))
		write(t, dir, "hosts", "")
		ok(t, os.Remove(filepath.Join(dir, "hosts")))
		ok(t, unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{before.Atim, before.Mtim}, 0))
	}
	if got := f.step(base, func(root string) {
		mountPoint(root, "etc")
		mountPoint(root, "etc/ssl")
		mountPoint(root, "run/lock")
	}); !slices.Equal(got, base) {
		t.Errorf("nothing changed, but there is the layer %q", f.viewTree(got[len(base):]))
	}
	next := f.step(base, func(root string) {
		mountPoint(root, "etc/ssl")
		write(t, root, "etc/own", "1")
	})
	if got := f.viewTree(next[len(base):]); len(got) != 3 {
		t.Errorf("the layer should have etc and etc/own alone: %q", got)
	}
	f.same(next)
}

// A single layer's whiteouts and opaque marks must not be seen, though nothing is below them.
// TestLargeSteps mounts what a step has left before it has an index, with the metadata of its root, and changes it.
func TestLargeSteps(t *testing.T) {
	f := newFixture(t)
	var snap Snapshot
	for n := range 3 {
		snap = f.step(snap, func(root string) {
			if n > 0 {
				st, err := os.Stat(root)
				ok(t, err)
				if want := os.FileMode(0o700 + n); st.Mode().Perm() != want {
					t.Errorf("step %d: the root has mode %o, want %o", n, st.Mode().Perm(), want)
				}
				ok(t, os.Remove(fmt.Sprintf("%s/d%d/f%d", root, n%3, n)))
			}
			for i := range 200 {
				dir := filepath.Join(root, fmt.Sprintf("d%d", i%3))
				ok(t, os.MkdirAll(dir, 0o755))
				write(t, dir, fmt.Sprintf("f%d", i+100*n), fmt.Sprint(n))
			}
			ok(t, os.Chmod(root, os.FileMode(0o700+n+1)))
		})
		if len(snap) != n+1 {
			t.Fatalf("%d layers after step %d", len(snap), n)
		}
	}
	shown := f.same(snap)
	if slices.ContainsFunc(shown, func(line string) bool { return strings.Contains(line, "/f1 ") }) {
		t.Error("f1 is back")
	}
	if len(shown) < 400 {
		t.Errorf("%d entries", len(shown))
	}
}

func TestSingleLayerWithWhiteouts(t *testing.T) { drivers(t, checkSingleLayerWithWhiteouts) }

func checkSingleLayerWithWhiteouts(t *testing.T, f *fixture) {
	base := Snapshot{f.untar("a/", "a/x=1", "b=2")}
	next := f.step(base, func(root string) {
		ok(t, os.Remove(filepath.Join(root, "b")), os.RemoveAll(filepath.Join(root, "a")), os.Mkdir(filepath.Join(root, "a"), 0o755))
		write(t, root, "c", "3")
	})
	if diff := cmp.Diff([]string{"/ 0755 0:0 dir", "/a 0755 0:0 dir", "/c 0644 0:0 file=3"}, f.same(next[1:])); diff != "" {
		t.Errorf("the upper layer alone (-want +got):\n%s", diff)
	}
}

// Overlay takes no directory twice; a stack may well have a layer twice (COPY of the same thing, a merge).
func TestLayerTwice(t *testing.T) { drivers(t, checkLayerTwice) }

func checkLayerTwice(t *testing.T, f *fixture) {
	a, b := f.untar("x/", "x/f=a", "y=a"), f.untar("x/", "x/f=b", "z=b")
	if diff := cmp.Diff(f.viewTree(Snapshot{b, a}), f.same(Snapshot{a, b, a})); diff != "" {
		t.Errorf("a b a differs from b a (-want +got):\n%s", diff)
	}
}

func TestStackOf120(t *testing.T) { drivers(t, checkStackOf120) }

func checkStackOf120(t *testing.T, f *fixture) {
	var snap Snapshot
	for i := range 120 {
		if i%2 == 0 {
			snap = append(snap, f.untar("shared/", fmt.Sprintf("shared/%d=%d", i%10, i), fmt.Sprintf("f%d=x", i)))
			continue
		}
		snap = f.step(snap, func(root string) {
			write(t, root, fmt.Sprintf("f%d", i), "x")
			ok(t, os.Remove(filepath.Join(root, fmt.Sprintf("f%d", i-1))))
		})
	}
	if len(snap) != 120 {
		t.Fatalf("%d layers", len(snap))
	}
	got := f.same(snap)
	if !slices.Contains(got, "/shared/8 0644 0:0 file=118") || slices.Contains(got, "/f118 0644 0:0 file=x") || len(got) != 1+1+5+60 {
		t.Errorf("%d entries:\n%s", len(got), strings.Join(got, "\n"))
	}
	if _, err := f.Mount(t.Context(), make(Snapshot, 501), MountOptions{}); err == nil {
		t.Error("a snapshot of layers that do not exist was mounted")
	}
}

func TestContent(t *testing.T) {
	f := newFixture(t)
	a, b := f.untar("a=1"), f.untar("b=2")
	again := f.step(nil, func(root string) { write(t, root, "a", "1") })
	digests := map[string]string{}
	for name, s := range map[string]Snapshot{"none": nil, "a": {a}, "b": {b}, "a b": {a, b}, "b a": {b, a}, "a as a tree": again} {
		d, err := f.Content(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		for other, o := range digests {
			if (o == d.String()) != (name == "a as a tree" && other == "a" || name == "a" && other == "a as a tree") {
				t.Errorf("content of %s and of %s: equal is %v", name, other, o == d.String())
			}
		}
		digests[name] = d.String()
	}
	if _, err := f.Content(t.Context(), Snapshot{"tabsent"}); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("content of an absent layer: %v", err)
	}
}

func TestOpenFileErrors(t *testing.T) {
	f := newFixture(t)
	v, err := f.View(t.Context(), Snapshot{f.untar("d/", "d/f=1")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.OpenFile(t.Context(), "d/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := v.OpenFile(t.Context(), "d"); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("directory: %v", err)
	}
	if _, err := f.View(t.Context(), Snapshot{"tabsent"}); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("view of an absent layer: %v", err)
	}
}

func TestLifecycle(t *testing.T) { drivers(t, checkLifecycle) }

func checkLifecycle(t *testing.T, f *fixture) {
	base := Snapshot{f.untar("a=1")}
	ro, rw := f.mount(base, false), f.mount(base, true)
	if !f.InUse()[base[0]] {
		t.Error("the layer of a mount is not in use")
	}
	if _, err := ro.Commit(t.Context()); err == nil {
		t.Error("a read-only mount was committed")
	}
	ok(t, ro.Release(), ro.Release())
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	write(t, rw.Path(), "b", "2")
	if _, err := rw.Commit(ctx); !errors.Is(err, stop) {
		t.Errorf("commit with an ended context: %v", err)
	}
	if _, err := rw.Commit(t.Context()); err == nil {
		t.Error("a second commit was accepted")
	}
	ok(t, rw.Release())
	if _, err := f.Mount(ctx, base, MountOptions{Writable: true}); !errors.Is(err, stop) {
		t.Errorf("mount with an ended context: %v", err)
	}
	if _, err := f.Mount(t.Context(), Snapshot{"tabsent"}, MountOptions{Writable: true}); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("mount of an absent layer: %v", err)
	}
	if used := f.InUse(); len(used) != 0 {
		t.Errorf("still in use: %v", used)
	}
	forgotten := f.mount(base, true)
	write(t, forgotten.Path(), "c", "3")
	f.Close() // releases it
	if _, err := f.Mount(t.Context(), base, MountOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("mount after Close: %v", err)
	}
}

// fullDisk says that there is no room left.
type fullDisk struct{ fsys.FS }

func (fullDisk) Free(string) (int64, error) { return 1 << 20, nil }

// On a full disk what a failed step has written is gone when Release returns.
func TestReleaseOnFullDisk(t *testing.T) {
	f := newFixtureWith(t, Options{FS: fullDisk{fsys.OS}})
	for range 10 {
		m := f.mount(nil, true)
		write(t, m.Path(), "big", strings.Repeat("x", 1<<20))
		ok(t, m.Release())
		if left, err := os.ReadDir(filepath.Join(f.dir, "layers", "uppers")); err != nil || len(left) > 0 {
			t.Fatalf("still there: %v, %v", left, err)
		}
	}
}

func TestConcurrentSteps(t *testing.T) { drivers(t, checkConcurrentSteps) }

func checkConcurrentSteps(t *testing.T, f *fixture) {
	base := Snapshot{f.untar("a=1")}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			snap := base
			for j := range 4 {
				m, err := f.Mount(context.Background(), snap, MountOptions{Writable: true})
				if err != nil {
					t.Error(err)
					return
				}
				if err := os.WriteFile(filepath.Join(m.Path(), fmt.Sprint("f", j)), fmt.Append(nil, i), 0o644); err != nil {
					t.Error(err)
				}
				if j == 2 {
					m.Release()
					continue
				}
				if snap, err = m.Commit(context.Background()); err != nil {
					t.Error(err)
					return
				}
			}
			if len(snap) != 4 {
				t.Errorf("%d layers", len(snap))
			}
		})
	}
	wg.Wait()
}

// A killed engine leaves its mounts; the next one takes them away.
func TestCleanup(t *testing.T) {
	f := newFixture(t)
	base := Snapshot{f.untar("a=1")}
	m := f.mount(base, false)
	other, err := Open(filepath.Join(f.dir, "snapshots"), f.layers)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if left, err := mountsBelow(f.mountpoints()); err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
	if _, err := os.Stat(m.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("mount point: %v", err)
	}
	if err := Clean(filepath.Join(f.dir, "never there")); err != nil {
		t.Error(err)
	}
}

// The way of kernels before 6.8 works on this one, too.
func TestMountClassic(t *testing.T) {
	f := newFixture(t)
	odd := filepath.Join(f.dir, `a:b,c\d`+strings.Repeat("x", 200))
	var lowers []string
	for i := range 100 {
		dir := filepath.Join(odd, fmt.Sprint(i))
		ok(t, os.MkdirAll(dir, 0o755))
		write(t, dir, fmt.Sprint("f", i), "x")
		lowers = append(lowers, dir)
	}
	target, up := filepath.Join(f.dir, "target"), filepath.Join(odd, "up")
	ok(t, os.Mkdir(target, 0o755), os.MkdirAll(filepath.Join(up, "upper"), 0o755), os.Mkdir(filepath.Join(up, "work"), 0o755))
	for _, o := range []overlay{{lowers: lowers}, {lowers: lowers, upper: filepath.Join(up, "upper"), work: filepath.Join(up, "work")}} {
		for name, mount := range map[string]func(string) error{"classic": o.mountClassic, "new": o.mountNew} {
			if err := mount(target); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			names, err := os.ReadDir(target)
			if err != nil || len(names) != 100 {
				t.Errorf("%s: %d names, %v", name, len(names), err)
			}
			err = os.WriteFile(filepath.Join(target, "f0"), nil, 0o644)
			if (err == nil) != (o.upper != "") {
				t.Errorf("%s: write: %v", name, err)
			}
			os.Remove(filepath.Join(up, "upper", "f0"))
			ok(t, unix.Unmount(target, 0))
			os.RemoveAll(filepath.Join(up, "work", "work"))
		}
	}
	o := overlay{lowers: slices.Repeat(lowers, 3)}
	if err := o.mountClassic(target); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("300 layers by mount(2): %v", err)
	}
	o = overlay{lowers: []string{lowers[0], filepath.Join(f.dir, "none")}}
	if err := o.mount(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a lower directory that is not there: %v", err)
	}
}

func TestParseMounts(t *testing.T) {
	const info = `25 30 0:23 / /sys rw - sysfs sysfs rw
30 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
90 30 0:50 / /s/mnt rw - ext4 x rw
91 30 0:51 / /s/mnt/1 rw - overlay slipway rw
92 91 0:52 / /s/mnt/1/a\040b\134c\011\012 rw - tmpfs t rw
93 30 0:53 / /s/mnt2 rw - tmpfs t rw
`
	got, err := parseMounts(strings.NewReader(info), "/s/mnt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/s/mnt/1", "/s/mnt/1/a b\\c\t\n"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, err := parseMounts(strings.NewReader("1 2 3\n"), "/"); err == nil {
		t.Error("a short line was accepted")
	}
}
