// SPDX-License-Identifier: Apache-2.0

// Package registry sends local images to registries. Layers go as compressed blobs: those that were pulled as they came,
// ours as gzip, made once and kept in the blob store. Blobs go in parallel, then the configs, the manifests, and last the tag.
package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	attestationtypes "github.com/moby/buildkit/util/attestation"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// parallel is how many blobs are sent at once.
const parallel = 4

// Deps is what pushes work with.
type Deps struct {
	Layers   *layer.Store
	Blobs    *blob.Store
	Images   *image.Store
	Records  *record.Store
	Registry *registry.Registry
	// LayerBlobs compresses; nil means one of the Pusher's own.
	LayerBlobs *layerblob.Maker
}

// Pusher sends images. It may be used concurrently.
type Pusher struct {
	deps    Deps
	layers  *layerblob.Maker
	sources registry.Sources
	sending layerblob.Locks
}

// New returns a Pusher.
func New(deps Deps) *Pusher {
	if deps.LayerBlobs == nil {
		deps.LayerBlobs = layerblob.New(layerblob.Deps{Layers: deps.Layers, Blobs: deps.Blobs, Records: deps.Records, Registry: deps.Registry})
	}
	return &Pusher{
		deps:    deps,
		layers:  deps.LayerBlobs,
		sources: registry.Sources{Values: deps.Records},
	}
}

// Options belong to one push.
type Options struct {
	// Credentials are asked before those that the Registry has; nil means that there are no others.
	Credentials registry.Credentials
	// Tokens are fetched by whoever asks for the push, without its credentials; may be nil.
	Tokens registry.TokenSource
	// Progress is called with the bytes of each layer, by its digest in the registry, and once, done, with the full size for one that
	// the registry had already. It may be called from several goroutines; nil is allowed. It fits solver.Progress.Status.
	Progress func(id string, current, total int64, done bool)
	// Compression is the form of the layers that have not been pulled, or of all; the zero value means gzip.
	Compression layerblob.Compression
	// ByDigest sets no tag.
	ByDigest bool
	// Insecure is for a registry without a certificate that somebody vouches for, or without any.
	Insecure bool
}

// Push sends img to ref, whose tag ("latest" when it has none) is set last, and returns the manifest or index that it
// names then. Of an index the platforms that are in the local store are sent: all of them as the same index, one alone
// as its manifest. A manifest whose layers have not been compressed yet becomes another one with the same config.
func (p *Pusher) Push(ctx context.Context, img image.Image, ref string, opts Options) (ocispec.Descriptor, error) {
	s, err := p.newPush(ref, opts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	// Whether the tag has to be set is asked while the blobs are on their way: a fresh machine pushes mostly what is there.
	tagged := make(chan bool, 1)
	go func() { tagged <- !opts.ByDigest && s.to.Tagged(ctx, s.ref, img.Target.Digest) }()
	desc, content, err := s.image(ctx, img.Target)
	done := <-tagged && desc.Digest == img.Target.Digest
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	switch {
	case done:
	case opts.ByDigest:
		err = s.to.PushManifest(ctx, s.repo, desc, content)
	default:
		err = s.to.Tag(ctx, s.ref, desc, content)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := s.remember(ctx, img, desc, opts.ByDigest); err != nil {
		slog.Warn("note the digest of a pushed image", "image", s.ref, "digest", desc.Digest, "error", err)
	}
	return desc, nil
}

// PushLayer sends the blob that Push would send for a layer of an image, and nothing that names it.
func (p *Pusher) PushLayer(ctx context.Context, id layer.ID, ref string, opts Options) error {
	s, err := p.newPush(ref, opts)
	if err != nil {
		return err
	}
	b, err := s.layers.Layer(ctx, id, s.compression)
	if err != nil {
		return fmt.Errorf("push %s: %w", s.ref, err)
	}
	if err := s.blob(ctx, b); err != nil {
		return err
	}
	return s.sources.Add(s.ref, b.Desc.Digest)
}

func (p *Pusher) newPush(ref string, opts Options) (*push, error) {
	named, err := registry.Parse(ref)
	if err != nil {
		return nil, err
	}
	if strings.Contains(named.String(), "@") {
		return nil, fmt.Errorf("push %s: a name to push to cannot have a digest", named)
	}
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64, bool) {}
	}
	if opts.Compression.Kind == "" {
		opts.Compression.Kind = compress.Gzip
	}
	to := p.deps.Registry
	if opts.Insecure {
		to = to.Lenient()
	}
	return &push{
		Pusher: p, ref: named.String(), repo: named.Name(), to: to.WithTokens(opts.Credentials, opts.Tokens), progress: opts.Progress,
		slots: make(chan struct{}, parallel), compression: opts.Compression,
	}, nil
}

// push is one image on its way.
type push struct {
	*Pusher
	ref, repo   string
	to          *registry.Registry
	progress    func(id string, current, total int64, done bool)
	slots       chan struct{}
	compression layerblob.Compression
}

// image sends everything below target and returns the manifest or index to be tagged, which is not sent yet.
func (s *push) image(ctx context.Context, target ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	raw, err := s.deps.Blobs.ReadAll(target.Digest)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: read manifest %s: %w", s.ref, target.Digest, err)
	}
	if !isIndex(target.MediaType) {
		return s.manifest(ctx, target, raw)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: index %s: %w", s.ref, target.Digest, err)
	}
	all := len(index.Manifests)
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool { return !s.here(d) })
	// An attestation without what it is about says nothing.
	present := slices.Clone(index.Manifests)
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool {
		about, ok := attests(d)
		return ok && !slices.ContainsFunc(present, func(o ocispec.Descriptor) bool { return o.Digest == about })
	})
	switch {
	case len(index.Manifests) == 0:
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: none of the %d platforms of its index are in the local store: pull the image first", s.ref, all)
	case len(index.Manifests) == 1 && all > 1:
		raw, err := s.deps.Blobs.ReadAll(index.Manifests[0].Digest)
		if err != nil {
			return ocispec.Descriptor{}, nil, err
		}
		d := index.Manifests[0]
		d.Platform, d.Annotations = nil, nil // what the index says of it
		return s.manifest(ctx, d, raw)
	}
	changed := len(index.Manifests) != all
	sent := make([]ocispec.Descriptor, len(index.Manifests))
	group, gctx := errgroup.WithContext(ctx)
	for i, d := range index.Manifests {
		group.Go(func() error {
			raw, err := s.deps.Blobs.ReadAll(d.Digest)
			if err != nil {
				return err
			}
			desc, content, err := s.manifest(gctx, d, raw)
			if err != nil {
				return err
			}
			sent[i] = d
			sent[i].Digest, sent[i].Size = desc.Digest, desc.Size
			return s.to.PushManifest(gctx, s.repo, desc, content)
		})
	}
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	for i, d := range index.Manifests {
		if sent[i].Digest == d.Digest {
			continue
		}
		changed = true
		for _, other := range index.Manifests {
			if about, ok := attests(other); ok && about == d.Digest {
				return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: manifest %s would become %s, because blobs of its layers are gone, and its attestation %s is about the former: build the image again",
					s.ref, d.Digest, sent[i].Digest, other.Digest)
			}
		}
	}
	if !changed {
		return target, raw, nil
	}
	index.Manifests = sent
	return s.rewrite(ctx, target, index)
}

// attests returns the manifest that the attestation manifest d is about; false when d is no such thing.
func attests(d ocispec.Descriptor) (about digest.Digest, ok bool) {
	if d.Annotations[attestationtypes.DockerAnnotationReferenceType] != attestationtypes.DockerAnnotationReferenceTypeDefault {
		return "", false
	}
	return digest.Digest(d.Annotations[attestationtypes.DockerAnnotationReferenceDigest]), true
}

// here says whether a manifest of an index can be sent.
func (s *push) here(d ocispec.Descriptor) bool {
	if isIndex(d.MediaType) || !s.deps.Blobs.Has(d.Digest) {
		return false
	}
	raw, err := s.deps.Blobs.ReadAll(d.Digest)
	if err != nil {
		return false
	}
	var m ocispec.Manifest
	return json.Unmarshal(raw, &m) == nil && s.deps.Blobs.Has(m.Config.Digest)
}

// manifest sends the layers and the config of a manifest, and returns the manifest as the registry will have it.
func (s *push) manifest(ctx context.Context, desc ocispec.Descriptor, raw []byte) (ocispec.Descriptor, []byte, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: manifest %s: %w", s.ref, desc.Digest, err)
	}
	config, err := s.deps.Blobs.ReadAll(m.Config.Digest)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: read config: %w", s.ref, err)
	}
	find := &finder{push: s, manifest: desc.Digest, config: config}
	docker := strings.HasPrefix(desc.MediaType, "application/vnd.docker.")

	sent := make([]ocispec.Descriptor, len(m.Layers))
	group, gctx := errgroup.WithContext(ctx)
	first := make([]int, len(m.Layers)) // the same layer twice is sent once
	for i, l := range m.Layers {
		first[i] = slices.IndexFunc(m.Layers, func(o ocispec.Descriptor) bool { return o.Digest == l.Digest })
		if first[i] < i {
			continue
		}
		group.Go(func() (err error) {
			select {
			case s.slots <- struct{}{}:
				defer func() { <-s.slots }()
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			sent[i], err = s.layer(gctx, find, i, l, docker)
			return err
		})
	}
	quiet := *s // progress is about layers
	quiet.progress = func(string, int64, int64, bool) {}
	group.Go(func() error { return quiet.blob(gctx, layerblob.Stored(m.Config)) })
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	changed := false
	for i := range m.Layers {
		sent[i] = sent[first[i]]
		changed = changed || sent[i].Digest != m.Layers[i].Digest || sent[i].MediaType != m.Layers[i].MediaType ||
			!maps.Equal(sent[i].Annotations, m.Layers[i].Annotations)
	}
	var blobs []digest.Digest
	for _, l := range sent {
		blobs = append(blobs, l.Digest)
	}
	if err := s.sources.Add(s.ref, blobs...); err != nil {
		slog.Warn("note where layers have been pushed to", "image", s.ref, "error", err)
	}
	if !changed {
		return desc, raw, nil
	}
	m.Layers = sent
	made, content, err := s.rewrite(ctx, desc, m)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	// It runs from the same layers.
	snap, ok, err := s.deps.Images.Layers(ctx, desc.Digest)
	if err == nil && ok {
		err = s.deps.Images.SetLayers(ctx, made.Digest, snap)
	}
	return made, content, err
}

// remember gives an image that was pushed under its own name, or only by its digest, the digest that it has in the registry as one
// more name, which is what docker lists as its RepoDigests and what a Dockerfile may say.
func (s *push) remember(ctx context.Context, img image.Image, desc ocispec.Descriptor, byDigest bool) error {
	local, err := s.deps.Images.Get(ctx, s.ref)
	if byDigest {
		if img.ID == "" {
			return nil // not in the store
		}
		local, err = img, nil
	}
	if err != nil || local.Target.Digest != img.Target.Digest || desc.Digest == img.Target.Digest && !byDigest {
		return nil // not ours to name, or found by that digest already
	}
	return s.deps.Images.Put(ctx, image.Image{Name: s.repo + "@" + desc.Digest.String(), Target: desc, Size: local.Size, Created: local.Created})
}

func (s *push) rewrite(ctx context.Context, old ocispec.Descriptor, v any) (ocispec.Descriptor, []byte, error) {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	desc, err := s.deps.Blobs.PutBytes(ctx, old.MediaType, raw)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("push %s: store manifest: %w", s.ref, err)
	}
	return desc, raw, nil
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}
