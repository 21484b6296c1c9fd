// SPDX-License-Identifier: Apache-2.0

package ocilayout

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/exporter/image"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/exporter/reshape"
)

// attrs are the options of one export.
type attrs struct {
	names       []string // as given; "*" is the name that the frontend chose
	tar         bool
	docker      bool // Docker's media types instead of OCI's
	compression layerblob.Compression
	inline      bool  // attestations that are only for images, too
	artifact    *bool // whether attestation manifests are OCI artifacts; nil means that they are
	annotations image.Annotations
	epoch       *time.Time
	epochSet    bool
	reshape     reshape.Options
}

// parseAttrs refuses what these exporters do not do, by name.
func parseAttrs(given map[string]string) (attrs, error) {
	a := attrs{tar: true, compression: layerblob.Compression{Kind: compress.Gzip}}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if err := a.set(key, given[key]); err != nil {
			return attrs{}, err
		}
	}
	if err := image.CheckArtifact(a.artifact, a.docker); err != nil {
		return attrs{}, err
	}
	return a, a.compression.Check(a.docker)
}

func (a *attrs) set(key, value string) (err error) {
	var on bool
	switch k := exptypes.ImageExporterOptKey(key); k {
	case "tar":
		a.tar, err = image.ParseBool(value)
	case exptypes.OptKeyName:
		a.names, err = image.ParseNames(value)
	case exptypes.OptKeyOCITypes:
		on, err = image.ParseBool(value)
		a.docker = !on
	case exptypes.OptKeySourceDateEpoch:
		a.epochSet = true
		a.epoch, err = image.ParseEpoch(value)
	case exptypes.OptKeyOCIArtifact:
		a.artifact, err = image.ParseArtifact(value)
	case exptypes.OptKeyForceInlineAttestations:
		a.inline, err = image.ParseBool(value)
	case "prefer-image-digest":
		// For buildx itself, which digest to tell its user; it leaves it in.
		_, err = image.ParseBool(value)
	case exptypes.OptKeyPreferNondistLayers:
		if on, err = image.ParseBool(value); on {
			return image.NotSupported(key, value)
		}
	default:
		var ok bool
		if ok, err = a.reshape.Set(key, value); !ok {
			ok, err = a.compression.Set(key, value)
		}
		if !ok {
			ok, err = a.annotations.Add(key, value)
		}
		if !ok {
			return image.NotSupported(key, value)
		}
	}
	if err != nil {
		return fmt.Errorf("attribute %s=%s: %w", key, value, err)
	}
	return nil
}
