// SPDX-License-Identifier: Apache-2.0

package tar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/local"
)

// files is a tree whose files say their own name.
type files struct {
	*index.View
	damaged string
}

func (f files) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	e, ok := f.Lookup(path)
	if !ok {
		return nil, errors.New("not there")
	}
	text := path
	if e.HardLink != "" {
		text = e.HardLink
	}
	if path == f.damaged {
		text = text[1:]
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

func file(path string) index.Entry {
	return index.Entry{Path: path, Type: index.File, Mode: 0o644, Size: int64(len(path)), ModTime: 1_500_000_000}
}

func tree(t *testing.T, o local.Options, f files) (*local.Tree, error) {
	r := exporter.Result{Refs: []exporter.Ref{{ID: "linux/amd64", Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}}}
	return local.NewTree(t.Context(), r, func(context.Context, exporter.Ref) (layer.Files, error) { return f, nil }, o)
}

// listing is a tar, an entry a line.
func listing(t *testing.T, raw []byte) []string {
	t.Helper()
	var lines []string
	tr := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%c %s %o %d:%d @%d", h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid, h.ModTime.Unix())
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
			line += fmt.Sprintf(" %d,%d", h.Devmajor, h.Devminor)
		}
		if len(b) > 0 {
			line += " " + string(b)
		}
		if v, ok := h.PAXRecords["SCHILY.xattr.user.a"]; ok {
			line += fmt.Sprintf(" %q", v)
		}
		lines = append(lines, line)
	}
}

func TestWrite(t *testing.T) {
	long := strings.Repeat("long", 60)
	entries := []index.Entry{
		{Path: "b", Type: index.File, Mode: 0o4755, UID: 3_000_000, GID: 4, Size: 1, ModTime: -1_500_000_000, Xattrs: map[string]string{"user.a": "\x00\xff"}},
		// Links may come before their file, when a layer was made by others.
		{Path: "a", Type: index.File, HardLink: "b", Mode: 0o4755, UID: 3_000_000, GID: 4, Size: 1, ModTime: -1_500_000_000, Xattrs: map[string]string{"user.a": "\x00\xff"}},
		{Path: "d/c", Type: index.File, HardLink: "b", Mode: 0o4755, UID: 3_000_000, GID: 4, Size: 1, ModTime: -1_500_000_000, Xattrs: map[string]string{"user.a": "\x00\xff"}},
		{Path: "d", Type: index.Dir, Mode: 0o1777, Xattrs: map[string]string{"user.a": "dir"}},
		{Path: "d/l", Type: index.Symlink, Mode: 0o777, Target: "../b"},
		{Path: "d/pipe", Type: index.Fifo, Mode: 0o600},
		{Path: "dev", Type: index.BlockDevice, Mode: 0o660, Major: 8, Minor: 300},
		file("d-before"), file(long), file("gone"), file("é\xff"),
	}
	for i := range entries {
		if entries[i].ModTime == 0 {
			entries[i].ModTime = 5e9
		}
	}
	upper := []index.Entry{{Path: "gone", Type: index.Whiteout}, file("new")}
	f := files{View: index.Merge(index.New(entries), index.New(upper))}
	want := []string{
		`0 a 4755 3000000:4 @-2 a "\x00\xff"`,
		`1 b 4755 3000000:4 @-2 -> a`,
		`5 d/ 1777 0:0 @5 "dir"`,
		`1 d/c 4755 3000000:4 @-2 -> a`,
		`2 d/l 777 0:0 @5 -> ../b`,
		`6 d/pipe 600 0:0 @5`,
		`0 d-before 644 0:0 @1 d-before`,
		`4 dev 660 0:0 @5 8,300`,
		`0 ` + long + ` 644 0:0 @1 ` + long,
		`0 new 644 0:0 @1 new`,
		"0 é\xff 644 0:0 @1 é\xff",
	}
	want[0] = strings.Replace(want[0], " a \"", " b \"", 1) // its bytes are those of the file, whose name the test's trees write
	tr, err := tree(t, local.Options{}, f)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := write(t.Context(), &out, tr); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, out.Bytes()); !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	tr, err = tree(t, local.Options{Source: "/d/../d"}, f)
	if err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if err := write(t.Context(), &out, tr); err != nil {
		t.Fatal(err)
	}
	want = []string{`0 c 4755 3000000:4 @-2 b "\x00\xff"`, `2 l 777 0:0 @5 -> ../b`, `6 pipe 600 0:0 @5`}
	if got := listing(t, out.Bytes()); !slices.Equal(got, want) {
		t.Errorf("src=/d: got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	f.damaged = "new"
	tr, err = tree(t, local.Options{}, f)
	if err != nil {
		t.Fatal(err)
	}
	if err := write(t.Context(), io.Discard, tr); err == nil || !strings.Contains(err.Error(), "damaged") || tr.Err() == nil {
		t.Errorf("damaged layer: %v, %v", err, tr.Err())
	}
}
