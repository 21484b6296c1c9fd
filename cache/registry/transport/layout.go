// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationImageName is containerd's annotation for the full name of an image in a layout.
const annotationImageName = "io.containerd.image.name"

// Layout is an image in an OCI image layout, as source and as destination.
type Layout struct {
	dir string
	tag string // "" is the only one there
}

// NewLayout returns the image tag of the layout in dir, "" for one without a tag.
func NewLayout(dir, tag string) *Layout { return &Layout{dir, tag} }

// Root implements Source.
func (l *Layout) Root(context.Context) (ocispec.Descriptor, error) {
	index, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return find(index, l.tag, l.dir)
}

func (l *Layout) index() (ocispec.Index, error) {
	raw, err := os.ReadFile(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if err != nil {
		return ocispec.Index{}, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return ocispec.Index{}, fmt.Errorf("OCI layout %s: index.json: %w", l.dir, err)
	}
	return index, nil
}

// find finds an image in a layout's index.json by the tag or the name in its annotations.
func find(index ocispec.Index, tag, where string) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	var names []string
	for _, d := range index.Manifests {
		ref, name := d.Annotations[ocispec.AnnotationRefName], d.Annotations[annotationImageName]
		names = append(names, ref)
		if tag == "" || tag == ref || tag == d.Digest.String() || name != "" && hasName([]string{name}, tag) {
			found = append(found, d)
		}
	}
	same := func(d ocispec.Descriptor) bool { return d.Digest != found[0].Digest }
	switch {
	case len(found) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("%s: has no image %q (there are: %q)", where, tag, names)
	case slices.ContainsFunc(found, same):
		return ocispec.Descriptor{}, fmt.Errorf("%s: has %d images: say which (%q)", where, len(found), names)
	}
	d := found[0]
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
}

func (l *Layout) path(desc ocispec.Descriptor) string {
	return filepath.Join(l.dir, "blobs", desc.Digest.Algorithm().String(), desc.Digest.Encoded())
}

// Open implements Source.
func (l *Layout) Open(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, err
	}
	f, err := os.Open(l.path(desc))
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	return verify(f, desc), nil
}

// Blob implements Destination.
func (l *Layout) Blob(_ context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64)) error {
	if info, err := os.Stat(l.path(desc)); err == nil && info.Size() == desc.Size {
		progress(desc.Size)
		return nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	return l.write(l.path(desc), reporting{r, new(int64), progress})
}

// write makes a file of r, which must be verified, under its name when it is whole.
func (l *Layout) write(path string, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing, once it has been renamed
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Manifest implements Destination.
func (l *Layout) Manifest(_ context.Context, desc ocispec.Descriptor, content []byte) error {
	return l.write(l.path(desc), verify(nopCloser(content), desc))
}

// Name implements Destination.
func (l *Layout) Name(ctx context.Context, root ocispec.Descriptor, content []byte) error {
	if err := l.Manifest(ctx, root, content); err != nil {
		return err
	}
	index, err := l.index()
	if errors.Is(err, fs.ErrNotExist) {
		index = ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	} else if err != nil {
		return err
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool {
		ref := d.Annotations[ocispec.AnnotationRefName]
		return ref == l.tag && (l.tag != "" || d.Digest == root.Digest)
	})
	index.Manifests = append(index.Manifests, tagged(root, l.tag))
	for name, v := range map[string]any{ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}, ocispec.ImageIndexFile: index} {
		raw, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := l.write(filepath.Join(l.dir, name), nopCloser(raw)); err != nil {
			return fmt.Errorf("OCI layout %s: %w", l.dir, err)
		}
	}
	return nil
}

// tagged is a descriptor with the annotation that layouts have for a tag.
func tagged(d ocispec.Descriptor, tag string) ocispec.Descriptor {
	d.Annotations = nil
	if tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	}
	return d
}

// Close implements Source and Destination.
func (l *Layout) Close() error { return nil }

// reporting reports what has been read.
type reporting struct {
	io.Reader
	n      *int64
	report func(int64)
}

func (r reporting) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	*r.n += int64(n)
	r.report(*r.n)
	return n, err
}
