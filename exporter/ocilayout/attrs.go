// SPDX-License-Identifier: Apache-2.0

package ocilayout

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
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
	if a.docker && a.compression.Kind == compress.Zstd {
		return attrs{}, fmt.Errorf("compression=zstd conflicts with oci-mediatypes=false")
	}
	if err := image.CheckArtifact(a.artifact, a.docker); err != nil {
		return attrs{}, err
	}
	if level := a.compression.Level; level != nil {
		if lowest, highest, _ := compress.Levels(a.compression.Kind); *level < lowest || *level > highest {
			return attrs{}, fmt.Errorf("attribute compression-level=%d: %s has %d to %d", *level, a.compression.Kind, lowest, highest)
		}
	}
	return a, nil
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
	case exptypes.OptKeyLayerCompression:
		switch kind := compress.Kind(value); kind {
		case compress.None, compress.Gzip, compress.Zstd:
			a.compression.Kind = kind
		default:
			return image.NotSupported(key, value)
		}
	case exptypes.OptKeyCompressionLevel:
		var level int
		if level, err = strconv.Atoi(value); err != nil {
			err = fmt.Errorf("not a number")
		}
		a.compression.Level = &level
	case exptypes.OptKeyForceCompression:
		a.compression.Force, err = image.ParseBool(value)
	case exptypes.OptKeySourceDateEpoch:
		a.epochSet = true
		a.epoch, err = image.ParseEpoch(value)
	case exptypes.OptKeyOCIArtifact:
		a.artifact, err = image.ParseArtifact(value)
	case exptypes.OptKeyPreferNondistLayers, exptypes.OptKeyForceInlineAttestations:
		if on, err = image.ParseBool(value); on {
			return image.NotSupported(key, value)
		}
	default:
		var ok bool
		if ok, err = a.reshape.Set(key, value); !ok {
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
