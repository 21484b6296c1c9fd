// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Whatever other tools make of an image's layers, our mount and our merged index show: path by path, with type, mode, owner,
// size, link, device, xattrs, time and content.

// need skips a test for which a program is missing, loudly.
func need(t *testing.T, programs ...string) {
	t.Helper()
	needRoot(t)
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIPPED: no %s here (Debian package %s): images of other tools were NOT compared", p, p)
		}
	}
}

func command(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	// Nothing of the user's own configuration; vfs and overlay storage are chosen by option.
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "STORAGE_DRIVER=", "BUILDAH_ISOLATION=chroot")
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, &errs)
	}
	return strings.TrimSpace(out.String()), nil
}

// writeLayout makes an OCI image "x" of uncompressed layers.
func writeLayout(t *testing.T, layers ...[]byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	blobs := filepath.Join(dir, "blobs/sha256")
	put := func(mediaType string, b []byte) ocispec.Descriptor {
		d := digest.FromBytes(b)
		if err := os.WriteFile(filepath.Join(blobs, d.Encoded()), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
	}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if err := errors.Join(os.MkdirAll(blobs, 0o755), os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	man := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		man.Layers = append(man.Layers, put(ocispec.MediaTypeImageLayer, l))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
	}
	man.Config = put(ocispec.MediaTypeImageConfig, marshal(config))
	target := put(ocispec.MediaTypeImageManifest, marshal(man))
	target.Annotations = map[string]string{ocispec.AnnotationRefName: "x"}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{target}}), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// readLayout returns the uncompressed layers of the only image in a layout.
func readLayout(t *testing.T, dir string) (layers [][]byte) {
	t.Helper()
	read := func(d digest.Digest) []byte {
		b, err := os.ReadFile(filepath.Join(dir, "blobs/sha256", d.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var list ocispec.Index
	b, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var man ocispec.Manifest
	if err := errors.Join(json.Unmarshal(b, &list), json.Unmarshal(read(list.Manifests[0].Digest), &man)); err != nil {
		t.Fatal(err)
	}
	for _, l := range man.Layers {
		b := read(l.Digest)
		if strings.HasSuffix(l.MediaType, "gzip") {
			z, err := gzip.NewReader(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if b, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		}
		layers = append(layers, b)
	}
	return layers
}

// umociTree is what umoci makes of the image.
func umociTree(t *testing.T, layout string) (string, error) {
	t.Helper()
	to := filepath.Join(t.TempDir(), "bundle")
	_, err := command(t, "umoci", "unpack", "--image", layout+":x", to)
	return filepath.Join(to, "rootfs"), err
}

// storage is a containers-storage, of buildah and skopeo, for one test.
type storage struct {
	t                    *testing.T
	driver, root, runDir string
}

func newStorage(t *testing.T, driver string) storage {
	t.Helper()
	s := storage{t, driver, t.TempDir(), t.TempDir()}
	t.Cleanup(func() {
		// What buildah leaves mounted below its own directory.
		b, _ := os.ReadFile("/proc/self/mountinfo")
		points := mountPointsBelow(string(b), s.root)
		slices.Reverse(points)
		for _, p := range points {
			_ = unix.Unmount(p, unix.MNT_DETACH)
		}
	})
	return s
}

func (s storage) buildah(args ...string) (string, error) {
	s.t.Helper()
	return command(s.t, "buildah", append([]string{"--root", s.root, "--runroot", s.runDir, "--storage-driver", s.driver}, args...)...)
}

// tree is what buildah mounts of the image.
func (s storage) tree(layout string) (string, error) {
	s.t.Helper()
	if _, err := command(s.t, "skopeo", "--insecure-policy", "copy", "oci:"+layout+":x", fmt.Sprintf("containers-storage:[%s@%s+%s]localhost/x", s.driver, s.root, s.runDir)); err != nil {
		return "", err
	}
	name, err := s.buildah("from", "--pull-never", "x")
	if err != nil {
		return "", err
	}
	return s.buildah("mount", name)
}

// ours unpacks the layers one over the other.
func ours(t *testing.T, s *Store, layers ...[]byte) ([]ID, error) {
	t.Helper()
	var ids []ID
	for _, l := range layers {
		id, err := s.Unpack(t.Context(), bytes.NewReader(l), digest.FromBytes(l), newStack(t, s, ids...))
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// shows lists a tree. Times of directories count only where explicit says that the image gives them; times that others round
// are rounded.
func shows(entries []index.Entry, explicit map[string]bool) []index.Entry {
	out := slices.Clone(entries)
	for i := range out {
		e := &out[i]
		e.Offset = 0
		if e.Type == index.Dir && !explicit[e.Path] {
			e.ModTime = 0
		}
		if len(e.Xattrs) == 0 {
			e.Xattrs = nil
		}
	}
	return out
}

// explicitDirs are the directories whose last word in the image is an entry of their own, not a change of what is in them.
func explicitDirs(t *testing.T, layers ...[]byte) map[string]bool {
	t.Helper()
	named := map[string]bool{}
	for _, l := range layers {
		last := map[string]bool{}
		r := tar.NewReader(bytes.NewReader(l))
		for {
			h, err := r.Next()
			if err != nil {
				break
			}
			name, err := cleanName(h.Name)
			if err != nil {
				continue
			}
			// A layer that changes a directory without naming it gives it the time of its unpacking, in some tools.
			delete(named, index.Parent(name))
			if h.Typeflag == tar.TypeDir {
				last[name] = true
			}
		}
		for name := range last {
			named[name] = true
		}
	}
	delete(named, "")
	return named
}

// compare compares what another tool shows with our mount and our index.
func compare(t *testing.T, tool, dir string, s *Store, ids []ID, layers ...[]byte) {
	t.Helper()
	explicit := explicitDirs(t, layers...)
	theirs, err := scanIndex(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	mounted, err := scanIndex(t.Context(), mountOverlay(t, s, ids...))
	if err != nil {
		t.Fatal(err)
	}
	var merged []index.Entry
	if err := index.Walk(newStack(t, s, ids...), "", func(e index.Entry) error {
		merged = append(merged, e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := shows(slices.Collect(theirs.All()), explicit)
	if tool == "buildah" && want[0].Mode == 0o555 {
		want[0].Mode = 0o755 // containers-storage has its own idea of a root that no layer names; docker's is ours
	}
	if diff := cmp.Diff(want, shows(slices.Collect(mounted.All()), explicit)); diff != "" {
		t.Errorf("our mount (+) differs from %s (-):\n%s", tool, diff)
	}
	if diff := cmp.Diff(want, shows(merged, explicit)); diff != "" {
		t.Errorf("our index (+) differs from %s (-):\n%s", tool, diff)
	}
}

// TestBuildahImages makes an image with buildah, of steps that leave odd things, and compares it layer by layer.
func TestBuildahImages(t *testing.T) {
	need(t, "buildah", "skopeo", "umoci")
	for _, driver := range []string{"overlay"} {
		t.Run(driver, func(t *testing.T) {
			st := newStorage(t, driver)
			run := func(args ...string) string {
				t.Helper()
				out, err := st.buildah(args...)
				if err != nil {
					t.Fatal(err)
				}
				return out
			}
			from := "scratch"
			for i, step := range oddSteps {
				name := run("from", "--pull-never", from)
				root := run("mount", name)
				if err := step(root); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				from = fmt.Sprint("step", i)
				run("commit", "--omit-history", name, from)
			}
			layout := t.TempDir()
			run("push", from, "oci:"+layout+":x")
			layers := readLayout(t, layout)
			if len(layers) != len(oddSteps) {
				t.Fatalf("%d layers of %d steps", len(layers), len(oddSteps))
			}
			theirs := run("mount", run("from", "--pull-never", from))
			unpacked, err := umociTree(t, layout)
			if err != nil {
				t.Fatal(err)
			}
			bothForms(t, func(t *testing.T, s *Store) {
				ids, err := ours(t, s, layers...)
				if err != nil {
					t.Fatal(err)
				}
				compare(t, "buildah", theirs, s, ids, layers...)
				compare(t, "umoci", unpacked, s, ids, layers...)
			})
		})
	}
}

// hostileTars are images that nobody makes with good intentions, or with a good tool. What a tool does with each when it can be
// asked: "" if it shows the same as we do, or why it does not.
var hostileTars = []struct {
	name   string
	layers func(t testing.TB) [][]byte
	// refused is what our refusal says; "" if the image is taken.
	refused string
	umoci   string
	buildah string // it is only asked about several layers: it is slow, and refuses duplicates
}{
	{name: "out of order", layers: one1(reg("d/e/x", "a"), mkdir("d/e/"), mkdir("d/"), reg("d/y", "b"))},
	{name: "duplicates", layers: one1(reg("f", "first"), mkdir("d/"), reg("d/x", "1"), reg("f", "second, longer"), reg("d/x", "2"), mkdir("d/"))},
	{name: "absolute", layers: one1(reg("/abs/x", "a"), reg("//b", "b"), symlinkTo("/abs/l", "/b"))},
	{name: "dots inside", layers: one1(mkdir("a/"), reg("a/./b/../c", "c"), reg("./a//d", "d"))},
	{name: "file becomes a directory", layers: one1(reg("x", "file"), mkdir("x/"), reg("x/y", "in it"))},
	{name: "directory becomes a file", layers: one1(mkdir("x/"), reg("x/y", "in it"), reg("x", "file"))},
	{name: "directory becomes a symlink", layers: one1(mkdir("x/"), reg("x/y", "in it"), mkdir("to/"), symlinkTo("x", "to"))},
	{name: "replaced across layers", layers: layersOf(
		[]tarEntry{mkdir("d/"), reg("d/f", "1"), reg("f", "2"), symlinkTo("l", "d")},
		[]tarEntry{reg("d", "now a file"), mkdir("f/"), reg("f/in", "3"), mkdir("l/"), reg("l/in", "4")},
	)},
	{name: "whiteouts", layers: layersOf(
		[]tarEntry{mkdir("d/"), reg("d/1", "1"), reg("d/2", "2"), mkdir("o/"), reg("o/old", "old"), reg("x", "x")},
		[]tarEntry{reg("d/.wh.1", ""), reg("o/.wh..wh..opq", ""), reg("o/new", "new"), reg(".wh.x", ""), reg(".wh.never", "")},
	)},
	{name: "whiteout after what it must not hide", layers: layersOf(
		[]tarEntry{mkdir("o/"), reg("o/old", "old")}, []tarEntry{reg("o/new", "new"), reg("o/.wh..wh..opq", ""), reg("y", "y"), reg(".wh.z", "")},
	)},
	{name: "made again under a whiteout", layers: layersOf(
		[]tarEntry{mkdir("d/"), reg("d/old", "old"), reg("f", "1")}, []tarEntry{reg(".wh.d", ""), mkdir("d/"), reg("d/new", "new"), reg(".wh.f", ""), reg("f", "2")},
	)},
	{name: "hard link into a lower layer", layers: layersOf([]tarEntry{reg("a", "content")}, []tarEntry{hardlink("b", "a"), hardlink("c", "/b")})},
	{name: "hard link to what is hidden then", layers: layersOf(
		[]tarEntry{mkdir("d/"), reg("d/a", "content"), reg("e", "too")},
		[]tarEntry{hardlink("b", "d/a"), reg("d/.wh..wh..opq", ""), hardlink("c", "e"), reg(".wh.e", "")},
	)},
	{name: "implicit parents", layers: layersOf(
		[]tarEntry{{Header: tar.Header{Typeflag: tar.TypeDir, Name: "p/", Mode: 0o2751, Uid: 12, Gid: 34}}, mkdir("p/q/")},
		[]tarEntry{reg("p/q/f", "f"), reg("new/parent/g", "g")},
	)},
	{name: "through symlinks of its own", layers: one1(mkdir("usr/"), mkdir("usr/lib/"), symlinkTo("lib", "usr/lib"), reg("lib/x", "x"))},
	{name: "PAX long names and xattrs and large owner", layers: one1(
		tarEntry{tar.Header{
			Name: strings.Repeat("long/", 40) + "name", Uid: 1 << 28, Gid: 1 << 28, Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v\x00w"},
		}, "x"},
		symlinkTo("s", strings.Repeat("t", 300)),
	)},
	{name: "GNU long names and links", layers: one1(
		tarEntry{tar.Header{Name: strings.Repeat("n/", 100) + "f", Format: tar.FormatGNU}, "x"},
		tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: strings.Repeat("t/", 100), Format: tar.FormatGNU}, ""},
		tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: strings.Repeat("n/", 100) + "f", Format: tar.FormatGNU}, ""},
	)},
	{name: "V7", layers: func(t testing.TB) [][]byte {
		return [][]byte{v7(t, makeTar(t, reg("old", "as in 1979"), reg("d/x", "y")))}
	}},
	{name: "devices", layers: one1(
		tarEntry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}},
		tarEntry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "b", Devmajor: 8, Devminor: 1}},
		tarEntry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "p"}},
	)},
	{name: "sparse", layers: func(t testing.TB) [][]byte {
		m := "1\n8192\n5\n"
		return [][]byte{append(rawPAX(t, "GNUSparseFile.0/f", m+strings.Repeat("\x00", 512-len(m))+"hello", map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", "GNU.sparse.realsize": "8197",
		}), makeTar(t, reg("after", "x"))...)}
	}},
	{name: "not UTF-8", layers: one1(reg("\xff\xfe", "x"), symlinkTo("l", "\x80"))},
	{name: "a name with ..", layers: one1(reg("../escape", "x")), refused: "outside"},
	{name: "a link out of the root", layers: one1(hardlink("passwd", "../../../etc/passwd")), refused: "outside"},
	{name: "a link to an absolute path", layers: one1(hardlink("passwd", "/etc/passwd")), refused: "no such file"},
	{name: "a symlink out of the root and a file through it", layers: one1(symlinkTo("out", "../../../../../../tmp"), reg("out/slipway-escaped", "x"))},
	{name: "a size larger than what follows", layers: func(t testing.TB) [][]byte { return [][]byte{lie(makeTar(t, reg("f", "12345")), 1<<20)} }, refused: "unexpected EOF"},
	{name: "a size smaller than what follows", layers: func(t testing.TB) [][]byte {
		return [][]byte{lie(makeTar(t, reg("f", strings.Repeat("x", 2000)), reg("g", "g")), 100)}
	}, refused: "invalid tar header"},
	{name: "below a file", layers: one1(reg("f", "file"), reg("f/g", "x")), refused: "not a directory"},
}

func one1(entries ...tarEntry) func(testing.TB) [][]byte { return layersOf(entries) }

func layersOf(layers ...[]tarEntry) func(testing.TB) [][]byte {
	return func(t testing.TB) (out [][]byte) {
		for _, entries := range layers {
			out = append(out, makeTar(t, entries...))
		}
		return out
	}
}

// checksum makes the checksum of a header right again.
func checksum(h []byte) {
	sum := 8 * int(' ')
	for i, c := range h[:512] {
		if i < 148 || i >= 156 {
			sum += int(c)
		}
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
}

// lie changes the size in the first header.
func lie(b []byte, size int64) []byte {
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	checksum(b)
	return b
}

// v7 takes out of every header what tar did not have in 1979.
func v7(t testing.TB, b []byte) []byte {
	t.Helper()
	for at := 0; at+512 <= len(b) && b[at] != 0; {
		h := b[at:]
		var size int64
		if _, err := fmt.Sscanf(string(h[124:135]), "%o", &size); err != nil {
			t.Fatal(err)
		}
		clear(h[257:512])
		if h[156] == '0' {
			h[156] = 0
		}
		checksum(h)
		at += 512 + int((size+511)/512*512)
	}
	return b
}

// TestHostileImages: what is not refused by name is shown as umoci and buildah show it, and nothing appears outside.
func TestHostileImages(t *testing.T) {
	need(t, "umoci")
	st := newStorage(t, "vfs")
	_, noBuildah := exec.LookPath("buildah")
	if noBuildah != nil {
		t.Log("SKIPPED: no buildah here (Debian package buildah): only umoci was asked")
	}
	for _, c := range hostileTars {
		t.Run(c.name, func(t *testing.T) {
			st.t = t
			layers := c.layers(t)
			layout := writeLayout(t, layers...)
			unpacked, umociErr := umociTree(t, layout)
			if len(layers) == 1 || noBuildah != nil {
				c.buildah = "what it does with one layer umoci does too, and sooner"
			}
			var mounted string
			var buildahErr error
			if c.buildah == "" {
				mounted, buildahErr = st.tree(layout)
			}
			bothForms(t, func(t *testing.T, s *Store) {
				ids, err := ours(t, s, layers...)
				if c.refused != "" {
					if err == nil || !strings.Contains(err.Error(), c.refused) {
						t.Errorf("we say %v, want %q", err, c.refused)
					}
					return
				}
				if err != nil {
					t.Fatalf("we refuse it: %v (umoci: %v, buildah: %v)", err, umociErr, buildahErr)
				}
				checkMount(t, s, ids...)
				for _, other := range []struct {
					name, why, dir string
					err            error
				}{{"umoci", c.umoci, unpacked, umociErr}, {"buildah", c.buildah, mounted, buildahErr}} {
					switch {
					case other.why != "":
						t.Logf("not compared with %s: %s", other.name, other.why)
					case other.err != nil:
						t.Errorf("%s refuses what we take: %v", other.name, other.err)
					default:
						compare(t, other.name, other.dir, s, ids, layers...)
					}
				}
			})
		})
	}
	if _, err := os.Lstat("/tmp/slipway-escaped"); err == nil {
		os.Remove("/tmp/slipway-escaped")
		t.Error("a file has escaped")
	}
}

// oddSteps are what steps of a build may do to a root directory.
var oddSteps = []func(root string) error{
	func(root string) error {
		at := func(name string) string { return filepath.Join(root, name) }
		return errors.Join(
			os.MkdirAll(at("usr/lib/deep/er"), 0o755), os.MkdirAll(at("etc/conf.d"), 0o750), os.Mkdir(at("opaque"), 0o755), os.Mkdir(at("dir2file"), 0o755),
			os.Mkdir(at("dev"), 0o755), os.Mkdir(at("tmp"), 0o755), os.Chmod(at("tmp"), os.ModeSticky|0o777),
			put(at("usr/lib/deep/er/file"), "deep"), put(at("etc/conf.d/a"), "a"), put(at("etc/conf.d/b"), "b"), put(at("etc/passwd"), "root"),
			put(at("opaque/old"), "old"), put(at("dir2file/x"), "x"), put(at("file2dir"), "f"), put(at("gone"), "x"), put(at("link-one"), "linked"),
			os.Link(at("link-one"), at("etc/link-two")), os.Link(at("link-one"), at("usr/link-three")), os.Symlink("usr/lib", at("lib")),
			os.Symlink("/etc/passwd", at("abs")), os.Symlink("nowhere", at("dangling")),
			unix.Mknod(at("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(at("dev/sda"), unix.S_IFBLK|0o660, int(unix.Mkdev(8, 0))), unix.Mkfifo(at("dev/fifo"), 0o600),
			put(at("etc/\xff\xfe-not-utf8"), "bytes"), put(at("etc/"+strings.Repeat("n", 240)), "long name"), put(at("empty"), ""),
			os.Symlink(strings.Repeat("t/", 500)+"end", at("long-target")),
			put(at("setuid"), "s"), os.Chown(at("setuid"), 1234, 5678), os.Chmod(at("setuid"), os.ModeSetuid|os.ModeSetgid|0o755),
			unix.Setxattr(at("empty"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
			unix.Setxattr(at("gone"), "user.x", []byte("y"), 0),
			os.Chown(at("etc/conf.d"), 33, 44),
			os.Truncate(at("etc/conf.d/b"), 1<<20), // sparse
			age(root),
		)
	},
	func(root string) error {
		at := func(name string) string { return filepath.Join(root, name) }
		return errors.Join(
			os.Remove(at("gone")), os.RemoveAll(at("opaque")), os.Mkdir(at("opaque"), 0o700), put(at("opaque/new"), "new"),
			os.RemoveAll(at("dir2file")), put(at("dir2file"), "now a file"), os.Remove(at("file2dir")), os.MkdirAll(at("file2dir/sub"), 0o755),
			put(at("file2dir/sub/f"), "f"), put(at("lib/through-a-link"), "x"), os.Chmod(at("etc/passwd"), 0o600), os.Remove(at("dangling")), os.Symlink("elsewhere", at("dangling")),
			put(at("etc/conf.d/c"), "c"), os.Remove(at("etc/conf.d/a")), os.Chown(at("usr/lib/deep"), 7, 8),
			put(at("usr/lib/deep/er/two"), "two"),
		)
	},
	func(root string) error {
		at := func(name string) string { return filepath.Join(root, name) }
		return errors.Join(
			// A new name for a file of a lower layer, and a name of one taken away.
			os.Link(at("etc/passwd"), at("etc/passwd-")), os.Remove(at("file2dir/sub/f")), os.RemoveAll(at("usr/lib/deep/er")),
			put(at("gone"), "back again"), os.Remove(at("dir2file")), os.Symlink("etc", at("dir2file")), put(at("dir2file/via"), "via"),
		)
	},
}

func put(path, content string) error { return os.WriteFile(path, []byte(content), 0o644) }

// age gives everything a time in the past, with nanoseconds.
func age(root string) error {
	old := unix.Timespec{Sec: 1_600_000_000, Nsec: 123_456_789}
	return filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW)
	})
}
