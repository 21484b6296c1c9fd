// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/seed-68981b69/slipway/cache"
)

// held is a cache.Source of what is in a directory and in use as long as it is there. Who has made it removes it.
type held struct {
	dir string
	// kind and description are of what is in it, or of all together when name is set.
	kind        cache.UsageType
	description string
	name        string
}

// Usage implements cache.Source.
func (h held) Usage(ctx context.Context) ([]cache.Usage, error) {
	entries, err := os.ReadDir(h.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var list []cache.Usage
	add := func(id, path string) error {
		size, err := cache.DirUsage(ctx, path)
		if err == nil {
			list = append(list, cache.Usage{ID: id, Type: h.kind, Description: h.description, Mutable: true, InUse: true, Size: size})
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	if h.name != "" && len(entries) > 0 {
		return list, add(h.name, h.dir)
	}
	for _, e := range entries {
		if err := add(e.Name(), filepath.Join(h.dir, e.Name())); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Remove implements cache.Source.
func (h held) Remove(context.Context, string) (bool, error) { return false, nil }
