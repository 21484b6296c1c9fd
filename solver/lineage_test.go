// SPDX-License-Identifier: Apache-2.0

package solver_test

import (
	"context"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/buildkit/client/llb"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/solvertest"
)

// stackOp puts a layer on its input, but for the command "nothing".
type stackOp struct{ funcOp }

func (o stackOp) Run(_ context.Context, _ *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	var out snapshot.Snapshot
	if len(inputs) > 0 {
		out = slices.Clone(inputs[0])
	}
	if o.vertex.Op.GetExec().Meta.Args[0] != "nothing" {
		out = append(out, layer.ID("t"+o.vertex.Digest.Encoded()))
	}
	return []snapshot.Snapshot{out}, nil
}

// prunable is Records of which some are gone.
type prunable struct {
	*solvertest.Records
	gone func(*record.Record) bool
}

func (p *prunable) Get(ctx context.Context, key string) (*record.Record, bool, error) {
	rec, ok, err := p.Records.Get(ctx, key)
	if ok && p.gone != nil && p.gone(rec) {
		return nil, false, nil
	}
	return rec, ok, err
}

// TestChainWithoutRecords: which step has made which layer is still known when the records of the steps below the result are gone,
// and not said of another result.
func TestChainWithoutRecords(t *testing.T) {
	records := &prunable{Records: solvertest.NewRecords()}
	s := solver.New(solver.Options{
		Layers: noLayers{}, Records: records, Jobs: 2,
		NewOp: func(v *solver.Vertex) (solver.Op, error) { return stackOp{funcOp{vertex: v}}, nil },
	})
	st := llb.Scratch()
	for _, cmd := range []string{"one", "nothing", "two"} {
		st = st.Run(llb.Shlex(cmd), llb.WithCustomName(cmd)).Root()
	}
	def, err := st.Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	chain := func() []snapshot.Snapshot {
		t.Helper()
		b := s.NewBuild(solver.BuildOptions{ID: "b"})
		defer b.Close()
		e, err := b.Load(def.ToPB())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Result(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		return b.Chain(t.Context(), e)
	}
	first := chain()
	var layers []int
	for _, snap := range first {
		layers = append(layers, len(snap))
	}
	if diff := cmp.Diff([]int{0, 1, 1, 2}, layers); diff != "" {
		t.Fatalf("layers after each step (-want +got):\n%s", diff)
	}
	records.gone = func(rec *record.Record) bool { return rec.Step.Name == "nothing" }
	if diff := cmp.Diff(first, chain(), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("with the record of a step pruned (-before +after):\n%s", diff)
	}
	for _, rec := range records.All() {
		if rec.Step.Name == "two" {
			rec.Outputs = []snapshot.Snapshot{{"t0", "t1"}}
		}
	}
	if got := chain(); got != nil {
		t.Errorf("of another result it says %v", got)
	}
}
