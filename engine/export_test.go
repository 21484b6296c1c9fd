// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/google/go-cmp/cmp"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// exported is what exports are tried on: everything that a file system can hold, in two layers.
const exported = `FROM base AS made
RUN mkdir -p /out/dir/sub /out/empty && cd /out && printf hello > dir/file && chown 12:34 dir/file && chmod 4755 dir/file \
 && ln dir/file dir/sub/hard && ln dir/file alink && ln -s ../dir/file dir/soft && ln -s /out/dir/file dir/abs \
 && mkfifo pipe && mknod null c 1 3 && chown 12:34 dir && chmod 1777 empty && printf gone > gone && printf "k=v" > dir/'na me=é' \
 && dd if=/dev/zero of=big bs=1024 count=3000 2>/dev/null && touch -d '2001-02-03 04:05:06' dir/file
FROM scratch
COPY --from=made /out/ /
COPY top /dir/top
`

// exportTo builds dockerfile with these outputs.
func (te *testEngine) exportTo(dockerfile string, attrs map[string]string, exports ...bkclient.ExportEntry) (map[string]string, error) {
	te.t.Helper()
	return te.exportWith(dockerfile, bkclient.SolveOpt{FrontendAttrs: attrs, Exports: exports})
}

// exportWith builds dockerfile, and what else solve says.
func (te *testEngine) exportWith(dockerfile string, solve bkclient.SolveOpt) (map[string]string, error) {
	te.t.Helper()
	dir := te.t.TempDir()
	for name, text := range map[string]string{"Dockerfile": dockerfile, "top": "top"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			te.t.Fatal(err)
		}
	}
	return te.exportFrom(dir, solve)
}

// exportFrom builds what is in dir.
func (te *testEngine) exportFrom(dir string, solve bkclient.SolveOpt) (map[string]string, error) {
	te.t.Helper()
	files, err := fsutil.NewFS(dir)
	if err != nil {
		te.t.Fatal(err)
	}
	solve.Frontend, solve.LocalMounts = "dockerfile.v0", map[string]fsutil.FS{"context": files, "dockerfile": files}
	response, err := te.client.Solve(te.t.Context(), nil, solve, nil)
	if err != nil {
		return nil, err
	}
	return response.ExporterResponse, nil
}

func (te *testEngine) mustExport(dockerfile string, attrs map[string]string, exports ...bkclient.ExportEntry) map[string]string {
	te.t.Helper()
	response, err := te.exportTo(dockerfile, attrs, exports...)
	if err != nil {
		te.t.Fatal(err)
	}
	return response
}

// buffer is an output that a test can read.
type buffer struct{ bytes.Buffer }

func (b *buffer) Close() error { return nil }

func toBuffer(typ string, attrs map[string]string) (bkclient.ExportEntry, *buffer) {
	b := &buffer{}
	return bkclient.ExportEntry{Type: typ, Attrs: attrs, Output: func(map[string]string) (io.WriteCloser, error) { return b, nil }}, b
}

// listing describes the files of a directory, one a line.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	inodes := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		st := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%s %s", name, info.Mode())
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		case info.Mode()&os.ModeCharDevice != 0:
			line += fmt.Sprintf(" %d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		case !info.IsDir() && inodes[st.Ino] != "":
			line += " = " + inodes[st.Ino]
		case info.Mode().IsRegular():
			inodes[st.Ino] = name
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(b) > 20 {
				b = []byte(fmt.Sprintf("%d bytes", len(b)))
			}
			line += fmt.Sprintf(" %q", b)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

var wantFiles = []string{
	`alink -rwxr-xr-x "hello"`, // set-user-ID is checked by itself: a transfer may lose it to the change of owner
	`big -rw-r--r-- "3072000 bytes"`,
	`dir drwxr-xr-x`,
	`dir/abs Lrwxrwxrwx -> /out/dir/file`,
	`dir/file = alink`,
	`dir/na me=é -rw-r--r-- "k=v"`,
	`dir/soft Lrwxrwxrwx -> ../dir/file`,
	`dir/sub drwxr-xr-x`,
	`dir/sub/hard = alink`,
	`dir/top -rw-r--r-- "top"`,
	`empty dtrwxrwxrwx`,
	`gone -rw-r--r-- "gone"`,
	`null Dcrw-r--r-- 1,3`,
	`pipe prw-r--r--`,
}

// plain leaves out what wantFiles leaves out.
func plain(lines []string) []string {
	var out []string
	for _, l := range lines {
		if i := strings.Index(l, " = "); i >= 0 {
			l = strings.Fields(l)[0] + l[i:]
		}
		out = append(out, strings.Replace(l, " urwxr-xr-x", " -rwxr-xr-x", 1))
	}
	return out
}

func wantSame(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n%s\nwant:\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestExportLocal(t *testing.T) {
	te := openTest(t)
	te.base()
	dir := filepath.Join(t.TempDir(), "new", "out")
	to := func(dir string, attrs map[string]string) bkclient.ExportEntry {
		return bkclient.ExportEntry{Type: "local", OutputDir: dir, Attrs: attrs}
	}
	te.mustExport(exported, nil, to(dir, nil))
	wantSame(t, "local", plain(listing(t, dir)), wantFiles)
	info, err := os.Stat(filepath.Join(dir, "dir/file"))
	if err != nil || info.ModTime().UTC().Format("2006-01-02 15:04:05") != "2001-02-03 04:05:06" {
		t.Errorf("time of dir/file: %v, %v", info.ModTime(), err)
	}

	// mode=copy leaves what is there, mode=delete does not.
	if err := os.WriteFile(filepath.Join(dir, "dir", "other"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	te.mustExport(exported, nil, to(dir, map[string]string{"mode": "copy"}))
	if _, err := os.Stat(filepath.Join(dir, "dir", "other")); err != nil {
		t.Error(err)
	}
	te.mustExport(exported, nil, to(dir, map[string]string{"mode": "delete"}))
	wantSame(t, "mode=delete", plain(listing(t, dir)), wantFiles)

	part := t.TempDir()
	te.mustExport(exported, map[string]string{"build-arg:SOURCE_DATE_EPOCH": "5"}, to(part, map[string]string{"src": "/dir/sub/.."}))
	wantSame(t, "src", plain(listing(t, part)), []string{
		`abs Lrwxrwxrwx -> /out/dir/file`, `file -rwxr-xr-x "hello"`, `na me=é -rw-r--r-- "k=v"`, `soft Lrwxrwxrwx -> ../dir/file`,
		`sub drwxr-xr-x`, `sub/hard = file`, `top -rw-r--r-- "top"`,
	})
	if info, err := os.Stat(filepath.Join(part, "file")); err != nil || info.ModTime().Unix() != 5 {
		t.Errorf("time with an epoch: %v, %v", info.ModTime(), err)
	}
	for attrs, want := range map[string]string{
		"src=/none": "src=/none: no such file", "src=/big": "not a directory", "src=": "empty", "mode=move": "want copy or delete",
		"attestation-prefix=a/": "a slash is not supported", "platform-split=x": "not true or false",
	} {
		key, value, _ := strings.Cut(attrs, "=")
		if key == "mode" {
			continue // the client refuses it
		}
		if _, err := te.exportTo(exported, nil, to(t.TempDir(), map[string]string{key: value})); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", attrs, err, want)
		}
	}
	split := t.TempDir()
	te.mustExport("FROM scratch\nCOPY top /\n", nil, to(split, map[string]string{"platform-split": "true"}))
	if got := listing(t, split); len(got) != 2 || !strings.HasPrefix(got[1], "linux_") || !strings.HasSuffix(got[1], `/top -rw-r--r-- "top"`) {
		t.Errorf("platform-split: %v", got)
	}
}

func TestExportPlatforms(t *testing.T) {
	te := openTest(t)
	const dockerfile = "FROM scratch\nARG TARGETARCH\nCOPY top /$TARGETARCH\nCOPY top /both/x\n"
	attrs := map[string]string{"platform": "linux/amd64,linux/arm64"}
	dir := t.TempDir()
	te.mustExport(dockerfile, attrs, bkclient.ExportEntry{Type: "local", OutputDir: dir})
	var want []string
	for _, arch := range []string{"amd64", "arm64"} {
		p := "linux_" + arch
		want = append(want, p+" drwxr-xr-x", p+"/"+arch+` -rw-r--r-- "top"`, p+"/both drwxr-xr-x", p+`/both/x -rw-r--r-- "top"`)
	}
	wantSame(t, "split", listing(t, dir), want)
	_, err := te.exportTo(dockerfile, attrs, bkclient.ExportEntry{Type: "local", OutputDir: t.TempDir(), Attrs: map[string]string{"platform-split": "false"}})
	if err == nil || !strings.Contains(err.Error(), "both/x is in the results for linux/amd64 and linux/arm64") {
		t.Errorf("one file of two platforms: %v", err)
	}
	merged := t.TempDir()
	te.mustExport("FROM scratch\nARG TARGETARCH\nCOPY top /d/$TARGETARCH\n", attrs,
		bkclient.ExportEntry{Type: "local", OutputDir: merged, Attrs: map[string]string{"platform-split": "false", "mode": "delete"}})
	wantSame(t, "merged", listing(t, merged), []string{"d drwxr-xr-x", `d/amd64 -rw-r--r-- "top"`, `d/arm64 -rw-r--r-- "top"`})

	entry, archive := toBuffer("oci", map[string]string{
		"name": "multi", "annotation-index.a": "i", "annotation-manifest[linux/arm64].a": "m", "annotation-manifest-descriptor.a": "d",
	})
	response := te.mustExport(dockerfile, attrs, entry)
	files := untar(t, archive.Bytes())
	var index ocispec.Index
	decode(t, files["blobs/sha256/"+strings.TrimPrefix(response["containerimage.digest"], "sha256:")], &index)
	if len(index.Manifests) != 2 || index.Annotations["a"] != "i" || index.Manifests[1].Platform.Architecture != "arm64" || index.Manifests[0].Annotations["a"] != "d" {
		t.Errorf("index: %+v", index)
	}
	for i, want := range []string{"", "m"} {
		var m ocispec.Manifest
		decode(t, files["blobs/sha256/"+index.Manifests[i].Digest.Encoded()], &m)
		if m.Annotations["a"] != want {
			t.Errorf("annotations of manifest %d: %v", i, m.Annotations)
		}
	}
	path := filepath.Join(t.TempDir(), "a.tar")
	write(t, path, archive.Bytes())
	run(t, "skopeo", "--override-arch", "arm64", "inspect", "oci-archive:"+path)
	docker, _ := toBuffer("docker", nil)
	if _, err := te.exportTo(dockerfile, attrs, docker); err == nil || !strings.Contains(err.Error(), "no images of several platforms") {
		t.Errorf("docker: %v", err)
	}
}

func TestExportTar(t *testing.T) {
	te := openTest(t)
	te.base()
	entry, first := toBuffer("tar", nil)
	te.mustExport(exported, nil, entry)
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "out.tar")
	write(t, path, first.Bytes())
	run(t, "tar", "-C", dir, "--same-owner", "-xpf", path)
	wantSame(t, "tar", plain(listing(t, dir)), wantFiles)
	list := run(t, "tar", "--numeric-owner", "-tvf", path)
	for _, want := range []string{"-rwsr-xr-x 12/34", "drwxrwxrwt 0/0", "crw-r--r-- 0/0", "link to alink", "2001-02-03"} {
		if !strings.Contains(list, want) {
			t.Errorf("tar -tv: no %q in\n%s", want, list)
		}
	}
	entry, second := toBuffer("tar", nil)
	te.mustExport(exported, nil, entry)
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("a cached build has another tar")
	}
}

// TestExportImages: each form of each format, read by skopeo and umoci; the same bytes again from the cache.
func TestExportImages(t *testing.T) {
	te := openTest(t)
	te.base()
	for _, typ := range []string{"oci", "docker"} {
		for _, compression := range []string{"uncompressed", "gzip", "zstd", "estargz"} {
			t.Run(typ+"/"+compression, func(t *testing.T) {
				attrs := map[string]string{"name": "example.com/team/app:1,other", "compression": compression}
				if compression == "zstd" {
					attrs["compression-level"] = "9"
				}
				entry, first := toBuffer(typ, attrs)
				response := te.mustExport(exported, nil, entry)
				again, second := toBuffer(typ, maps.Clone(attrs))
				te.mustExport(exported, nil, again)
				if !bytes.Equal(first.Bytes(), second.Bytes()) {
					t.Error("a cached build has another archive")
				}
				files := untar(t, first.Bytes())
				for name, b := range files {
					if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && hex != "" && digest.FromBytes(b).Encoded() != hex {
						t.Errorf("%s has other bytes", name)
					}
				}
				var index ocispec.Index
				decode(t, files["index.json"], &index)
				if len(index.Manifests) != 2 || index.Manifests[0].Digest.String() != response["containerimage.digest"] ||
					index.Manifests[0].Annotations["io.containerd.image.name"] != "example.com/team/app:1" ||
					index.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != "1" ||
					index.Manifests[1].Annotations["io.containerd.image.name"] != "docker.io/library/other:latest" {
					t.Errorf("index.json %s", files["index.json"])
				}
				for _, key := range []string{"containerimage.digest", "containerimage.config.digest", "containerimage.descriptor", "image.name"} {
					if response[key] == "" {
						t.Errorf("no %s in %v", key, response)
					}
				}
				path := filepath.Join(t.TempDir(), "a.tar")
				write(t, path, first.Bytes())
				ref := "oci-archive:" + path + ":1"
				if typ == "docker" {
					ref = "docker-archive:" + path + ":example.com/team/app:1"
				}
				out := run(t, "skopeo", "inspect", ref)
				if !strings.Contains(out, `"Architecture"`) {
					t.Error(out)
				}
				// skopeo checks all digests of what it copies, and the diff IDs when it decompresses.
				layout := filepath.Join(t.TempDir(), "layout")
				run(t, "skopeo", "--insecure-policy", "copy", "--dest-decompress", ref, "dir:"+filepath.Join(t.TempDir(), "dir"))
				run(t, "skopeo", "--insecure-policy", "copy", ref, "oci:"+layout+":x")
				if compression == "zstd" {
					return // which Debian's umoci does not read
				}
				bundle := filepath.Join(t.TempDir(), "bundle")
				run(t, "umoci", "unpack", "--image", layout+":x", bundle)
				wantSame(t, "umoci", plain(listing(t, filepath.Join(bundle, "rootfs"))), wantFiles)
			})
		}
	}
	for attrs, want := range map[string]string{
		"compression=bzip2": "compression=bzip2: not supported", "rewrite-timestamp=x": "not true or false", "squash=some": "want all",
		"compression-level=10": "gzip has 0 to 9", "unknown=1": "not supported yet: unknown=1", "push=true": "not supported yet: push=true",
	} {
		key, value, _ := strings.Cut(attrs, "=")
		entry, _ := toBuffer("oci", map[string]string{key: value})
		if _, err := te.exportTo(exported, nil, entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", attrs, err, want)
		}
	}
}

// TestExportIntoFile: a client on this host has the engine write its files, to the same bytes that the session brings.
func TestExportIntoFile(t *testing.T) {
	te := openTest(t)
	te.base()
	host, err := buildkitapi.HostID()
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range []string{"oci", "docker", "tar"} {
		for _, compression := range []string{"uncompressed", "gzip"} {
			attrs := map[string]string{"compression": compression}
			if typ == "tar" {
				attrs = nil
			}
			entry, b := toBuffer(typ, attrs)
			te.mustExport(exported, nil, entry)
			path := filepath.Join(t.TempDir(), "out")
			write(t, path, []byte("x"))
			entry = bkclient.ExportEntry{Type: typ, Attrs: maps.Clone(attrs), Output: func(map[string]string) (io.WriteCloser, error) {
				t.Errorf("%s: came through the session", typ)
				return &buffer{}, nil
			}}
			te.mustExport(exported, map[string]string{buildkitapi.HostAttr: host, buildkitapi.OutputFileAttr + "0": path}, entry)
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, b.Bytes()) {
				t.Errorf("%s %s: %d bytes in the file, %d through the session, %v", typ, compression, len(got), b.Len(), err)
			}
			// Of another host it may be any path.
			entry, b = toBuffer(typ, maps.Clone(attrs))
			te.mustExport(exported, map[string]string{buildkitapi.HostAttr: "elsewhere", buildkitapi.OutputFileAttr + "0": path + "2"}, entry)
			if _, err := os.Stat(path + "2"); err == nil || b.Len() == 0 {
				t.Errorf("%s: a stranger's path was written to", typ)
			}
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{link, "/dev/null", link + "missing", filepath.Dir(link)} {
		entry, _ := toBuffer("oci", nil)
		if _, err := te.exportTo(exported, map[string]string{buildkitapi.HostAttr: host, buildkitapi.OutputFileAttr + "0": bad}, entry); err == nil {
			t.Errorf("%s is written to", bad)
		}
	}
}

// TestExportSeveral: all outputs of one build, among them a layout as a directory, agree on the image.
func TestExportSeveral(t *testing.T) {
	te := openTest(t)
	te.base()
	layout, dir := filepath.Join(t.TempDir(), "layout"), t.TempDir()
	oci, archive := toBuffer("oci", map[string]string{"name": "several"})
	files, _ := toBuffer("tar", nil)
	for range 2 {
		archive.Reset()
		te.mustExport(exported, nil,
			bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": "several"}},
			oci, files,
			bkclient.ExportEntry{Type: "oci", OutputDir: layout, Attrs: map[string]string{"tar": "false", "name": "several"}},
			bkclient.ExportEntry{Type: "local", OutputDir: dir},
			bkclient.ExportEntry{Type: "cacheonly"},
		)
	}
	wantSame(t, "local", plain(listing(t, dir)), wantFiles)
	bundle := filepath.Join(t.TempDir(), "bundle")
	run(t, "umoci", "unpack", "--image", layout+":latest", bundle)
	wantSame(t, "layout", plain(listing(t, filepath.Join(bundle, "rootfs"))), wantFiles)
	inArchive := untar(t, archive.Bytes())
	raw, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var a, b ocispec.Index
	decode(t, raw, &a)
	decode(t, inArchive["index.json"], &b)
	if len(a.Manifests) != 1 || len(b.Manifests) != 1 || a.Manifests[0].Digest != b.Manifests[0].Digest {
		t.Errorf("index.json %s, %s", raw, inArchive["index.json"])
	}
	var m ocispec.Manifest
	decode(t, inArchive["blobs/sha256/"+b.Manifests[0].Digest.Encoded()], &m)
	if body := te.get(t, "/images/several/json"); !strings.Contains(body, m.Config.Digest.String()) {
		t.Errorf("the image in the store has another ID than the archive's %s: %s", m.Config.Digest, body)
	}
}

// reproducible has layers of every kind: copied, run, linked, and one that makes and hides what was there.
const reproducible = `FROM scratch AS base2
COPY --from=base / /
FROM base2
ENV PATH=/bin
COPY --chmod=600 top /a/top
COPY --link top /b
RUN mkdir -p /made/dir && date > /dev/null && echo made > /made/file && ln /made/file /made/dir/link && mkfifo /made/pipe
RUN rm -r /a && mkdir /a && touch -d '2001-02-03 04:05:06' /a/old && rm /made/pipe
WORKDIR /work
`

// TestExportReproducible: two engines make the same bytes of the same build, and no time in them is later than the epoch.
func TestExportReproducible(t *testing.T) {
	const epoch = 1700000000
	args := map[string]string{"build-arg:SOURCE_DATE_EPOCH": strconv.Itoa(epoch)}
	rewrite := func(more ...string) map[string]string {
		attrs := map[string]string{"rewrite-timestamp": "true"}
		for i := 0; i < len(more); i += 2 {
			attrs[more[i]] = more[i+1]
		}
		return attrs
	}
	var first map[string]digest.Digest
	for range 2 {
		te := openTest(t)
		te.base()
		got := map[string]digest.Digest{}
		for name, e := range map[string]struct {
			typ   string
			attrs map[string]string
		}{
			"tar":    {"tar", nil},
			"oci":    {"oci", rewrite()},
			"docker": {"docker", rewrite("compression", "uncompressed")},
			"zstd":   {"oci", rewrite("compression", "zstd", "squash", "new")},
			"all":    {"oci", rewrite("squash", "all", "source-date-epoch", "1600000000")},
		} {
			entry, b := toBuffer(e.typ, e.attrs)
			te.mustExport(reproducible, args, entry)
			got[name] = digest.FromBytes(b.Bytes())
			if e.typ == "tar" {
				continue
			}
			latest := int64(epoch)
			if name == "all" {
				latest = 1600000000
			}
			checkTimes(t, name, untar(t, b.Bytes()), latest)
		}
		entry := bkclient.ExportEntry{Type: "image", Attrs: rewrite("name", "again")}
		got["image"] = digest.Digest(te.mustExport(reproducible, args, entry)["containerimage.digest"])
		// What is in the local store has the layers that were rewritten, and runs.
		response := te.mustExport("FROM again\nRUN test -f /made/dir/link && test $(stat -c %Y /made/file) -eq "+strconv.Itoa(epoch)+" && test ! -e /a/top\n", nil,
			bkclient.ExportEntry{Type: "image"})
		if response["containerimage.digest"] == "" {
			t.Errorf("%v", response)
		}
		te.stop()
		if first == nil {
			first = got
			continue
		}
		if diff := cmp.Diff(first, got); diff != "" {
			t.Error(diff)
		}
	}
}

// checkTimes looks into the image of an archive for times later than latest.
func checkTimes(t *testing.T, what string, files map[string][]byte, latest int64) {
	t.Helper()
	blob := func(d ocispec.Descriptor) []byte { return files["blobs/sha256/"+d.Digest.Encoded()] }
	var index ocispec.Index
	decode(t, files["index.json"], &index)
	created, err := time.Parse(time.RFC3339, index.Manifests[0].Annotations[ocispec.AnnotationCreated])
	if err != nil || created.Unix() != latest {
		t.Errorf("%s: created %v, %v", what, created, err)
	}
	var m ocispec.Manifest
	decode(t, blob(index.Manifests[0]), &m)
	var config ocispec.Image
	decode(t, blob(m.Config), &config)
	if config.Created == nil || config.Created.Unix() != latest {
		t.Errorf("%s: config says %v", what, config.Created)
	}
	layers := 0
	for _, h := range config.History {
		if h.Created == nil || h.Created.Unix() > latest {
			t.Errorf("%s: %q says %v", what, h.CreatedBy, h.Created)
		}
		if !h.EmptyLayer {
			layers++
		}
	}
	if layers != len(m.Layers) || len(config.RootFS.DiffIDs) != layers {
		t.Errorf("%s: %d layers, %d diff IDs, %d in the history", what, len(m.Layers), len(config.RootFS.DiffIDs), layers)
	}
	old := false
	for i, l := range m.Layers {
		r, _, err := compress.NewReader(bytes.NewReader(blob(l)))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(raw) != config.RootFS.DiffIDs[i] {
			t.Errorf("%s: layer %d is not its diff ID", what, i)
		}
		for tr := tar.NewReader(bytes.NewReader(raw)); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.ModTime.Unix() > latest {
				t.Errorf("%s: %s is of %v", what, h.Name, h.ModTime)
			}
			old = old || h.Name == "a/old" && h.ModTime.Year() == 2001
		}
	}
	if !old {
		t.Errorf("%s: a/old has lost its time, or is not there", what)
	}
}

// brokenPipe is a client whose disk is full.
type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errors.New("disk full") }
func (brokenPipe) Close() error              { return nil }

func TestExportErrors(t *testing.T) {
	te := openTest(t)
	const dockerfile = "FROM scratch\nCOPY top /\n"
	broken := bkclient.ExportEntry{Type: "oci", Output: func(map[string]string) (io.WriteCloser, error) { return brokenPipe{}, nil }}
	if _, err := te.exportTo(dockerfile, nil, broken); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("full disk: %v", err)
	}
	// A client that has the file says so by no writer.
	has := bkclient.ExportEntry{Type: "oci", Output: func(map[string]string) (io.WriteCloser, error) { return nil, nil }}
	if response, err := te.exportTo(dockerfile, nil, has); err != nil || response["containerimage.digest"] == "" {
		t.Errorf("client that has the file: %v, %v", response, err)
	}
	noStore := bkclient.ExportEntry{Type: "oci", OutputStore: refusing{}, Attrs: map[string]string{"tar": "false"}}
	if _, err := te.exportTo(dockerfile, nil, noStore); err == nil || !strings.Contains(err.Error(), "no more room") {
		t.Errorf("store that refuses: %v", err)
	}
}

type refusing struct{ content.Store }

func (refusing) Writer(context.Context, ...content.WriterOpt) (content.Writer, error) {
	return nil, errors.New("no more room")
}

func untar(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	var names []string
	tr := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = b
		names = append(names, h.Name)
	}
	if !slices.IsSorted(names) {
		t.Errorf("entries are not sorted: %v", names)
	}
	return files
}

func decode(t *testing.T, raw []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(raw, v); err != nil {
		t.Fatalf("%v in %q", err, raw)
	}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// run runs a program of the machine and returns what it prints; without the program the test is skipped.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED: needs %s (apt install %s)", name, name)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(bin, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}
