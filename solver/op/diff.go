// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// diffOp is what one must put on top of lower to get upper.
type diffOp struct {
	deps *Deps
	// lower and upper say whether the input is there; the other is scratch.
	lower, upper bool
}

func newDiff(d *Deps, v *solver.Vertex, op *pb.DiffOp) (solver.Op, error) {
	if op.GetLower() == nil || op.GetUpper() == nil {
		return nil, fmt.Errorf("diff operation lacks an input")
	}
	o := &diffOp{deps: d}
	next := int64(0)
	for _, in := range []struct {
		name  string
		index int64
		used  *bool
	}{{"lower", op.Lower.Input, &o.lower}, {"upper", op.Upper.Input, &o.upper}} {
		if in.index == int64(pb.Empty) {
			continue
		}
		if in.index != next {
			return nil, fmt.Errorf("diff: %s input is %d instead of %d", in.name, in.index, next)
		}
		*in.used = true
		next++
	}
	if next != int64(len(v.Inputs)) {
		return nil, fmt.Errorf("diff of %d inputs has %d", next, len(v.Inputs))
	}
	return o, nil
}

func (o *diffOp) Parts() []record.Part {
	p := parts{{Name: "op", Value: "diff"}}
	p.flag("lower is scratch", !o.lower)
	p.flag("upper is scratch", !o.upper)
	return p
}

func (o *diffOp) InputDigest(ctx context.Context, _ *solver.Env, _ int, in snapshot.Snapshot) (digest.Digest, error) {
	return o.deps.Snapshots.Content(ctx, in)
}

func (o *diffOp) Run(ctx context.Context, _ *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	var lower, upper snapshot.Snapshot
	if o.lower {
		lower, inputs = inputs[0], inputs[1:]
	}
	if o.upper {
		upper = inputs[0]
	}
	if len(upper) >= len(lower) && slices.Equal(lower, upper[:len(lower)]) {
		return []snapshot.Snapshot{upper[len(lower):]}, nil
	}
	out, err := diffTrees(ctx, o.deps, lower, upper)
	if err != nil {
		return nil, fmt.Errorf("diff: %w", err)
	}
	return []snapshot.Snapshot{out}, nil
}

// diffTrees compares what two unrelated snapshots show and writes the difference as one layer.
func diffTrees(ctx context.Context, d *Deps, lower, upper snapshot.Snapshot) (snapshot.Snapshot, error) {
	below, err := d.Snapshots.View(ctx, lower)
	if err != nil {
		return nil, err
	}
	above, err := d.Snapshots.View(ctx, upper)
	if err != nil {
		return nil, err
	}
	draft := d.Layers.NewDraft(below)
	differ{draft, below, above, map[string]bool{}}.dir(ctx, "")
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if draft.Empty() {
		return nil, nil
	}
	id, err := draft.Commit(ctx)
	if err != nil {
		return nil, err
	}
	return with(nil, id), nil
}

// differ puts into a draft over one tree what makes it another.
type differ struct {
	draft        *layer.Draft
	below, above layer.Files
	put          map[string]bool // files in the draft, for hard links
}

// dir takes what differs below one directory that both trees have, or only above.
func (d differ) dir(ctx context.Context, dir string) {
	old := d.below.ReadDir(dir)
	for _, e := range d.above.ReadDir(dir) {
		for len(old) > 0 && old[0].Path < e.Path {
			d.draft.Remove(old[0].Path)
			old = old[1:]
		}
		changed := true
		if len(old) > 0 && old[0].Path == e.Path {
			changed = !same(old[0], e)
			old = old[1:]
		}
		if changed {
			if !d.put[e.HardLink] {
				e.HardLink = "" // its first name is not in this layer
			}
			d.put[e.Path] = e.Type == index.File
			e.Offset = -1
			d.draft.Put(e, opener(ctx, d.above, e.Path))
		}
		if e.Type == index.Dir && ctx.Err() == nil {
			d.dir(ctx, e.Path)
		}
	}
	for _, e := range old {
		d.draft.Remove(e.Path)
	}
}

// same says whether an entry that two trees have needs no change: for everything but directories the time counts,
// as it does in BuildKit.
func same(a, b index.Entry) bool {
	return a.Type == b.Type && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID &&
		a.Size == b.Size && a.Digest == b.Digest && a.Target == b.Target &&
		a.Major == b.Major && a.Minor == b.Minor && maps.Equal(a.Xattrs, b.Xattrs) &&
		(a.Type == index.Dir || a.ModTime == b.ModTime)
}

// opener defers opening a file of a tree until its bytes are needed.
func opener(ctx context.Context, t layer.Files, path string) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return t.OpenFile(ctx, path) }
}
