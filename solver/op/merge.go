// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// mergeOp puts its inputs on top of each other. A layer is a difference, so the inputs' layers in order are the
// result: nothing is read or written. What an input has removed from what was below it is removed from the inputs
// before it too, as in BuildKit.
type mergeOp struct{ deps *Deps }

func newMerge(d *Deps, v *solver.Vertex, op *pb.MergeOp) (solver.Op, error) {
	if op == nil {
		return nil, fmt.Errorf("merge operation is empty")
	}
	if len(op.Inputs) != len(v.Inputs) {
		return nil, fmt.Errorf("merge of %d inputs has %d", len(op.Inputs), len(v.Inputs))
	}
	for i, in := range op.Inputs {
		if in.GetInput() != int64(i) {
			return nil, fmt.Errorf("merge: input %d is at place %d", in.GetInput(), i)
		}
	}
	return &mergeOp{d}, nil
}

func (*mergeOp) Parts() []record.Part { return []record.Part{{Name: "op", Value: "merge"}} }

func (m *mergeOp) InputDigest(ctx context.Context, _ *solver.Env, _ int, in snapshot.Snapshot) (digest.Digest, error) {
	return m.deps.Snapshots.Identity(ctx, in)
}

// Stacks implements solver.Stacker.
func (*mergeOp) Stacks() bool { return true }

func (*mergeOp) Run(_ context.Context, _ *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	var out snapshot.Snapshot
	for _, in := range inputs {
		out = append(out, in...)
	}
	return []snapshot.Snapshot{out}, nil
}

// passthroughOp hands inputs on as outputs: a name for what several vertices have made.
type passthroughOp struct {
	deps *Deps
	op   *pb.PassthroughOp
}

func newPassthrough(d *Deps, v *solver.Vertex, op *pb.PassthroughOp) (solver.Op, error) {
	switch {
	case op == nil:
		return nil, fmt.Errorf("passthrough operation is empty")
	case op.Id == "":
		return nil, fmt.Errorf("passthrough operation has no id")
	case len(op.Outputs) == 0:
		return nil, fmt.Errorf("passthrough %q has no outputs", op.Id)
	}
	for _, in := range op.Outputs {
		if in < 0 || in >= int64(len(v.Inputs)) {
			return nil, fmt.Errorf("passthrough %q: there is no input %d", op.Id, in)
		}
	}
	return &passthroughOp{d, op}, nil
}

func (p *passthroughOp) Parts() []record.Part {
	return []record.Part{
		{Name: "op", Value: "passthrough"},
		{Name: "id", Value: p.op.Id},
		{Name: "outputs", Value: strings.Trim(fmt.Sprint(p.op.Outputs), "[]")},
	}
}

func (p *passthroughOp) InputDigest(ctx context.Context, _ *solver.Env, _ int, in snapshot.Snapshot) (digest.Digest, error) {
	return p.deps.Snapshots.Identity(ctx, in)
}

// Stacks implements solver.Stacker.
func (*passthroughOp) Stacks() bool { return true }

func (p *passthroughOp) Run(_ context.Context, _ *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	out := make([]snapshot.Snapshot, len(p.op.Outputs))
	for i, in := range p.op.Outputs {
		out[i] = inputs[in]
	}
	return out, nil
}
