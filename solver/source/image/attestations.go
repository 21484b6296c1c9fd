// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/solver"
)

// What signatures of attestation manifests are: Sigstore's bundles, and cosign's older form.
const (
	sigstoreBundle  = "application/vnd.dev.sigstore.bundle.v0.3+json"
	cosignSignature = "application/vnd.dev.cosign.artifact.sig.v1+json"
)

// How an index says which of its manifests has the attestations of which image, and an attestation manifest what a layer is.
const (
	referenceType       = "vnd.docker.reference.type"
	referenceDigest     = "vnd.docker.reference.digest"
	attestationManifest = "attestation-manifest"
	predicateType       = "in-toto.io/predicate-type"
)

// Attestations returns the documents by which a policy can judge an image: the index that ref stands for, the attestation manifest
// that belongs to the manifest for platform (nil: this machine's), its signature, and those of its statements whose predicate types are
// asked for. An image without an index has no documents. Nothing is judged here: the documents have the digests by which they are named,
// and that is all. A signature is looked for in the registry only.
func (r *Resolver) Attestations(ctx context.Context, env *solver.Env, ref string, platform *ocispec.Platform, mode string, predicates []string) (*sourceresolver.AttestationChain, error) {
	p := DefaultPlatform()
	if platform != nil {
		p = *platform
	}
	f, err := r.find(ctx, env, ref, p, mode)
	if err != nil {
		return nil, err
	}
	c := chainReader{resolver: r, registry: r.Registry(env), ref: f.name, blobs: map[digest.Digest]sourceresolver.Blob{}}
	chain := &sourceresolver.AttestationChain{Root: f.target.Digest, ImageManifest: f.manifest.Digest, Blobs: c.blobs}
	if !isIndex(f.target.MediaType) {
		return chain, nil // not nil: policies that get no chain ask again
	}
	if img, err := r.deps.Images.Resolve(ctx, f.name); err == nil {
		c.local = img.Target.Digest == f.target.Digest
	}
	raw, err := c.read(ctx, f.target)
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("image %s: index: %w", f.name, err)
	}
	i := slices.IndexFunc(index.Manifests, func(d ocispec.Descriptor) bool {
		return d.Annotations[referenceType] == attestationManifest && d.Annotations[referenceDigest] == f.manifest.Digest.String()
	})
	if i < 0 {
		return chain, nil
	}
	chain.AttestationManifest = index.Manifests[i].Digest
	manifest, err := c.manifest(ctx, index.Manifests[i])
	if err != nil {
		return nil, err
	}
	for _, d := range manifest.Layers {
		if slices.Contains(predicates, d.Annotations[predicateType]) {
			if _, err := c.read(ctx, d); err != nil {
				return nil, err
			}
		}
	}
	signature, ok, err := c.signature(ctx, chain.AttestationManifest)
	if err != nil || !ok {
		return chain, err
	}
	chain.SignatureManifests = []digest.Digest{signature.Digest}
	if manifest, err = c.manifest(ctx, signature); err != nil {
		return nil, err
	}
	for _, d := range manifest.Layers {
		if _, err := c.read(ctx, d); err != nil {
			return nil, err
		}
	}
	return chain, nil
}

// chainReader collects the documents of one chain.
type chainReader struct {
	resolver *Resolver
	registry *registry.Registry
	ref      string
	local    bool // the local image store has it, and so its registry may not
	blobs    map[digest.Digest]sourceresolver.Blob
}

// read gets a document out of the store or from the registry.
func (c *chainReader) read(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	raw, err := c.resolver.document(ctx, c.registry, c.ref, d)
	if err != nil {
		return nil, fmt.Errorf("attestations of image %s: %w", c.ref, err)
	}
	c.blobs[d.Digest] = sourceresolver.Blob{Descriptor: d, Data: raw}
	return raw, nil
}

func (c *chainReader) manifest(ctx context.Context, d ocispec.Descriptor) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	raw, err := c.read(ctx, d)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("attestations of image %s: manifest %s: %w", c.ref, d.Digest, err)
	}
	return m, nil
}

// signature finds the signature of an attestation manifest: a bundle before one of the older form. An image that is only here, because it
// was built here and its registry has never seen it, has none.
func (c *chainReader) signature(ctx context.Context, of digest.Digest) (ocispec.Descriptor, bool, error) {
	list, err := c.registry.Referrers(ctx, c.ref, of)
	switch {
	case errors.Is(err, registry.ErrNotFound), err != nil && ctx.Err() == nil && c.local:
		return ocispec.Descriptor{}, false, nil
	case err != nil:
		return ocispec.Descriptor{}, false, fmt.Errorf("signatures of the attestations of image %s: %w", c.ref, err)
	}
	for _, kind := range []string{sigstoreBundle, cosignSignature} {
		for _, d := range list {
			if d.ArtifactType == kind {
				return d, true, nil
			}
		}
	}
	return ocispec.Descriptor{}, false, nil
}
