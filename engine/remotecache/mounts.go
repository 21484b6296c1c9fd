// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/share/chunk"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// allMounts stands for every cache mount that the build has.
const allMounts = "all"

// mountIDs are the IDs that are wanted of the build's cache mounts, or of all when everything is exported, and the names that none of them has.
func (e *exporting) mountIDs(x *Exports) (ids, unknown []string, err error) {
	var all []string
	if x.whole {
		if all, err = x.caches.deps.Mounts.IDs(); err != nil {
			return nil, nil, err
		}
	}
	x.build.Ops(func(o *pb.Op) { all = append(all, op.MountIDs(o)...) })
	named := map[string]bool{allMounts: true}
	for _, id := range all {
		for _, want := range []string{id, op.MountName(id), allMounts} {
			if slices.Contains(e.spec.Mounts, want) {
				named[want] = true
				ids = append(ids, id)
			}
		}
	}
	for _, want := range e.spec.Mounts {
		if !named[want] {
			unknown = append(unknown, want)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), unknown, nil
}

// mounts exports the content of the build's cache mounts as far as it is here. What other builds write to them meanwhile is left out.
func (e *exporting) mounts(x *Exports, progress solver.Progress) error {
	ids, unknown, err := e.mountIDs(x)
	if err != nil {
		return err
	}
	if len(unknown) > 0 {
		progress.Warn(fmt.Sprintf("no step of this build has a cache mount called %s", strings.Join(unknown, ", ")))
	}
	contents, err := x.caches.deps.Mounts.Contents(ids, x.began)
	if err != nil {
		return err
	}
	for _, m := range contents {
		name := op.MountName(m.ID)
		err := x.caches.deps.Mounts.Read(m, func(dir string, changed func() (time.Time, bool)) error {
			stats, err := e.export.AddMount(m.ID, m.From, m.LastUsed, dir, chunk.TreeOptions{MaxSize: e.spec.MountsMaxSize, Since: changed})
			if err != nil {
				return err
			}
			progress.Log(1, []byte(mountReport(name, stats)))
			return nil
		})
		if err != nil {
			return fmt.Errorf("cache mount %s: %w", name, err)
		}
	}
	return nil
}

func mountReport(name string, s chunk.Stats) string {
	report := fmt.Sprintf("cache mount %s: %d files, %s; %s sent", name, s.Files, units.HumanSize(float64(s.Bytes)), units.HumanSize(float64(s.Sent)))
	if s.Dropped > 0 {
		report += fmt.Sprintf("; %d files used least recently left out", s.Dropped)
	}
	if s.Changed > 0 {
		report += fmt.Sprintf("; %d files that were being written left out", s.Changed)
	}
	return report + "\n"
}
