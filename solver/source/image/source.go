// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// source is the op of "docker-image://REF".
type source struct {
	resolver *Resolver
	puller   *Puller

	ref        string
	platform   ocispec.Platform
	mode       string
	layerLimit int // -1: all
	checksum   digest.Digest

	mu     sync.Mutex // guards pinned
	pinned *found     // by the last Pin
}

func newSource(r *Resolver, p *Puller, v *solver.Vertex) (*source, error) {
	op := v.Op.GetSource()
	ref, ok := strings.CutPrefix(op.GetIdentifier(), "docker-image://")
	if !ok {
		scheme, _, _ := strings.Cut(op.GetIdentifier(), "://")
		return nil, fmt.Errorf("source not supported yet: %s://", scheme)
	}
	s := &source{resolver: r, puller: p, platform: DefaultPlatform()}
	named, err := parse(ref)
	if err != nil {
		return nil, err
	}
	s.ref = named.String()
	if pl := v.Op.GetPlatform(); pl != nil && pl.OS != "" {
		s.platform = platforms.Normalize(ocispec.Platform{
			OS: pl.OS, Architecture: pl.Architecture, Variant: pl.Variant, OSVersion: pl.OSVersion, OSFeatures: pl.OSFeatures,
		})
	}
	if s.mode, s.layerLimit, s.checksum, err = attrsOf(op); err != nil {
		return nil, fmt.Errorf("image %s: %w", s.ref, err)
	}
	return s, nil
}

// Parts implements solver.Op. What the source is comes from its pin.
func (s *source) Parts() []record.Part {
	parts := []record.Part{{Name: "source", Value: "docker-image"}}
	if s.layerLimit >= 0 {
		parts = append(parts, record.Part{Name: "layer limit", Value: strconv.Itoa(s.layerLimit)})
	}
	return parts
}

// InputDigest implements solver.Op. A source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("image %s: a source has no inputs", s.ref)
}

// Pin implements solver.Source: an image is pinned by the manifest for its platform.
func (s *source) Pin(ctx context.Context, env *solver.Env) (solver.Pin, error) {
	f, err := s.find(ctx, env)
	if err != nil {
		return solver.Pin{}, err
	}
	s.mu.Lock()
	s.pinned = f
	s.mu.Unlock()
	return solver.Pin{
		Parts:    []record.Part{{Name: "manifest", Value: f.manifest.Digest.String()}},
		Resolved: f.target.Digest.String(),
	}, nil
}

func (s *source) find(ctx context.Context, env *solver.Env) (*found, error) {
	f, err := s.resolver.find(ctx, env, s.ref, s.platform, s.mode)
	if err != nil {
		return nil, err
	}
	if s.checksum != "" && f.target.Digest != s.checksum && f.manifest.Digest != s.checksum {
		return nil, fmt.Errorf("image %s: its digest is %s, not %s as was asked for", s.ref, f.target.Digest, s.checksum)
	}
	return f, nil
}

// Run implements solver.Op: it pulls what Pin found; if nothing of it will be read, as far as the solver knows, its layers stay in the
// registry. The name is not looked up again: the result is recorded under what the pin says.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	s.mu.Lock()
	f := s.pinned
	s.mu.Unlock()
	if f == nil {
		var err error
		if f, err = s.find(ctx, env); err != nil {
			return nil, err
		}
	}
	snap, err := s.puller.layers(ctx, s.resolver.Registry(env), f, s.layerLimit, env.Unread, env.Progress.Status)
	if err != nil {
		return nil, err
	}
	return []snapshot.Snapshot{snap}, nil
}
