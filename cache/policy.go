// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Policy is one rule of garbage collection, in BuildKit's words. Rules are applied in order. Sizes are in bytes; 0 is no
// limit. A rule without any of the three sizes deletes everything it may.
type Policy struct {
	// All includes internal things, frontends, and results that are also images' (whose layers stay).
	All bool
	// Filters choose what the rule may delete (UsageFilter.Filters).
	Filters []string
	// KeepDuration spares what was used within it.
	KeepDuration time.Duration
	// ReservedSpace is never gone below.
	ReservedSpace int64
	// MaxUsedSpace is what the cache may take.
	MaxUsedSpace int64
	// MinFreeSpace is what should be left on the file system.
	MinFreeSpace int64
}

// Disk is the file system of a store, in bytes.
type Disk struct{ Total, Free int64 }

// OnGrow sets the function that is called with the size in bytes of every layer and blob that is about to become
// visible. It may take its time, to collect garbage for instance.
func (s *Store) OnGrow(fn func(bytes int64)) { s.onGrow.Store(&fn) }

// Disk returns the size of the store's file system, and what is free for us.
func (s *Store) Disk() (Disk, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.Dir, &st); err != nil {
		return Disk{}, fmt.Errorf("statfs %s: %w", s.Dir, err)
	}
	return Disk{Total: int64(st.Blocks) * st.Bsize, Free: int64(st.Bavail) * st.Bsize}, nil
}

// The defaults of BuildKit 0.34 on Linux (cmd/buildkitd/config/gcpolicy*.go).
const (
	reservedPercent, maxReservedBytes = 10, 10e9
	usedPercent, maxUsedBytes         = 80, 100e9
	freePercent                       = 20

	reproducibleBytes = 512e6 // of what is made anew most easily
	reproducibleAge   = 48 * time.Hour
	unusedAge         = 60 * 24 * time.Hour
)

// DefaultPolicies are BuildKit's for a disk: of its size a tenth (at most 10 GB) is the cache's for certain, four fifths
// (at most 100 GB) are the most it takes, and a fifth should stay free.
func DefaultPolicies(d Disk) []Policy {
	limits := Policy{
		ReservedSpace: min(d.Percent(reservedPercent), maxReservedBytes),
		MaxUsedSpace:  min(d.Percent(usedPercent), maxUsedBytes),
		MinFreeSpace:  d.Percent(freePercent),
	}
	return DefaultPoliciesWithin(limits)
}

// DefaultPoliciesWithin are BuildKit's default rules with the sizes of limits.
func DefaultPoliciesWithin(limits Policy) []Policy {
	reproducible := Policy{
		Filters:      []string{"type==" + string(TypeLocal), "type==" + string(TypeCacheMount), "type==" + string(TypeGit)},
		KeepDuration: reproducibleAge,
		MaxUsedSpace: reproducibleBytes,
	}
	unused, regular, all := limits, limits, limits
	unused.KeepDuration = unusedAge
	all.All = true
	return []Policy{reproducible, unused, regular, all}
}

// Percent is that part of the disk in bytes, rounded up to the next gigabyte as BuildKit does.
func (d Disk) Percent(n int64) int64 {
	if d.Total == 0 {
		return 2e9
	}
	return (d.Total*n/100/(1<<30) + 1) * 1e9
}

// limited says whether p has a target at all.
func (p Policy) limited() bool {
	return p.MaxUsedSpace != 0 || p.ReservedSpace != 0 || p.MinFreeSpace != 0
}

// keepBytes is what p lets a cache of total bytes have while free bytes are left on its disk.
func (p Policy) keepBytes(total, free int64) int64 {
	keep := total
	if p.MaxUsedSpace != 0 {
		keep = p.MaxUsedSpace
	} else if p.MinFreeSpace == 0 {
		keep = 0 // a reserve is all that is asked for
	}
	if lacking := p.MinFreeSpace - free; lacking > 0 {
		keep = min(keep, total-lacking)
	}
	return max(keep, p.ReservedSpace, 0)
}
