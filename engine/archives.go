// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/compress"
	cacheimage "github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/registry/transport"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/solver/source/image"
)

// archives saves and loads images for the Docker API.
type archives struct {
	store  *cache.Store
	layers *layerblob.Maker
	puller *image.Puller
	dir    string // for archives that are being loaded
	synced func() // asks for a sync of the store
}

var _ dockerapi.Archives = (*archives)(nil)

// Save implements dockerapi.Archives.
func (a *archives) Save(ctx context.Context, w io.Writer, images []dockerapi.Saved, platform *ocispec.Platform) error {
	lease := a.store.Lease("save images")
	defer lease.Release()
	out := transport.StreamArchive(w, true)
	for _, img := range images {
		found, err := a.store.Images.Resolve(ctx, img.Ref)
		if err != nil {
			return err
		}
		p := image.DefaultPlatform()
		if platform != nil {
			p = *platform
		}
		m, ok := found.ForPlatform(p)
		if !ok {
			return fmt.Errorf("image %s: nothing for platform %s/%s is here", img.Ref, p.OS, p.Architecture)
		}
		d := m.Target
		from := &storedImage{archives: a, root: ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}
		if _, err := transport.Copy(ctx, from, namedIn{out, img.Names}, transport.Options{}); err != nil {
			return fmt.Errorf("save image %s: %w", img.Ref, err)
		}
	}
	return out.Finish()
}

// namedIn names the next image of an archive, which goes on.
type namedIn struct {
	*transport.NewArchive
	names []string
}

func (n namedIn) Name(ctx context.Context, root ocispec.Descriptor, content []byte) error {
	return n.Add(ctx, root, content, n.names)
}

// storedImage is an image of the store as a source: a layer is the blob that it was pulled as, or the tar that it is.
type storedImage struct {
	*archives
	root ocispec.Descriptor
}

func (s *storedImage) Root(context.Context) (ocispec.Descriptor, error) { return s.root, nil }
func (s *storedImage) Close() error                                     { return nil }

func (s *storedImage) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if s.store.Blobs.Has(desc.Digest) {
		return layerblob.OpenBlob(s.store.Blobs, desc)
	}
	snap, ok, err := s.store.Images.Layers(ctx, s.root.Digest)
	if err != nil {
		return nil, err
	}
	if ok {
		if err := s.store.Layers.Materialise(ctx, snap...); err != nil {
			return nil, err
		}
		if s.store.Blobs.Has(desc.Digest) { // it has come with them
			return layerblob.OpenBlob(s.store.Blobs, desc)
		}
		for _, id := range snap {
			info, err := s.store.Layers.Pack(ctx, id)
			if err != nil {
				return nil, err
			}
			if info.DiffID == desc.Digest {
				b, err := s.layers.Layer(ctx, id, layerblob.Compression{Kind: compress.None, Force: true})
				if err != nil {
					return nil, err
				}
				return s.layers.Open(ctx, b)
			}
		}
	}
	return nil, fmt.Errorf("the layer %s is not in the local store: pull the image again", desc.Digest)
}

// Load implements dockerapi.Archives.
func (a *archives) Load(ctx context.Context, r io.Reader, platform *ocispec.Platform, loaded func(name string)) error {
	plain, _, err := compress.NewReader(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(a.dir, "load-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, plain)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	archive, err := transport.OpenArchive(f.Name(), "")
	if err != nil {
		return fmt.Errorf("load images: %w", err)
	}
	defer archive.Close()
	lease := a.store.Lease("load images")
	defer lease.Release()
	for _, img := range archive.Images() {
		if err := a.load(ctx, archive, img, platform, loaded); err != nil {
			return fmt.Errorf("load image %v: %w", img.Names, err)
		}
	}
	a.synced()
	return nil
}

// load takes one image out of an archive: for the platform asked for, or for every platform that the archive has it for.
func (a *archives) load(ctx context.Context, archive *transport.Archive, img transport.Named, platform *ocispec.Platform, loaded func(string)) error {
	wanted := []ocispec.Platform{image.DefaultPlatform()}
	if platform != nil {
		wanted = []ocispec.Platform{*platform}
	} else if raw, err := archive.Document(img.Root.Digest); err == nil {
		there, attestations, err := contents(archive, raw)
		if err != nil {
			return err
		}
		if len(there) > 0 {
			wanted = there
		}
		for _, desc := range attestations {
			if err := a.loadAttestation(ctx, archive, desc); err != nil {
				return fmt.Errorf("attestation %s: %w", desc.Digest, err)
			}
		}
	}
	for _, p := range wanted {
		// Documents are kept as they are read: the store names them by their digests.
		found, err := image.Find(img.Root.Digest.String(), img.Root.Digest, p, func(d ocispec.Descriptor) ([]byte, error) {
			raw, err := archive.Document(d.Digest)
			if err != nil {
				return nil, err
			}
			_, err = a.store.Blobs.PutBytes(ctx, d.MediaType, raw)
			return raw, err
		})
		if err != nil {
			return err
		}
		if _, err := a.puller.Layers(ctx, archiveOrigin{archive}, found, -1, nil); err != nil {
			return err
		}
	}
	names := img.Names
	if len(names) == 0 {
		names = []string{""}
	}
	for _, name := range names {
		added, err := a.store.Images.Add(ctx, cacheimage.Image{Name: name, Target: img.Root})
		if err != nil {
			return err
		}
		if name == "" {
			loaded(digest.Digest(added.ID).String())
			continue
		}
		if named, err := reference.ParseNormalizedNamed(name); err == nil {
			loaded(reference.FamiliarString(named))
		}
	}
	return nil
}

// contents are the platforms that an index lists and the archive has, and the attestations of images that go with them; nothing for what is no index.
func contents(archive *transport.Archive, raw []byte) (there []ocispec.Platform, attestations []ocispec.Descriptor, err error) {
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, nil, fmt.Errorf("index: %w", err)
	}
	for _, d := range index.Manifests {
		if _, err := archive.Document(d.Digest); err != nil {
			continue // archives of one platform keep the whole index
		}
		switch {
		case d.Annotations["vnd.docker.reference.type"] == "attestation-manifest":
			attestations = append(attestations, d)
		case d.Platform != nil && d.Annotations["vnd.docker.reference.type"] == "":
			there = append(there, *d.Platform)
		}
	}
	return there, attestations, nil
}

// loadAttestation keeps an attestation manifest with its statements, without which the image's index could not be pushed.
func (a *archives) loadAttestation(ctx context.Context, archive *transport.Archive, desc ocispec.Descriptor) error {
	raw, err := archive.Document(desc.Digest)
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		r, err := archive.Open(ctx, d)
		if err != nil {
			return err
		}
		if err := errors.Join(a.store.Blobs.Put(ctx, r, d), r.Close()); err != nil {
			return err
		}
	}
	_, err = a.store.Blobs.PutBytes(ctx, desc.MediaType, raw)
	return err
}

// archiveOrigin gives the blobs of an archive to a Puller.
type archiveOrigin struct{ archive *transport.Archive }

func (o archiveOrigin) Fetch(ctx context.Context, _ string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return o.archive.Open(ctx, desc)
}
