// SPDX-License-Identifier: Apache-2.0

package op

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/solver"
)

// newSource hands the vertex to the source of its scheme.
func newSource(d *Deps, v *solver.Vertex, op *pb.SourceOp) (solver.Op, error) {
	if op == nil {
		return nil, fmt.Errorf("source operation is empty")
	}
	if len(v.Inputs) != 0 {
		return nil, fmt.Errorf("source %s must not have inputs", op.Identifier)
	}
	scheme, _, ok := strings.Cut(op.Identifier, "://")
	if !ok {
		return nil, fmt.Errorf("source %q has no scheme", op.Identifier)
	}
	newOp, ok := d.Sources[scheme]
	if !ok {
		return nil, fmt.Errorf("source %s: scheme not supported yet: %s (there are: %s)",
			op.Identifier, scheme, strings.Join(slices.Sorted(maps.Keys(d.Sources)), ", "))
	}
	return newOp(v)
}

// NewSource returns the source of an operation that is in no graph, to be asked what it stands for.
func NewSource(deps Deps, source *pb.SourceOp) (solver.Source, error) {
	op := &pb.Op{Op: &pb.Op_Source{Source: source}}
	made, err := newSource(&deps, &solver.Vertex{Op: op, Name: source.GetIdentifier()}, source)
	if err != nil {
		return nil, err
	}
	s, ok := made.(solver.Source)
	if !ok {
		return nil, fmt.Errorf("source %s is none", source.GetIdentifier())
	}
	return s, nil
}
