// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// The values of Problem.Kind.
const (
	ProblemBlob     = "blob"
	ProblemLayer    = "layer"
	ProblemRecord   = "record"
	ProblemValue    = "value"
	ProblemDatabase = "database"
	ProblemImage    = "image"
	ProblemOrphan   = "orphan"
	// These are found by Checkers, and what the history names by Check.
	ProblemHistory    = "history"
	ProblemCacheMount = "cache mount"
	ProblemVolume     = "volume"
)

// Checker is a Source that can say what is wrong with what it has.
type Checker interface {
	Source
	// Check reports what is damaged, and what is left over; with repair it takes that away. Nobody else may be using it.
	Check(ctx context.Context, repair bool) ([]Problem, error)
}

// Problem is something in the store that is not as it should be.
type Problem struct {
	// Kind is one of the constants.
	Kind string `json:"kind"`
	// Name is the digest, layer ID, key or image name that it is about.
	Name string `json:"name"`
	// Part is what of a layer is damaged.
	Part string `json:"part,omitempty"`
	// Detail says what is wrong.
	Detail string `json:"detail"`
	// Repair is what was done about it: RepairQuarantined or RepairRemoved; "" when nothing was.
	Repair string `json:"repair,omitempty"`
	// Advice says what the user has to do when nobody else can.
	Advice string `json:"advice,omitempty"`
}

// The values of Problem.Repair.
const (
	RepairQuarantined = "quarantined"
	RepairRemoved     = "removed"
)

// CheckOptions say how Check goes about it.
type CheckOptions struct {
	// Repair moves what is damaged to the folder "quarantine", where nothing looks for it, so that it is fetched or made
	// again when it is needed, and removes what is left over. Without it nothing is changed, but that a layer whose info is
	// lost gets a new one, as whenever it is looked for.
	Repair bool
	// Progress, which may be nil, is called with what is being read and how much of how many are done.
	Progress func(what string, done, total int)
}

// Check reads everything that the store has from the disk and compares it with what it should be: blobs and tars with
// their digests, trees and EROFS images with their indexes, records with their checksums, and what names what. Nobody
// else may be using the store. The error says why it could not go on; problems are no error.
func (s *Store) Check(ctx context.Context, opt CheckOptions) ([]Problem, error) {
	c := &checker{s: s, opt: opt, broken: map[layer.ID]bool{}}
	if c.opt.Progress == nil {
		c.opt.Progress = func(string, int, int) {}
	}
	for _, step := range []func(context.Context) error{c.records, c.layers, c.blobs, c.references, c.kept, c.sources, c.orphans} {
		if err := step(ctx); err != nil {
			return c.found, fmt.Errorf("check store: %w", err)
		}
	}
	return c.found, nil
}

type checker struct {
	s     *Store
	opt   CheckOptions
	found []Problem
	// damaged says that the database has lost an unknown part.
	damaged bool
	// broken are the layers that were found damaged.
	broken map[layer.ID]bool
	// badBlobs are the blobs that were found damaged.
	badBlobs map[digest.Digest]bool
}

func (c *checker) add(p Problem) { c.found = append(c.found, p) }

// records checks the database before anybody reads it in earnest and drops what is bad.
func (c *checker) records(ctx context.Context) error {
	c.opt.Progress("records", 0, 1)
	if err := c.putAside(); err != nil {
		return err
	}
	bad, err := c.s.Records.Check(ctx)
	if errors.Is(err, record.ErrDamaged) {
		c.damaged = true
		c.add(Problem{
			Kind: ProblemDatabase, Name: "records", Detail: err.Error(),
			Advice: "some records and image names may be lost: build or pull again what is missing",
			Repair: c.did(RepairQuarantined),
		})
	} else if err != nil {
		return err
	}
	for _, b := range bad {
		kind := ProblemValue
		if b.Record {
			kind = ProblemRecord
		}
		c.add(Problem{Kind: kind, Name: b.Key, Detail: b.Err.Error(), Repair: c.did(RepairQuarantined)})
	}
	if len(bad) > 0 || c.damaged {
		if c.opt.Repair {
			if err := c.s.Records.Repair(ctx, c.s.path("quarantine", "records")); err != nil {
				return err
			}
		}
	}
	return nil
}

// putAside reports databases that Open was not able to open: the build cache and the names of images have begun anew since.
func (c *checker) putAside() error {
	old, err := filepath.Glob(c.s.path("records.broken-*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		c.damaged = true
		c.add(Problem{
			Kind: ProblemDatabase, Name: filepath.Base(path), Detail: "it could not be opened and was put aside: what can be read of it is in a new one",
			Advice: "build or pull again what is missing", Repair: c.did(RepairQuarantined),
		})
		if !c.opt.Repair {
			continue
		}
		dir := c.s.path("quarantine", "records")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := os.Rename(path, filepath.Join(dir, filepath.Base(path))); err != nil {
			return err
		}
	}
	return nil
}

// did returns what a repair does, if this is one.
func (c *checker) did(repair string) string {
	if c.opt.Repair {
		return repair
	}
	return ""
}

func (c *checker) layers(ctx context.Context) error {
	ids, err := c.s.Layers.IDs()
	if err != nil {
		return err
	}
	for i, id := range ids {
		c.opt.Progress("layers", i, len(ids))
		damage, err := c.s.Layers.Check(ctx, id)
		if errors.Is(err, layer.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		repair := RepairRemoved
		for _, d := range damage {
			if !d.Derived {
				repair = RepairQuarantined
				c.broken[id] = true
			}
		}
		for _, d := range damage {
			c.add(Problem{Kind: ProblemLayer, Name: string(id), Part: d.Part, Detail: d.Err.Error(), Repair: c.did(repair)})
		}
		if c.opt.Repair {
			if err := c.s.Layers.Repair(ctx, id, damage, c.s.path("quarantine", "layers")); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) blobs(ctx context.Context) error {
	c.badBlobs = map[digest.Digest]bool{}
	var all []digest.Digest
	if err := c.s.Blobs.Walk(func(d digest.Digest, _ int64) error {
		all = append(all, d)
		return nil
	}); err != nil {
		return err
	}
	slices.Sort(all)
	for i, d := range all {
		c.opt.Progress("blobs", i, len(all))
		err := c.s.Blobs.Check(ctx, d)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.badBlobs[d] = true
		c.add(Problem{Kind: ProblemBlob, Name: string(d), Detail: err.Error(), Repair: c.did(RepairQuarantined)})
		if c.opt.Repair {
			if err := c.s.Blobs.Quarantine(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// references looks for what records and images name that is not there.
func (c *checker) references(ctx context.Context) error {
	c.opt.Progress("references", 0, 1)
	type stale struct{ key, detail string }
	var lost []stale
	err := c.s.Records.Walk(ctx, func(key string, rec *record.Record) error {
		for _, snap := range rec.Outputs {
			if id, ok := c.missing(ctx, snap); ok {
				lost = append(lost, stale{key, fmt.Sprintf("its layer %s is missing or damaged: the step will run again", id)})
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range lost {
		c.add(Problem{Kind: ProblemRecord, Name: r.key, Detail: r.detail, Repair: c.did(RepairRemoved)})
		if c.opt.Repair {
			if err := c.s.Records.Delete(ctx, r.key); err != nil {
				return err
			}
		}
	}
	images, err := c.s.Images.List(ctx)
	if err != nil {
		return err
	}
	for _, m := range images {
		name := image.Familiar(m.Name)
		if name == "" {
			name = m.ID.String()
		}
		details := c.imageProblems(ctx, m)
		advice, repair := "build or pull it again, or remove it (slipway rmi)", ""
		if m.Name == "" { // left by a build or pull that took its name: nobody can want it damaged
			advice, repair = "", c.did(RepairRemoved)
		}
		for _, detail := range details {
			c.add(Problem{Kind: ProblemImage, Name: name, Detail: detail, Advice: advice, Repair: repair})
		}
		if len(details) > 0 && repair != "" {
			if _, err := c.s.Images.Remove(ctx, m.ID.String(), false); err != nil && !errors.Is(err, image.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}

// kept looks for blobs that the build history names and that are not there. What is told of a build without its log or
// explanation is of little use, and the build can be made again: the repair forgets it.
func (c *checker) kept(ctx context.Context) error {
	for bucket, description := range keepBuckets {
		lost := map[string][]byte{}
		err := c.s.Records.WalkValues(bucket, func(key string, value []byte) error {
			for _, d := range findDigests(value) {
				if c.s.Blobs.Has(d) && !c.badBlobs[d] {
					continue
				}
				lost[key] = nil
				c.add(Problem{
					Kind: ProblemHistory, Name: key, Repair: c.did(RepairRemoved),
					Detail: fmt.Sprintf("%s: blob %s, which it names, is missing or damaged", description, d),
				})
				return nil
			}
			return nil
		})
		if err == nil && c.opt.Repair && len(lost) > 0 {
			err = c.s.Records.ChangeValues(bucket, lost)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sources asks those who have something beside layers, blobs and records.
func (c *checker) sources(ctx context.Context) error {
	for _, src := range c.s.sources {
		checker, ok := src.(Checker)
		if !ok {
			continue
		}
		found, err := checker.Check(ctx, c.opt.Repair)
		c.found = append(c.found, found...)
		if err != nil {
			return err
		}
	}
	return nil
}

// missing returns the first layer of snap that is not there or not good.
func (c *checker) missing(ctx context.Context, snap snapshot.Snapshot) (layer.ID, bool) {
	for _, id := range snap {
		if _, err := c.s.Layers.Stat(ctx, id); errors.Is(err, layer.ErrNotFound) || c.broken[id] {
			return id, true
		}
	}
	return "", false
}

func (c *checker) imageProblems(ctx context.Context, m image.Image) []string {
	var out []string
	blob := func(what string, d digest.Digest) {
		if d != "" && (!c.s.Blobs.Has(d) || c.badBlobs[d]) {
			out = append(out, fmt.Sprintf("its %s %s is missing or damaged", what, d))
		}
	}
	if len(m.Manifests) != 1 || m.Manifests[0].Target.Digest != m.Target.Digest {
		blob("index", m.Target.Digest)
	}
	for _, man := range m.Manifests {
		blob("manifest", man.Target.Digest)
		blob("config", man.Config)
		snap, ok, err := c.s.Images.Layers(ctx, man.Target.Digest)
		if err != nil || !ok {
			continue // of another platform, or never unpacked
		}
		if id, ok := c.missing(ctx, snap); ok {
			out = append(out, fmt.Sprintf("its layer %s is missing or damaged", id))
		}
	}
	return out
}

// orphans reports what nothing names, and removes it.
func (c *checker) orphans(ctx context.Context) error {
	if !c.opt.Repair && (c.damaged || len(c.badBlobs) > 0) {
		return nil // nobody knows what the lost records and manifests name
	}
	c.opt.Progress("orphans", 0, 1)
	layers, blobs, err := c.s.unnamed(ctx)
	if err != nil && !c.opt.Repair && len(c.broken) > 0 {
		return nil // a layer that the disk fails to read: it has been reported, and nobody knows what else is named
	}
	if err != nil {
		return err
	}
	repair := RepairRemoved
	if c.damaged {
		repair = "" // what the lost records have named is garbage now, but not ours to judge
	}
	for _, id := range layers {
		if !c.broken[id] {
			c.add(Problem{Kind: ProblemOrphan, Name: string(id), Detail: "no image, record or mount names this layer", Repair: c.did(repair)})
		}
	}
	for _, d := range blobs {
		if !c.badBlobs[d] {
			c.add(Problem{Kind: ProblemOrphan, Name: string(d), Detail: "no image, record or layer names this blob", Repair: c.did(repair)})
		}
	}
	if !c.opt.Repair || c.damaged {
		return nil
	}
	if _, err := c.s.Layers.RemoveBroken(ctx); err != nil {
		return err
	}
	_, err = c.s.Sweep(ctx)
	return err
}
