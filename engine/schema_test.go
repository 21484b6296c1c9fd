// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/schema"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/compress"
)

// inTotoStatement is the config's media type of nothing that has a schema: what attestations are made of.
const inTotoStatement = "application/vnd.in-toto+json"

// checkSchemas validates an OCI layout, given as its files, against the schemas of the OCI image specification, with everything that its
// index leads to, and returns how many documents there were of each media type.
func checkSchemas(t *testing.T, files map[string][]byte) map[string]int {
	t.Helper()
	seen := map[string]int{}
	validate := func(what, mediaType string, raw []byte) {
		t.Helper()
		seen[mediaType]++
		if err := schema.Validator(mediaType).Validate(bytes.NewReader(raw)); err != nil {
			t.Errorf("%s (%s): %v\n%s", what, mediaType, err, raw)
		}
	}
	validate("oci-layout", ocispec.MediaTypeLayoutHeader, files["oci-layout"])
	validate("index.json", ocispec.MediaTypeImageIndex, files["index.json"])
	var walk func(d ocispec.Descriptor)
	walk = func(d ocispec.Descriptor) {
		t.Helper()
		raw, ok := files["blobs/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded()]
		if !ok || int64(len(raw)) != d.Size || digest.FromBytes(raw) != d.Digest {
			t.Errorf("blob %s (%s): there %v, %d bytes instead of %d", d.Digest, d.MediaType, ok, len(raw), d.Size)
			return
		}
		switch d.MediaType {
		case ocispec.MediaTypeImageIndex:
			validate("index "+d.Digest.String(), d.MediaType, raw)
			var index ocispec.Index
			decode(t, raw, &index)
			for _, m := range index.Manifests {
				walk(m)
			}
		case ocispec.MediaTypeImageManifest:
			var m ocispec.Manifest
			decode(t, raw, &m)
			if m.Layers != nil && len(m.Layers) == 0 {
				// The specification says that there should be a layer, its schema that there must be. BuildKit makes none either.
				seen[d.MediaType]++
			} else {
				validate("manifest "+d.Digest.String(), d.MediaType, raw)
			}
			walk(m.Config)
			for _, l := range m.Layers {
				walk(l)
			}
		case ocispec.MediaTypeImageConfig:
			validate("config "+d.Digest.String(), d.MediaType, raw)
		case ocispec.MediaTypeEmptyJSON, inTotoStatement:
			seen[d.MediaType]++
		default:
			if _, err := compress.MediaTypeKind(d.MediaType); err != nil {
				t.Errorf("blob %s: %v", d.Digest, err)
			}
			seen[d.MediaType]++
		}
	}
	var index ocispec.Index
	decode(t, files["index.json"], &index)
	for _, m := range index.Manifests {
		walk(m)
	}
	return seen
}

// layoutFiles reads an OCI layout from a directory.
func layoutFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, pattern := range []string{"oci-layout", "index.json", "blobs/*/*"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			name, _ := filepath.Rel(dir, path)
			if files[name], err = os.ReadFile(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	return files
}

// TestSchemas: whatever we export is what the OCI's schemas say, with attestations, several platforms, annotations at each level, no layers.
func TestSchemas(t *testing.T) {
	te := openTest(t)
	te.base()
	annotations := map[string]string{
		"annotation.org.example.m": "<&>", "annotation-index.i": "1", "annotation-manifest-descriptor.d": "2", "annotation-index-descriptor.x": "3",
	}
	with := func(more ...string) map[string]string {
		attrs := map[string]string{"name": "example.com/team/app:1"}
		for i := 0; i < len(more); i += 2 {
			attrs[more[i]] = more[i+1]
		}
		return attrs
	}
	both := map[string]string{"platform": "linux/amd64,linux/arm64/v8"}
	attested := map[string]string{"attest:provenance": "mode=max"}
	const copied = "FROM scratch\nCOPY top /top\nENV A=b\nEXPOSE 80/tcp\nVOLUME /v\nSTOPSIGNAL SIGTERM\nLABEL a=b\nUSER 1:2\nWORKDIR /w\nCMD [\"/top\"]\nHEALTHCHECK CMD [\"/top\"]\n"
	for _, c := range []struct {
		name       string
		dockerfile string
		attrs      map[string]string
		out        map[string]string
		want       map[string]int
	}{
		{"plain", exported, nil, with("compression", "uncompressed"), map[string]int{ocispec.MediaTypeImageManifest: 1, ocispec.MediaTypeImageLayer: 2}},
		{"zstd", exported, nil, with("compression", "zstd"), map[string]int{ocispec.MediaTypeImageLayerZstd: 2}},
		{"estargz", exported, nil, with("compression", "estargz"), map[string]int{ocispec.MediaTypeImageLayerGzip: 2}},
		{"squashed", exported, nil, with("squash", "all"), map[string]int{ocispec.MediaTypeImageLayerGzip: 1}},
		{"platforms", copied, both, with(), map[string]int{ocispec.MediaTypeImageManifest: 2, ocispec.MediaTypeImageIndex: 2}},
		{"annotations", copied, both, with("annotation.a", "b", "annotation-index.i", "1"), map[string]int{ocispec.MediaTypeImageIndex: 2}},
		{"one platform annotated", copied, nil, with("annotation.a", "<&>", "annotation-manifest-descriptor.d", "2"), map[string]int{ocispec.MediaTypeImageIndex: 1}},
		{"attested", copied, attested, with("oci-artifact", "false"), map[string]int{inTotoStatement: 1, ocispec.MediaTypeImageConfig: 2, ocispec.MediaTypeImageManifest: 2}},
		{"attested artifact", copied, attested, with("oci-artifact", "true"), map[string]int{inTotoStatement: 1, ocispec.MediaTypeEmptyJSON: 1, ocispec.MediaTypeImageConfig: 1}},
		{"nothing", "FROM scratch\nENV A=b\n", nil, with(), map[string]int{ocispec.MediaTypeImageManifest: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "annotations" {
				for k, v := range annotations {
					c.out[k] = v
				}
			}
			entry, b := toBuffer("oci", c.out)
			te.mustExport(c.dockerfile, c.attrs, entry)
			files := untar(t, b.Bytes())
			seen := checkSchemas(t, files)
			for mediaType, n := range c.want {
				if seen[mediaType] != n {
					t.Errorf("%d documents of %s, want %d: %v", seen[mediaType], mediaType, n, seen)
				}
			}
			// As a directory it is the same.
			dir := t.TempDir()
			c.out["tar"] = "false"
			te.mustExport(c.dockerfile, c.attrs, bkclient.ExportEntry{Type: "oci", Attrs: c.out, OutputDir: dir})
			checkSchemas(t, layoutFiles(t, dir))
			// What skopeo copies of it is what it was.
			again := filepath.Join(t.TempDir(), "again")
			files = layoutFiles(t, dir) // statements say when they were made
			run(t, "skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", "oci:"+dir, "oci:"+again)
			for name, raw := range layoutFiles(t, again) {
				if strings.HasPrefix(name, "blobs/") && !bytes.Equal(files[name], raw) {
					t.Errorf("skopeo has changed %s", name)
				}
			}
		})
	}
}

// TestUnpackedByUmoci: owners, modes, times and extended attributes are on the disk of who unpacks an image what they were in the build.
func TestUnpackedByUmoci(t *testing.T) {
	te := openTest(t)
	dir := t.TempDir()
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o2750, Uid: 3, Gid: 70000},
		{Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o6711, Uid: 1234, Gid: 5678, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.k": "v\x00w",
		}},
		{Typeflag: tar.TypeSymlink, Name: "d/l", Linkname: "/d/f", Mode: 0o777, Uid: 9, Gid: 9},
	} {
		h.ModTime = old
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "in.tar"), b.Bytes())
	write(t, filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nADD in.tar /\n"))
	for _, compression := range []string{"gzip", "estargz", "uncompressed"} {
		layout, bundle := filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "bundle")
		entry := bkclient.ExportEntry{Type: "oci", Attrs: map[string]string{"tar": "false", "name": "x:x", "compression": compression}, OutputDir: layout}
		if _, err := te.exportFrom(dir, bkclient.SolveOpt{Exports: []bkclient.ExportEntry{entry}}); err != nil {
			t.Fatal(err)
		}
		run(t, "umoci", "unpack", "--image", layout+":x", bundle)
		for name, want := range map[string]string{"d": "3 70000 42750", "d/f": "1234 5678 106711", "d/l": "9 9 120777"} {
			path := filepath.Join(bundle, "rootfs", name)
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%d %d %o", st.Uid, st.Gid, st.Mode); got != want || st.Mtim.Sec != old.Unix() {
				t.Errorf("%s: %s is %s of %v, want %s of %v", compression, name, got, time.Unix(st.Mtim.Sec, 0).UTC(), want, old)
			}
		}
		for name, want := range map[string]string{"security.capability": capability, "user.k": "v\x00w"} {
			value := make([]byte, 100)
			n, err := unix.Lgetxattr(filepath.Join(bundle, "rootfs/d/f"), name, value)
			if err != nil || string(value[:n]) != want {
				t.Errorf("%s: %s is %q, %v, want %q", compression, name, value[:max(n, 0)], err, want)
			}
		}
	}
}

// TestZstdTool: the reference program reads our zstd, and finds the diff ID in it.
func TestZstdTool(t *testing.T) {
	if _, err := exec.LookPath("zstd"); err != nil {
		t.Skip("SKIPPED: no zstd here (Debian package zstd)")
	}
	te := openTest(t)
	te.base()
	for _, level := range []string{"0", "1", "3", "19"} {
		entry, b := toBuffer("oci", map[string]string{"compression": "zstd", "compression-level": level})
		te.mustExport(exported, nil, entry)
		files := untar(t, b.Bytes())
		blob := func(d ocispec.Descriptor) []byte { return files["blobs/sha256/"+d.Digest.Encoded()] }
		var index ocispec.Index
		var m ocispec.Manifest
		var config ocispec.Image
		decode(t, files["index.json"], &index)
		decode(t, blob(index.Manifests[0]), &m)
		decode(t, blob(m.Config), &config)
		for i, l := range m.Layers {
			cmd := exec.Command("zstd", "-dc")
			cmd.Stdin = bytes.NewReader(blob(l))
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(fmt.Errorf("level %s: %w", level, err))
			}
			if got := digest.FromBytes(out); got != config.RootFS.DiffIDs[i] {
				t.Errorf("level %s, layer %d: %s, want %s", level, i, got, config.RootFS.DiffIDs[i])
			}
		}
	}
}
