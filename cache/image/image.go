// SPDX-License-Identifier: Apache-2.0

// Package image is the local image store: names, and which manifest each stands for.
//
// An image is its manifest (or index) and config, kept as blobs, and the layers it runs from, kept as a snapshot for each
// manifest. It needs no packed or compressed layer: a built image is here at once and is packed when somebody
// asks for it. Names behave as docker's do: a name that moves to another image leaves the old one dangling
// (kept, with no name), and an image goes with its last name.
package image

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Errors that callers may want to tell apart. They also have the marker methods by which containerd's errdefs classify.
var (
	// ErrNotFound is an image that is not in the store.
	ErrNotFound error = notFoundError("no such image")
	// ErrAmbiguous is an ID prefix that several images have.
	ErrAmbiguous error = invalidError("ambiguous image ID")
	// ErrInvalidName is a name that cannot be an image's.
	ErrInvalidName error = invalidError("invalid image name")
	// ErrConflict is a removal by ID of an image that has several names.
	ErrConflict error = conflictError("image has several names")
)

type notFoundError string

func (e notFoundError) Error() string { return string(e) }
func (notFoundError) NotFound()       {}

type invalidError string

func (e invalidError) Error() string   { return string(e) }
func (invalidError) InvalidParameter() {}

type conflictError string

func (e conflictError) Error() string { return string(e) }
func (conflictError) Conflict()       {}

// Image is one name of the store and what it stands for. An image with several names is listed once for each.
type Image struct {
	// Name is normalised, with its tag or digest ("docker.io/library/busybox:latest"); "" for a dangling image.
	Name string `json:"name,omitempty"`
	// Target is the manifest or index, in the blob store.
	Target ocispec.Descriptor `json:"target"`
	// ID is what docker calls the image ID: the digest of the config, of an index that of this machine's platform.
	// It is the digest of Target when no config is known.
	ID digest.Digest `json:"id"`
	// Manifests are Target itself, or the manifests of the index whose blobs are in the store, in the index's order.
	Manifests []Manifest `json:"manifests,omitempty"`
	// Size is in bytes: what Put was given, else the sum of the packed layers as the manifest of ID names them.
	Size int64 `json:"size,omitempty"`
	// Created is when the image was made (from its config), or put here when the config does not say.
	Created time.Time `json:"created"`
}

// Manifest is one platform's manifest of an Image.
type Manifest struct {
	// Target has Platform set where the index or the config says it.
	Target ocispec.Descriptor `json:"target"`
	// Config is "" when the config is not in the store: this manifest cannot be run from here.
	Config digest.Digest `json:"config,omitempty"`
}

// ForPlatform returns the manifest that fits p best; false when none does.
func (m Image) ForPlatform(p ocispec.Platform) (Manifest, bool) {
	only := platforms.Only(p)
	var best *Manifest
	for i := range m.Manifests {
		c := &m.Manifests[i]
		if c.Config == "" || c.Target.Platform == nil || !only.Match(*c.Target.Platform) {
			continue
		}
		if best == nil || only.Less(*c.Target.Platform, *best.Target.Platform) {
			best = c
		}
	}
	if best == nil {
		return Manifest{}, false
	}
	return *best, true
}

// digests returns every digest that m keeps in the blob store.
func (m Image) digests() []digest.Digest {
	ds := []digest.Digest{m.Target.Digest}
	for _, c := range m.Manifests {
		ds = append(ds, c.Target.Digest)
		if c.Config != "" {
			ds = append(ds, c.Config)
		}
	}
	return ds
}

// Normalize returns the full form of an image name, with the tag "latest" when it has neither tag nor digest. Of
// a name with both, the digest decides and the tag is dropped. Errors wrap ErrInvalidName.
func Normalize(name string) (string, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("%w %q: %v", ErrInvalidName, name, err)
	}
	return ref.String(), nil
}

// Familiar returns the short form of a normalised name, as docker shows it ("busybox:latest"). What is not a
// name is returned as it is.
func Familiar(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(ref)
}

// repository returns a normalised name without tag and digest.
func repository(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return ref.Name()
}

// nameDigest returns the digest of a name that has one, else "".
func nameDigest(name string) digest.Digest {
	_, d, _ := strings.Cut(name, "@")
	return digest.Digest(d)
}

// Blobs is what the image store needs of the blob store.
type Blobs interface {
	ReadAll(digest.Digest) ([]byte, error)
	Has(digest.Digest) bool
	Delete(digest.Digest) error
}

// fill completes m from its blobs: Manifests, ID, and Size and Created where they are not given.
func fill(m *Image, blobs Blobs, now time.Time) error {
	target, err := blobs.ReadAll(m.Target.Digest)
	if err != nil {
		return fmt.Errorf("read manifest %s: %w", m.Target.Digest, err)
	}
	candidates := []ocispec.Descriptor{m.Target}
	if isIndex(m.Target.MediaType) {
		var idx ocispec.Index
		if err := json.Unmarshal(target, &idx); err != nil {
			return fmt.Errorf("read index %s: %w", m.Target.Digest, err)
		}
		candidates = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
			return isIndex(d.MediaType) || d.Digest.Validate() != nil || !blobs.Has(d.Digest)
		})
	}
	type config struct {
		ocispec.Platform
		Created *time.Time `json:"created"`
	}
	configs := map[digest.Digest]config{}
	sizes := map[digest.Digest]int64{}
	m.Manifests = nil
	for _, d := range candidates {
		raw, err := blobs.ReadAll(d.Digest)
		if err != nil {
			return fmt.Errorf("read manifest %s: %w", d.Digest, err)
		}
		var man ocispec.Manifest
		if err := json.Unmarshal(raw, &man); err != nil {
			return fmt.Errorf("read manifest %s: %w", d.Digest, err)
		}
		if err := man.Config.Digest.Validate(); err != nil {
			return fmt.Errorf("read manifest %s: config: %w", d.Digest, err)
		}
		if d.Digest != m.Target.Digest && !blobs.Has(man.Config.Digest) {
			m.Manifests = append(m.Manifests, Manifest{Target: d}) // of another platform: not all of it was pulled
			continue
		}
		raw, err = blobs.ReadAll(man.Config.Digest)
		if err != nil {
			return fmt.Errorf("read config %s of manifest %s: %w", man.Config.Digest, d.Digest, err)
		}
		var c config
		if err := json.Unmarshal(raw, &c); err != nil {
			c = config{} // not an image's config, but an artifact's: nothing to learn from it
		}
		if d.Platform == nil && c.OS != "" {
			p := platforms.Normalize(c.Platform)
			d.Platform = &p
		}
		configs[man.Config.Digest] = c
		for _, l := range man.Layers {
			sizes[man.Config.Digest] += l.Size
		}
		m.Manifests = append(m.Manifests, Manifest{Target: d, Config: man.Config.Digest})
	}
	m.ID = m.Target.Digest
	if c, ok := m.ForPlatform(platforms.DefaultSpec()); ok {
		m.ID = c.Config
	} else if i := slices.IndexFunc(m.Manifests, func(c Manifest) bool { return c.Config != "" }); i >= 0 {
		m.ID = m.Manifests[i].Config
	}
	if m.Size == 0 {
		m.Size = sizes[m.ID]
	}
	if c := configs[m.ID].Created; m.Created.IsZero() && c != nil {
		m.Created = *c
	}
	if m.Created.IsZero() {
		m.Created = now
	}
	return nil
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}
