// SPDX-License-Identifier: Apache-2.0

package share

import (
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BuildKitConfig is the media type by which a cache that BuildKit has made is known.
const BuildKitConfig = "application/vnd.buildkit.cacheconfig.v0"

// emptyConfig is the config of the manifests: everything is in the document, but registries want JSON there.
var emptyConfig = []byte("{}")

// manifestOf is the manifest by which registries and image layouts keep a document and its blobs.
func manifestOf(document []byte, blobs []ocispec.Descriptor) (raw []byte, config, doc ocispec.Descriptor, err error) {
	config = descriptorOf(MediaTypeConfig, emptyConfig)
	doc = descriptorOf(MediaTypeDocument, document)
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: MediaTypeConfig, Config: config, Layers: []ocispec.Descriptor{doc},
	}
	for _, b := range blobs {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size})
	}
	raw, err = json.Marshal(m)
	return raw, config, doc, err
}

// documentIn returns the descriptor of the document that a manifest of ours names.
func documentIn(raw []byte) (ocispec.Descriptor, error) {
	var m struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest of a cache: %w", err)
	}
	for _, d := range append(m.Manifests, m.Config) {
		if d.MediaType == BuildKitConfig {
			return ocispec.Descriptor{}, ErrBuildKit
		}
	}
	switch {
	case len(m.Layers) > 0 && m.Layers[0].MediaType == MediaTypeDocument:
		d := m.Layers[0]
		if err := checkDigest(d.Digest); err != nil {
			return ocispec.Descriptor{}, err
		}
		if d.Size < 0 || d.Size > maxPacked {
			return ocispec.Descriptor{}, fmt.Errorf("a cache document of %d bytes; at most %d are read", d.Size, maxPacked)
		}
		return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
	case m.ArtifactType == MediaTypeConfig || m.Config.MediaType == MediaTypeConfig:
		return ocispec.Descriptor{}, fmt.Errorf("%w: its manifest has no %s first", ErrVersion, MediaTypeDocument)
	}
	return ocispec.Descriptor{}, ErrNoCache
}

func descriptorOf(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}
