// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
)

// UsageType says what kind of thing takes room. The values are BuildKit's.
type UsageType string

// The values of UsageType.
const (
	TypeRegular    UsageType = "regular"
	TypeInternal   UsageType = "internal"
	TypeFrontend   UsageType = "frontend"
	TypeLocal      UsageType = "source.local"
	TypeGit        UsageType = "source.git.checkout"
	TypeCacheMount UsageType = "exec.cachemount"
)

// Usage is one thing that takes room in the store: the result of a step (whatever the number of keys it is found by),
// an image as far as no step has it, or what a Source has.
type Usage struct {
	ID   string
	Type UsageType
	// Description is for people: "[build 2/3] RUN make".
	Description string
	// Mutable things change while they are used: cache mounts.
	Mutable bool
	// InUse things are not deleted now.
	InUse bool
	// Shared says that an image consists of the same layers.
	Shared bool
	// Size is in bytes on disk. A layer of several results is counted for one of them only, so that sizes add up.
	Size int64
	// Created and LastUsed are zero when nobody knows. A result is used when one that consists of it and more is.
	Created, LastUsed time.Time
	// UsageCount is how often it was used again, counted once a minute at most.
	UsageCount int
	// Parents are the IDs of the results that this one lies directly on.
	Parents []string
}

// Source is something beside layers, blobs and records that takes room and can give it back. Its methods may be
// called concurrently.
type Source interface {
	// Usage lists what there is. IDs are unique among all sources, and no result has one like it.
	Usage(ctx context.Context) ([]Usage, error)
	// Remove deletes what has that ID, unless it is in use, and reports whether it did.
	Remove(ctx context.Context, id string) (bool, error)
}

// AddSource makes DiskUsage and Prune see what src has. Call it before the store is used.
func (s *Store) AddSource(src Source) { s.sources = append(s.sources, src) }

// UsageFilter chooses things for DiskUsage.
type UsageFilter struct {
	// Filters are in containerd's syntax ("type==regular", "description~=RUN", "inuse"); a thing is chosen when one of
	// them matches, and when there are none. The fields are id, parents, description, type, inuse, mutable, immutable, shared, private.
	Filters []string
	// MinAge leaves out what was used more recently.
	MinAge time.Duration
}

// DiskUsage lists what takes room, by ID. Together that is the size of the store.
func (s *Store) DiskUsage(ctx context.Context, f UsageFilter) ([]Usage, error) {
	match, err := parseFilters(f.Filters)
	if err != nil {
		return nil, err
	}
	inv, err := s.takeInventory(ctx, s.uses.horizon())
	if err != nil {
		return nil, fmt.Errorf("disk usage: %w", err)
	}
	database, err := DirUsage(ctx, s.path("records"))
	if err != nil {
		return nil, fmt.Errorf("disk usage: %w", err)
	}
	all := append(inv.usage(), Usage{ID: "database", Type: TypeInternal, Description: "record database", InUse: true, Size: database})
	cutOff := s.now().Add(-f.MinAge)
	var list []Usage
	for _, u := range all {
		if match(u) && (f.MinAge == 0 || !u.LastUsed.After(cutOff)) {
			list = append(list, u)
		}
	}
	slices.SortFunc(list, func(a, b Usage) int { return cmp.Compare(a.ID, b.ID) })
	return list, nil
}

// parseFilters returns the function that says whether one of filters matches.
func parseFilters(list []string) (func(Usage) bool, error) {
	f, err := filters.ParseAll(list...)
	if err != nil {
		return nil, fmt.Errorf("filter %q: %w", list, err)
	}
	return func(u Usage) bool { return f.Match(filterFields(u)) }, nil
}

// filterFields gives filters the fields that BuildKit's have.
func filterFields(u Usage) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "id":
			return u.ID, u.ID != ""
		case "parents":
			return strings.Join(u.Parents, ";"), len(u.Parents) > 0
		case "description":
			return u.Description, u.Description != ""
		case "type":
			return string(u.Type), u.Type != ""
		case "inuse":
			return "", u.InUse
		case "mutable":
			return "", u.Mutable
		case "immutable":
			return "", !u.Mutable
		case "shared":
			return "", u.Shared
		case "private":
			return "", !u.Shared
		}
		return "", false
	})
}

// CheckFilters says what is wrong with the syntax of filters.
func CheckFilters(list []string) error {
	_, err := parseFilters(list)
	return err
}
