// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// readArchive reads an OCI archive: its files by name.
func readArchive(r io.Reader) (map[string][]byte, error) {
	files := map[string][]byte{}
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if files[path.Clean(h.Name)], err = io.ReadAll(in); err != nil {
			return nil, err
		}
	}
}

// readRegistry reads an image, as the files of an OCI archive.
func readRegistry(ctx context.Context, host, name string) (map[string][]byte, error) {
	files := map[string][]byte{}
	get := func(path string) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/v2/"+path, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept", strings.Join([]string{
			ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
			"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json",
		}, ", "))
		response, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("%s: %s", req.URL, response.Status)
		}
		return io.ReadAll(response.Body)
	}
	var add func(repository, tag string) error
	add = func(repository, tag string) error {
		data, err := get(repository + "/manifests/" + tag)
		if err != nil {
			return err
		}
		d := digest.FromBytes(data)
		files["blobs/sha256/"+d.Encoded()] = data
		if len(files) == 1 {
			files["index.json"], _ = json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{{Digest: d}}})
		}
		var m struct {
			Config            ocispec.Descriptor
			Manifests, Layers []ocispec.Descriptor
		}
		if err := json.Unmarshal(data, &m); err != nil {
			return err
		}
		for _, d := range m.Manifests {
			if err := add(repository, d.Digest.String()); err != nil {
				return err
			}
		}
		for _, d := range append(m.Layers, m.Config) {
			if d.Digest == "" {
				continue
			}
			if files["blobs/sha256/"+d.Digest.Encoded()], err = get(repository + "/blobs/" + d.Digest.String()); err != nil {
				return err
			}
		}
		return nil
	}
	repository, tag, ok := strings.Cut(strings.TrimPrefix(name, host+"/"), ":")
	if !ok {
		tag = "latest"
	}
	return files, add(repository, tag)
}

func readLayoutDir(dir string) (map[string][]byte, error) {
	files := map[string][]byte{}
	return files, filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		files[rel], err = os.ReadFile(name)
		return err
	})
}

// newestManifest is the image that an OCI layout holds.
func newestManifest(dir string) (*ocispec.Index, string, error) {
	data, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		return nil, "", err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil || len(index.Manifests) == 0 {
		return nil, "", fmt.Errorf("%s: no index: %w", dir, err)
	}
	return &index, index.Manifests[len(index.Manifests)-1].Digest.String(), nil
}

// baseLayers are the digests of the layers of all bases: they are the same for both engines.
func (b *conformanceCase) baseLayers() map[string]bool {
	layers := map[string]bool{}
	for _, dir := range b.layouts {
		files, err := readLayoutDir(dir)
		if err != nil {
			continue
		}
		for _, data := range files {
			var m ocispec.Manifest
			if len(data) < 1<<20 && json.Unmarshal(data, &m) == nil {
				for _, l := range m.Layers {
					layers[l.Digest.String()] = true
				}
			}
		}
	}
	return layers
}

// addImages adds all that an OCI archive holds.
func (o *observation) addImages(prefix string, files map[string][]byte, base map[string]bool) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasPrefix(name, "blobs/") {
			o.addf("%sarchive has %s", prefix, name)
		}
	}
	if text, ok := files["manifest.json"]; ok {
		o.addJSON(prefix+"manifest.json", text)
	}
	var index ocispec.Index
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		return fmt.Errorf("index.json: %w", err)
	}
	o.addJSON(prefix+"index.json", files["index.json"])
	for i, d := range index.Manifests {
		if err := o.addManifest(fmt.Sprintf("%simage %d ", prefix, i), files, d, base); err != nil {
			return err
		}
	}
	return nil
}

func (o *observation) addManifest(prefix string, files map[string][]byte, d ocispec.Descriptor, base map[string]bool) error {
	blob := func(d digest.Digest) ([]byte, error) {
		data, ok := files["blobs/sha256/"+d.Encoded()]
		if !ok {
			return nil, fmt.Errorf("no blob %s", d)
		}
		if digest.FromBytes(data) != d {
			return nil, fmt.Errorf("blob %s has other content", d)
		}
		return data, nil
	}
	data, err := blob(d.Digest)
	if err != nil {
		return err
	}
	o.addManifestText(prefix+"manifest", data)
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return err
	}
	for i, d := range index.Manifests {
		if err := o.addManifest(fmt.Sprintf("%s%d ", prefix, i), files, d, base); err != nil {
			return err
		}
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil || m.Config.Digest == "" {
		return err
	}
	config, err := blob(m.Config.Digest)
	if err != nil {
		return err
	}
	tree := map[string]entry{}
	var empty []bool
	number := 0
	for i, l := range m.Layers {
		if base[l.Digest.String()] {
			o.addf("%slayer is the base's", prefix)
			empty = append(empty, false)
			continue
		}
		data, err := blob(l.Digest)
		if err != nil {
			return err
		}
		if strings.Contains(l.MediaType, "in-toto") {
			o.addJSON(fmt.Sprintf("%slayer %d", prefix, i), data)
			continue
		}
		entries, err := readLayer(l.MediaType, data)
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		empty = append(empty, len(entries) == 0)
		if len(entries) > 0 {
			o.addf("%slayer %d is %s %v", prefix, number, l.MediaType, maskedAnnotations(l.Annotations))
		}
		for _, e := range entries {
			o.addf("%slayer %d %s", prefix, number, e)
		}
		if len(entries) > 0 {
			number++
		}
		applyEntries(tree, entries)
	}
	if config, err = withoutEmptyLayers(config, empty); err != nil {
		return err
	}
	o.addJSON(prefix+"config", config)
	for _, name := range slices.Sorted(maps.Keys(tree)) {
		o.addf("%stree %s", prefix, tree[name])
	}
	return nil
}

// withoutEmptyLayers says in a config that what has made an empty layer has made none: that is what we do, while BuildKit has a layer without
// anything in it for a RUN that changes nothing. The diff IDs are left out.
func withoutEmptyLayers(text []byte, empty []bool) ([]byte, error) {
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	if fs, ok := config["rootfs"].(map[string]any); ok {
		delete(fs, "diff_ids")
	}
	history, _ := config["history"].([]any)
	for _, h := range history {
		h, ok := h.(map[string]any)
		if !ok || h["empty_layer"] == true {
			continue
		}
		if len(empty) == 0 {
			return nil, errors.New("the history has more layers than the manifest")
		}
		if empty[0] {
			h["empty_layer"] = true
		}
		empty = empty[1:]
	}
	if len(empty) > 0 && len(history) > 0 {
		return nil, errors.New("the manifest has more layers than the history")
	}
	return json.Marshal(config)
}

// entry is a file of a tree or a layer.
type entry struct {
	name string
	kind byte // as in a tar
	text string
}

func (e entry) String() string { return fmt.Sprintf("%q %s", e.name, e.text) }

// applyEntries puts a layer over a tree.
func applyEntries(tree map[string]entry, entries []entry) {
	for _, e := range entries {
		dir, file := path.Split(e.name)
		if file == ".wh..wh..opq" {
			removeBelow(tree, dir, entries)
		} else if hidden, ok := strings.CutPrefix(file, ".wh."); ok {
			delete(tree, dir+hidden)
			removeBelow(tree, dir+hidden+"/", nil)
		}
	}
	for _, e := range entries {
		if strings.HasPrefix(path.Base(e.name), ".wh.") {
			continue
		}
		if e.kind != tar.TypeDir {
			removeBelow(tree, e.name+"/", nil)
		}
		tree[e.name] = e
	}
}

func removeBelow(tree map[string]entry, dir string, but []entry) {
	for name := range tree {
		if strings.HasPrefix(name, dir) && !slices.ContainsFunc(but, func(e entry) bool { return e.name == name }) {
			delete(tree, name)
		}
	}
}

// readLayer reads a layer's blob.
func readLayer(mediaType string, data []byte) ([]entry, error) {
	var r io.Reader = bytes.NewReader(data)
	switch {
	case strings.HasSuffix(mediaType, "gzip"):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, err
		}
		r = z
	case strings.HasSuffix(mediaType, "zstd"):
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	}
	return readEntries(r)
}

func readEntries(r io.Reader) ([]entry, error) {
	var entries []entry
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, in); err != nil {
			return nil, err
		}
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = fmt.Sprintf("size=%d sha=%x", h.Size, sum.Sum(nil)[:6])
			if strings.HasSuffix(h.Name, "provenance.json") {
				content = "" // it has times and names in it
			}
		}
		var extra []string
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				if strings.HasPrefix(name, "user.") {
					continue // BuildKit's layers have no extended attributes but capabilities
				}
				extra = append(extra, fmt.Sprintf("%s=%q", name, value))
			} else if key != "mtime" && key != "path" && key != "linkpath" {
				extra = append(extra, fmt.Sprintf("%s:%q", key, value))
			}
		}
		entries = append(entries, entry{
			name: strings.TrimSuffix(h.Name, "/"), kind: h.Typeflag,
			text: describe(string(h.Typeflag), h.Mode, h.Uid, h.Gid, content, h.Linkname, h.Devmajor, h.Devminor, extra, h.ModTime) + h.Uname + h.Gname,
		})
	}
}

func describe(kind string, mode int64, uid, gid int, content, link string, major, minor int64, extra []string, when time.Time) string {
	mtime := "NOW"
	if when.Before(conformanceStart) {
		mtime = when.UTC().Format(time.RFC3339Nano)
	}
	slices.Sort(extra)
	text := fmt.Sprintf("type=%s mode=%04o owner=%d:%d %s", kind, mode, uid, gid, content)
	if link != "" {
		text += fmt.Sprintf(" -> %q", link)
	}
	if major != 0 || minor != 0 {
		text += fmt.Sprintf(" dev=%d:%d", major, minor)
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s mtime=%s", text, strings.Join(extra, " "), mtime))
}

// addDirectory adds a tree of files.
func (o *observation) addDirectory(prefix, dir string) error {
	first := map[uint64]string{}
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		if rel == "." {
			return nil
		}
		stat := info.Sys().(*syscall.Stat_t)
		var content, link string
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			content = fmt.Sprintf("size=%d sha=%s", len(data), hex.EncodeToString(sum[:6]))
			if strings.HasSuffix(rel, ".json") && json.Valid(data) {
				content = ""
				o.addJSON(prefix+rel, data)
			}
			if stat.Nlink > 1 {
				if other, ok := first[stat.Ino]; ok {
					link = "same as " + other
				} else {
					first[stat.Ino] = rel
				}
			}
		case info.Mode()&fs.ModeSymlink != 0:
			if link, err = os.Readlink(name); err != nil {
				return err
			}
		}
		var extra []string
		buffer := make([]byte, 4096)
		if n, err := unix.Llistxattr(name, buffer); err == nil {
			for _, key := range strings.Split(strings.TrimRight(string(buffer[:n]), "\x00"), "\x00") {
				value := make([]byte, 4096)
				if n, err := unix.Lgetxattr(name, key, value); err == nil && key != "" {
					extra = append(extra, fmt.Sprintf("%s=%q", key, value[:n]))
				}
			}
		}
		o.addf("%stree %q %s", prefix, rel, describe(info.Mode().Type().String(), int64(stat.Mode&0o7777), int(stat.Uid), int(stat.Gid), content, link,
			int64(unix.Major(stat.Rdev)), int64(unix.Minor(stat.Rdev)), extra, info.ModTime()))
		return nil
	})
}

// addJSON adds every value of a JSON text with its path.
func (o *observation) addJSON(prefix string, text []byte) {
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		o.addf("%s: %s", prefix, masked(string(text)))
		return
	}
	o.addValue(prefix, value)
}

func maskedAnnotations(annotations map[string]string) []string {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if key == "buildkit/rewritten-timestamp" {
			continue // a note of BuildKit's to itself, by which it knows what it has rewritten already
		}
		out = append(out, key+"="+masked(annotations[key]))
	}
	return out
}

// addManifestText adds a manifest without its layers.
func (o *observation) addManifestText(prefix string, text []byte) {
	var m map[string]any
	if json.Unmarshal(text, &m) != nil {
		o.addJSON(prefix, text)
		return
	}
	delete(m, "layers")
	o.addValue(prefix, m)
}

func (o *observation) addValue(prefix string, value any) {
	switch v := value.(type) {
	case map[string]any:
		if len(v) == 0 {
			o.addf("%s = {}", prefix)
		}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if key == "size" {
				continue
			}
			o.addValue(prefix+"."+masked(key), v[key])
		}
	case []any:
		if len(v) == 0 {
			o.addf("%s = []", prefix)
		}
		for i, x := range v {
			o.addValue(fmt.Sprintf("%s[%d]", prefix, i), x)
		}
	case string:
		o.addf("%s = %q", prefix, masked(readable(v)))
	default:
		o.addf("%s = %v", prefix, v)
	}
}

// readable is a text without the base64 that JSON values of responses are in.
func readable(s string) string {
	if data, err := base64.StdEncoding.DecodeString(s); err == nil && len(data) > 1 && data[0] == '{' && json.Valid(data) {
		return string(data)
	}
	return s
}

func setTime(name string, when time.Time) error {
	ts := unix.NsecToTimespec(when.UnixNano())
	return unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}
