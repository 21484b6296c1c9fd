// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"strings"
	"sync"

	"github.com/distribution/reference"
	registrytypes "github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
	registryexporter "github.com/seed-68981b69/slipway/exporter/registry"
	"github.com/seed-68981b69/slipway/solver/source/image"
)

// remotes pulls and pushes for the Docker API.
type remotes struct {
	store    *cache.Store
	registry *registry.Registry
	puller   *image.Puller
	pusher   *registryexporter.Pusher
	synced   func() // asks for a sync of the store
}

var _ dockerapi.Registry = (*remotes)(nil)

// Pull implements dockerapi.Registry.
func (r *remotes) Pull(ctx context.Context, ref string, platform *ocispec.Platform, auth *registrytypes.AuthConfig, progress func(dockerapi.Transfer)) (digest.Digest, bool, error) {
	lease := r.store.Lease("pull " + ref)
	defer lease.Release()
	before, hadErr := r.store.Images.Get(ctx, ref)
	creds, err := credentials(ref, auth)
	if err != nil {
		return "", false, err
	}
	img, err := r.puller.Pull(ctx, ref, platform, creds, transfers(progress))
	if err != nil {
		return "", false, err
	}
	r.synced()
	return img.Target.Digest, hadErr != nil || before.Target.Digest != img.Target.Digest, nil
}

// Push implements dockerapi.Registry.
func (r *remotes) Push(ctx context.Context, ref string, auth *registrytypes.AuthConfig, progress func(dockerapi.Transfer)) (ocispec.Descriptor, error) {
	lease := r.store.Lease("push " + ref)
	defer lease.Release()
	img, err := r.store.Images.Get(ctx, ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	creds, err := credentials(ref, auth)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ctx = registry.WithAccess(ctx, creds, nil)
	return r.pusher.Push(ctx, img, ref, registryexporter.Options{Credentials: creds, Progress: transfers(progress)})
}

// Login implements dockerapi.Registry. Registries here are asked with user and password each time, so there is no token.
func (r *remotes) Login(ctx context.Context, auth registrytypes.AuthConfig) (string, error) {
	return "", r.registry.Verify(ctx, auth.ServerAddress, auth.Username, auth.Password)
}

// credentials makes what a client sent good for the registry of ref and no other.
func credentials(ref string, auth *registrytypes.AuthConfig) (registry.Credentials, error) {
	if auth == nil {
		return nil, nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, err
	}
	host := reference.Domain(named)
	return func(_ context.Context, asked string) (string, string, error) {
		switch {
		case asked != host && !(host == "docker.io" && strings.HasSuffix(asked, ".docker.io")):
			return "", "", nil
		case auth.IdentityToken != "":
			return "", auth.IdentityToken, nil
		}
		return auth.Username, auth.Password, nil
	}, nil
}

// transfers translates the progress of layers: what is reported only once was there already.
func transfers(progress func(dockerapi.Transfer)) func(id string, current, total int64, done bool) {
	var mu sync.Mutex
	seen := map[string]bool{}
	return func(id string, current, total int64, done bool) {
		mu.Lock()
		first := !seen[id]
		seen[id] = true
		mu.Unlock()
		t := dockerapi.Transfer{Digest: digest.Digest(id), State: dockerapi.Running, Current: current, Total: total}
		switch {
		case done && first:
			t.State = dockerapi.Exists
		case done:
			t.State = dockerapi.Done
		}
		progress(t)
	}
}
