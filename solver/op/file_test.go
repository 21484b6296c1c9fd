// SPDX-License-Identifier: Apache-2.0

package op

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/ulikunitz/xz"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

func fileActions(actions ...*pb.FileAction) *pb.Op {
	return &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: actions}}}
}

func mkfileAction(in, out int64, p, data string, edit ...func(*pb.FileActionMkFile)) *pb.FileAction {
	m := &pb.FileActionMkFile{Path: p, Mode: 0o644, Data: []byte(data), Timestamp: -1}
	for _, e := range edit {
		e(m)
	}
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out, Action: &pb.FileAction_Mkfile{Mkfile: m}}
}

func mkdirAction(in, out int64, p string, mode int32, parents bool) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out, Action: &pb.FileAction_Mkdir{
		Mkdir: &pb.FileActionMkDir{Path: p, Mode: mode, MakeParents: parents, Timestamp: -1},
	}}
}

func symlinkAction(in, out int64, target, p string) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out, Action: &pb.FileAction_Symlink{
		Symlink: &pb.FileActionSymlink{Oldpath: target, Newpath: p, Timestamp: 3e9},
	}}
}

func rmAction(in, out int64, p string, notFound, wildcard bool) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out, Action: &pb.FileAction_Rm{
		Rm: &pb.FileActionRm{Path: p, AllowNotFound: notFound, AllowWildcard: wildcard},
	}}
}

func TestFileActions(t *testing.T) {
	d := newDeps(t)
	base := tree(t, d, "/etc", "/etc/motd =hi", "/etc/rc 0700", "/etc/rc/x =x", "/lib -> etc", "/loop -> loop",
		"/out -> ../../tmp", "/staff 2775 0:50", "/t1 =1", "/t2 =2")
	const now = " @1714979289 =" // testTime
	for _, c := range []struct {
		name    string
		actions []*pb.FileAction
		added   []string
		removed []string
		err     string
	}{
		{"mkfile", []*pb.FileAction{mkfileAction(0, 0, "/a", "A")}, []string{"/a 0644 0:0" + now + "A"}, nil, ""},
		{"mkfile replaces", []*pb.FileAction{mkfileAction(0, 0, "/etc/motd", "B")}, []string{"/etc/motd 0644 0:0" + now + "B"}, []string{"/etc/motd"}, ""},
		{"mkfile through a symlink", []*pb.FileAction{mkfileAction(0, 0, "/lib/a", "A")}, []string{"/etc/a 0644 0:0" + now + "A"}, nil, ""},
		{"mkfile never leaves the root", []*pb.FileAction{mkfileAction(0, 0, "/out", "A")}, []string{"/tmp 0644 0:0" + now + "A"}, nil, ""},
		{"mkfile without a parent", []*pb.FileAction{mkfileAction(0, 0, "/no/a", "A")}, nil, nil, "/no/a: no such file or directory"},
		{"mkfile below a file", []*pb.FileAction{mkfileAction(0, 0, "/t1/a", "A")}, nil, nil, "/t1/a: not a directory"},
		{"mkfile over a directory", []*pb.FileAction{mkfileAction(0, 0, "/etc", "A")}, nil, nil, "is a directory"},
		{"mkfile in a set-gid directory", []*pb.FileAction{mkfileAction(0, 0, "/staff/a", "A")}, []string{"/staff/a 0644 0:50" + now + "A"}, nil, ""},
		{"mkfile in a loop", []*pb.FileAction{mkfileAction(0, 0, "/loop/a", "A")}, nil, nil, "too many levels of symbolic links"},
		{"mkfile with owner and time", []*pb.FileAction{mkfileAction(0, 0, "/staff/a", "A", func(m *pb.FileActionMkFile) {
			m.Owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: 5}}}
			m.Timestamp = 9e9
		})}, []string{"/staff/a 0644 5:5 @9 =A"}, nil, ""},
		{"mkdir", []*pb.FileAction{mkdirAction(0, 0, "/d", 0o711, false)}, []string{"/d 0711 0:0"}, nil, ""},
		{"mkdir that exists", []*pb.FileAction{mkdirAction(0, 0, "/etc/rc", 0o755, false)}, nil, nil, ""},
		{"mkdir with parents", []*pb.FileAction{mkdirAction(0, 0, "/w/x/y", 0o750, true)}, []string{"/w 0750 0:0", "/w/x 0750 0:0", "/w/x/y 0750 0:0"}, nil, ""},
		{"mkdir in a set-gid directory", []*pb.FileAction{mkdirAction(0, 0, "/staff/d", 0o755, true)}, []string{"/staff/d 02755 0:50"}, nil, ""},
		{"mkdir without parents", []*pb.FileAction{mkdirAction(0, 0, "/w/x", 0o750, false)}, nil, nil, "no such file or directory"},
		{"mkdir below a file", []*pb.FileAction{mkdirAction(0, 0, "/t1/x", 0o750, true)}, nil, nil, "not a directory"},
		{"symlink", []*pb.FileAction{symlinkAction(0, 0, "../x", "/etc/l")}, []string{"/etc/l 0777 0:0 @3 -> ../x"}, nil, ""},
		{"symlink that exists", []*pb.FileAction{symlinkAction(0, 0, "../x", "/t1")}, nil, nil, "file exists"},
		{"rm", []*pb.FileAction{rmAction(0, 0, "/t1", false, false)}, nil, []string{"/t1"}, ""},
		{"rm of a directory", []*pb.FileAction{rmAction(0, 0, "/etc/rc", false, false)}, nil, []string{"/etc/rc", "/etc/rc/x"}, ""},
		{"rm of a symlink", []*pb.FileAction{rmAction(0, 0, "/lib", false, false)}, nil, []string{"/lib"}, ""},
		{"rm through a symlink", []*pb.FileAction{rmAction(0, 0, "/lib/motd", false, false)}, nil, []string{"/etc/motd"}, ""},
		{"rm of nothing", []*pb.FileAction{rmAction(0, 0, "/nope", false, false)}, nil, nil, `"/nope": not found`},
		{"rm of nothing is fine", []*pb.FileAction{rmAction(0, 0, "/nope", true, false)}, nil, nil, ""},
		{"rm of the root", []*pb.FileAction{rmAction(0, 0, "/", true, false)}, nil, nil, "root cannot be removed"},
		{"rm with wildcard", []*pb.FileAction{rmAction(0, 0, "/t*", false, true)}, nil, []string{"/t1", "/t2"}, ""},
		{
			"a chain makes one layer",
			[]*pb.FileAction{mkdirAction(0, -1, "/d", 0o755, false), mkfileAction(1, -1, "/d/f", "F"), rmAction(2, 0, "/t1", false, false)},
			[]string{"/d 0755 0:0", "/d/f 0644 0:0" + now + "F"},
			[]string{"/t1"},
			"",
		},
		{"name of a whiteout", []*pb.FileAction{mkfileAction(0, 0, "/.wh.x", "A")}, nil, nil, "reserved in image layers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := runOp(t, d, fileActions(c.actions...), base)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			before, after := showSnapshot(t, d, base), showSnapshot(t, d, out[0])
			diffLines(t, without(after, before), c.added)
			var removed []string
			for _, line := range without(before, after) {
				name, _, _ := strings.Cut(line, " ")
				removed = append(removed, name)
			}
			diffLines(t, removed, c.removed)
			if want := len(base) + min(len(c.added)+len(c.removed), 1); len(out[0]) != want {
				t.Errorf("%d layers, want %d", len(out[0]), want)
			}
		})
	}
}

// TestFileGraph: actions read each other's results, several outputs, and what nobody needs is not run.
func TestFileGraph(t *testing.T) {
	d := newDeps(t)
	copyBetween := func(in, from, out int64, src, dest string) *pb.FileAction {
		return &pb.FileAction{Input: in, SecondaryInput: from, Output: out, Action: &pb.FileAction_Copy{Copy: dockerCopy(src, dest)}}
	}
	names := func(s snapshot.Snapshot) (out []string) {
		for _, line := range showSnapshot(t, d, s) {
			name, _, _ := strings.Cut(line, " ")
			out = append(out, name)
		}
		return out
	}
	base := tree(t, d, "/base =b")
	out, err := runOp(t, d, fileActions(
		mkfileAction(-1, -1, "/one", "1"),     // tree 1: scratch, read by the next alone
		copyBetween(0, 1, 1, "/one", "/a"),    // tree 2: an output that goes on
		mkfileAction(2, 0, "/two", "2"),       // tree 3
		copyBetween(-1, 2, 2, "/a", "/x/"),    // tree 4
		mkfileAction(-1, -1, "/no/such", "3"), // would fail
	), base)
	if err != nil {
		t.Fatal(err)
	}
	diffLines(t, names(out[0]), []string{"/a", "/base", "/two"})
	diffLines(t, names(out[1]), []string{"/a", "/base"})
	diffLines(t, names(out[2]), []string{"/x", "/x/a"})
}

// TestFileDeterministic: the same copy gives the same layer, whenever it runs.
func TestFileDeterministic(t *testing.T) {
	var ids []snapshot.Snapshot
	now := testTime
	for range 2 {
		d := newDeps(t)
		d.Now = func() time.Time { now = now.Add(time.Hour); return now }
		out, err := runOp(t, d, copyOp(dockerCopy("/", "/new/dir/")), nil, tree(t, d, "/a", "/a/b =b", "/a/c == /a/b"))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, out[0])
	}
	if !slices.Equal(ids[0], ids[1]) {
		t.Errorf("different layers: %v", ids)
	}
}

func TestFileRefused(t *testing.T) {
	d := newDeps(t)
	unknown := mkfileAction(0, 0, "/a", "")
	unknown.GetMkfile().ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1})
	for _, c := range []struct {
		name string
		op   *pb.Op
		err  string
	}{
		{"no actions", fileActions(), "has no actions"},
		{"no outputs", fileActions(mkfileAction(0, -1, "/a", "")), "no outputs"},
		{"same output", fileActions(mkfileAction(0, 0, "/a", ""), mkfileAction(0, 0, "/a", "")), "output 0 is there twice"},
		{"missing output", fileActions(mkfileAction(0, 1, "/a", "")), "lacks output 0"},
		{"no such input", fileActions(mkfileAction(7, 0, "/a", "")), "there is no input 7"},
		{"loop", fileActions(mkfileAction(2, 0, "/a", ""), mkfileAction(1, -1, "/a", "")), "depends on itself"},
		{"unknown field", fileActions(unknown), "not supported yet: pb.FileActionMkFile"},
		{"bad mode", copyOp(&pb.FileActionCopy{Src: "/", Dest: "/", Mode: -1, ModeStr: "bogus"}), `invalid mode "bogus"`},
		{"windows", &pb.Op{Platform: &pb.Platform{OS: "windows"}, Op: fileActions(mkfileAction(0, 0, "/a", "")).Op}, "not supported yet: windows"},
		{"worker constraint", &pb.Op{Constraints: &pb.WorkerConstraints{Filter: []string{"gpu"}}, Op: fileActions(mkfileAction(0, 0, "/a", "")).Op}, "not supported yet: gpu"},
		{"build", &pb.Op{Op: &pb.Op_Build{Build: &pb.BuildOp{}}}, "not supported yet: build"},
	} {
		if _, err := New(*d)(vertex(c.op, 1)); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got error %v, want %q", c.name, err, c.err)
		}
	}
}

// TestFileParts: every field of an action is in the parts.
func TestFileParts(t *testing.T) {
	d := newDeps(t)
	base := func() *pb.FileActionCopy { return dockerCopy("/a", "/b") }
	seen := map[string]int{}
	edits := []func(*pb.FileActionCopy){
		func(*pb.FileActionCopy) {},
		func(a *pb.FileActionCopy) { a.Src = "/x" },
		func(a *pb.FileActionCopy) { a.Dest = "/x" },
		chown("ann", ""), chown("ann", "www"),
		func(a *pb.FileActionCopy) { a.Mode = 0o600 },
		func(a *pb.FileActionCopy) { a.ModeStr = "a+x" },
		func(a *pb.FileActionCopy) { a.FollowSymlink = false },
		func(a *pb.FileActionCopy) { a.DirCopyContents = false },
		func(a *pb.FileActionCopy) { a.AttemptUnpackDockerCompatibility = true },
		func(a *pb.FileActionCopy) { a.CreateDestPath = false },
		func(a *pb.FileActionCopy) { a.AllowWildcard = false },
		func(a *pb.FileActionCopy) { a.AllowEmptyWildcard = false },
		func(a *pb.FileActionCopy) { a.Timestamp = 0 },
		func(a *pb.FileActionCopy) { a.IncludePatterns = []string{"x"} },
		func(a *pb.FileActionCopy) { a.ExcludePatterns = []string{"x"} },
		func(a *pb.FileActionCopy) { a.AlwaysReplaceExistingDestPaths = true },
		func(a *pb.FileActionCopy) { a.RequiredPaths = []string{"x"} },
	}
	if n := (&pb.FileActionCopy{}).ProtoReflect().Descriptor().Fields().Len(); n != 16 {
		t.Errorf("FileActionCopy has %d fields: does Parts have them all?", n)
	}
	for i, edit := range edits {
		a := base()
		edit(a)
		op, err := New(*d)(vertex(copyOp(a), 2))
		if err != nil {
			t.Fatal(err)
		}
		key := partsKey(op)
		if j, dup := seen[key]; dup {
			t.Errorf("edits %d and %d have the same parts:\n%s", j, i, key)
		}
		seen[key] = i
	}
}

func partsKey(op solver.Op) string {
	var b strings.Builder
	for _, p := range op.Parts() {
		b.WriteString(p.Name + " = " + p.Value + "\n")
	}
	return b.String()
}

// archiveBytes makes a tar archive with all that ADD has to cope with.
func archiveBytes(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.ModTime = testTime
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 4, Gid: 5}, "")
	add(tar.Header{Name: "dir/file", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 1}, "hello")
	add(tar.Header{Name: "dir/hard", Typeflag: tar.TypeLink, Linkname: "dir/file", Mode: 0o4755, Uid: 1}, "")
	add(tar.Header{Name: "dir/abs", Typeflag: tar.TypeSymlink, Linkname: "/dir/file"}, "")
	add(tar.Header{Name: "implied/deep/x", Typeflag: tar.TypeReg, Uid: 9}, "x")
	add(tar.Header{Name: "twice", Typeflag: tar.TypeReg}, "first")
	add(tar.Header{Name: "twice", Typeflag: tar.TypeReg}, "second")
	add(tar.Header{Name: "there/new", Typeflag: tar.TypeReg}, "n")
	add(tar.Header{Name: "was-dir", Typeflag: tar.TypeReg}, "now a file")
	add(tar.Header{Name: "ln/through", Typeflag: tar.TypeReg}, "t")
	add(tar.Header{Name: "../../escape", Typeflag: tar.TypeReg}, "e")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestUnpackLongNames adds an archive of a kilobyte whose names would take more memory than there is.
func TestUnpackLongNames(t *testing.T) {
	d := newDeps(t)
	for name, h := range map[string]tar.Header{
		"file": {Name: strings.Repeat("a/", 400_000) + "f", Typeflag: tar.TypeReg},
		"link": {Name: "l", Linkname: strings.Repeat("a/", 400_000) + "f", Typeflag: tar.TypeLink},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := errors.Join(w.WriteHeader(&h), w.Close()); err != nil {
			t.Fatal(err)
		}
		src := commitTree(t, d, nil, []node{{Entry: index.Entry{
			Path: "a.tar", Type: index.File, Mode: 0o644, Size: int64(b.Len()), Digest: digest.FromBytes(b.Bytes()), Offset: -1,
		}, content: b.String()}})
		a := dockerCopy("/a.tar", "/dst")
		a.AttemptUnpackDockerCompatibility = true
		if _, err := runOp(t, d, copyOp(a), nil, src); !errors.Is(err, syscall.ENAMETOOLONG) || len(err.Error()) > 4096 {
			t.Errorf("%s: %.1000v", name, err)
		}
	}
}

func TestUnpack(t *testing.T) {
	d := newDeps(t)
	plain := archiveBytes(t)
	packed := map[string][]byte{"plain": plain}
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	gz.Write(plain)
	gz.Close()
	packed["gzip"] = bytes.Clone(b.Bytes())
	b.Reset()
	zw, _ := zstd.NewWriter(&b)
	zw.Write(plain)
	zw.Close()
	packed["zstd"] = bytes.Clone(b.Bytes())
	b.Reset()
	xw, _ := xz.NewWriter(&b)
	xw.Write(plain)
	xw.Close()
	packed["xz"] = bytes.Clone(b.Bytes())
	cmd := exec.Command("bzip2", "-c")
	cmd.Stdin = bytes.NewReader(plain)
	if bz, err := cmd.Output(); err == nil {
		packed["bzip2"] = bz
	} else {
		t.Log("no bzip2 here: SKIPPED")
	}

	base := tree(t, d, "/dst 0700 3:3", "/dst/there 0711 2:2", "/dst/there/old =o", "/dst/was-dir", "/dst/was-dir/x =x", "/dst/ln -> there")
	const at = " @1714979289"
	want := []string{
		"/dst 0700 3:3",
		"/dst/dir 0750 4:5",
		"/dst/dir/abs 0777 0:0" + at + " -> /dir/file",
		"/dst/dir/file 04755 1:0" + at + " =hello",
		"/dst/dir/hard 04755 1:0" + at + " == /dst/dir/file",
		"/dst/escape 0644 0:0" + at + " =e",
		"/dst/implied 0755 0:0",
		"/dst/implied/deep 0755 0:0",
		"/dst/implied/deep/x 0644 9:0" + at + " =x",
		"/dst/ln 0777 0:0 @1000000000 -> there",
		"/dst/there 0711 2:2",
		"/dst/there/new 0644 0:0" + at + " =n",
		"/dst/there/old 0644 0:0 @1000000000 =o",
		"/dst/there/through 0644 0:0" + at + " =t",
		"/dst/twice 0644 0:0" + at + " =second",
		"/dst/was-dir 0644 0:0" + at + " =now a file",
	}

	for name, data := range packed {
		t.Run(name, func(t *testing.T) {
			src := commitTree(t, d, nil, []node{{Entry: index.Entry{
				Path: "a.tar", Type: index.File, Mode: 0o644, Size: int64(len(data)), Digest: digest.FromBytes(data), Offset: -1,
			}, content: string(data)}})
			a := dockerCopy("/a.tar", "/dst")
			a.AttemptUnpackDockerCompatibility = true
			out, err := runOp(t, d, copyOp(a), base, src)
			if err != nil {
				t.Fatal(err)
			}
			diffLines(t, showSnapshot(t, d, out[0]), want)
		})
	}

	t.Run("owner", func(t *testing.T) {
		src := commitTree(t, d, nil, []node{{Entry: index.Entry{
			Path: "a.tar", Type: index.File, Mode: 0o644, Size: int64(len(plain)), Digest: digest.FromBytes(plain), Offset: -1,
		}, content: string(plain)}})
		a := dockerCopy("/a.tar", "/n/d/")
		a.AttemptUnpackDockerCompatibility = true
		a.Owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: 77}}}
		out, err := runOp(t, d, copyOp(a), nil, src)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range showSnapshot(t, d, out[0]) {
			implied := strings.HasPrefix(line, "/n/d/implied 0755 0:0") || strings.HasPrefix(line, "/n/d/implied/deep 0755 0:0") ||
				strings.HasPrefix(line, "/n/d/there 0755 0:0") || strings.HasPrefix(line, "/n/d/ln 0755 0:0")
			if !strings.Contains(line, " 77:77") && !implied {
				t.Errorf("owner: %s", line)
			}
		}
	})

	t.Run("not an archive", func(t *testing.T) {
		for _, content := range []string{"text", "", "\x1f\x8b\x08broken", "\xfd7zXZ\x00broken", "BZhbroken", "\x28\xb5\x2f\xfdbroken"} {
			n := node{Entry: index.Entry{Path: "f", Type: index.File, Mode: 0o644, Size: int64(len(content)), Digest: digest.FromString(content), Offset: -1}, content: content}
			a := dockerCopy("/f", "/out")
			a.AttemptUnpackDockerCompatibility = true
			out, err := runOp(t, d, copyOp(a), nil, commitTree(t, d, nil, []node{n}))
			if err != nil {
				t.Fatalf("%q: %v", content, err)
			}
			if got := showSnapshot(t, d, out[0]); len(got) != 1 || !strings.HasSuffix(got[0], "="+content) {
				t.Errorf("%q: got %q", content, got)
			}
		}
	})
}

// FuzzUnpack: whatever an archive says, the result is inside the destination and a layer can be made of it.
func FuzzUnpack(f *testing.F) {
	f.Add([]byte("not an archive"))
	d := newDeps(f)
	dst := tree(f, d, "/dst", "/dst/up -> ..", "/keep =k")
	f.Fuzz(func(t *testing.T, data []byte) {
		n := node{Entry: index.Entry{Path: "a", Type: index.File, Size: int64(len(data)), Digest: digest.FromBytes(data), Offset: -1}, content: string(data)}
		a := dockerCopy("/a", "/dst/sub/")
		a.AttemptUnpackDockerCompatibility = true
		out, err := runOp(t, d, copyOp(a), dst, commitTree(t, d, nil, []node{n}))
		if err != nil {
			return
		}
		for _, line := range showSnapshot(t, d, out[0]) {
			if name := strings.Fields(line)[0]; !strings.HasPrefix(name, "/dst") && name != "/keep" {
				t.Errorf("outside: %s", line)
			}
		}
	})
}

func TestMergeAndDiff(t *testing.T) {
	d := newDeps(t)
	base := tree(t, d, "/a =1", "/d", "/d/x =x", "/d/y =y", "/same =s")
	upper := commitTree(t, d, base, parseTree(t, "/a =2", "/new =n"))
	other := tree(t, d, "/a =3", "/d 0700", "/d/y =y", "/same =s", "/l =l", "/m == /l")
	merge := func(n int) *pb.Op {
		op := &pb.MergeOp{}
		for i := range n {
			op.Inputs = append(op.Inputs, &pb.MergeInput{Input: int64(i)})
		}
		return &pb.Op{Op: &pb.Op_Merge{Merge: op}}
	}
	diff := func(lower, upper int64) *pb.Op {
		return &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: lower}, Upper: &pb.UpperDiffInput{Input: upper}}}}
	}
	run := func(o *pb.Op, in ...snapshot.Snapshot) snapshot.Snapshot {
		t.Helper()
		out, err := runOp(t, d, o, in...)
		if err != nil {
			t.Fatal(err)
		}
		return out[0]
	}
	if got := run(merge(3), base, nil, other); !slices.Equal(got, append(slices.Clone(base), other...)) {
		t.Errorf("merge: %v", got)
	}
	if got := run(diff(0, 1), base, upper); !slices.Equal(got, upper[1:]) {
		t.Errorf("diff of a stack: %v, want %v", got, upper[1:])
	}
	if got := run(diff(-1, 0), upper); !slices.Equal(got, upper) {
		t.Errorf("diff from scratch: %v", got)
	}
	if got := run(diff(0, 1), base, base); len(got) != 0 {
		t.Errorf("diff of the same: %v", got)
	}
	// Put back on what it is a difference to, it gives the upper again.
	for name, pair := range map[string][2]snapshot.Snapshot{
		"unrelated": {base, other}, "back": {upper, base}, "to nothing": {base, nil},
	} {
		got := run(diff(0, 1), pair[0], pair[1])
		if len(got) != 1 {
			t.Fatalf("%s: %v", name, got)
		}
		diffLines(t, showSnapshot(t, d, run(merge(2), pair[0], got)), showSnapshot(t, d, pair[1]))
	}
	unrelated := run(diff(0, 1), base, other)
	for _, line := range showSnapshot(t, d, unrelated) {
		if strings.HasPrefix(line, "/same") {
			t.Errorf("unchanged file is in the difference: %s", line)
		}
	}
	pass := &pb.Op{Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "x", Outputs: []int64{1, 0, 1}}}}
	out, err := runOp(t, d, pass, base, other)
	if err != nil || len(out) != 3 || !slices.Equal(out[0], other) || !slices.Equal(out[1], base) || !slices.Equal(out[2], other) {
		t.Errorf("passthrough: %v, %v", out, err)
	}
}
