// SPDX-License-Identifier: Apache-2.0

// Package image is the source of images: it finds what a name stands for, in the local image store or in a registry, fetches
// configs for frontends, and pulls layers into the layer store. engine/dockerapi pulls through it as well.
//
// Three things are kept apart. Resolver answers what a name stands for, without layers. Puller brings layers here, of
// a manifest that is known. Source is the solver's op for "docker-image://", made of both.
package image

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Docker's media types.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1"
)

// Deps is what the source works with.
type Deps struct {
	Blobs     *blob.Store
	Layers    *layer.Store
	Snapshots *snapshot.Store
	Images    *image.Store
	Records   *record.Store
	Registry  *registry.Registry
}

// DefaultPlatform is what is taken when nobody names a platform: this machine's.
func DefaultPlatform() ocispec.Platform {
	p := platforms.DefaultSpec()
	p.OS = "linux"
	return platforms.Normalize(ocispec.Platform{OS: p.OS, Architecture: runtime.GOARCH, Variant: p.Variant})
}

// found is what a name stands for on one platform.
type found struct {
	// name is the full form of what was asked for.
	name string
	// target is the manifest or index that the name stands for.
	target ocispec.Descriptor
	// manifest is target, or the manifest of the platform in it.
	manifest ocispec.Descriptor
	raw      []byte // of manifest
	config   []byte
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

// sniff returns the media type of a manifest or index, from its bytes.
func sniff(raw []byte) (string, error) {
	var doc struct {
		MediaType     string            `json:"mediaType"`
		SchemaVersion int               `json:"schemaVersion"`
		Manifests     []json.RawMessage `json:"manifests"`
		Layers        []json.RawMessage `json:"layers"`
		FSLayers      []json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return "", fmt.Errorf("manifest: %w", err)
	}
	switch {
	case doc.SchemaVersion == 1 || doc.FSLayers != nil:
		return "", fmt.Errorf("manifest of docker's schema 1: not supported: push the image again with a docker of this decade")
	case doc.Manifests != nil && (doc.Layers != nil || doc.MediaType == dockerManifest || doc.MediaType == ocispec.MediaTypeImageManifest):
		return "", fmt.Errorf("manifest that is also an index: refused as ambiguous") // CVE-2021-41190
	case doc.MediaType != "":
		return doc.MediaType, nil
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex, nil
	}
	return ocispec.MediaTypeImageManifest, nil
}

// New returns the function that makes sources for "docker-image://" vertices, for op.Deps.Sources.
func New(r *Resolver, p *Puller) func(*solver.Vertex) (solver.Source, error) {
	return func(v *solver.Vertex) (solver.Source, error) { return newSource(r, p, v) }
}

// session asks the client's session for credentials.
func session(s solver.Session) registry.Credentials {
	if s == nil {
		return nil
	}
	return func(ctx context.Context, host string) (string, string, error) { return s.Credentials(ctx, host) }
}

// tokens is the client's session if it can fetch tokens itself.
func tokens(s solver.Session) registry.TokenSource {
	if t, ok := s.(solver.TokenSession); ok {
		return t
	}
	return nil
}

// once runs a function once for each key among those who ask at the same time, and hands its result to all of them. It ends when
// nobody waits for it any more.
type once[T any] struct {
	mu      sync.Mutex // guards running
	running map[string]*call[T]
}

type call[T any] struct {
	waiting int
	cancel  context.CancelCauseFunc
	done    chan struct{}
	value   T
	err     error
}

func (o *once[T]) do(ctx context.Context, key string, f func(context.Context) (T, error)) (T, error) {
	o.mu.Lock()
	c, ok := o.running[key]
	if !ok {
		if o.running == nil {
			o.running = map[string]*call[T]{}
		}
		run, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		c = &call[T]{cancel: cancel, done: make(chan struct{})}
		o.running[key] = c
		go func() {
			c.value, c.err = f(run)
			cancel(nil)
			o.mu.Lock()
			if o.running[key] == c {
				delete(o.running, key)
			}
			o.mu.Unlock()
			close(c.done)
		}()
	}
	c.waiting++
	o.mu.Unlock()
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
	}
	o.mu.Lock()
	last := false
	if c.waiting--; c.waiting == 0 {
		last = true
		c.cancel(context.Cause(ctx))
		if o.running[key] == c {
			delete(o.running, key) // who comes now begins anew
		}
	}
	o.mu.Unlock()
	if last {
		<-c.done // nothing of ours goes on behind the caller's back
	}
	var none T
	return none, context.Cause(ctx)
}

// op checks the attributes that we honour.
func attrsOf(op *pb.SourceOp) (mode string, layerLimit int, checksum digest.Digest, err error) {
	layerLimit = -1
	for key, value := range op.Attrs {
		switch key {
		case pb.AttrImageResolveMode:
			if mode, err = parseMode(value); err != nil {
				return "", 0, "", err
			}
		case pb.AttrImageRecordType:
			// Says what records of this image are shown as in "du": nothing that a build could notice.
		case pb.AttrImageLayerLimit:
			if _, err := fmt.Sscanf(value, "%d", &layerLimit); err != nil || layerLimit < 1 {
				return "", 0, "", fmt.Errorf("attribute %s=%s: not a positive number", key, value)
			}
		case pb.AttrImageChecksum:
			if checksum, err = digest.Parse(value); err != nil {
				return "", 0, "", fmt.Errorf("attribute %s=%s: %w", key, value, err)
			}
		default:
			return "", 0, "", fmt.Errorf("attribute not supported yet: %s", key)
		}
	}
	return mode, layerLimit, checksum, nil
}

// The modes of looking up a name.
const (
	modeDefault = pb.AttrImageResolveModeDefault
	modePull    = pb.AttrImageResolveModeForcePull
	modeLocal   = pb.AttrImageResolveModePreferLocal
)

func parseMode(mode string) (string, error) {
	switch mode {
	case "":
		return modeDefault, nil
	case modeDefault, modePull, modeLocal:
		return mode, nil
	}
	return "", fmt.Errorf("attribute %s=%s: not one of %s, %s, %s", pb.AttrImageResolveMode, mode, modeDefault, modePull, modeLocal)
}

// parse returns the full form of a name. Of a name with tag and digest the digest counts; both are kept.
func parse(ref string) (reference.Named, error) { return registry.Parse(ref) }
