// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/seed-68981b69/slipway/cache"
)

// VolumeCheck looks at the volumes of a state directory that no engine has open. What is in them is the user's, and never
// touched: only what a crash has left half made or half removed goes.
type VolumeCheck struct {
	// Dir is the directory of the volumes.
	Dir string
}

var _ cache.Checker = VolumeCheck{}

// Usage implements cache.Source: volumes are no cache.
func (VolumeCheck) Usage(context.Context) ([]cache.Usage, error) { return nil, nil }

// Remove implements cache.Source.
func (VolumeCheck) Remove(context.Context, string) (bool, error) { return false, nil }

// Check implements cache.Checker.
func (v VolumeCheck) Check(_ context.Context, repair bool) ([]cache.Problem, error) {
	entries, err := os.ReadDir(v.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("check volumes: %w", err)
	}
	var found []cache.Problem
	for _, e := range entries {
		path := filepath.Join(v.Dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), ".new-"), strings.HasPrefix(e.Name(), ".gone-"):
			p := cache.Problem{Kind: cache.ProblemOrphan, Name: path, Detail: "a volume that was being made or removed when the engine died"}
			if repair {
				p.Repair = cache.RepairRemoved
				if err := os.RemoveAll(path); err != nil {
					return found, fmt.Errorf("check volumes: %w", err)
				}
			}
			found = append(found, p)
		case strings.HasPrefix(e.Name(), "."), !e.IsDir():
		default:
			if st, err := os.Stat(filepath.Join(path, "_data")); err != nil || !st.IsDir() {
				found = append(found, cache.Problem{
					Kind: cache.ProblemVolume, Name: e.Name(), Part: "_data", Detail: "the directory with its content is missing",
					Advice: "remove the volume, or put its content back at " + filepath.Join(path, "_data"),
				})
			}
		}
	}
	return found, nil
}
