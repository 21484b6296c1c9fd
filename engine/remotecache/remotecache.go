// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"context"
	"log/slog"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// Deps is what shared caches work with.
type Deps struct {
	Layers     *layer.Store
	Blobs      *blob.Store
	Records    *record.Store
	Registry   *registry.Registry
	LayerBlobs *layerblob.Maker
	Mounts     *op.CacheMounts
	Log        *slog.Logger
}

// Caches are the shared caches of an engine. Its methods may be called concurrently.
type Caches struct {
	deps    Deps
	sources registry.Sources
	open    places
}

// New returns the Caches of an engine.
func New(deps Deps) *Caches {
	return &Caches{deps: deps, sources: registry.Sources{Values: deps.Records}}
}

// Session reaches the client of a build.
type Session interface {
	registry.TokenSource
	Credentials(ctx context.Context, host string) (user, secret string, err error)
	// ContentStore is a content store that the client offers.
	ContentStore(ctx context.Context, id string) (content.Store, error)
}

// Step shows f as a vertex of the build.
type Step func(ctx context.Context, name string, id digest.Digest, f func(env *solver.Env) error) error

// repository opens a registry for a client.
func (c *Caches) repository(session Session, ref string, insecure bool) (*share.Repository, error) {
	remote := c.deps.Registry
	if insecure {
		remote = remote.Lenient()
	}
	return share.OpenRepository(remote.WithTokens(session.Credentials, session), ref, c.sources)
}

// contentStore opens a directory of the client: clients offer them under this name.
func contentStore(ctx context.Context, session Session, dir string) (content.Store, error) {
	return session.ContentStore(ctx, "local:"+dir)
}
