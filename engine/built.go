// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/rand"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
	"github.com/seed-68981b69/slipway/exporter"
)

const (
	// builtPrefix begins the names of results that have no image.
	builtPrefix = "slipway-snapshot:"
	// builtFor is how long a result is kept from its build to the container, and from there to the container's start, when its mount
	// keeps it. It is a moment for `slipway run --build`; the steps' records keep the layers anyway, unless the cache is full.
	builtFor = time.Minute
)

// built has the results of builds that are about to be run without an image.
type built struct {
	dockerapi.Images
	lease func(id string) (release func())
	// ensure writes layers to disk that are in memory only.
	ensure func(ctx context.Context, ids ...layer.ID) error

	mu      sync.Mutex // guards what follows
	results map[string]*builtResult
}

type builtResult struct {
	image   dockerapi.Image
	timer   *time.Timer
	release func()
}

// keep is a snapshot.Keeper.
func (b *built) keep(ctx context.Context, ref exporter.Ref) (string, error) {
	if err := b.ensure(ctx, ref.Snapshot...); err != nil {
		return "", err
	}
	name := builtPrefix + strings.ToLower(rand.Text())
	id := digest.FromBytes(ref.Config)
	r := &builtResult{
		image: dockerapi.Image{
			ID: id, Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: id, Size: int64(len(ref.Config))},
			Config: ref.Config, Created: time.Now(), Layers: ref.Snapshot, Runnable: true,
		},
		release: b.lease("run " + name),
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.results == nil {
		b.results = map[string]*builtResult{}
	}
	b.results[name] = r
	r.timer = time.AfterFunc(builtFor, func() { b.forget(name) })
	return name, nil
}

func (b *built) forget(name string) {
	b.mu.Lock()
	r := b.results[name]
	delete(b.results, name)
	b.mu.Unlock()
	if r != nil {
		r.release()
	}
}

// close lets go of everything. Nobody builds any more.
func (b *built) close() {
	b.mu.Lock()
	var names []string
	for name, r := range b.results {
		r.timer.Stop()
		names = append(names, name)
	}
	b.mu.Unlock()
	for _, name := range names {
		b.forget(name)
	}
}

// Get implements dockerapi.Images: whoever is told of a result has some more time to run it.
func (b *built) Get(ctx context.Context, ref string) (dockerapi.Image, error) {
	b.mu.Lock()
	r := b.results[ref]
	if r != nil {
		r.timer.Reset(builtFor)
	}
	b.mu.Unlock()
	if r != nil {
		return r.image, nil
	}
	return b.Images.Get(ctx, ref)
}
