// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// Archive is an image in an OCI or docker archive that is there.
type Archive struct {
	f       *os.File
	tag     string
	entries map[string]section
	index   ocispec.Index // of a layout
	// legacy is for archives of older dockers, which are no layouts: what their manifest.json says, as a manifest of today.
	legacy map[digest.Digest]section
	images []Named
}

// section is a part of the archive, or bytes that stand for one.
type section struct {
	offset, size int64
	raw          []byte
}

// OpenArchive opens the archive at file; tag names one of several images in it.
func OpenArchive(file, tag string) (*Archive, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	a := &Archive{f: f, tag: tag, entries: map[string]section{}}
	if err := a.scan(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("archive %s: %w", file, err)
	}
	return a, nil
}

// maxEntries bounds what an archive may list.
const maxEntries = 1 << 20

func (a *Archive) scan() error {
	links := map[string]string{}
	for tr := tar.NewReader(a.f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w (a compressed archive has to be uncompressed first)", err)
		}
		if len(a.entries) > maxEntries {
			return errors.New("too many entries")
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The reader has read to the end of the header and no further.
			at, err := a.f.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			a.entries[name] = section{offset: at, size: h.Size}
		case tar.TypeSymlink, tar.TypeLink: // older dockers have one layer in several places
			target := h.Linkname
			if h.Typeflag == tar.TypeSymlink {
				target = path.Join(path.Dir(name), target)
			}
			links[name] = path.Clean(target)
		}
	}
	for name, target := range links {
		if s, ok := a.entries[target]; ok {
			a.entries[name] = s
		}
	}
	raw, err := a.document(ocispec.ImageIndexFile)
	switch {
	case err == nil:
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return fmt.Errorf("index.json: %w", err)
		}
		for _, d := range index.Manifests {
			a.add(ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, d.Annotations[annotationImageName])
		}
		a.index = index
		return nil
	case a.entries["manifest.json"].size > 0:
		return a.readLegacy()
	}
	return errors.New("neither an OCI nor a docker archive: it has no index.json and no manifest.json")
}

func (a *Archive) document(name string) ([]byte, error) {
	s, ok := a.entries[name]
	if !ok {
		return nil, fmt.Errorf("has no %s", name)
	}
	if s.size > registry.MaxDocument {
		return nil, fmt.Errorf("%s: %d bytes are too many", name, s.size)
	}
	return io.ReadAll(a.open(s))
}

func (a *Archive) open(s section) io.Reader {
	if s.raw != nil {
		return bytes.NewReader(s.raw)
	}
	return io.NewSectionReader(a.f, s.offset, s.size)
}

// readLegacy makes a manifest of what `docker save` wrote before version 25.
func (a *Archive) readLegacy() error {
	raw, err := a.document("manifest.json")
	if err != nil {
		return err
	}
	var items []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(raw, &items); err != nil {
		return fmt.Errorf("manifest.json: %w", err)
	}
	a.legacy = map[digest.Digest]section{}
	add := func(mediaType, name string) (ocispec.Descriptor, error) {
		s, ok := a.entries[path.Clean(name)]
		if !ok {
			return ocispec.Descriptor{}, fmt.Errorf("has no %s, which its manifest.json names", name)
		}
		d, err := digest.FromReader(a.open(s))
		a.legacy[d] = s
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: s.size}, err
	}
	for _, item := range items {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
		if m.Config, err = add(ocispec.MediaTypeImageConfig, item.Config); err != nil {
			return err
		}
		for _, layer := range item.Layers {
			d, err := add(ocispec.MediaTypeImageLayer, layer)
			if err != nil {
				return err
			}
			m.Layers = append(m.Layers, d)
		}
		raw, err := json.Marshal(m)
		if err != nil {
			return err
		}
		root := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		a.legacy[root.Digest] = section{raw: raw, size: int64(len(raw))}
		a.add(root, item.RepoTags...)
	}
	return nil
}

// add notes an image of the archive.
func (a *Archive) add(root ocispec.Descriptor, names ...string) {
	i := slices.IndexFunc(a.images, func(n Named) bool { return n.Root.Digest == root.Digest })
	if i < 0 {
		i = len(a.images)
		a.images = append(a.images, Named{Root: root})
	}
	for _, name := range names {
		if named, err := registry.Parse(name); name != "" && err == nil {
			a.images[i].Names = append(a.images[i].Names, named.String())
		}
	}
}

func hasName(names []string, name string) bool {
	want, err := reference.ParseNormalizedNamed(name)
	for _, n := range names {
		if n == name {
			return true
		}
		if have, herr := reference.ParseNormalizedNamed(n); err == nil && herr == nil && have.String() == reference.TagNameOnly(want).String() {
			return true
		}
	}
	return false
}

// Root implements Source.
func (a *Archive) Root(context.Context) (ocispec.Descriptor, error) {
	if a.legacy == nil {
		return find(a.index, a.tag, a.f.Name())
	}
	var names []string
	for _, n := range a.images {
		names = append(names, n.Names...)
		if a.tag == "" && len(a.images) == 1 || a.tag != "" && hasName(n.Names, a.tag) {
			return n.Root, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("archive %s: has no image %q: say which (%q)", a.f.Name(), a.tag, names)
}

// Open implements Source.
func (a *Archive) Open(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, err
	}
	s, ok := a.legacy[desc.Digest]
	if !ok {
		if s, ok = a.entries[blobName(desc.Digest)]; !ok {
			return nil, fmt.Errorf("archive %s: has no blob %s", a.f.Name(), desc.Digest)
		}
	}
	return verify(io.NopCloser(a.open(s)), desc), nil
}

// Document returns a manifest or config of the archive, of which only the digest is known.
func (a *Archive) Document(d digest.Digest) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, err
	}
	s, ok := a.legacy[d]
	if !ok {
		if s, ok = a.entries[blobName(d)]; !ok {
			return nil, fmt.Errorf("archive %s: has no blob %s", a.f.Name(), d)
		}
	}
	return read(context.Background(), a, ocispec.Descriptor{Digest: d, Size: s.size})
}

// Close implements Source.
func (a *Archive) Close() error { return a.f.Close() }

func blobName(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// Named is an image of an archive.
type Named struct {
	Root ocispec.Descriptor
	// Names are full names, with a tag.
	Names []string
}

// Images are all images of the archive, each once.
func (a *Archive) Images() []Named { return a.images }

// NewArchive is an OCI or docker archive being written, with one image or several.
type NewArchive struct {
	path, tag string
	docker    bool
	// mu is held while an entry is written: they come one after the other.
	mu       sync.Mutex
	f        *os.File // nil for a stream
	tw       *tar.Writer
	seen     map[digest.Digest]bool
	index    ocispec.Index
	manifest []dockerImage
}

// dockerImage is an image in a docker archive's manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// CreateArchive begins an archive in a file, which gets its name with the image. tag is what the image is called in it; with docker it
// has a manifest.json for `docker load`, and tag is a full name.
func CreateArchive(file, tag string, docker bool) (*NewArchive, error) {
	if docker && tag != "" {
		named, err := registry.Parse(tag)
		if err != nil {
			return nil, err
		}
		tag = named.String()
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-")
	if err != nil {
		return nil, err
	}
	a := StreamArchive(f, docker)
	a.path, a.tag, a.f = file, tag, f
	return a, nil
}

// StreamArchive begins an archive that goes to w. Finish ends it.
func StreamArchive(w io.Writer, docker bool) *NewArchive {
	return &NewArchive{
		docker: docker, tw: tar.NewWriter(w), seen: map[digest.Digest]bool{},
		index: ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex},
	}
}

// Ordered says that the blobs are to come in order: an image has one archive, to the byte.
func (*NewArchive) Ordered() {}

// entry writes a file.
func (a *NewArchive) entry(name string, r io.Reader, sizeBytes int64, progress func(int64)) error {
	if err := a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: sizeBytes}); err != nil {
		return err
	}
	if progress != nil {
		r = reporting{r, new(int64), progress}
	}
	n, err := io.Copy(struct{ io.Writer }{a.tw}, r)
	if err == nil && n != sizeBytes {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Blob implements Destination.
func (a *NewArchive) Blob(_ context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.seen[desc.Digest] {
		return nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	a.seen[desc.Digest] = true
	return a.entry(blobName(desc.Digest), r, desc.Size, progress)
}

// Manifest implements Destination.
func (a *NewArchive) Manifest(ctx context.Context, desc ocispec.Descriptor, content []byte) error {
	return a.Blob(ctx, desc, func() (io.ReadCloser, error) { return verify(nopCloser(content), desc), nil }, nil)
}

// Name implements Destination.
func (a *NewArchive) Name(ctx context.Context, root ocispec.Descriptor, content []byte) error {
	var names []string
	if a.tag != "" {
		names = []string{a.tag}
	}
	if err := a.Add(ctx, root, content, names); err != nil {
		return err
	}
	return a.Finish()
}

// Add adds an image, whose blobs and manifests are there, under names: full ones in a docker archive, tags in others.
func (a *NewArchive) Add(ctx context.Context, root ocispec.Descriptor, content []byte, names []string) error {
	if err := a.Manifest(ctx, root, content); err != nil {
		return err
	}
	if !a.docker {
		for _, tag := range names {
			a.index.Manifests = append(a.index.Manifests, tagged(root, tag))
		}
		if len(names) == 0 {
			a.index.Manifests = append(a.index.Manifests, tagged(root, ""))
		}
		return nil
	}
	if isIndex(root.MediaType) {
		return errors.New("a docker archive has no images of several platforms: name one with --platform, or use an OCI archive")
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(content, &m); err != nil {
		return err
	}
	item := dockerImage{Config: blobName(m.Config.Digest), Layers: []string{}}
	for _, l := range m.Layers {
		item.Layers = append(item.Layers, blobName(l.Digest))
	}
	for _, name := range names {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return err
		}
		item.RepoTags = append(item.RepoTags, reference.FamiliarString(named))
		d := tagged(root, "")
		d.Annotations = map[string]string{annotationImageName: named.String()}
		if t, ok := named.(reference.Tagged); ok {
			d.Annotations[ocispec.AnnotationRefName] = t.Tag()
		}
		a.index.Manifests = append(a.index.Manifests, d)
	}
	if len(names) == 0 {
		a.index.Manifests = append(a.index.Manifests, tagged(root, ""))
	}
	a.manifest = append(a.manifest, item)
	return nil
}

// Finish writes what says which images there are, and gives the file its name.
func (a *NewArchive) Finish() error {
	type document struct {
		name string
		v    any
	}
	documents := []document{{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}}, {ocispec.ImageIndexFile, a.index}}
	if a.docker {
		documents = append(documents, document{"manifest.json", a.manifest})
	}
	for _, doc := range documents {
		raw, err := json.Marshal(doc.v)
		if err != nil {
			return err
		}
		if err := a.entry(doc.name, bytes.NewReader(raw), int64(len(raw)), nil); err != nil {
			return err
		}
	}
	if err := a.tw.Close(); err != nil || a.f == nil {
		return err
	}
	if err := errors.Join(a.f.Chmod(0o644), a.f.Close()); err != nil {
		return err
	}
	if err := os.Rename(a.f.Name(), a.path); err != nil {
		return err
	}
	a.path = ""
	return nil
}

// Close implements Destination: it removes a file that was not finished.
func (a *NewArchive) Close() error {
	if a.path == "" {
		return nil
	}
	_ = a.f.Close()
	return os.Remove(a.f.Name())
}

func nopCloser(b []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }
