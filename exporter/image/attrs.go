// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/exporter/reshape"
)

// attrs are the options of one export.
type attrs struct {
	names    []string // as given; "*" is the name that the frontend chose
	push     bool
	byDigest bool // the registry gets no tag
	insecure bool
	store    bool
	docker   bool // Docker's media types instead of OCI's
	// canonical adds NAME@DIGEST for each name; dangling is a name that becomes one of that form, without a name of its own, and
	// danglingOnly says that it does so only for an image without another name.
	canonical    bool
	dangling     string
	danglingOnly bool
	// noInline leaves out the attestations that are only for images.
	noInline bool
	// artifact says whether attestation manifests are OCI artifacts; nil means that they are.
	artifact *bool
	epoch    *time.Time
	// epochSet says that source-date-epoch was given, perhaps as "", which turns off what the frontend says.
	epochSet    bool
	annotations Annotations
	reshape     reshape.Options
	compression layerblob.Compression
	// formed says that the form of the layers' blobs was asked for.
	formed bool
}

// parseAttrs refuses what this exporter does not do, by name.
func parseAttrs(given map[string]string) (attrs, error) {
	a := attrs{store: true, compression: layerblob.Compression{Kind: compress.Gzip}}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		var on bool
		var err error
		switch k := exptypes.ImageExporterOptKey(key); k {
		case exptypes.OptKeyName:
			if a.names, err = ParseNames(value); err != nil {
				return attrs{}, err
			}
		case exptypes.OptKeyPush:
			a.push, err = ParseBool(value)
		case exptypes.OptKeyStore:
			a.store, err = ParseBool(value)
		case exptypes.OptKeyOCITypes:
			on, err = ParseBool(value)
			a.docker = !on
		case exptypes.OptKeyForceInlineAttestations:
			on, err = ParseBool(value)
			a.noInline = !on
		case exptypes.OptKeyOCIArtifact:
			a.artifact, err = ParseArtifact(value)
		case exptypes.OptKeyUnpack:
			// Images of our store are always ready to run.
			_, err = ParseBool(value)
		case exptypes.OptKeySourceDateEpoch:
			a.epochSet = true
			a.epoch, err = ParseEpoch(value)
		case exptypes.OptKeyPushByDigest:
			a.byDigest, err = ParseBool(value)
		case exptypes.OptKeyInsecure:
			a.insecure, err = ParseBool(value)
		case exptypes.OptKeyNameCanonical:
			a.canonical, err = ParseBool(value)
		case exptypes.OptKeyDanglingPrefix:
			a.dangling, err = parseDangling(value)
		case exptypes.OptKeyDanglingEmptyOnly:
			a.danglingOnly, err = ParseBool(value)
		case exptypes.OptKeyPreferNondistLayers:
			if on, err = ParseBool(value); on {
				return attrs{}, NotSupported(key, value)
			}
		case "prefer-image-digest":
			// For buildx itself, which digest to tell its user; it leaves it in.
			_, err = ParseBool(value)
		case "buildinfo", "buildinfo-attrs":
			// Build information is no longer part of images (BuildKit v0.12 and later ignore these, too).
		default:
			var ok bool
			if ok, err = a.reshape.Set(key, value); !ok {
				if ok, err = a.compression.Set(key, value); ok && (k != exptypes.OptKeyForceCompression || a.compression.Force) {
					a.formed = true
				}
			}
			if !ok {
				ok, err = a.annotations.Add(key, value)
			}
			if !ok {
				return attrs{}, NotSupported(key, value)
			}
		}
		if err != nil {
			return attrs{}, fmt.Errorf("attribute %s=%s: %w", key, value, err)
		}
	}
	return a, a.check()
}

// check says what is wrong with the attributes together.
func (a attrs) check() error {
	if err := a.compression.Check(a.docker); err != nil {
		return err
	}
	if err := CheckArtifact(a.artifact, a.docker); err != nil {
		return err
	}
	if a.push && len(a.names) == 0 && a.dangling == "" {
		return errors.New("push needs a name: give the image one that begins with its registry")
	}
	if a.push && a.byDigest {
		for _, name := range a.names {
			if named, err := reference.ParseNormalizedNamed(name); err == nil && !reference.IsNameOnly(named) {
				return fmt.Errorf("image name %q: has a tag, which push-by-digest=true does not set", name)
			}
		}
	}
	return nil
}

// blobs says that the image that is made names its layers by the blobs that a push would send, though there is none: their form was asked
// for, or all that is wanted is the image's digest. Otherwise an image in the local store names their tars, which cost nothing.
func (a attrs) blobs() bool { return !a.push && (a.formed || !a.store) }

// parseDangling reads a name to which a digest will be added.
func parseDangling(value string) (string, error) {
	if value == "" {
		return "", nil
	}
	named, err := reference.ParseNormalizedNamed(value)
	if err != nil {
		return "", err
	}
	if !reference.IsNameOnly(named) {
		return "", errors.New("want a name without a tag or digest")
	}
	return named.Name(), nil
}

// NotSupported is the error for an attribute that is not honoured.
func NotSupported(key, value string) error {
	return fmt.Errorf("attribute not supported yet: %s=%s", key, value)
}

// ParseArtifact reads the attribute "oci-artifact".
func ParseArtifact(value string) (*bool, error) {
	on, err := ParseBool(value)
	return &on, err
}

// CheckArtifact refuses artifacts with media types that have none.
func CheckArtifact(artifact *bool, docker bool) error {
	if artifact != nil && *artifact && docker {
		return fmt.Errorf("oci-artifact=true conflicts with oci-mediatypes=false")
	}
	return nil
}

// ParseBool reads a boolean; a key without a value means true.
func ParseBool(value string) (bool, error) {
	if value == "" {
		return true, nil
	}
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, fmt.Errorf("not true or false")
	}
	return b, nil
}

// ParseEpoch reads SOURCE_DATE_EPOCH; "" means none.
func ParseEpoch(value string) (*time.Time, error) {
	if value == "" {
		return nil, nil
	}
	s, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("not a number of seconds since 1970")
	}
	t := time.Unix(s, 0).UTC()
	return &t, nil
}

// ParseNames reads the attribute "name": names with commas between them, as they were given. "*" stands for the name that
// the frontend chooses.
func ParseNames(value string) ([]string, error) {
	var names []string
	for name := range strings.SplitSeq(value, ",") {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		if name != "*" {
			if _, err := image.Normalize(name); err != nil {
				return nil, err
			}
			if strings.Contains(name, "@") {
				return nil, fmt.Errorf("image name %q: a name to be given cannot have a digest", name)
			}
		}
		names = append(names, name)
	}
	return names, nil
}

// Names are the full forms of what ParseNames returned, each once, for the image of r.
func Names(given []string, r exporter.Result) ([]string, error) {
	var names []string
	for _, name := range given {
		meant := []string{name}
		if name == "*" {
			meant = strings.Split(string(r.Metadata[exptypes.ExporterImageNameKey]), ",")
		}
		for _, name := range meant {
			if name == "" {
				continue
			}
			full, err := image.Normalize(name)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(names, full) {
				names = append(names, full)
			}
		}
	}
	return names, nil
}
