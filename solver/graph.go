// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// graph is a definition taken apart: its vertices with inputs before what reads them, and the edge it stands for.
type graph struct {
	vertices []*Vertex
	result   Edge
}

// readGraph checks def and turns it into vertices. Only what the result needs is looked at. known returns the
// vertex of that digest when there is one already, so that equal vertices of several definitions are one.
//
// A definition is a list of marshalled ops that name their inputs by digest, so its edges cannot form a cycle short
// of a hash collision; the last op has no work and points to the result.
func readGraph(def *pb.Definition, known func(digest.Digest) *Vertex) (*graph, error) {
	if def == nil || len(def.Def) == 0 {
		return nil, errors.New("the definition is empty")
	}
	ops := make(map[digest.Digest]*pb.Op, len(def.Def))
	var last digest.Digest
	for i, b := range def.Def {
		op := new(pb.Op)
		if err := op.Unmarshal(b); err != nil {
			return nil, fmt.Errorf("decode op %d of %d: %w", i+1, len(def.Def), err)
		}
		last = digest.FromBytes(b)
		ops[last] = op
	}
	pointer := ops[last]
	if pointer.Op != nil || len(pointer.Inputs) != 1 {
		return nil, errors.New("the last op of the definition does not point to a result: it must have one input and no work")
	}

	l := &loader{def: def, ops: ops, known: known, loaded: make(map[digest.Digest]*Vertex, len(ops)), made: map[*Vertex]bool{}}
	result, err := l.edge(pointer.Inputs[0])
	if err != nil {
		return nil, fmt.Errorf("result of the definition: %w", err)
	}
	return &graph{vertices: l.order, result: result}, nil
}

// loader walks a definition depth first.
type loader struct {
	def    *pb.Definition
	ops    map[digest.Digest]*pb.Op
	known  func(digest.Digest) *Vertex
	loaded map[digest.Digest]*Vertex // nil while its inputs are being loaded
	order  []*Vertex
	made   map[*Vertex]bool // not known before, so still ours to change
}

func (l *loader) edge(in *pb.Input) (Edge, error) {
	if in == nil {
		return Edge{}, errors.New("an input is missing")
	}
	v, err := l.vertex(digest.Digest(in.Digest))
	if err != nil {
		return Edge{}, err
	}
	if n := outputCount(v.Op); in.Index < 0 || in.Index >= int64(n) {
		return Edge{}, fmt.Errorf("output %d of %q is asked for, which has %d", in.Index, v.Name, n)
	}
	return Edge{Vertex: v, Index: int(in.Index)}, nil
}

func (l *loader) vertex(dgst digest.Digest) (*Vertex, error) {
	if v, ok := l.loaded[dgst]; ok {
		if v == nil {
			return nil, fmt.Errorf("vertex %s depends on itself", dgst)
		}
		return v, nil
	}
	op, ok := l.ops[dgst]
	if !ok {
		return nil, fmt.Errorf("vertex %q is not in the definition", dgst)
	}
	l.loaded[dgst] = nil
	inputs := make([]Edge, len(op.Inputs))
	for i, in := range op.Inputs {
		var err error
		if inputs[i], err = l.edge(in); err != nil {
			return nil, err
		}
	}
	if err := checkOp(op); err != nil {
		return nil, fmt.Errorf("vertex %s: %w", dgst, err)
	}
	v := l.known(dgst)
	if v == nil {
		v = &Vertex{Digest: dgst, Op: op, Meta: l.def.Metadata[dgst.String()], Inputs: inputs}
		if v.Meta == nil {
			v.Meta = new(pb.OpMetadata)
		}
		v.Name = vertexName(v)
		var err error
		if v.Locations, v.Sources, err = locations(l.def.Source, dgst); err != nil {
			return nil, fmt.Errorf("vertex %q: %w", v.Name, err)
		}
		l.made[v] = true
		l.lendLocations(v)
	}
	l.loaded[dgst] = v
	l.order = append(l.order, v)
	return v, nil
}

// lendLocations gives v's place in the Dockerfile to the sources that it reads and that have none: what ADD fetches comes from the
// line of the ADD. A local context is read by many lines.
func (l *loader) lendLocations(v *Vertex) {
	for _, in := range v.Inputs {
		src := in.Vertex
		if source := src.Op.GetSource(); source != nil && l.made[src] && len(src.Locations) == 0 && !strings.HasPrefix(source.Identifier, "local://") {
			src.Locations, src.Sources = v.Locations, v.Sources
		}
	}
}

// locations returns where the vertex comes from and the files of these places.
func locations(src *pb.Source, dgst digest.Digest) ([]*pb.Location, []*pb.SourceInfo, error) {
	if src == nil || src.Locations[dgst.String()] == nil {
		return nil, nil, nil
	}
	locs := src.Locations[dgst.String()].Locations
	infos := make([]*pb.SourceInfo, len(locs))
	for i, loc := range locs {
		if loc == nil || loc.SourceIndex < 0 || int(loc.SourceIndex) >= len(src.Infos) {
			return nil, nil, fmt.Errorf("source location %d names no file of the definition", i)
		}
		infos[i] = src.Infos[loc.SourceIndex]
	}
	return locs, infos, nil
}

// checkOp refuses what the rest of the package could not even name. What an op means is checked by its maker (Options.NewOp).
func checkOp(op *pb.Op) error {
	switch o := op.Op.(type) {
	case *pb.Op_Source:
		if o.Source == nil || o.Source.Identifier == "" {
			return errors.New("a source op has no identifier")
		}
		if len(op.Inputs) != 0 {
			return fmt.Errorf("the source op %q has inputs", o.Source.Identifier)
		}
	case *pb.Op_Exec:
		if o.Exec == nil || o.Exec.Meta == nil || len(o.Exec.Meta.Args) == 0 {
			return errors.New("an exec op has no command")
		}
		for _, m := range o.Exec.Mounts {
			if m == nil || m.Input < int64(pb.Empty) || m.Input >= int64(len(op.Inputs)) {
				return errors.New("a mount of an exec op has no such input")
			}
			if m.Output < int64(pb.SkipOutput) || m.Output >= int64(len(o.Exec.Mounts)) {
				return errors.New("a mount of an exec op has an output out of range")
			}
		}
	case *pb.Op_File:
		if o.File == nil || len(o.File.Actions) == 0 {
			return errors.New("a file op has no actions")
		}
		for _, a := range o.File.Actions {
			if a == nil || a.Output < int64(pb.SkipOutput) || a.Output >= int64(len(o.File.Actions)) {
				return errors.New("an action of a file op has an output out of range")
			}
		}
	case *pb.Op_Merge:
		if o.Merge == nil || len(o.Merge.Inputs) != len(op.Inputs) {
			return errors.New("a merge op has other inputs than its vertex")
		}
	case *pb.Op_Diff:
		if o.Diff == nil || o.Diff.Lower == nil || o.Diff.Upper == nil {
			return errors.New("a diff op has no lower or no upper side")
		}
		for _, in := range []int64{o.Diff.Lower.Input, o.Diff.Upper.Input} {
			if in < int64(pb.Empty) || in >= int64(len(op.Inputs)) {
				return errors.New("a side of a diff op has no such input")
			}
		}
	case *pb.Op_Build:
		if o.Build == nil {
			return errors.New("a build op is empty")
		}
	case *pb.Op_Passthrough:
		if o.Passthrough == nil || len(o.Passthrough.Outputs) == 0 {
			return errors.New("a passthrough op has no outputs")
		}
	default:
		return fmt.Errorf("op %T is not supported", op.Op)
	}
	return nil
}

// Outputs is how many outputs a vertex has.
func Outputs(v *Vertex) int { return outputCount(v.Op) }

// outputCount returns how many outputs the op has.
func outputCount(op *pb.Op) int {
	n := int64(0)
	switch o := op.Op.(type) {
	case *pb.Op_Exec:
		for _, m := range o.Exec.Mounts {
			n = max(n, m.Output+1)
		}
	case *pb.Op_File:
		for _, a := range o.File.Actions {
			n = max(n, a.Output+1)
		}
	case *pb.Op_Passthrough:
		n = int64(len(o.Passthrough.Outputs))
	default:
		n = 1
	}
	return int(n)
}

// vertexName is what progress shows for v: the name its maker gave it, or what it does in BuildKit's words.
func vertexName(v *Vertex) string {
	if name, ok := v.Meta.GetDescription()["llb.customname"]; ok {
		return name
	}
	switch o := v.Op.Op.(type) {
	case *pb.Op_Source:
		return o.Source.Identifier
	case *pb.Op_Exec:
		return strings.Join(o.Exec.Meta.Args, " ")
	case *pb.Op_File:
		names := make([]string, 0, len(o.File.Actions))
		for _, a := range o.File.Actions {
			names = append(names, actionName(a))
		}
		return strings.Join(names, ", ")
	case *pb.Op_Build:
		return "build"
	case *pb.Op_Merge:
		names := make([]string, len(v.Inputs))
		for i, in := range v.Inputs {
			names[i] = shorten(in.Vertex.Name)
		}
		return "merge (" + strings.Join(names, ", ") + ")"
	case *pb.Op_Diff:
		return "diff " + diffSide(v, o.Diff.Lower.Input) + " -> " + diffSide(v, o.Diff.Upper.Input)
	case *pb.Op_Passthrough:
		return "passthrough " + o.Passthrough.Id
	default:
		return "unknown"
	}
}

func actionName(a *pb.FileAction) string {
	switch f := a.Action.(type) {
	case *pb.FileAction_Mkdir:
		return "mkdir " + f.Mkdir.GetPath()
	case *pb.FileAction_Mkfile:
		return "mkfile " + f.Mkfile.GetPath()
	case *pb.FileAction_Symlink:
		return "symlink " + f.Symlink.GetNewpath() + " -> " + f.Symlink.GetOldpath()
	case *pb.FileAction_Rm:
		return "rm " + f.Rm.GetPath()
	case *pb.FileAction_Copy:
		return "copy " + f.Copy.GetSrc() + " " + f.Copy.GetDest()
	default:
		return "unknown"
	}
}

func diffSide(v *Vertex, input int64) string {
	if input == int64(pb.Empty) {
		return "scratch"
	}
	return "(" + shorten(v.Inputs[input].Vertex.Name) + ")"
}

// shorten keeps a name that is part of another within bounds: a merge of merges of one vertex would double its
// name at every level.
func shorten(name string) string {
	const most = 200
	if len(name) <= most {
		return name
	}
	return strings.ToValidUTF8(name[:most], "") + "…"
}

// stageName returns the Dockerfile stage in a name such as "[linux/amd64 build 2/5] RUN make", "" when there is none.
// The frontend tells it nowhere else.
func stageName(name string) string {
	inside, _, ok := strings.Cut(strings.TrimPrefix(name, "["), "] ")
	if !ok || !strings.HasPrefix(name, "[") {
		return ""
	}
	words := strings.Fields(inside)
	if len(words) < 2 || !isCounter(words[len(words)-1]) {
		return ""
	}
	if stage := words[len(words)-2]; !strings.Contains(stage, "/") {
		return stage
	}
	return ""
}

// isCounter reports whether s is "2/5".
func isCounter(s string) bool {
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	i, n, ok := strings.Cut(s, "/")
	return ok && digits(i) && digits(n)
}
