// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// discard is a log that nobody reads.
var discard = slog.New(slog.DiscardHandler)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting needs root")
	}
}

func openStore(t *testing.T, opt Options) *Store {
	t.Helper()
	opt.Log = discard
	s, err := Open(t.TempDir(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		b, _ := os.ReadFile("/proc/self/mountinfo")
		if left := mountPointsBelow(string(b), s.dir); len(left) > 0 {
			t.Errorf("mounts left behind: %v", left)
		}
		if tmp, _ := os.ReadDir(filepath.Join(s.dir, "tmp")); len(tmp) > 0 {
			t.Errorf("temporary files left behind: %v", tmp)
		}
	})
	return s
}

// bothForms runs a test with EROFS mounts and with trees only.
func bothForms(t *testing.T, test func(t *testing.T, s *Store)) {
	needRoot(t)
	t.Run("erofs", func(t *testing.T) {
		s := openStore(t, Options{})
		if info := s.Info(); !info.EROFS {
			t.Skip("SKIPPED: no EROFS here: " + info.Reason)
		}
		test(t, s)
	})
	t.Run("tree", func(t *testing.T) { test(t, openStore(t, Options{NoEROFS: true})) })
}

// text is an open function.
func text(s string) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(s)), nil }
}

func dir(path string) index.Entry { return index.Entry{Path: path, Type: index.Dir, Mode: 0o755} }

func file(path, content string) index.Entry {
	return index.Entry{Path: path, Type: index.File, Mode: 0o644, Size: int64(len(content)), ModTime: 1e18}
}

func symlink(path, target string) index.Entry {
	return index.Entry{Path: path, Type: index.Symlink, Mode: 0o777, Target: target}
}

// stack is a stack of layers of a store; it implements Files.
type stack struct {
	*index.View
	s   *Store
	ids []ID
}

func newStack(t testing.TB, s *Store, ids ...ID) *stack {
	t.Helper()
	var layers []*index.Index
	for _, id := range ids {
		x, err := s.Index(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, x)
	}
	return &stack{index.Merge(layers...), s, ids}
}

func (k *stack) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	i, ok := k.Layer(path)
	if !ok {
		return nil, fs.ErrNotExist
	}
	return k.s.OpenFile(ctx, k.ids[i], path)
}

// mountOverlay shows a stack as the kernel does.
func mountOverlay(t *testing.T, s *Store, ids ...ID) string {
	t.Helper()
	var lowers []string
	for _, id := range ids {
		dir, err := s.Mount(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		lowers = append([]string{dir}, lowers...)
	}
	lowers = append(lowers, t.TempDir(), t.TempDir()) // overlay wants two
	if err := os.Chmod(lowers[len(lowers)-2], 0o755); err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// ignored leaves out what a mount and an index say differently: offsets, and times of directories that overlay makes.
var ignored = cmp.Options{cmpopts.IgnoreFields(index.Entry{}, "Offset"), cmpopts.EquateEmpty()}

// checkMount compares what the kernel shows of a stack, every byte of it, with what its indexes say.
func checkMount(t *testing.T, s *Store, ids ...ID) {
	t.Helper()
	at := mountOverlay(t, s, ids...)
	scan, err := scanTree(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	want := newStack(t, s, ids...)
	var shown []index.Entry
	if err := index.Walk(want, "", func(e index.Entry) error {
		shown = append(shown, e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(shown, slices.Collect(scan.index.All()), ignored); diff != "" {
		t.Errorf("the mount (+) is not what the index says (-):\n%s", diff)
	}
	for _, e := range shown {
		if e.Type != index.File {
			continue
		}
		r, err := want.OpenFile(t.Context(), e.Path)
		if err != nil {
			t.Fatal(err)
		}
		sum, err := digest.FromReader(r)
		r.Close()
		if err != nil || sum != e.Digest {
			t.Errorf("OpenFile(%q): %s, %v; want %s", e.Path, sum, err, e.Digest)
		}
	}
}

// zoo is a draft with one of everything.
func zoo(s *Store, base Files) *Draft {
	d := s.NewDraft(base)
	put := func(e index.Entry, content string) { d.Put(e, text(content)) }
	put(dir("etc"), "")
	put(file("etc/passwd", "root"), "root")
	big := strings.Repeat("0123456789abcdef", 40<<10) // more than a read-ahead takes
	put(file("usr/share/big", big), big)
	put(file("usr/empty", ""), "")
	put(symlink("etc/link", "../usr/share"), "")
	put(symlink("etc/"+strings.Repeat("l", 255), strings.Repeat("t/", 2000)), "")
	hard := file("a/one", "linked")
	hard.Xattrs = map[string]string{"user.odd": "x", "trusted.overlay.opaque": "y"}
	put(hard, "linked")
	put(index.Entry{Path: "z/two", Type: index.File, HardLink: "a/one"}, "")
	put(index.Entry{Path: "A/three", Type: index.File, HardLink: "z/two"}, "")
	put(index.Entry{Path: "dev/null", Type: index.CharDevice, Mode: 0o666, Major: 1, Minor: 3}, "")
	put(index.Entry{Path: "dev/big", Type: index.BlockDevice, Mode: 0o600, Major: 259, Minor: 0x12345}, "")
	put(index.Entry{Path: "dev/pipe", Type: index.Fifo, Mode: 0o600, UID: 1 << 30, GID: 12}, "")
	suid := file("bin/su", "su")
	suid.Mode, suid.UID, suid.GID = 0o6755, 1000, 4000000000
	suid.Xattrs = map[string]string{"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
	put(suid, "su")
	acl := file("etc/acl", "acl")
	acl.Mode = 0o664
	acl.Xattrs = map[string]string{"system.posix_acl_access": "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x06\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"}
	put(acl, "acl")
	put(file("etc/\xff\xfe not utf8\n", "x"), "x")
	old := file("etc/before-1970", "x")
	old.ModTime = -1e9
	put(old, "x")
	sticky := dir("tmp")
	sticky.Mode = 0o1777
	sticky.Xattrs = map[string]string{"user.many": strings.Repeat("v", 900), "user.more": "1"}
	put(sticky, "")
	for i := range 100 { // a directory of several blocks, with names around "." and ".."
		c := fmt.Sprint(i)
		put(file("many/"+string("!#+,-.0;=A^a~\x01\x80"[i%15])+c, c), c)
	}
	deep := strings.Repeat("d/", 40) + "f"
	put(file(deep, "deep"), "deep")
	return d
}

func TestEverythingRoundTrips(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		id, err := zoo(s, nil).Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		checkMount(t, s, id)
		info, err := s.Stat(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if info.Form != FormTar || info.Size < 640<<10 || info.DiffID == "" {
			t.Errorf("%+v", info)
		}

		again, err := zoo(s, nil).Commit(ctx)
		if err != nil || again != id {
			t.Errorf("equal drafts: %s and %s, %v", id, again, err)
		}

		// The tar is its diff ID, and unpacking it elsewhere gives the same layer.
		r, size, err := s.OpenTar(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		if err != nil || int64(len(b)) != size || digest.FromBytes(b) != info.DiffID {
			t.Errorf("tar of %d bytes (%d), %v, digest %s, diff ID %s", len(b), size, err, digest.FromBytes(b), info.DiffID)
		}
		other := openStore(t, Options{NoEROFS: s.opt.NoEROFS})
		got, err := other.Unpack(ctx, bytes.NewReader(b), info.DiffID, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got != id {
			t.Errorf("unpacked as %s, written as %s", got, id)
		}
		x, _ := s.Index(ctx, id)
		y, _ := other.Index(ctx, id)
		if diff := cmp.Diff(slices.Collect(x.All()), slices.Collect(y.All()), cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
		checkMount(t, other, got)
		if found, ok := other.FindDiffID(ctx, info.DiffID, nil); !ok || found != id {
			t.Errorf("FindDiffID: %s, %v", found, ok)
		}
	})
}

// TestTarIsTheSameEverywhere pins the bytes: a change here changes every diff ID that we make.
func TestTarIsTheSameEverywhere(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	id, err := zoo(s, nil).Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := ID("dc776b7be9dd9e20eb51a78619905e55c0963c8db2d68cd228a531b47d6353d58"); id != want {
		t.Errorf("the zoo's layer is %s, was %s", id, want)
	}
}

// TestImageReadsWithGoEROFS reads our EROFS image with somebody else's library.
func TestImageReadsWithGoEROFS(t *testing.T) {
	s := openStore(t, Options{})
	id, err := zoo(s, nil).Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	img, err := os.Open(s.path(id, erofsFile))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	data, err := os.Open(s.path(id, tarFile))
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	fsys, err := erofs.Open(img, erofs.WithExtraDevices(data))
	if err != nil {
		t.Fatal(err)
	}
	x, _ := s.Index(t.Context(), id)
	seen := 0
	inodes := map[string]int64{}
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		seen++
		if path == "." {
			path = ""
		}
		e, ok := x.Lookup(path)
		if !ok {
			return fmt.Errorf("%q is not in the index", path)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		inodes[path] = st.Ino
		if st.UID != e.UID || st.GID != e.GID || e.Type == index.File && info.Size() != e.Size {
			t.Errorf("%q: %+v, want %+v", path, st, e)
		}
		if e.Type == index.File {
			b, err := fs.ReadFile(fsys, path)
			if err != nil || digest.FromBytes(b) != e.Digest {
				t.Errorf("%q reads wrong: %v", path, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != x.Len() {
		t.Errorf("%d of %d entries", seen, x.Len())
	}
	if inodes["a/one"] != inodes["z/two"] || inodes["a/one"] != inodes["A/three"] {
		t.Error("hard links have come apart")
	}
}

func TestHardLinksShareAnInode(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		id, err := zoo(s, nil).Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		dir, err := s.Mount(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		var sts [3]unix.Stat_t
		for i, name := range []string{"a/one", "z/two", "A/three"} {
			if err := unix.Lstat(filepath.Join(dir, name), &sts[i]); err != nil {
				t.Fatal(err)
			}
			if sts[i].Ino != sts[0].Ino || sts[i].Nlink != 3 {
				t.Errorf("%s: inode %d with %d links, want %d with 3", name, sts[i].Ino, sts[i].Nlink, sts[0].Ino)
			}
		}
	})
}

// The other names of a file are one file still when a layer above replaces or removes the first one.
func TestHardLinkWithoutItsFirstName(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ids, err := ours(t, s,
			makeTar(t, reg("a", "linked"), hardlink("b", "a"), mkdir("d/"), hardlink("d/c", "a"), hardlink("e", "a")),
			makeTar(t, reg("a", "another file")),
		)
		if err != nil {
			t.Fatal(err)
		}
		checkMount(t, s, ids...)
		if e, _ := newStack(t, s, ids...).Lookup("d/c"); e.HardLink != "b" {
			t.Errorf("d/c is another name of %q", e.HardLink)
		}
		gone, err := s.Unpack(t.Context(), bytes.NewReader(makeTar(t, reg(".wh.a", ""), reg(".wh.b", ""))), "", newStack(t, s, ids[0]))
		if err != nil {
			t.Fatal(err)
		}
		checkMount(t, s, ids[0], gone)
		if e, _ := newStack(t, s, ids[0], gone).Lookup("e"); e.HardLink != "d/c" {
			t.Errorf("e is another name of %q", e.HardLink)
		}
	})
}

func TestStackOfDrafts(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		base, err := zoo(s, nil).Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		d := s.NewDraft(newStack(t, s, base))
		if !d.Empty() {
			t.Error("a new draft must be empty")
		}
		d.Remove("no/such/file")
		d.Put(file("etc/new", "new"), text("new"))
		d.Remove("etc/new")
		if !d.Empty() {
			t.Error("removing what only the draft had must leave nothing behind")
		}
		d.Remove("etc/passwd")
		d.Remove("usr")
		d.Put(file("usr/fresh", "f"), text("f")) // opaque
		d.Put(dir("bin/su"), nil)                // a directory over a file
		d.Put(file("many", "file over dir"), text("file over dir"))
		d.Put(index.Entry{Path: "new/link", Type: index.File, HardLink: "a/one"}, nil)
		d.Put(dir("dev"), nil) // keeps its content
		id, err := d.Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := s.Index(ctx, id)
		var got []string
		for e := range x.All() {
			s := e.Path
			switch {
			case e.Type == index.Whiteout:
				s += " gone"
			case e.Opaque:
				s += " opaque"
			case e.HardLink != "":
				s += " = " + e.HardLink
			}
			got = append(got, s)
		}
		want := []string{"", "a", "a/one", "bin", "bin/su opaque", "dev", "etc", "etc/passwd gone", "many", "new", "new/link = a/one", "usr opaque", "usr/fresh"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		checkMount(t, s, base, id)

		// The same through the tar, in the way of other tools.
		r, _, err := s.OpenTar(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		info, _ := s.Stat(ctx, id)
		other := openStore(t, Options{NoEROFS: s.opt.NoEROFS})
		base2, err := zoo(other, nil).Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		id2, err := other.Unpack(ctx, r, info.DiffID, newStack(t, other, base2))
		if err != nil {
			t.Fatal(err)
		}
		y, _ := other.Index(ctx, id2)
		if x.Digest() != y.Digest() {
			t.Error(cmp.Diff(slices.Collect(x.All()), slices.Collect(y.All())))
		}
		checkMount(t, other, base2, id2)
	})
}

func TestCommitTree(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		base, err := zoo(s, nil).Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		lower, err := s.Mount(ctx, base)
		if err != nil {
			t.Fatal(err)
		}
		run := func(step func(root string)) ID {
			t.Helper()
			upper, err := s.NewUpper(ctx)
			if err != nil {
				t.Fatal(err)
			}
			at := t.TempDir()
			if err := unix.Mount("overlay", at, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%[2]s/work,volatile", lower, upper)); err != nil {
				t.Fatal(err)
			}
			step(at)
			if err := unix.Unmount(at, 0); err != nil {
				t.Fatal(err)
			}
			id, err := s.CommitTree(ctx, upper)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.RemoveAll(upper); err != nil {
				t.Fatal(err)
			}
			return id
		}
		if id := run(func(string) {}); id != "" {
			t.Errorf("nothing was written, but there is a layer %q", id)
		}
		must := func(errs ...error) {
			t.Helper()
			for _, err := range errs {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		id := run(func(root string) {
			must(os.WriteFile(root+"/etc/hosts", []byte("hosts"), 0o640),
				os.Remove(root+"/etc/passwd"),
				os.RemoveAll(root+"/usr"), os.MkdirAll(root+"/usr/lib", 0o755),
				os.Rename(root+"/bin/su", root+"/su"),
				os.Link(root+"/etc/hosts", root+"/hosts2"),
				os.Chmod(root+"/tmp", 0o700),
				unix.Lsetxattr(root+"/hosts2", "user.k", []byte("v"), 0),
				unix.Mkfifo(root+"/fifo", 0o600))
		})
		info, err := s.Stat(ctx, id)
		must(err)
		if info.Form != FormTree || info.DiffID != "" || id[0] != 't' {
			t.Errorf("%+v", info)
		}
		x, _ := s.Index(ctx, id)
		if e, _ := x.Lookup("hosts2"); e.HardLink != "etc/hosts" || e.Digest != digest.FromString("hosts") {
			t.Errorf("%+v", e)
		}
		if e, _ := x.Lookup("usr"); !e.Opaque {
			t.Errorf("%+v", e)
		}
		for e := range x.All() {
			for name := range e.Xattrs {
				if isOverlayXattr(name) {
					t.Errorf("%q has %s", e.Path, name)
				}
			}
		}
		checkMount(t, s, base, id)

		packed, err := s.Pack(ctx, id)
		must(err)
		if packed.ID != id || packed.DiffID == "" || packed.Content != info.Content {
			t.Errorf("%+v", packed)
		}
		checkMount(t, s, base, id)
		r, _, err := s.OpenTar(ctx, id)
		must(err)
		defer r.Close()
		if found, ok := s.FindDiffID(ctx, packed.DiffID, newStack(t, s, base)); !ok || found != id {
			t.Errorf("FindDiffID: %q, %v", found, ok)
		}
		unpacked, err := s.Unpack(ctx, r, packed.DiffID, newStack(t, s, base))
		must(err)
		y, _ := s.Index(ctx, unpacked)
		if y.Digest() != info.Content {
			t.Error(cmp.Diff(slices.Collect(x.All()), slices.Collect(y.All())))
		}
		checkMount(t, s, base, unpacked)
	})
}

func TestHold(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	s := openStore(t, Options{})
	draft := func(content string) *Draft {
		d := s.NewDraft(nil)
		e := file("a/f", content)
		e.Digest = digest.FromString("content")
		d.Put(e, text(content))
		return d
	}
	id, err := draft("content").Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Stat(ctx, id)
	if err != nil || info.Form != FormHeld || info.Content == "" {
		t.Errorf("%+v, %v", info, err)
	}
	r, err := s.OpenFile(ctx, id, "a/f")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(r); string(b) != "content" {
		t.Errorf("%q", b)
	}
	if on, err := os.ReadDir(s.path(id, "")); err == nil {
		t.Errorf("a held layer is on disk: %v", on)
	}
	if again, err := draft("content").Hold(ctx); again != id || err != nil {
		t.Errorf("%s, %v", again, err)
	}
	checkMount(t, s, id)
	after, err := s.Stat(ctx, id)
	if err != nil || after.Form != FormTar || after.Content != info.Content || after.DiffID == "" {
		t.Errorf("%+v, %v", after, err)
	}
	if err := s.Ensure(ctx, id, "d00"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Ensure of an unknown layer: %v", err)
	}
	if err := s.Delete(ctx, id); err != nil {
		t.Fatal(err)
	}

	// A file that is no longer what it was when its digest was taken.
	id, err = draft("changed").Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Ensure(ctx, id); !errors.Is(err, ErrChanged) || !strings.Contains(fmt.Sprint(err), `"a/f"`) {
		t.Errorf("Ensure: %v", err)
	}
	d := s.NewDraft(nil)
	d.Put(file("f", "x"), text("x"))
	if _, err := d.Hold(ctx); err == nil {
		t.Error("a file without a digest cannot be held")
	}
	d.Put(file("f", "x"), text("longer"))
	if _, err := d.Commit(ctx); !errors.Is(err, ErrChanged) {
		t.Errorf("a file longer than its entry says: %v", err)
	}
	d.Put(file("f", "longer"), text("x"))
	if _, err := d.Commit(ctx); !errors.Is(err, ErrChanged) {
		t.Errorf("a file shorter than its entry says: %v", err)
	}
	d.Put(file("f", "x"), text("x"))
	d.Put(file(".wh.f", "x"), text("x"))
	if _, err := d.Commit(ctx); err == nil || !strings.Contains(err.Error(), ".wh.f") {
		t.Errorf("a name that no layer can have: %v", err)
	}
}

func TestReopen(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	s := openStore(t, Options{})
	id, err := zoo(s, nil).Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Mount(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.NewUpper(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.tmpName()+"/half/written", 0o700); err != nil {
		t.Fatal(err)
	}
	// A layer whose info and index were lost counts as missing, and can be written anew.
	d := s.NewDraft(nil)
	d.Put(file("f", "x"), text("x"))
	broken, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Truncate(s.path(broken, infoFile), 3), os.Truncate(s.path(broken, indexFile), 3)); err != nil {
		t.Fatal(err)
	}

	// As after a kill: s is never closed, its mount still there.
	again, err := Open(s.dir, Options{Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	again.work.Wait()
	b, _ := os.ReadFile("/proc/self/mountinfo")
	if left := mountPointsBelow(string(b), s.dir); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
	for _, sub := range []string{"tmp", "uppers", "mnt"} {
		if left, _ := os.ReadDir(filepath.Join(s.dir, sub)); len(left) > 0 {
			t.Errorf("left in %s: %v", sub, left)
		}
	}
	var ids []ID
	if err := again.Walk(ctx, func(info Info) error {
		ids = append(ids, info.ID)
		return nil
	}); err != nil || !slices.Equal(ids, []ID{id}) {
		t.Errorf("Walk: %v, %v", ids, err)
	}
	if _, err := again.Stat(ctx, broken); !errors.Is(err, ErrNotFound) {
		t.Errorf("a damaged layer: %v", err)
	}
	d = again.NewDraft(nil)
	d.Put(file("f", "x"), text("x"))
	if anew, err := d.Commit(ctx); err != nil || anew != broken {
		t.Errorf("%s, %v", anew, err)
	}
	if _, err := again.Stat(ctx, broken); err != nil {
		t.Error(err)
	}
	if err := again.Delete(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := again.Index(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("a deleted layer: %v", err)
	}
	for _, bad := range []ID{"", "../x", "tmp", "mnt", "d/../../etc"} {
		if _, err := again.Stat(ctx, bad); !errors.Is(err, ErrNotFound) {
			t.Errorf("Stat(%q): %v", bad, err)
		}
	}
}

func TestMountIsShared(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		id, err := zoo(s, nil).Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		dirs := make([]string, 8)
		for i := range dirs {
			wg.Go(func() {
				var err error
				if dirs[i], err = s.Mount(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(slices.Compact(dirs)) != 1 {
			t.Errorf("different mounts: %v", dirs)
		}
		if err := s.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(dirs[0]); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a deleted layer is still mounted: %v", err)
		}
	})
}

// entry is a header with content.
type tarEntry struct {
	tar.Header
	content string
}

func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if e.Mode == 0 {
			e.Mode = 0o644
		}
		if e.Typeflag == 0 {
			e.Typeflag = tar.TypeReg
		}
		e.ModTime = time.Unix(1e9, 0)
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func reg(name, content string) tarEntry { return tarEntry{tar.Header{Name: name}, content} }

func hardlink(name, target string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

func symlinkTo(name, target string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}}
}

func mkdir(name string) tarEntry {
	return tarEntry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o700}}
}

// describe shows an index as text.
func describe(x *index.Index) []string {
	var out []string
	for e := range x.All() {
		s := "/" + e.Path
		switch e.Type {
		case index.Dir:
			s += fmt.Sprintf(" dir %o", e.Mode)
		case index.File:
			s += " " + e.Digest.Encoded()[:4]
		case index.Symlink:
			s += " -> " + e.Target
		case index.Whiteout:
			s += " gone"
		}
		if e.Opaque {
			s += " opaque"
		}
		if e.HardLink != "" {
			s += " = " + e.HardLink
		}
		out = append(out, s)
	}
	return out
}

func TestUnpackForeignTars(t *testing.T) {
	a, b := digest.FromString("a").Encoded()[:4], digest.FromString("b").Encoded()[:4]
	for _, tt := range []struct {
		name    string
		entries []tarEntry
		want    []string
	}{
		{
			"absolute and dots",
			[]tarEntry{reg("/x/./a", "a"), reg("./x/../y/b", "b"), reg("/../../z", "a")},
			[]string{"/ dir 755", "/x dir 755", "/x/a " + a, "/y dir 755", "/y/b " + b, "/z " + a},
		},
		{
			"last wins",
			[]tarEntry{reg("f", "a"), mkdir("d"), reg("d/x", "a"), reg("f", "b"), reg("d", "a")},
			[]string{"/ dir 755", "/d " + a, "/f " + b},
		},
		{
			"out of order",
			[]tarEntry{reg("d/e/x", "a"), mkdir("d/e/"), mkdir("./")},
			[]string{"/ dir 700", "/d dir 755", "/d/e dir 700", "/d/e/x " + a},
		},
		{
			"first name sorts first",
			[]tarEntry{reg("z", "a"), hardlink("b", "/z"), hardlink("c", "./b"), reg("z", "b")},
			[]string{"/ dir 755", "/b " + a, "/c " + a + " = b", "/z " + b},
		},
		{
			"through our symlinks",
			[]tarEntry{symlinkTo("lib", "/usr/lib"), reg("lib/x", "a"), symlinkTo("up", "../../.."), reg("up/up/y", "b")},
			[]string{"/ dir 755", "/lib -> /usr/lib", "/up -> ../../..", "/usr dir 755", "/usr/lib dir 755", "/usr/lib/x " + a, "/y " + b},
		},
		{
			"whiteouts",
			[]tarEntry{
				reg(".wh.f", ""), reg("d/.wh..wh..opq", ""), reg("d/x", "a"), reg("e/x", "a"), reg(".wh.e", ""), reg(".wh.g", ""), mkdir("g"),
				reg(".wh..wh.plnk/1", ""), reg(".wh..wh.aufs", ""),
			},
			[]string{"/ dir 755", "/.wh..wh.plnk dir 755", "/.wh..wh.plnk/1 " + digest.FromString("").Encoded()[:4], "/d dir 755 opaque", "/d/x " + a, "/e dir 755 opaque", "/e/x " + a, "/g dir 700 opaque"},
		},
		{
			"whiteout of nothing as a device",
			[]tarEntry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "d/gone"}}},
			[]string{"/ dir 755", "/d dir 755"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bothForms(t, func(t *testing.T, s *Store) {
				id, err := s.Unpack(t.Context(), bytes.NewReader(makeTar(t, tt.entries...)), "", nil)
				if err != nil {
					t.Fatal(err)
				}
				x, _ := s.Index(t.Context(), id)
				if diff := cmp.Diff(tt.want, describe(x)); diff != "" {
					t.Error(diff)
				}
				checkMount(t, s, id)
			})
		})
	}
}

func TestUnpackRefuses(t *testing.T) {
	s := openStore(t, Options{NoEROFS: true})
	good := makeTar(t, reg("f", strings.Repeat("x", 5000)))
	long := strings.Repeat("n", 250)
	for _, tt := range []struct {
		name, want string
		tar        []byte
	}{
		{"out of the root", "outside", makeTar(t, reg("../evil", "x"))},
		{"out of the root, hidden", "outside", makeTar(t, reg("a/../../evil", "x"))},
		{"link out of the root", "outside", makeTar(t, hardlink("a", "../../etc/passwd"))},
		{"link to nothing", "no such file", makeTar(t, hardlink("a", "/etc/passwd"))},
		{"link to itself", "no such file", makeTar(t, hardlink("a", "a"))},
		{"link to a directory", "directory", makeTar(t, mkdir("d"), hardlink("a", "d"))},
		{"below a file", "not a directory", makeTar(t, reg("f", ""), reg("f/g", ""))},
		{"symlink loop", "too many", makeTar(t, symlinkTo("a", "b"), symlinkTo("b", "a"), reg("a/x", ""))},
		{"whiteout of ..", "whiteout", makeTar(t, reg("d/.wh...", ""))},
		{"root is a file", "root", makeTar(t, symlinkTo("./", "/etc"))},
		{"owner", "owner", makeTar(t, tarEntry{Header: tar.Header{Name: "f", Uid: -1, Format: tar.FormatGNU}})},
		{"truncated", "unexpected EOF", good[:3000]},
		{"no tar", "tar", bytes.Repeat([]byte("x"), 2000)},
		{"sparse file of an exabyte", "too large", append(rawPAX(t, "GNUSparseFile.0/f", "1\n8192\n5\n"+strings.Repeat("\x00", 503)+"hello", map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", "GNU.sparse.realsize": "1152921504606846976",
		}), makeTar(t)...)},
		{"long name", "too long", makeTar(t, reg(strings.Repeat("n", 256), ""))},
		{"long path", "too long", makeTar(t, reg(strings.Repeat("a/", 10_000)+"f", ""))},
		{"deep path", "too long", makeTar(t, reg(strings.Repeat("a/", index.MaxDepth)+"f", ""))},
		{"long path of a link", "too long", makeTar(t, hardlink("a", strings.Repeat("a/", 10_000)+"f"))},
		{"long path by symlinks", "too long", makeTar(t, symlinkTo("s", strings.Repeat(long+"/", 16)), symlinkTo("s/s", strings.Repeat(long+"/", 16)), symlinkTo("s/s/s", strings.Repeat(long+"/", 16)), reg("s/s/s/f", ""))},
	} {
		id, err := s.Unpack(t.Context(), bytes.NewReader(tt.tar), "", nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %q, %v", tt.name, id, err)
		}
	}
	if id, err := s.Unpack(t.Context(), bytes.NewReader(good), digest.FromString("another"), nil); !errors.Is(err, ErrDigest) {
		t.Errorf("wrong diff ID: %q, %v", id, err)
	}
	s.work.Wait()
	if err := s.Walk(t.Context(), func(info Info) error { return fmt.Errorf("%s is there", info.ID) }); err != nil {
		t.Error(err)
	}
	// What follows the archive is part of the blob.
	padded := append(slices.Clone(good), make([]byte, 100_000)...)
	id, err := s.Unpack(t.Context(), bytes.NewReader(padded), digest.FromBytes(padded), nil)
	if err != nil || id != ID("d"+digest.FromBytes(padded).Encoded()) {
		t.Errorf("%s, %v", id, err)
	}
}

func TestUnpackOverOtherLayers(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		d := s.NewDraft(nil)
		private := dir("home/user")
		private.Mode, private.UID = 0o700, 1000
		d.Put(private, nil)
		d.Put(file("home/user/old", "old"), text("old"))
		d.Put(symlink("lib", "usr/lib"), nil)
		base, err := d.Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		below := newStack(t, s, base)
		gone, err := s.Unpack(ctx, bytes.NewReader(makeTar(t, reg(".wh.lib", ""), reg("home/user/.wh.old", ""), reg("home/.wh.nobody", ""))), "", below)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := s.Index(ctx, gone)
		if diff := cmp.Diff([]string{"/ dir 755", "/home dir 755", "/home/user dir 700", "/home/user/old gone", "/lib gone"}, describe(x)); diff != "" {
			t.Error(diff)
		}
		checkMount(t, s, base, gone)

		b := makeTar(t, reg("home/user/new", "new"), hardlink("home/user/again", "home/user/old"), reg("lib/x", "x"))
		diffID := digest.FromBytes(b)
		if id, ok := s.FindDiffID(ctx, diffID, below); ok {
			t.Errorf("found %s before it was there", id)
		}
		id, err := s.Unpack(ctx, bytes.NewReader(b), diffID, below)
		if err != nil {
			t.Fatal(err)
		}
		x, _ = s.Index(ctx, id)
		sum := func(s string) string { return digest.FromString(s).Encoded()[:4] }
		want := []string{"/ dir 755", "/home dir 755", "/home/user dir 700", "/home/user/again " + sum("old"), "/home/user/new " + sum("new"), "/home/user/old " + sum("old") + " = home/user/again", "/lib dir 755", "/lib/x " + sum("x")}
		if diff := cmp.Diff(want, describe(x)); diff != "" {
			t.Error(diff)
		}
		checkMount(t, s, base, id)
		if got, ok := s.FindDiffID(ctx, diffID, below); !ok || got != id {
			t.Errorf("FindDiffID: %s, %v", got, ok)
		}
		if got, ok := s.FindDiffID(ctx, diffID, nil); ok {
			t.Errorf("over nothing the layer is another one, but found %s", got)
		}
		r, _, err := s.OpenTar(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got, _ := digest.FromReader(r); got != diffID {
			t.Errorf("the tar is %s now", got)
		}

		// Only parents: the tar form, under an ID of its own.
		b = makeTar(t, reg("home/user/new", "new"))
		over, err := s.Unpack(ctx, bytes.NewReader(b), "", below)
		if err != nil {
			t.Fatal(err)
		}
		alone, err := s.Unpack(ctx, bytes.NewReader(b), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if over == alone || !strings.HasPrefix(string(over), string(alone)+"-") {
			t.Errorf("%s, %s", over, alone)
		}
		if info, _ := s.Stat(ctx, over); info.Form != FormTar {
			t.Errorf("%+v", info)
		}
		checkMount(t, s, base, over)
		checkMount(t, s, alone)

		// An opaque root hides each name below.
		opq, err := s.Unpack(ctx, bytes.NewReader(makeTar(t, reg(".wh..wh..opq", ""), reg("home/x", "x"))), "", below)
		if err != nil {
			t.Fatal(err)
		}
		x, _ = s.Index(ctx, opq)
		if diff := cmp.Diff([]string{"/ dir 755", "/home dir 755 opaque", "/home/x " + sum("x"), "/lib gone"}, describe(x)); diff != "" {
			t.Error(diff)
		}
		checkMount(t, s, base, opq)
	})
}

func TestUnpackSparse(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		id, err := s.Unpack(t.Context(), bytes.NewReader(scatteredTar(t)), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := s.Index(t.Context(), id)
		e, _ := x.Lookup("f")
		if e.Size != 8197 || e.Digest != digest.FromString(strings.Repeat("\x00", 8192)+"hello") {
			t.Errorf("%+v", e)
		}
		checkMount(t, s, id)
	})
}

// scatteredTar has a file whose bytes are not in one piece.
func scatteredTar(t testing.TB) []byte {
	t.Helper()
	// GNU sparse 1.0 in PAX: the map stands before the data, "1\n" entry at 8192 of 5 bytes; real size 8197.
	m := "1\n8192\n5\n"
	data := m + strings.Repeat("\x00", 512-len(m)) + "hello"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(
		w.WriteHeader(&tar.Header{Name: "before", Mode: 0o644, Size: 1}), errOf(w.Write([]byte("x"))),
		w.Flush(),
	); err != nil {
		t.Fatal(err)
	}
	b.Write(rawPAX(t, "GNUSparseFile.0/f", data, map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", "GNU.sparse.realsize": "8197",
	}))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func errOf(_ int, err error) error { return err }

// rawPAX makes an entry with PAX records that archive/tar does not write.
func rawPAX(t testing.TB, name, data string, records map[string]string) []byte {
	t.Helper()
	var recs strings.Builder
	for _, k := range slices.Sorted(maps.Keys(records)) {
		line := " " + k + "=" + records[k] + "\n"
		n := len(line) + 2
		recs.WriteString(fmt.Sprintf("%d%s", n, line))
		if n < 10 || n > 99 {
			t.Fatal("a record of another length")
		}
	}
	var out bytes.Buffer
	add := func(typeflag byte, name, data string) {
		var one bytes.Buffer
		w := tar.NewWriter(&one)
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}), errOf(io.WriteString(w, data)), w.Flush()); err != nil {
			t.Fatal(err)
		}
		b := one.Bytes()
		b[156] = typeflag
		sum := 8 * int(' ')
		for i, c := range b[:512] {
			if i < 148 || i >= 156 {
				sum += int(c)
			}
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		out.Write(b)
	}
	add('x', "PaxHeaders/f", recs.String())
	add('0', name, data)
	return out.Bytes()
}

func FuzzUnpack(f *testing.F) {
	f.Add(makeTar(f, reg("a/b", "x"), hardlink("c", "a/b"), symlinkTo("l", ".."), reg("l/l/y", "z"), reg(".wh.q", "")))
	f.Add(makeTar(f, mkdir("d"), reg("d/.wh..wh..opq", ""), reg("../x", "")))
	for _, c := range hostileTars {
		for _, layer := range c.layers(f) {
			f.Add(layer)
		}
	}
	where := f.TempDir()
	if _, err := os.Stat("/dev/shm"); err == nil { // where syncing costs nothing
		if where, err = os.MkdirTemp("/dev/shm", "slipway-fuzz"); err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { os.RemoveAll(where) })
	}
	s, err := Open(where, Options{NoEROFS: true, Log: discard})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := s.Unpack(t.Context(), bytes.NewReader(b), "", nil)
		if err != nil {
			return
		}
		defer s.Delete(t.Context(), id)
		x, err := s.Index(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		m, _ := s.meta(id)
		if _, err := encodeEROFS(x, m.TarSize); err != nil && !m.Tree {
			t.Fatal(err)
		}
		// Extracted, nothing appears outside of the directory, whatever the kernel refuses inside it.
		outside := t.TempDir()
		inside := filepath.Join(outside, "inside")
		if err := os.Mkdir(inside, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := extract(t.Context(), s.fs, inside, x, func(e index.Entry) (io.ReadCloser, error) {
			return s.OpenFile(t.Context(), id, e.Path)
		}); err != nil {
			t.Logf("extract: %v", err)
		}
		if names, err := os.ReadDir(outside); err != nil || len(names) != 1 {
			t.Fatalf("%v, %v", names, err)
		}
	})
}

// TestUserXattrsHideNothing: a step may set the xattrs that overlayfs of an ordinary user goes by. Our mounts do not, so the index must not.
func TestUserXattrsHideNothing(t *testing.T) {
	needRoot(t)
	s := openStore(t, Options{})
	ctx := t.Context()
	upper, err := s.NewUpper(ctx)
	if err != nil {
		t.Fatal(err)
	}
	dir, file := filepath.Join(upper, "upper", "dir"), filepath.Join(upper, "upper", "file")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(file, nil, 0o644),
		unix.Setxattr(dir, xattrUserOpaque, []byte("y"), 0), unix.Setxattr(file, xattrUserWhiteout, []byte("y"), 0)); err != nil {
		t.Fatal(err)
	}
	id, err := s.CommitTree(ctx, upper)
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.Index(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	below := index.New([]index.Entry{{Path: "dir", Type: index.Dir, Mode: 0o755}, {Path: "dir/f", Type: index.Symlink, Target: "x"}})
	view := index.Merge(below, x)
	if _, ok := view.Lookup("dir/f"); !ok {
		t.Error("dir hides what is below")
	}
	if e, ok := view.Lookup("file"); !ok || e.Type != index.File {
		t.Errorf("file is %+v, %v", e, ok)
	}
}
