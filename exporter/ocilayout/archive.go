// SPDX-License-Identifier: Apache-2.0

package ocilayout

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// file is an entry of the archive.
type file struct {
	name string // directories end in a slash
	mode int64
	size int64
	open func(context.Context) (io.ReadCloser, error)
}

// files are the entries of the archive, by name.
func (l *layout) files() ([]file, error) {
	files := []file{{name: "blobs/", mode: 0o755}}
	algorithms := map[digest.Algorithm]bool{}
	for _, b := range l.blobs {
		if a := b.desc.Digest.Algorithm(); !algorithms[a] {
			algorithms[a] = true
			files = append(files, file{name: "blobs/" + a.String() + "/", mode: 0o755})
		}
		files = append(files, file{name: blobPath(b.desc.Digest), mode: 0o444, size: b.desc.Size, open: b.open})
	}
	add := func(name string, mode int64, raw []byte, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		files = append(files, file{name, mode, int64(len(raw)), func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(raw)), nil
		}})
		return nil
	}
	raw, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err := add(ocispec.ImageLayoutFile, 0o444, raw, err); err != nil {
		return nil, err
	}
	raw, err = l.index()
	if err := add(ocispec.ImageIndexFile, 0o644, raw, err); err != nil {
		return nil, err
	}
	if l.docker {
		raw, err = l.dockerManifest()
		if err := add("manifest.json", 0o644, raw, err); err != nil {
			return nil, err
		}
		if len(l.names) > 0 && len(l.Manifests[0].Layers) > 0 {
			raw, err = l.dockerRepositories()
			if err := add("repositories", 0o644, raw, err); err != nil {
				return nil, err
			}
		}
	}
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	return files, nil
}

func blobPath(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// writeTar writes the archive.
func (l *layout) writeTar(ctx context.Context, w io.Writer) error {
	files, err := l.files()
	if err != nil {
		return err
	}
	// Headers are collected until a file comes that goes by itself: the kernel may copy it.
	var headers bytes.Buffer
	flush := func() error {
		_, err := headers.WriteTo(w)
		return err
	}
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: f.size}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := tar.NewWriter(&headers).WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if f.open == nil {
			continue
		}
		if f.size > smallFile {
			if err := flush(); err != nil {
				return err
			}
			err = copyFile(ctx, w, f)
		} else {
			err = copyFile(ctx, &headers, f)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if rest := f.size % tarBlock; rest != 0 {
			headers.Write(make([]byte, tarBlock-rest))
		}
	}
	headers.Write(make([]byte, 2*tarBlock))
	return flush()
}

const (
	tarBlock = 512
	// smallFile is what is copied through memory, in bytes.
	smallFile = 64 << 10
)

func copyFile(ctx context.Context, w io.Writer, f file) error {
	r, err := f.open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.Copy(w, r)
	if err == nil && n != f.size {
		err = fmt.Errorf("%d bytes instead of %d", n, f.size)
	}
	return err
}

// dockerManifest is the manifest.json by which `docker load` finds its way.
func (l *layout) dockerManifest() ([]byte, error) {
	type item struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	m := l.Manifests[0]
	it := item{Config: blobPath(m.Config.Digest), Layers: []string{}}
	for _, name := range l.names {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return nil, err
		}
		it.RepoTags = append(it.RepoTags, reference.FamiliarString(named))
	}
	for _, d := range m.Layers {
		it.Layers = append(it.Layers, blobPath(d.Digest))
	}
	return marshal([]item{it})
}

// dockerRepositories is what older readers look for: name and tag to the uppermost layer.
func (l *layout) dockerRepositories() ([]byte, error) {
	layers := l.Manifests[0].Layers
	top := layers[len(layers)-1].Digest.Encoded()
	repositories := map[string]map[string]string{}
	for _, name := range l.names {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return nil, err
		}
		tagged, ok := named.(reference.Tagged)
		if !ok {
			continue
		}
		repo := reference.FamiliarName(named)
		if repositories[repo] == nil {
			repositories[repo] = map[string]string{}
		}
		repositories[repo][tagged.Tag()] = top
	}
	return marshal(repositories)
}
