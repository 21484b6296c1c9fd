// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// TestChanges compares what a copy's changes are with what makes an overlay of them.
func TestChanges(t *testing.T) {
	file := func(path, content, link string) index.Entry {
		return index.Entry{Path: path, Type: index.File, Size: int64(len(content)), Mode: 0o644, HardLink: link, Target: content, Offset: -1}
	}
	dir := func(path string) index.Entry {
		return index.Entry{Path: path, Type: index.Dir, Mode: 0o755, Offset: -1}
	}
	gone := func(path string) index.Entry {
		return index.Entry{Path: path, Type: index.Whiteout, Offset: -1}
	}
	for _, c := range []struct {
		name                string
		before, after, want []index.Entry
	}{
		{"nothing", []index.Entry{dir(""), file("a", "1", "")}, []index.Entry{dir(""), file("a", "1", "")}, []index.Entry{dir("")}},
		{
			"deep change",
			[]index.Entry{dir(""), dir("d"), dir("d/e"), file("d/e/f", "1", ""), file("d/g", "1", "")},
			[]index.Entry{dir(""), dir("d"), dir("d/e"), file("d/e/f", "22", ""), file("d/g", "1", "")},
			[]index.Entry{dir(""), dir("d"), dir("d/e"), file("d/e/f", "22", "")},
		},
		{
			"removed with all that is in it",
			[]index.Entry{dir(""), dir("d"), file("d/f", "1", "")},
			[]index.Entry{dir("")},
			[]index.Entry{dir(""), gone("d")},
		},
		{
			"directory becomes a file",
			[]index.Entry{dir(""), dir("d"), file("d/f", "1", "")},
			[]index.Entry{dir(""), file("d", "x", "")},
			[]index.Entry{dir(""), file("d", "x", "")},
		},
		{
			"one more name",
			[]index.Entry{dir(""), file("b", "1", "")},
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a")},
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a")},
		},
		{
			"two files become one",
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "")},
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a")},
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a")},
		},
		{
			"the first name goes",
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a"), file("c", "1", "a")},
			[]index.Entry{dir(""), file("b", "1", ""), file("c", "1", "b")},
			[]index.Entry{dir(""), gone("a")},
		},
		{
			"one file becomes two that look the same",
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", "a"), file("c", "1", "a")},
			[]index.Entry{dir(""), file("a", "1", ""), file("b", "1", ""), file("c", "1", "b")},
			[]index.Entry{dir(""), file("b", "1", ""), file("c", "1", "b")},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := changes(index.New(c.before), index.New(c.after))
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestDriversAgree makes the same steps with both drivers: the layers have the same content.
func TestDriversAgree(t *testing.T) {
	content := map[string][]string{}
	drivers(t, func(t *testing.T, f *fixture) {
		base := Snapshot{f.untar("bin/", "bin/sh=shell", "etc/", "etc/conf=1", "etc/gone=x", "opt/", "opt/old/", "opt/old/deep=y")}
		steps := []func(root string){
			func(root string) { write(t, root, "etc/conf", "2") },
			func(root string) {
				ok(t, os.Remove(filepath.Join(root, "etc/gone")), os.RemoveAll(filepath.Join(root, "opt")))
			},
			func(root string) { ok(t, os.Link(filepath.Join(root, "bin/sh"), filepath.Join(root, "bin/bash"))) },
			// A change of one name only must not be compared: overlay takes the names of a file of a layer apart then.
			func(root string) { ok(t, os.Chmod(filepath.Join(root, "etc"), 0o711)) },
			func(root string) {
				ok(t, unix.Mknod(filepath.Join(root, "etc/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), os.Symlink("../bin/sh", filepath.Join(root, "etc/sym")))
				ok(t, unix.Setxattr(filepath.Join(root, "etc/conf"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
			},
		}
		var got []string
		for _, do := range steps {
			base = f.step(base, do)
			d, err := f.Content(t.Context(), base)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, d.String())
		}
		content[f.Info().Driver] = got
	})
	if len(content) < 2 {
		t.Skip("SKIPPED: there is only one driver here")
	}
	if diff := cmp.Diff(content[DriverOverlay], content[DriverCopy]); diff != "" {
		t.Errorf("(-overlay +copy):\n%s", diff)
	}
}

// TestProbe: a store whose directory is itself on an overlay says so, and works.
func TestProbe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounts need root")
	}
	dir := t.TempDir()
	lower, upper, work, at := filepath.Join(dir, "lower"), filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "at")
	for _, d := range []string{lower, upper, work, at} {
		ok(t, os.Mkdir(d, 0o755))
	}
	ok(t, overlay{lowers: []string{lower}, upper: upper, work: work}.mount(at))
	t.Cleanup(func() { ok(t, unix.Unmount(at, 0)) })
	f := &fixture{t: t, dir: at}
	var err error
	f.layers, err = layer.Open(filepath.Join(at, "layers"), layer.Options{})
	ok(t, err)
	defer f.layers.Close()
	f.Store, err = Open(filepath.Join(at, "snapshots"), f.layers)
	ok(t, err)
	defer f.Close()
	if info := f.Info(); info.Driver != DriverCopy || !strings.Contains(info.Reason, "overlay") {
		t.Errorf("on an overlay: %+v", info)
	}
	next := f.step(Snapshot{f.untar("a=1", "b=2")}, func(root string) { ok(t, os.Remove(filepath.Join(root, "a"))) })
	if diff := cmp.Diff([]string{"/ 0755 0:0 dir", "/b 0644 0:0 file=2"}, f.same(next)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
