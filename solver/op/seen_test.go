// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"testing"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/solver"
)

// TestDescribeInputIsTheDigest: what a copy says it sees of an input is exactly what the input's digest is made of, and can
// be read back.
func TestDescribeInputIsTheDigest(t *testing.T) {
	d := newDeps(t)
	env, _ := newEnv(t)
	in := tree(t, d, "/app", "/app/a 0755 1:2 =aaa", "/app/sub", "/app/sub/b =", "/app/l -> a", "/other =o")
	for _, c := range []struct {
		name string
		a    *pb.FileActionCopy
		want []string
	}{
		{"directory", dockerCopy("/app", "/x"), []string{"app", "app/a", "app/l", "app/sub", "app/sub/b"}},
		{"everything", dockerCopy("/", "/x"), []string{"/", "/app", "/app/a", "/app/l", "/app/sub", "/app/sub/b", "/other"}},
		{"wildcard", dockerCopy("/app/*", "/x/"), []string{"a", "l", "sub", "sub/b"}},
		{"file", dockerCopy("/other", "/x"), []string{"other"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			made, err := New(*d)(vertex(copyOp(c.a), 2))
			if err != nil {
				t.Fatal(err)
			}
			op := made.(solver.Describer)
			if op.Describes(0) || !op.Describes(1) {
				t.Fatalf("describes the base: %v, the source: %v", op.Describes(0), op.Describes(1))
			}
			var list bytes.Buffer
			if err := op.DescribeInput(t.Context(), 1, in, &list); err != nil {
				t.Fatal(err)
			}
			dg, err := op.InputDigest(t.Context(), env, 1, in)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(append([]byte("file input\x00"), list.Bytes()...))
			if got := "sha256:" + hex.EncodeToString(sum[:]); got != dg.String() {
				t.Errorf("the list's digest is %s, the input's %s", got, dg)
			}
			var paths []string
			err = ReadSeen(&list, func(s Seen) error {
				paths = append(paths, s.Path)
				switch {
				case s.Type == index.File && s.Digest == "":
					t.Errorf("%s has no digest", s.Path)
				case len(s.Path) > 2 && s.Path[len(s.Path)-2:] == "/a" && (s.Mode != 0o755 || s.UID != 1 || s.GID != 2 || s.Size != 3):
					t.Errorf("%s has become %+v", s.Path, s)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(paths)
			if !slices.Equal(paths, c.want) {
				t.Errorf("got  %q\nwant %q", paths, c.want)
			}
		})
	}
}

func TestDescribeExecInput(t *testing.T) {
	d := newDeps(t)
	made, err := New(*d)(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{
		Meta: &pb.Meta{Args: []string{"x"}},
		Mounts: []*pb.Mount{
			{Dest: "/", Input: 0, Output: 0},
			{Dest: "/src", Input: 1, Output: -1, Selector: "/app", Readonly: true},
		},
	}}, Inputs: []*pb.Input{{}, {}}}, 2))
	if err != nil {
		t.Fatal(err)
	}
	op := made.(solver.Describer)
	if op.Describes(0) || !op.Describes(1) {
		t.Fatal("a root is seen as a whole, another mount file by file")
	}
	var list bytes.Buffer
	if err := op.DescribeInput(t.Context(), 1, tree(t, d, "/app", "/app/a =a", "/other =o"), &list); err != nil {
		t.Fatal(err)
	}
	var paths []string
	if err := ReadSeen(&list, func(s Seen) error { paths = append(paths, s.Path); return nil }); err != nil {
		t.Fatal(err)
	}
	if want := []string{"app", "app/a"}; !slices.Equal(paths, want) {
		t.Errorf("got %q, want %q", paths, want)
	}
}

func FuzzReadSeen(f *testing.F) {
	var list bytes.Buffer
	w := &seenWriter{to: &list}
	w.action(0)
	w.match("app", "")
	_ = w.entry(visit{Entry: index.Entry{Path: "app", Type: index.Dir, Mode: 0o755, Xattrs: map[string]string{"user.a": "b"}}}, "app")
	w.users("/etc/passwd", "sha256:0")
	_ = w.flush()
	f.Add(list.Bytes())
	f.Add([]byte("e\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		_ = ReadSeen(bytes.NewReader(data), func(Seen) error { n++; return nil })
		if n > len(data) {
			t.Errorf("%d files from %d bytes", n, len(data))
		}
	})
}
