// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/exporter"
)

// The places where annotations can stand.
const (
	levelIndex              = exptypes.AnnotationIndex
	levelIndexDescriptor    = exptypes.AnnotationIndexDescriptor
	levelManifest           = exptypes.AnnotationManifest
	levelManifestDescriptor = exptypes.AnnotationManifestDescriptor
)

// Annotations are what is asked for by "annotation.KEY", "annotation-manifest[PLATFORM].KEY" and so on.
type Annotations []annotation

type annotation struct {
	level    string
	platform string // "" for all of them
	key      string
	value    string
}

// Add takes an attribute if it is an annotation.
func (as *Annotations) Add(key, value string) (ok bool, err error) {
	k, ok, err := exptypes.ParseAnnotationKey(key)
	if !ok || err != nil {
		return ok, err
	}
	*as = append(*as, annotation{k.Type, k.PlatformString(), k.Key, value})
	return true, nil
}

// with adds those that the frontend asks for; given ones come first.
func (as Annotations) with(metadata map[string][]byte) (Annotations, error) {
	var all Annotations
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		if _, err := all.Add(key, string(metadata[key])); err != nil {
			return nil, fmt.Errorf("result of the build: %w", err)
		}
	}
	return append(all, as...), nil
}

// at returns the annotations of one place, nil if there are none; platform is for manifests and their descriptors. What is
// said of one platform counts more than what is said of all.
func (as Annotations) at(level string, platform *ocispec.Platform) map[string]string {
	var out map[string]string
	add := func(name string) {
		for _, a := range as {
			if a.level == level && a.platform == name {
				if out == nil {
					out = map[string]string{}
				}
				out[a.key] = a.value
			}
		}
	}
	add("")
	if platform != nil {
		add(platforms.FormatAll(platforms.Normalize(*platform)))
	}
	return out
}

// check says what cannot be annotated.
func (as Annotations) check(r exporter.Result, docker bool) error {
	single := !r.MultiPlatform && len(r.Refs) == 1 && !r.Attested()
	for _, a := range as {
		switch {
		case docker && a.level != levelManifest:
			return fmt.Errorf("annotation %s at %s: oci-mediatypes=false has no such annotations", a.key, a.level)
		case single && (a.level == levelIndex || a.level == levelIndexDescriptor):
			return fmt.Errorf("annotation %s at %s: an image for a single platform has no index", a.key, a.level)
		case a.platform == "":
			continue
		}
		if !slices.ContainsFunc(r.Refs, func(ref exporter.Ref) bool {
			return platforms.FormatAll(platforms.Normalize(ref.Platform)) == a.platform
		}) {
			return fmt.Errorf("annotation %s of platform %s: the build has no such platform", a.key, a.platform)
		}
	}
	return nil
}
