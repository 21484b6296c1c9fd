// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	fscopy "github.com/tonistiigi/fsutil/copy"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// reference carries out a copy on real directories the way BuildKit does, with its own library.
func reference(ctx context.Context, src, dst string, a *pb.FileActionCopy, o *owner) error {
	opts := func(ci *fscopy.CopyInfo) {
		ci.IncludePatterns = a.IncludePatterns
		ci.ExcludePatterns = a.ExcludePatterns
		ci.CopyDirContents = a.DirCopyContents
		ci.FollowLinks = a.FollowSymlink
		ci.AlwaysReplaceExistingDestPaths = a.AlwaysReplaceExistingDestPaths
		ci.ModeStr = a.ModeStr
		if a.ModeStr == "" && a.Mode != -1 {
			m := int(a.Mode)
			ci.Mode = &m
		}
		if a.Timestamp != -1 {
			ts := time.Unix(0, a.Timestamp)
			ci.Utime = &ts
		}
		ci.Chown = func(u *fscopy.User) (*fscopy.User, error) { return u, nil }
		if o != nil {
			ci.Chown = func(*fscopy.User) (*fscopy.User, error) {
				return &fscopy.User{UID: int(o.uid), GID: int(o.gid)}, nil
			}
		}
	}
	names := []string{cleanPath(a.Src)}
	if a.AllowWildcard {
		var err error
		if names, err = fscopy.ResolveWildcards(src, cleanPath(a.Src), a.FollowSymlink); err != nil {
			return err
		}
		if len(names) == 0 && !a.AllowEmptyWildcard {
			return errors.New("not found")
		}
	}
	for _, name := range names {
		if err := fscopy.Copy(ctx, src, name, dst, cleanPath(a.Dest), opts); err != nil {
			return err
		}
	}
	return nil
}

func copyOp(a *pb.FileActionCopy) *pb.Op {
	return &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{
		{Input: 0, SecondaryInput: 1, Output: 0, Action: &pb.FileAction_Copy{Copy: a}},
	}}}}
}

// dockerCopy is a copy as the Dockerfile frontend makes it.
func dockerCopy(src, dest string) *pb.FileActionCopy {
	return &pb.FileActionCopy{
		Src: src, Dest: dest, Mode: -1, Timestamp: -1,
		FollowSymlink: true, DirCopyContents: true, CreateDestPath: true, AllowWildcard: true, AllowEmptyWildcard: true,
	}
}

func runOp(t testing.TB, d *Deps, o *pb.Op, inputs ...snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	t.Helper()
	env, _ := newEnv(t)
	op, err := New(*d)(vertex(o, len(inputs)))
	if err != nil {
		return nil, err
	}
	for i, in := range inputs {
		if _, err := op.InputDigest(t.Context(), env, i, in); err != nil {
			return nil, fmt.Errorf("digest of input %d: %w", i, err)
		}
	}
	return op.Run(t.Context(), env, inputs)
}

// TestCopyAgainstReference compares random copies of random trees with what BuildKit's library does on real
// directories. A failing case prints itself.
func TestCopyAgainstReference(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give files owners")
	}
	old := syscall.Umask(0) // the library's directories depend on it
	defer syscall.Umask(old)
	fscopy.UmaskIsZero = true // as buildkitd sets it
	d := newDeps(t)
	cases := 120
	if testing.Short() {
		cases = 30
	}
	refused := 0
	for seed := range cases {
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		src, base := randomTree(rng, true), randomTree(rng, false)
		a := randomCopy(rng)
		var who *owner
		if rng.IntN(4) == 0 {
			who = &owner{uint32(1000 + rng.IntN(2)), 50}
			a.Owner = &pb.ChownOpt{
				User:  &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: who.uid}},
				Group: &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: who.gid}},
			}
		}
		dir := t.TempDir()
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		for _, p := range []string{from, to} {
			if err := os.Mkdir(p, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		srcNodes, baseNodes := parseTree(t, src...), parseTree(t, base...)
		writeNodes(t, from, srcNodes)
		writeNodes(t, to, baseNodes)
		wantErr := reference(t.Context(), from, to, a, who)
		if fi, err := os.Lstat(to); err != nil || !fi.IsDir() {
			continue // the library has replaced the root itself, which no layer can
		}
		out, err := runOp(t, d, copyOp(a), commitTree(t, d, nil, baseNodes), commitTree(t, d, nil, srcNodes))
		describe := func() string {
			return fmt.Sprintf("seed %d: %v\nsource:\n\t%s\nbase:\n\t%s", seed, a,
				strings.Join(src, "\n\t"), strings.Join(base, "\n\t"))
		}
		if err == nil && errors.Is(wantErr, syscall.ENOTDIR) && strings.Contains(wantErr.Error(), "failed to stat") {
			continue // the library looks at targets of what no pattern includes, and minds a file in the way; we do not
		}
		if (err != nil) != (wantErr != nil) {
			t.Fatalf("%s\ngot error %v, want %v", describe(), err, wantErr)
		}
		if err != nil {
			refused++
			continue
		}
		got, want := showSnapshot(t, d, out[0]), showDir(t, to)
		if !slices.Equal(got, want) {
			t.Fatalf("%s\nonly got:\n\t%s\nonly wanted:\n\t%s", describe(), strings.Join(without(got, want), "\n\t"), strings.Join(without(want, got), "\n\t"))
		}
	}
	t.Logf("%d of %d cases were errors in both", refused, cases)
	if refused > cases*2/3 {
		t.Errorf("too many errors to compare much")
	}
}

// without returns the lines of a that b does not have.
func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(l string) bool { return slices.Contains(b, l) })
}

// randomTree has hard links if asked to: a View forgets those whose first name a layer above has replaced, which
// says nothing about copies.
func randomTree(rng *rand.Rand, hardLinks bool) []string {
	var lines []string
	var files []string
	var fill func(dir string, depth int)
	fill = func(dir string, depth int) {
		for _, name := range []string{"a", "b", "c", "d.txt"} {
			p := dir + "/" + name
			meta := fmt.Sprintf("%#o %d:%d", []int{0o755, 0o700, 0o644, 0o2750, 0o1777}[rng.IntN(5)], rng.IntN(2), rng.IntN(3))
			switch n := rng.IntN(12); {
			case n < 4 && depth < 3:
				lines = append(lines, p+" "+meta)
				fill(p, depth+1)
			case n < 7:
				lines = append(lines, fmt.Sprintf("%s %s @%d =%s%d", p, meta, 1e9+rng.IntN(1000), p, rng.IntN(100)))
				files = append(files, p)
			case n == 7:
				lines = append(lines, fmt.Sprintf("%s %d:0 -> %s", p, rng.IntN(2),
					[]string{"a", "/b", "../c", "b/a", "/a/b", "missing", "..", "/"}[rng.IntN(8)]))
			case n == 8 && len(files) > 0 && hardLinks:
				lines = append(lines, p+" == "+files[rng.IntN(len(files))])
			}
		}
	}
	fill("", 0)
	return lines
}

func randomCopy(rng *rand.Rand) *pb.FileActionCopy {
	names := []string{"/", "/a", "/b", "/a/b", "/c", "/d.txt", "/b/a", "/a/", "/a/.", "/new", "/new/", "/x/y/z", "/a/new/", "/."}
	yes := func(n int) bool { return rng.IntN(n) == 0 }
	a := &pb.FileActionCopy{
		Src: names[rng.IntN(9)], Dest: names[rng.IntN(len(names))], Mode: -1, Timestamp: -1,
		FollowSymlink: yes(2), DirCopyContents: yes(2), CreateDestPath: true, AllowWildcard: yes(2),
		AllowEmptyWildcard: yes(2), AlwaysReplaceExistingDestPaths: yes(2),
	}
	if a.AllowWildcard && yes(2) {
		a.Src = path.Join(a.Src, []string{"*", "?", "*/a", "[ab]", "d.*", "b/*", "*/*"}[rng.IntN(7)])
	}
	patterns := []string{"a", "b", "a/b", "*/b", "**/a", "*.txt", "**/*.txt", "c/*", "a/**"}
	if yes(3) {
		a.IncludePatterns = []string{patterns[rng.IntN(len(patterns))], patterns[rng.IntN(len(patterns))]}
	}
	if yes(3) {
		a.ExcludePatterns = []string{patterns[rng.IntN(len(patterns))]}
		if yes(2) {
			a.ExcludePatterns = append(a.ExcludePatterns, "!"+patterns[rng.IntN(len(patterns))])
		}
	}
	switch rng.IntN(6) {
	case 0:
		a.Mode = []int32{0o600, 0o4755, 0o1777}[rng.IntN(3)]
	case 1:
		a.ModeStr = []string{"u=rwX,go=rX", "a+x", "go-w", "u+s", "0640"}[rng.IntN(5)]
	}
	if yes(4) {
		a.Timestamp = 1e18 + 5e9
	}
	return a
}

// TestCopyDockerfile has the rules of the Dockerfile reference for COPY, one line each.
func TestCopyDockerfile(t *testing.T) {
	d := newDeps(t)
	src := tree(t, d, "/app", "/app/main.go =m", "/app/sub", "/app/sub/x.txt 0600 =x", "/app/.hidden =h",
		"/a.txt =a", "/b.txt =b", "/home.txt =home", "/home1.txt =h1", "/link -> app", "/flink -> a.txt", "/abs -> /app/sub")
	base := tree(t, d, "/bin 0700 3:3", "/etc", "/etc/passwd =root:x:0:0::/:\nann:x:7:8::/:\n", "/etc/group =www:x:33:\n",
		"/cur -> releases/1", "/releases", "/releases/1 0711", "/old =old", "/out -> ../../../etc/secret")
	const at = " @1000000000 ="
	for _, c := range []struct {
		name string
		edit func(*pb.FileActionCopy)
		src  string
		dest string
		want []string // of what is new or changed
		err  string
	}{
		{name: "file to name", src: "/a.txt", dest: "/x", want: []string{"/x 0644 0:0" + at + "a"}},
		{name: "file to directory by slash", src: "a.txt", dest: "/new/", want: []string{"/new 0755 0:0", "/new/a.txt 0644 0:0" + at + "a"}},
		{name: "file to existing directory", src: "a.txt", dest: "/bin", want: []string{"/bin/a.txt 0644 0:0" + at + "a"}},
		{name: "file replaces file", src: "a.txt", dest: "/old", want: []string{"/old 0644 0:0" + at + "a"}},
		{name: "directory's contents", src: "/app", dest: "/bin/", want: []string{
			"/bin/.hidden 0644 0:0" + at + "h",
			"/bin/main.go 0644 0:0" + at + "m", "/bin/sub 0755 0:0", "/bin/sub/x.txt 0600 0:0" + at + "x",
		}},
		{name: "wildcard", src: "hom*", dest: "/d/", want: []string{"/d 0755 0:0", "/d/home.txt 0644 0:0" + at + "home", "/d/home1.txt 0644 0:0" + at + "h1"}},
		{name: "one character", src: "hom?.txt", dest: "/d/", want: []string{"/d 0755 0:0", "/d/home.txt 0644 0:0" + at + "home"}},
		{name: "wildcard without match", src: "nope*", dest: "/d/"},
		{name: "missing", src: "/nope", dest: "/d", err: `"/nope": not found`},
		{name: "missing in missing", src: "/no/such/file", dest: "/d", err: `"/no/such/file": not found`},
		{name: "symlink to directory is followed", src: "/link", dest: "/d", want: []string{
			"/d 0755 0:0", "/d/.hidden 0644 0:0" + at + "h",
			"/d/main.go 0644 0:0" + at + "m", "/d/sub 0755 0:0", "/d/sub/x.txt 0600 0:0" + at + "x",
		}},
		{name: "symlink to file is followed", src: "/flink", dest: "/d/", want: []string{"/d 0755 0:0", "/d/flink 0644 0:0" + at + "a"}},
		{name: "through a symlink", src: "/link/sub/x.txt", dest: "/x", want: []string{"/x 0600 0:0" + at + "x"}},
		{name: "destination below a symlink", src: "/a.txt", dest: "/cur/bin/", want: []string{"/releases/1/bin 0755 0:0", "/releases/1/bin/a.txt 0644 0:0" + at + "a"}},
		{name: "destination is a symlink out", src: "/a.txt", dest: "/out", want: []string{"/etc/secret 0644 0:0" + at + "a"}},
		{
			name: "file over directory", src: "/a.txt", dest: "/", edit: func(a *pb.FileActionCopy) { a.Src, a.Dest = "/a.txt", "/" },
			want: []string{"/a.txt 0644 0:0" + at + "a"},
		},
		{name: "chown by name", src: "/a.txt", dest: "/x", edit: chown("ann", "www"), want: []string{"/x 0644 7:33" + at + "a"}},
		{
			name: "chown by name alone takes its group", src: "/a.txt", dest: "/n/", edit: chown("ann", ""),
			want: []string{"/n 0755 7:8", "/n/a.txt 0644 7:8" + at + "a"},
		},
		{name: "chown to nobody known", src: "/a.txt", dest: "/x", edit: chown("zed", ""), want: []string{"/x 0644 0:0" + at + "a"}},
		{
			name: "chmod", src: "/app/sub", dest: "/x", edit: func(a *pb.FileActionCopy) { a.Mode = 0o751 },
			want: []string{"/x 0751 0:0", "/x/x.txt 0751 0:0" + at + "x"},
		},
		{
			name: "symbolic chmod", src: "/app/sub", dest: "/x", edit: func(a *pb.FileActionCopy) { a.ModeStr = "u=rwX,go=rX" },
			want: []string{"/x 0755 0:0", "/x/x.txt 0644 0:0" + at + "x"},
		},
		{
			name: "exclude", src: "/app", dest: "/x", edit: func(a *pb.FileActionCopy) { a.ExcludePatterns = []string{"sub", ".*"} },
			want: []string{"/x 0755 0:0", "/x/main.go 0644 0:0" + at + "m"},
		},
		{name: "parents", src: "/", dest: "/x/", edit: func(a *pb.FileActionCopy) {
			a.IncludePatterns, a.RequiredPaths = []string{"app/sub/x.txt"}, []string{"/app/sub/x.txt"}
		}, want: []string{"/x 0755 0:0", "/x/app 0755 0:0", "/x/app/sub 0755 0:0", "/x/app/sub/x.txt 0600 0:0" + at + "x"}},
		{name: "parents of what is missing", src: "/", dest: "/x/", edit: func(a *pb.FileActionCopy) {
			a.IncludePatterns, a.RequiredPaths = []string{"app/nope"}, []string{"/app/nope"}
		}, err: `"/app/nope": not found`},
		{
			name: "link over file", src: "/flink", dest: "/old", edit: func(a *pb.FileActionCopy) { a.FollowSymlink = false },
			want: []string{"/old 0777 0:0 @1000000000 -> a.txt"},
		},
		{name: "directory over file", src: "/app", dest: "/old", err: "cannot copy to non-directory: /old"},
		{
			name: "directory over file, replaced", src: "/app/sub", dest: "/old", edit: func(a *pb.FileActionCopy) { a.AlwaysReplaceExistingDestPaths = true },
			want: []string{"/old 0755 0:0", "/old/x.txt 0600 0:0" + at + "x"},
		},
		{name: "timestamp", src: "/a.txt", dest: "/x", edit: func(a *pb.FileActionCopy) { a.Timestamp = 5e9 }, want: []string{"/x 0644 0:0 @5 =a"}},
		{name: "no parent", src: "/a.txt", dest: "/n/x", edit: func(a *pb.FileActionCopy) { a.CreateDestPath = false }, err: `"/n": not found`},
		{name: "bad pattern", src: "/a[", dest: "/x", err: "syntax error in pattern"},
		{name: "file into file", src: "/a.txt", dest: "/old/x", err: "not a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := dockerCopy(c.src, c.dest)
			if c.edit != nil {
				c.edit(a)
			}
			out, err := runOp(t, d, copyOp(a), base, src)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			before := showSnapshot(t, d, base)
			diffLines(t, without(showSnapshot(t, d, out[0]), before), c.want)
		})
	}
}

func chown(user, group string) func(*pb.FileActionCopy) {
	return func(a *pb.FileActionCopy) {
		a.Owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: user}}}}
		if group != "" {
			a.Owner.Group = &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: group}}}
		}
	}
}

// TestCopyInputDigest: the digest of a source covers what the copy takes and nothing else.
func TestCopyInputDigest(t *testing.T) {
	d := newDeps(t)
	env, _ := newEnv(t)
	digest := func(a *pb.FileActionCopy, lines ...string) string {
		t.Helper()
		op, err := New(*d)(vertex(copyOp(a), 2))
		if err != nil {
			t.Fatal(err)
		}
		dg, err := op.InputDigest(t.Context(), env, 1, tree(t, d, lines...))
		if err != nil {
			t.Fatal(err)
		}
		return dg.String()
	}
	files := []string{"/app", "/app/a.go =a", "/app/b.txt =b", "/other =o", "/l -> app", "/z =z"}
	edit := func(from, to string) []string {
		out := slices.Clone(files)
		i := slices.Index(out, from)
		if to == "" {
			return slices.Delete(out, i, i+1)
		}
		out[i] = to
		return out
	}
	excl := dockerCopy("/app", "/x")
	excl.ExcludePatterns = []string{"*.txt"}
	for _, c := range []struct {
		name    string
		a       *pb.FileActionCopy
		from    string
		to      string
		changes bool
	}{
		{"file outside", dockerCopy("/app", "/x"), "/other =o", "/other =changed", false},
		{"file gone outside", dockerCopy("/app", "/x"), "/other =o", "", false},
		{"content", dockerCopy("/app", "/x"), "/app/a.go =a", "/app/a.go =A", true},
		{"mode", dockerCopy("/app", "/x"), "/app/a.go =a", "/app/a.go 0600 =a", true},
		{"owner", dockerCopy("/app", "/x"), "/app/a.go =a", "/app/a.go 1:0 =a", true},
		{"time", dockerCopy("/app", "/x"), "/app/a.go =a", "/app/a.go @7 =a", false},
		{"name", dockerCopy("/app", "/x"), "/app/a.go =a", "/app/c.go =a", true},
		{"directory's mode", dockerCopy("/app", "/x"), "/app", "/app 0700", true},
		{"behind a link", dockerCopy("/l", "/x"), "/app/a.go =a", "/app/a.go =A", true},
		{"link elsewhere", dockerCopy("/l/a.go", "/x"), "/l -> app", "/l -> /app", false},
		{"excluded", excl, "/app/b.txt =b", "/app/b.txt =B", false},
		{"not excluded", excl, "/app/a.go =a", "/app/a.go =A", true},
		{"wildcard outside", dockerCopy("/app/*.go", "/x/"), "/app/b.txt =b", "/app/b.txt =B", false},
		{"wildcard inside", dockerCopy("/app/*.go", "/x/"), "/app/b.txt =b", "/app/b.go =b", true},
		{"type", dockerCopy("/z", "/x"), "/z =z", "/z", true},
	} {
		before, after := digest(c.a, files...), digest(c.a, edit(c.from, c.to)...)
		if (before != after) != c.changes {
			t.Errorf("%s: digest changes: %v, want %v", c.name, before != after, c.changes)
		}
	}
}
