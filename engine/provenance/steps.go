// SPDX-License-Identifier: Apache-2.0

package provenance

import (
	"context"
	"fmt"

	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/solver"
)

// describe adds what mode=max tells: the definition, step by step, where in which file each step comes from, and which layers it has made.
func (f *Facts) describe(ctx context.Context, p *types.ProvenancePredicateSLSA1, layers exporter.LayerBlobs) error {
	def := f.ref.Definition()
	list, err := readSteps(def)
	if err != nil {
		return err
	}
	p.BuildDefinition.InternalParameters.BuildConfig = &types.BuildConfig{Definition: list.steps, DigestMapping: list.mapping()}
	md := &p.RunDetails.Metadata.BuildKitMetadata
	if src := def.Source; src != nil && len(src.Infos) > 0 {
		md.Source = &types.Source{Locations: map[string]*pb.Locations{}}
		for _, info := range src.Infos {
			inner, err := readSteps(info.Definition)
			if err != nil {
				return err
			}
			md.Source.Infos = append(md.Source.Infos, types.SourceInfo{
				Filename: info.Filename, Language: info.Language, Data: info.Data, Definition: inner.steps, DigestMapping: inner.mapping(),
			})
		}
		for d, locations := range src.Locations {
			if i, ok := list.index[digest.Digest(d)]; ok {
				md.Source.Locations[stepID(i)] = locations
			}
		}
	}
	md.Layers = f.layers(ctx, list, layers)
	return nil
}

// steps are the vertices of a definition, inputs before what reads them.
type steps struct {
	steps []types.BuildStep
	index map[digest.Digest]int // in steps
}

func stepID(i int) string { return fmt.Sprintf("step%d", i) }

func (s steps) mapping() map[digest.Digest]string {
	out := make(map[digest.Digest]string, len(s.index))
	for d, i := range s.index {
		out[d] = stepID(i)
	}
	return out
}

// readSteps takes a definition apart; the last step points to the result. The definition of nothing has no steps.
func readSteps(def *pb.Definition) (steps, error) {
	if def == nil || len(def.Def) == 0 {
		return steps{}, nil
	}
	ops := make(map[digest.Digest]*pb.Op, len(def.Def))
	var last digest.Digest
	for _, data := range def.Def {
		op := &pb.Op{}
		if err := op.UnmarshalVT(data); err != nil {
			return steps{}, fmt.Errorf("read the definition: %w", err)
		}
		last = digest.FromBytes(data)
		ops[last] = op
	}
	s := steps{index: make(map[digest.Digest]int, len(ops))}
	// Inputs are named by digest, so there are no cycles; how deep they go is bounded by the size of a message.
	var visit func(d digest.Digest) error
	visit = func(d digest.Digest) error {
		if _, ok := s.index[d]; ok {
			return nil
		}
		op, ok := ops[d]
		if !ok {
			return fmt.Errorf("read the definition: vertex %s is missing", d)
		}
		step := types.BuildStep{Op: op, Inputs: make([]string, len(op.Inputs))}
		for i, in := range op.Inputs {
			d := digest.Digest(in.Digest)
			if err := visit(d); err != nil {
				return err
			}
			step.Inputs[i] = fmt.Sprintf("%s:%d", stepID(s.index[d]), in.Index)
		}
		op.Inputs = nil // they are in Inputs
		clean(op)
		s.index[d] = len(s.steps)
		step.ID = stepID(len(s.steps))
		s.steps = append(s.steps, step)
		return nil
	}
	return s, visit(last)
}

// layers says as which blobs each step's outputs are in the image, as far as they are: by "stepN:OUTPUT".
func (f *Facts) layers(ctx context.Context, list steps, blobs exporter.LayerBlobs) map[string][][]ocispec.Descriptor {
	if len(blobs) == 0 {
		return nil
	}
	out := map[string][][]ocispec.Descriptor{}
	seen := map[digest.Digest]bool{}
	var visit func(v *solver.Vertex)
	visit = func(v *solver.Vertex) {
		if v == nil || seen[v.Digest] {
			return
		}
		seen[v.Digest] = true
		for _, in := range v.Inputs {
			visit(in.Vertex)
		}
		i, ok := list.index[v.Digest]
		if !ok {
			return
		}
		outputs, _ := f.build.Solver.Outputs(ctx, v)
		for n, snap := range outputs {
			if chain := descriptors(snap, blobs); len(chain) > 0 {
				out[fmt.Sprintf("%s:%d", stepID(i), n)] = [][]ocispec.Descriptor{chain}
			}
		}
	}
	visit(f.ref.Edge().Vertex)
	if len(out) == 0 {
		return nil
	}
	return out
}

// descriptors are the blobs of a snapshot; nil when the image does not have all of them.
func descriptors(snap snapshot.Snapshot, blobs exporter.LayerBlobs) []ocispec.Descriptor {
	var chain []ocispec.Descriptor
	for _, id := range snap {
		desc, ok := blobs[id]
		if !ok {
			return nil
		}
		chain = append(chain, desc)
	}
	return chain
}
