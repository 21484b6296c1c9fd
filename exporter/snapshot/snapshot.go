// SPDX-License-Identifier: Apache-2.0

// Package snapshot hands the result of a build to whoever runs it: the layers as they are and the config, under a name that is valid for a
// moment. Nothing is packed, compressed, copied or named in the image store.
package snapshot

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/exporter"
)

// Type is what clients ask for, and NameKey where the response has the name.
const (
	Type    = "snapshot"
	NameKey = "slipway.snapshot"
)

// Keeper keeps a result for a moment and returns the name by which it is found. Its config is never nil.
type Keeper func(context.Context, exporter.Ref) (name string, err error)

// New returns the factory for Type.
func New(keep Keeper) exporter.Factory {
	return func(attrs map[string]string) (exporter.Exporter, error) {
		for _, key := range slices.Sorted(maps.Keys(attrs)) {
			if key != "source-date-epoch" { // what it is for, times in an image, there is none of
				return nil, fmt.Errorf("attribute not supported yet: %s=%s", key, attrs[key])
			}
		}
		return snapshotExporter{keep}, nil
	}
}

type snapshotExporter struct{ keep Keeper }

func (snapshotExporter) Name() string { return "keeping the result to run it" }

// Export implements exporter.Exporter.
func (e snapshotExporter) Export(ctx context.Context, r exporter.Result, _ exporter.Options) (map[string]string, error) {
	if len(r.Refs) > 1 {
		var names []string
		for _, ref := range r.Refs {
			names = append(names, platforms.Format(ref.Platform))
		}
		return nil, fmt.Errorf("a container has one platform, and the build has made %d: %v", len(names), names)
	}
	ref := r.Refs[0]
	if len(ref.Config) == 0 {
		p := ref.Platform
		if p.OS == "" {
			p = ocispec.Platform(platforms.DefaultSpec())
		}
		var err error
		if ref.Config, err = exporter.DefaultConfig(p); err != nil {
			return nil, err
		}
	}
	name, err := e.keep(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("keep the result: %w", err)
	}
	return map[string]string{NameKey: name}, nil
}
