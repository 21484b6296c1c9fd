// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
)

// Docker's media types.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// createdBucket of the record database has the time of the first export, under the digest of everything else in a config.
const createdBucket = "image-created"

// Assembler makes configs, manifests and indexes, and stores them as blobs.
type Assembler struct {
	Blobs   *blob.Store
	Records *record.Store
	// Docker asks for Docker's media types instead of OCI's.
	Docker      bool
	Annotations Annotations
	// Names are those that the image gets, by which statements name it; NoArtifact makes attestation manifests as images, as they
	// were before OCI had artifacts.
	Names      []string
	NoArtifact bool
	// Layers are looked into to say which layer a file of an SBOM is in.
	Layers LayerIndexes
	// Epoch is the latest time that may appear in the image, if EpochSet; else the frontend says.
	Epoch    *time.Time
	EpochSet bool
}

// Layer is a layer as the manifest will name it.
type Layer struct {
	// Desc may have OCI's media types even for an Assembler of Docker's.
	Desc   ocispec.Descriptor
	DiffID digest.Digest
}

// Assembled is an image: everything but its layers is in the blob store.
type Assembled struct {
	// Target is the index, or the only manifest.
	Target    ocispec.Descriptor
	Manifests []Manifest // in the order of the Result's Refs
	// Attestations are the manifests of what is said about those of Manifests that anything is said about, in their order.
	Attestations []Manifest
	// Created is when the image says that it was made; of several, the latest.
	Created time.Time
}

// Manifest is the manifest of one platform.
type Manifest struct {
	Desc, Config ocispec.Descriptor
	Layers       []ocispec.Descriptor
}

// IsIndex says whether there is an index over the manifests.
func (a Assembled) IsIndex() bool {
	return len(a.Manifests) != 1 || a.Target.Digest != a.Manifests[0].Desc.Digest
}

// Assemble makes the image of r, whose layers are given for each Ref.
func (a Assembler) Assemble(ctx context.Context, r exporter.Result, layers [][]Layer, opts exporter.Options) (Assembled, error) {
	if len(r.Refs) == 0 {
		return Assembled{}, fmt.Errorf("export image: the build has no result")
	}
	annotations, err := a.Annotations.with(r.Metadata)
	if err != nil {
		return Assembled{}, err
	}
	if err := annotations.check(r, a.Docker); err != nil {
		return Assembled{}, err
	}
	if a.Docker && r.Attested() {
		return Assembled{}, fmt.Errorf("attestations: oci-mediatypes=false has no such manifests")
	}
	var out Assembled
	for i, ref := range r.Refs {
		m, created, err := a.manifest(ctx, r, ref, layers[i], annotations.at(levelManifest, &ref.Platform), opts)
		if err != nil {
			return Assembled{}, err
		}
		out.Manifests = append(out.Manifests, m)
		if created.After(out.Created) {
			out.Created = created
		}
	}
	for i, ref := range r.Refs {
		blobs := layerBlobs(ref, layers[i])
		if opts.Layers != nil {
			opts.Layers(ref.ID, blobs)
		}
		if len(ref.Attestations) == 0 {
			continue
		}
		m, err := a.attest(ctx, ref, out.Manifests[i].Desc, blobs, opts)
		if err != nil {
			return Assembled{}, err
		}
		out.Attestations = append(out.Attestations, m)
	}
	if !r.MultiPlatform && len(out.Manifests) == 1 && len(out.Attestations) == 0 {
		out.Target = out.Manifests[0].Desc
		p := platforms.Normalize(r.Refs[0].Platform)
		out.Target.Platform = &p
		out.Target.Annotations = annotations.at(levelManifestDescriptor, &r.Refs[0].Platform)
		return out, nil
	}
	mediaType := ocispec.MediaTypeImageIndex
	if a.Docker {
		mediaType = dockerIndex
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Annotations: annotations.at(levelIndex, nil),
	}
	for i, ref := range r.Refs {
		p := platforms.Normalize(ref.Platform)
		desc := out.Manifests[i].Desc
		desc.Platform, desc.Annotations = &p, annotations.at(levelManifestDescriptor, &ref.Platform)
		index.Manifests = append(index.Manifests, desc)
	}
	for _, m := range out.Attestations {
		index.Manifests = append(index.Manifests, m.Desc)
	}
	out.Target, err = a.put(ctx, opts, "exporting manifest list", mediaType, index)
	out.Target.Annotations = annotations.at(levelIndexDescriptor, nil)
	return out, err
}

// manifest stores the config and the manifest of one platform.
func (a Assembler) manifest(ctx context.Context, r exporter.Result, ref exporter.Ref, layers []Layer, annotations map[string]string, opts exporter.Options) (Manifest, time.Time, error) {
	config, err := a.config(r, ref, layers, opts)
	if err != nil {
		return Manifest{}, time.Time{}, err
	}
	var times struct {
		Created time.Time `json:"created"`
	}
	if err := json.Unmarshal(config, &times); err != nil {
		return Manifest{}, time.Time{}, fmt.Errorf("image config: %w", err)
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Layers: []ocispec.Descriptor{}, Annotations: annotations,
	}
	m.Config.MediaType = ocispec.MediaTypeImageConfig
	if a.Docker {
		m.MediaType, m.Config.MediaType = dockerManifest, dockerConfig
	}
	done := opts.Step("exporting config " + digest.FromBytes(config).String())
	if m.Config, err = a.Blobs.PutBytes(ctx, m.Config.MediaType, config); err != nil {
		return Manifest{}, time.Time{}, fmt.Errorf("store image config: %w", err)
	}
	done()
	for _, l := range layers {
		desc := l.Desc
		// Docker has no media type for zstd.
		if k, err := compress.MediaTypeKind(desc.MediaType); err == nil {
			desc.MediaType = compress.MediaType(k, a.Docker && k != compress.Zstd)
		}
		m.Layers = append(m.Layers, desc)
	}
	desc, err := a.put(ctx, opts, "exporting manifest", m.MediaType, m)
	return Manifest{Desc: desc, Config: m.Config, Layers: m.Layers}, times.Created, err
}

// put stores a manifest or index as a blob.
func (a Assembler) put(ctx context.Context, opts exporter.Options, step, mediaType string, v any) (ocispec.Descriptor, error) {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	done := opts.Step(step + " " + digest.FromBytes(raw).String())
	desc, err := a.Blobs.PutBytes(ctx, mediaType, raw)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("store image manifest: %w", err)
	}
	done()
	return desc, nil
}

// config is the image config of one platform.
func (a Assembler) config(r exporter.Result, ref exporter.Ref, layers []Layer, opts exporter.Options) ([]byte, error) {
	config := ref.Config
	if len(config) == 0 {
		var err error
		if config, err = exporter.DefaultConfig(ref.Platform); err != nil {
			return nil, err
		}
	}
	p := patch{steps: steps(ref.Chain, ref.Snapshot)}
	for _, l := range layers {
		p.diffIDs = append(p.diffIDs, l.DiffID)
	}
	if len(ref.Base) > 0 {
		var base ocispec.Image
		if err := json.Unmarshal(ref.Base, &base); err != nil {
			return nil, fmt.Errorf("config of the base image: %w", err)
		}
		p.base = base.History
	}
	var err error
	if p.epoch, err = Epoch(r, ref.ID, a.Epoch, a.EpochSet); err != nil {
		return nil, err
	}
	if p.epoch != nil {
		p.created = *p.epoch
		return p.apply(config)
	}
	// What is the same but for the time gets the time of the first: an image that is built again is the same image.
	timeless, err := p.apply(config)
	if err != nil {
		return nil, err
	}
	if p.created, err = a.firstExport(digest.FromBytes(timeless), opts); err != nil {
		return nil, err
	}
	return p.apply(config)
}

// firstExports is held while a first time is looked for and set: two exports of one build must agree.
var firstExports sync.Mutex

func (a Assembler) firstExport(key digest.Digest, opts exporter.Options) (time.Time, error) {
	firstExports.Lock()
	defer firstExports.Unlock()
	raw, ok, err := a.Records.GetValue(createdBucket, key.String())
	if err != nil {
		return time.Time{}, err
	}
	if ok {
		if t, err := time.Parse(time.RFC3339Nano, string(raw)); err == nil {
			return t, nil
		}
	}
	now := time.Now
	if opts.Now != nil {
		now = opts.Now
	}
	t := now().UTC()
	return t, a.Records.PutValue(createdBucket, key.String(), []byte(t.Format(time.RFC3339Nano)))
}

// Epoch is the latest time that may appear in what is exported of a platform: what the attributes say, if isSet, else
// what the frontend says; nil when nobody does.
func Epoch(r exporter.Result, platformID string, given *time.Time, isSet bool) (*time.Time, error) {
	if isSet {
		return given, nil
	}
	value := exptypes.ParseKey(r.Metadata, commonexptypes.ExporterEpochKey, &exptypes.Platform{ID: platformID})
	t, err := ParseEpoch(string(value))
	if err != nil {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH=%s: %w", value, err)
	}
	return t, nil
}

// steps says how many layers each step of chain has made; nil when chain does not say how final came to be.
func steps(chain []snapshot.Snapshot, final snapshot.Snapshot) []int {
	if len(chain) == 0 || !slices.Equal(chain[len(chain)-1], final) {
		return nil
	}
	counts := []int{len(chain[0])}
	for i, s := range chain[1:] {
		if len(s) < len(chain[i]) || !slices.Equal(s[:len(chain[i])], chain[i]) {
			return nil // not built on the step before: a merge, or a diff
		}
		counts = append(counts, len(s)-len(chain[i]))
	}
	return counts
}
