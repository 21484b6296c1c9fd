// SPDX-License-Identifier: Apache-2.0

// Package solvertest has what it takes to try a solver without an engine: graphs as small values, a World whose ops
// work on numbers and take fake time, stores in memory, and a sequential model that says what has to come out.
//
// A World is deterministic: what a step produces depends only on its command and on what it sees of its inputs. Commands
// come in pairs that do the same, and steps may look at a part of an input only; so changes to no effect are frequent.
package solvertest

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
)

// Kind says what a Step is.
type Kind int

// The kinds of a Step.
const (
	Run   Kind = iota // an op with inputs
	Pin               // a source whose pin names it, such as an image
	Local             // a source that is known by content only
)

// Graph is a definition: steps whose inputs have lower numbers. The result is output Output of step Root.
type Graph struct {
	Steps        []Step
	Root, Output int
}

// Step is one vertex.
type Step struct {
	Kind Kind
	// Source names what a source reads, in World.Pins or World.Locals.
	Source string
	// Command is what a Run does. 2n and 2n+1 are two ways to write the same.
	Command     int
	Inputs      []Input
	Outputs     int // at least 1
	IgnoreCache bool
}

// Input is an edge, and how much of it the step looks at.
type Input struct {
	Step, Output int
	Sees         int // 0: A, 1: B, 2: both
}

// Content is what a snapshot holds.
type Content struct{ A, B int }

// seen is the digest of what in shows of c.
func (in Input) seen(c Content) digest.Digest { return seen(in.Sees, c) }

func seen(sees int, c Content) digest.Digest {
	switch sees {
	case 0:
		c.B = 0
	case 1:
		c.A = 0
	}
	return digest.FromString(fmt.Sprintf("%d sees %d %d", sees, c.A, c.B))
}

// produce is what a command makes of what it sees.
func produce(command, outputs int, sees []int, inputs []Content) []Content {
	effect := command / 2
	a, b := effect*3, effect
	for i, c := range inputs {
		if sees[i] != 1 {
			a += c.A
		}
		if sees[i] != 0 {
			b += c.B
		}
	}
	out := make([]Content, outputs)
	for i := range out {
		out[i] = Content{A: (a + b + i) % 4, B: (b + 2*i) % 3}
	}
	return out
}

// parts lists what identifies a step without its inputs; it is what the fake ops return.
func (s Step) parts() []record.Part {
	if s.Kind != Run {
		return []record.Part{{Name: "source", Value: s.Source}}
	}
	sees := make([]string, len(s.Inputs))
	for i, in := range s.Inputs {
		sees[i] = strconv.Itoa(in.Sees)
	}
	return []record.Part{
		{Name: "command", Value: strconv.Itoa(s.Command)},
		{Name: "sees", Value: strings.Join(sees, ",")},
		{Name: "makes", Value: strconv.Itoa(s.Outputs)},
	}
}

// Definition returns the graph as LLB, and the digest of each step's vertex.
func (g Graph) Definition() (*pb.Definition, []digest.Digest) {
	def := &pb.Definition{Metadata: make(map[string]*pb.OpMetadata)}
	digests := make([]digest.Digest, len(g.Steps))
	add := func(op *pb.Op) digest.Digest {
		b, err := op.Marshal()
		if err != nil {
			panic(err)
		}
		def.Def = append(def.Def, b)
		return digest.FromBytes(b)
	}
	for i, s := range g.Steps {
		op := new(pb.Op)
		for _, in := range s.Inputs {
			op.Inputs = append(op.Inputs, &pb.Input{Digest: digests[in.Step].String(), Index: int64(in.Output)})
		}
		switch s.Kind {
		case Pin:
			op.Op = &pb.Op_Source{Source: &pb.SourceOp{Identifier: "pin://" + s.Source}}
		case Local:
			op.Op = &pb.Op_Source{Source: &pb.SourceOp{Identifier: "local://" + s.Source}}
		default:
			// The number of the step makes vertices different that do the same: their digests differ, their keys do not.
			args := []string{strconv.Itoa(i)}
			for _, p := range s.parts() {
				args = append(args, p.Value)
			}
			exec := &pb.ExecOp{Meta: &pb.Meta{Args: args}}
			for o := range s.Outputs {
				exec.Mounts = append(exec.Mounts, &pb.Mount{Input: int64(pb.Empty), Output: int64(o)})
			}
			op.Op = &pb.Op_Exec{Exec: exec}
		}
		digests[i] = add(op)
		def.Metadata[digests[i].String()] = &pb.OpMetadata{
			IgnoreCache: s.IgnoreCache, Description: map[string]string{"llb.customname": fmt.Sprintf("step %d", i)},
		}
	}
	add(&pb.Op{Inputs: []*pb.Input{{Digest: digests[g.Root].String(), Index: int64(g.Output)}}})
	return def, digests
}

// stepOf reads a step back from a vertex, as far as an op has to know it.
func stepOf(op *pb.Op) Step {
	switch o := op.Op.(type) {
	case *pb.Op_Source:
		scheme, name, _ := strings.Cut(o.Source.Identifier, "://")
		if scheme == "pin" {
			return Step{Kind: Pin, Source: name, Outputs: 1}
		}
		return Step{Kind: Local, Source: name, Outputs: 1}
	case *pb.Op_Exec:
		args := o.Exec.Meta.Args
		s := Step{}
		s.Command, _ = strconv.Atoi(args[1])
		s.Outputs, _ = strconv.Atoi(args[3])
		for i := range op.Inputs {
			sees, _ := strconv.Atoi(strings.Split(args[2], ",")[i])
			s.Inputs = append(s.Inputs, Input{Sees: sees})
		}
		return s
	}
	panic(fmt.Sprintf("op %T is not from Graph.Definition", op.Op))
}
