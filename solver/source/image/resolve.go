// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/solver"
)

// Resolver finds what image names stand for. It may be used concurrently.
//
// A name is looked up once a build: all stages that begin with it see the same image. The local image store is asked
// first, unless the build or the vertex wants what the registry has now. A digest is what it is: its manifest is
// taken from wherever it is.
type Resolver struct {
	deps Deps
	once once[*found]

	mu     sync.Mutex          // guards builds and order
	builds map[string]*answers // by build ID
	order  []string            // of builds, oldest first
}

// answers are what names stood for when a build asked first.
type answers struct {
	byKey map[string]*found
	reg   *registry.Registry
}

// maxBuilds is how many builds' answers are kept: more than run at once.
const maxBuilds = 64

// NewResolver returns a Resolver.
func NewResolver(deps Deps) *Resolver {
	return &Resolver{deps: deps, builds: map[string]*answers{}}
}

// ResolveConfig returns what ref stands for: the digest of its manifest or, for several platforms, of its index; the image config
// for platform (nil: this machine's); and the full form of the name with that digest. mode is LLB's image.resolvemode. No layer
// is fetched.
func (r *Resolver) ResolveConfig(ctx context.Context, env *solver.Env, ref string, platform *ocispec.Platform, mode string) (digest.Digest, []byte, string, error) {
	p := DefaultPlatform()
	if platform != nil {
		p = *platform
	}
	f, err := r.find(ctx, env, ref, p, mode)
	if err != nil {
		return "", nil, "", err
	}
	named, err := parse(ref)
	if err != nil {
		return "", nil, "", err
	}
	pinned, err := reference.WithDigest(reference.TrimNamed(named), f.target.Digest)
	if err != nil {
		return "", nil, "", err
	}
	return f.target.Digest, f.config, pinned.String(), nil
}

// find answers from what this build has been told before, or looks the name up.
func (r *Resolver) find(ctx context.Context, env *solver.Env, ref string, p ocispec.Platform, mode string) (*found, error) {
	mode, err := parseMode(mode)
	if err != nil {
		return nil, err
	}
	if env.Pull {
		mode = modePull
	}
	named, err := parse(ref)
	if err != nil {
		return nil, err
	}
	a := r.build(env)
	key := named.String() + " " + platforms.FormatAll(p) + " " + mode
	r.mu.Lock()
	f := a.byKey[key]
	r.mu.Unlock()
	if f != nil {
		return f, nil
	}
	return r.once.do(ctx, env.BuildID+" "+key, func(ctx context.Context) (*found, error) {
		f, err := r.lookup(ctx, a.reg, named, p, mode)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		a.byKey[key] = f
		// The frontend puts the digest that it was told into the name: that name is answered, too.
		if pinned, err := reference.WithDigest(named, f.target.Digest); err == nil {
			a.byKey[pinned.String()+" "+platforms.FormatAll(p)+" "+mode] = f
		}
		return f, nil
	})
}

// build returns the answers of env's build.
func (r *Resolver) build(env *solver.Env) *answers {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a, ok := r.builds[env.BuildID]; ok && env.BuildID != "" {
		return a
	}
	a := &answers{byKey: map[string]*found{}, reg: r.deps.Registry.WithTokens(session(env.Session), tokens(env.Session))}
	if env.BuildID == "" {
		return a
	}
	r.builds[env.BuildID] = a
	if r.order = append(r.order, env.BuildID); len(r.order) > maxBuilds {
		delete(r.builds, r.order[0])
		r.order = r.order[1:]
	}
	return a
}

// Registry is what pulls for env's build go through: it has the build's credentials.
func (r *Resolver) Registry(env *solver.Env) *registry.Registry { return r.build(env).reg }

// lookup finds what named stands for on p.
func (r *Resolver) lookup(ctx context.Context, reg *registry.Registry, named reference.Named, p ocispec.Platform, mode string) (*found, error) {
	if _, pinned := named.(reference.Digested); mode == modePull && !pinned {
		return r.remote(ctx, reg, named, p)
	}
	f, err := r.local(ctx, named, p)
	if !errors.Is(err, errNotHere) {
		return f, err
	}
	if f, err = r.remote(ctx, reg, named, p); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%s is not in the local image store: %w", reference.FamiliarString(named), err)
	}
	return f, err
}

// errNotHere says that the local image store does not have what is looked for, or not for that platform.
var errNotHere = errors.New("not in the local image store")

// local looks in the image store, and, for a digest, among the blobs.
func (r *Resolver) local(ctx context.Context, named reference.Named, p ocispec.Platform) (*found, error) {
	f := &found{name: named.String()}
	img, err := r.deps.Images.Resolve(ctx, named.String())
	switch {
	case err == nil:
		f.target = img.Target
	case !errors.Is(err, image.ErrNotFound):
		return nil, err
	default:
		digested, ok := named.(reference.Digested)
		if !ok {
			return nil, errNotHere
		}
		f.target = ocispec.Descriptor{Digest: digested.Digest()}
	}
	if digested, ok := named.(reference.Digested); ok {
		f.target.Digest = digested.Digest() // of a manifest in the image's index, perhaps
		f.target.MediaType = ""
	}
	read := func(d ocispec.Descriptor) ([]byte, error) {
		raw, err := r.deps.Blobs.ReadAll(d.Digest)
		if errors.Is(err, blob.ErrNotFound) {
			return nil, errNotHere
		}
		return raw, err
	}
	if err := f.complete(p, read); err != nil {
		if errors.Is(err, errNoPlatform) {
			return nil, errNotHere // the registry may have it for that platform
		}
		return nil, err
	}
	var made ocispec.Platform
	if err := json.Unmarshal(f.config, &made); err == nil && made.OS != "" && !platforms.Only(p).Match(made) {
		return nil, errNotHere
	}
	return f, nil
}

// remote asks the registry. What it says is kept as blobs, so that the digest is found here the next time.
func (r *Resolver) remote(ctx context.Context, reg *registry.Registry, named reference.Named, p ocispec.Platform) (*found, error) {
	name, target, err := reg.Resolve(ctx, named.String())
	if err != nil {
		return nil, err
	}
	f := &found{name: name, target: target}
	err = f.complete(p, func(d ocispec.Descriptor) ([]byte, error) {
		return r.document(ctx, reg, named.String(), d)
	})
	return f, err
}

// document returns a manifest, index or config: from the blob store, or from the registry into it.
func (r *Resolver) document(ctx context.Context, reg *registry.Registry, ref string, d ocispec.Descriptor) ([]byte, error) {
	if r.deps.Blobs.Has(d.Digest) {
		if raw, err := r.deps.Blobs.ReadAll(d.Digest); err == nil {
			return raw, nil
		}
		// Damaged: the registry has a good one.
		if err := r.deps.Blobs.Delete(d.Digest); err != nil {
			return nil, err
		}
	}
	raw, err := reg.FetchBytes(ctx, ref, d)
	if errors.Is(err, registry.ErrCorrupt) {
		raw, err = reg.FetchBytes(ctx, ref, d) // once more: a proxy on the way may have had a bad copy
	}
	if err != nil {
		return nil, err
	}
	if _, err := r.deps.Blobs.PutBytes(ctx, d.MediaType, raw); err != nil {
		return nil, fmt.Errorf("store %s of %s: %w", d.Digest, ref, err)
	}
	return raw, nil
}

// errNoPlatform says that an image is not made for the platform that was asked for.
var errNoPlatform = errors.New("no image for the platform")

// complete goes from f.target to the manifest for p and its config.
func (f *found) complete(p ocispec.Platform, read func(ocispec.Descriptor) ([]byte, error)) error {
	raw, err := read(f.target)
	if err != nil {
		return err
	}
	mediaType, err := sniff(raw)
	if err != nil {
		return fmt.Errorf("image %s: %w", f.name, err)
	}
	f.target.MediaType, f.target.Size = mediaType, int64(len(raw))
	f.manifest, f.raw = f.target, raw
	if isIndex(mediaType) {
		if f.manifest, err = choose(raw, p); err != nil {
			return fmt.Errorf("image %s: %w", f.name, err)
		}
		if f.raw, err = read(f.manifest); err != nil {
			return err
		}
		if mediaType, err = sniff(f.raw); err != nil {
			return fmt.Errorf("image %s: %w", f.name, err)
		} else if isIndex(mediaType) {
			return fmt.Errorf("image %s: its index names another index for %s: not supported yet", f.name, platforms.Format(p))
		}
		f.manifest.MediaType = mediaType
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(f.raw, &m); err != nil {
		return fmt.Errorf("image %s: manifest %s: %w", f.name, f.manifest.Digest, err)
	}
	if err := m.Config.Digest.Validate(); err != nil {
		return fmt.Errorf("image %s: manifest %s: config: %w", f.name, f.manifest.Digest, err)
	}
	if f.config, err = read(m.Config); err != nil {
		return err
	}
	// A single manifest says in its config what it is for. Like docker, one for another platform is taken when that is
	// all there is: whoever asked is told by what fails to run.
	return nil
}

// choose returns the manifest of an index that fits p best.
func choose(raw []byte, p ocispec.Platform) (ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index: %w", err)
	}
	only := platforms.Only(p)
	var fitting []ocispec.Descriptor
	var have []string
	for _, d := range index.Manifests {
		if d.Platform == nil || d.Digest.Validate() != nil {
			continue
		}
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation
		}
		have = append(have, platforms.Format(*d.Platform))
		if only.Match(*d.Platform) {
			fitting = append(fitting, d)
		}
	}
	if len(fitting) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%w %s (there are: %v)", errNoPlatform, platforms.Format(p), have)
	}
	slices.SortStableFunc(fitting, func(a, b ocispec.Descriptor) int {
		switch {
		case only.Less(*a.Platform, *b.Platform):
			return -1
		case only.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return fitting[0], nil
}
