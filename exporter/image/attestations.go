// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	intoto "github.com/in-toto/in-toto-golang/in_toto"
	attestationtypes "github.com/moby/buildkit/util/attestation"
	"github.com/moby/buildkit/util/purl"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/package-url/packageurl-go"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/attestation"
)

const (
	// attestationArtifact is the artifact type of attestation manifests; BuildKit's.
	attestationArtifact = "application/vnd.docker.attestation.manifest.v1+json"
	// annotationPredicate says of a layer with a statement what kind of predicate it has.
	annotationPredicate = "in-toto.io/predicate-type"
)

// unknownPlatform is what attestation manifests are for, so that nobody takes them for an image to run.
var unknownPlatform = ocispec.Platform{Architecture: "unknown", OS: "unknown"}

// LayerIndexes opens the table of contents of layers; layer.Store does.
type LayerIndexes interface {
	Index(ctx context.Context, id layer.ID) (*index.Index, error)
}

// layerBlobs are the layers of ref by their ID.
func layerBlobs(ref exporter.Ref, layers []Layer) exporter.LayerBlobs {
	blobs := exporter.LayerBlobs{}
	for i, id := range ref.Snapshot {
		blobs[id] = layers[i].Desc
	}
	return blobs
}

// attest stores the statements of ref about image, its manifest, and the manifest that leads to them.
func (a Assembler) attest(ctx context.Context, ref exporter.Ref, image ocispec.Descriptor, blobs exporter.LayerBlobs, opts exporter.Options) (Manifest, error) {
	var self []attestation.Subject
	for _, name := range a.Names {
		url, err := purl.RefToPURL(packageurl.TypeDocker, name, &ref.Platform)
		if err != nil {
			return Manifest{}, fmt.Errorf("attestations: %w", err)
		}
		self = append(self, attestation.Subject{Name: url, Digest: image.Digest})
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	config := ocispec.Image{Platform: unknownPlatform, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, att := range ref.Attestations {
		predicate, err := att.Predicate(ctx, blobs)
		if err != nil {
			return Manifest{}, fmt.Errorf("attestation %s: %w", att.Path, err)
		}
		if att.CoreSBOM && a.Layers != nil {
			if predicate, err = a.nameLayers(ctx, predicate, ref, blobs); err != nil {
				return Manifest{}, fmt.Errorf("attestation %s: %w", att.Path, err)
			}
		}
		statement, err := attestation.NewStatement(att, predicate, self)
		if err != nil {
			return Manifest{}, err
		}
		raw, err := json.Marshal(statement)
		if err != nil {
			return Manifest{}, fmt.Errorf("attestation %s: %w", att.Path, err)
		}
		desc, err := a.Blobs.PutBytes(ctx, intoto.PayloadType, raw)
		if err != nil {
			return Manifest{}, fmt.Errorf("store attestation %s: %w", att.Path, err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, desc.Digest)
		desc.Annotations = map[string]string{annotationPredicate: att.PredicateType}
		m.Layers = append(m.Layers, desc)
	}
	var err error
	if a.NoArtifact {
		raw, merr := json.Marshal(config)
		if merr != nil {
			return Manifest{}, merr
		}
		m.Config, err = a.Blobs.PutBytes(ctx, ocispec.MediaTypeImageConfig, raw)
	} else {
		m.Config = ocispec.DescriptorEmptyJSON
		m.ArtifactType = attestationArtifact
		m.Subject = &ocispec.Descriptor{MediaType: image.MediaType, Digest: image.Digest, Size: image.Size}
		_, err = a.Blobs.PutBytes(ctx, m.Config.MediaType, m.Config.Data)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("store config of attestations: %w", err)
	}
	desc, err := a.put(ctx, opts, "exporting attestation manifest", m.MediaType, m)
	if err != nil {
		return Manifest{}, err
	}
	platform := unknownPlatform
	desc.Platform = &platform
	desc.Annotations = map[string]string{
		attestationtypes.DockerAnnotationReferenceType:   attestationtypes.DockerAnnotationReferenceTypeDefault,
		attestationtypes.DockerAnnotationReferenceDigest: image.Digest.String(),
	}
	return Manifest{Desc: desc, Config: m.Config, Layers: m.Layers}, nil
}

// nameLayers adds to an SPDX document in which layer each file is, as its comment, and that we did. A document that is not as expected
// stays as it is.
func (a Assembler) nameLayers(ctx context.Context, document json.RawMessage, ref exporter.Ref, blobs exporter.LayerBlobs) (json.RawMessage, error) {
	doc := map[string]any{}
	dec := json.NewDecoder(bytes.NewReader(document))
	dec.UseNumber()
	if dec.Decode(&doc) != nil || doc["spdxVersion"] == nil {
		return document, nil
	}
	files, _ := doc["files"].([]any)
	for _, f := range files {
		file, _ := f.(map[string]any)
		name, _ := file["fileName"].(string)
		if comment, _ := file["comment"].(string); name == "" || comment != "" {
			continue
		}
		blob, ok, err := a.layerOf(ctx, name, ref, blobs)
		if err != nil {
			return nil, err
		}
		if ok {
			file["comment"] = "layerID: " + blob.String()
		}
	}
	info, _ := doc["creationInfo"].(map[string]any)
	if info == nil {
		info = map[string]any{}
		doc["creationInfo"] = info
	}
	creators, _ := info["creators"].([]any)
	info["creators"] = append(creators, "Tool: slipway")
	return json.Marshal(doc)
}

// layerOf is the blob of the uppermost layer that has a file of that name.
func (a Assembler) layerOf(ctx context.Context, name string, ref exporter.Ref, blobs exporter.LayerBlobs) (digest.Digest, bool, error) {
	name = strings.Trim(path.Clean("/"+name), "/")
	for i := len(ref.Snapshot) - 1; i >= 0; i-- {
		table, err := a.Layers.Index(ctx, ref.Snapshot[i])
		if err != nil {
			return "", false, err
		}
		if e, ok := table.Lookup(name); ok && e.Type != index.Whiteout {
			return blobs[ref.Snapshot[i]].Digest, true, nil
		}
	}
	return "", false, nil
}
