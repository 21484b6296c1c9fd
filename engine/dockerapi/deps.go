// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"io"
	"time"

	mobyregistry "github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Image is one image of the local store as docker shows it: the manifest for this host's platform under all its names.
type Image struct {
	// ID is the digest of the config, which is what docker calls the image's ID.
	ID digest.Digest
	// Target is what the names point to: the manifest or the index it was found through.
	Target ocispec.Descriptor
	// Names are normalised references with a tag, sorted; none for a dangling image.
	Names []string
	// Digests are normalised references with a digest, sorted.
	Digests []string
	// Config is the image's config, as bytes.
	Config []byte
	// Created is when the image was made.
	Created time.Time
	// Size is what its layers take on disk, in bytes.
	Size int64
	// Layers are the root file system, if Runnable says that they are known.
	Layers   snapshot.Snapshot
	Runnable bool
}

// Images is the local image store, by StoreImages. Methods may be called concurrently. Errors wrap those of package image.
type Images interface {
	// List returns every image once, newest first.
	List(ctx context.Context) ([]Image, error)
	// Get finds an image by reference, by ID ("sha256:…" or hex) or by a unique prefix of the hex.
	Get(ctx context.Context, ref string) (Image, error)
	// Tag gives img one more name; an image that had it loses it and stays without.
	Tag(ctx context.Context, img Image, name string) error
	// Untag takes one of several names away.
	Untag(ctx context.Context, name string) error
	// Delete removes the image with all its names and what nothing else needs.
	Delete(ctx context.Context, img Image) error
	// LayerSizes are the sizes in bytes of the files in each layer, lowest first.
	LayerSizes(ctx context.Context, img Image) ([]int64, error)
}

// Mount is a writable root file system.
type Mount interface {
	Path() string
	// Release discards it with what was written.
	Release() error
}

// Roots opens root file systems.
type Roots interface {
	// Files reads without mounting.
	Files(ctx context.Context, s snapshot.Snapshot) (layer.Files, error)
	// Mount mounts s writable. It is mounted until Release.
	Mount(ctx context.Context, s snapshot.Snapshot) (Mount, error)
}

// Transfer is a step in the transfer of one blob.
type Transfer struct {
	Digest digest.Digest
	State  TransferState
	// Current and Total are bytes; Total is 0 when unknown.
	Current, Total int64
}

// TransferState says what happens to a blob.
type TransferState string

// The states of a Transfer, in order; a blob ends in Done or in Exists.
const (
	Waiting TransferState = "waiting"
	Running TransferState = "running"
	Done    TransferState = "done"
	Exists  TransferState = "exists"
)

// Archives writes and reads the archives of `docker save`. Methods may be called concurrently.
type Archives interface {
	// Save writes images to w, of each the manifest for platform (nil: this host's).
	Save(ctx context.Context, w io.Writer, images []Saved, platform *ocispec.Platform) error
	// Load brings the images of an archive, perhaps a compressed one, into the store, and calls loaded with the name of each, or its ID.
	Load(ctx context.Context, r io.Reader, platform *ocispec.Platform, loaded func(name string)) error
}

// Saved is an image that is saved: what finds it, and the names that it has in the archive.
type Saved struct {
	Ref   string
	Names []string
}

// Registry reaches registries. Methods may be called concurrently. Errors wrap those of package registry, and their text is for
// the user. A nil auth means that the client knows no credentials.
type Registry interface {
	// Pull brings ref, a normalised reference, and its layers for platform (nil: this host's) into the image store under that name
	// and returns the digest of what the name means there. changed says that it was not there before. progress may be called
	// from several goroutines.
	Pull(ctx context.Context, ref string, platform *ocispec.Platform, auth *mobyregistry.AuthConfig, progress func(Transfer)) (dgst digest.Digest, changed bool, err error)
	// Push sends the image of that name to the registry that the name begins with and returns its manifest there.
	Push(ctx context.Context, ref string, auth *mobyregistry.AuthConfig, progress func(Transfer)) (ocispec.Descriptor, error)
	// Login checks credentials and keeps nothing. A registry that prefers a token for later returns one.
	Login(ctx context.Context, auth mobyregistry.AuthConfig) (identityToken string, err error)
}
