// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// definition marshals a state as a frontend does.
func definition(t testing.TB, s llb.State) *pb.Definition {
	t.Helper()
	def, err := s.Marshal(context.Background(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	return def.ToPB()
}

func nothingKnown(digest.Digest) *Vertex { return nil }

// raw puts ops together without any check, and a pointer to output index of the last one.
func raw(t testing.TB, index int64, ops ...*pb.Op) *pb.Definition {
	t.Helper()
	def := new(pb.Definition)
	var last digest.Digest
	for _, op := range append(ops, nil) {
		if op == nil {
			op = &pb.Op{Inputs: []*pb.Input{{Digest: last.String(), Index: index}}}
		}
		b, err := op.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		last = digest.FromBytes(b)
		def.Def = append(def.Def, b)
	}
	return def
}

func sourceOp(id string, inputs ...*pb.Input) *pb.Op {
	return &pb.Op{Inputs: inputs, Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: id}}}
}

func TestReadGraphNames(t *testing.T) {
	base := llb.Image("example.com/base:1")
	run := base.Run(llb.Shlex("make all"), llb.WithCustomName("[build 2/3] RUN make all"))
	out := run.AddMount("/out", llb.Scratch())
	copied := llb.Scratch().File(llb.Copy(out, "/a", "/b").Mkdir("/c", 0o755))
	merged := llb.Merge([]llb.State{copied, llb.Diff(base, run.Root())})
	g, err := readGraph(definition(t, merged), nothingKnown)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	position := map[*Vertex]int{}
	for i, v := range g.vertices {
		got[v.Name] = true
		position[v] = i
		for _, in := range v.Inputs {
			if at, ok := position[in.Vertex]; !ok || at >= i {
				t.Errorf("%q comes before its input %q", v.Name, in.Vertex.Name)
			}
		}
	}
	want := map[string]bool{
		"docker-image://example.com/base:1": true,
		"[build 2/3] RUN make all":          true,
		"copy /a /b, mkdir /c":              true,
		"diff (docker-image://example.com/base:1) -> ([build 2/3] RUN make all)":                               true,
		"merge (copy /a /b, mkdir /c, diff (docker-image://example.com/base:1) -> ([build 2/3] RUN make all))": true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if g.result.Vertex != g.vertices[len(g.vertices)-1] || g.result.Index != 0 {
		t.Errorf("the result is output %d of %q", g.result.Index, g.result.Vertex.Name)
	}
}

func TestReadGraphRefuses(t *testing.T) {
	exec := func(input, output int64) *pb.Op {
		return &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{
			Meta: &pb.Meta{Args: []string{"true"}}, Mounts: []*pb.Mount{{Dest: "/", Input: input, Output: output}},
		}}}
	}
	located := raw(t, 0, sourceOp("a://b"))
	d := digest.FromBytes(located.Def[0]).String()
	located.Source = &pb.Source{Locations: map[string]*pb.Locations{d: {Locations: []*pb.Location{{SourceIndex: 3}}}}}
	for _, tc := range []struct {
		name string
		def  *pb.Definition
		want string
	}{
		{"nil", nil, "is empty"},
		{"empty", new(pb.Definition), "is empty"},
		{"garbage", &pb.Definition{Def: [][]byte{{0xff, 0xff}}}, "decode op 1 of 1"},
		{"no pointer", &pb.Definition{Def: raw(t, 0, sourceOp("a://b")).Def[:1]}, "does not point to a result"},
		{"missing input", &pb.Definition{Def: raw(t, 0, sourceOp("a://b")).Def[1:]}, "is not in the definition"},
		{"no such output", raw(t, 1, sourceOp("a://b")), `output 1 of "a://b" is asked for, which has 1`},
		{"negative output", raw(t, -1, sourceOp("a://b")), "output -1"},
		{"source with inputs", raw(t, 0, sourceOp("c://d"), sourceOp("a://b", &pb.Input{Digest: digest.FromString("x").String()})), "is not in the definition"},
		{"source without identifier", raw(t, 0, sourceOp("")), "no identifier"},
		{"exec without command", raw(t, 0, &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{}}}), "no command"},
		{"exec with a mount of nothing", raw(t, 0, exec(0, 0)), "no such input"},
		{"exec with a far output", raw(t, 7, exec(-1, 7)), "output out of range"},
		{"exec without outputs", raw(t, 0, exec(-1, -1)), "which has 0"},
		{"empty file op", raw(t, 0, &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{}}}), "no actions"},
		{"half a diff", raw(t, 0, &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{}}}), "no lower or no upper"},
		{"merge without inputs", raw(t, 0, &pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{}}}}}), "other inputs"},
		{"no op", raw(t, 0, &pb.Op{}), "not supported"},
		{"location in no file", located, "names no file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := readGraph(tc.def, nothingKnown)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}

// A merge of merges doubles its name at every level unless it is shortened.
func TestNamesStayShort(t *testing.T) {
	ops := []*pb.Op{sourceOp("a://b"), sourceOp("c://d")}
	inputs := func(ops ...*pb.Op) (in []*pb.Input) {
		for _, op := range ops {
			b, err := op.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			in = append(in, &pb.Input{Digest: digest.FromBytes(b).String()})
		}
		return in
	}
	for range 60 {
		last := ops[len(ops)-1]
		ops = append(ops, &pb.Op{
			Inputs: inputs(last, last),
			Op:     &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}}}},
		})
	}
	g, err := readGraph(raw(t, 0, ops...), nothingKnown)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(g.result.Vertex.Name); n > 1000 {
		t.Errorf("a name has %d bytes", n)
	}
}

func TestStageName(t *testing.T) {
	for name, want := range map[string]string{
		"[build 2/5] RUN make":                      "build",
		"[linux/amd64 build 2/5] RUN make":          "build",
		"[linux/arm64->amd64 build 10/11] COPY a b": "build",
		"[2/5] RUN make":                            "",
		"[linux/amd64 2/5] RUN make":                "",
		"[internal] load build context":             "",
		"[auth] library/alpine:pull token":          "",
		"RUN [ 1/2 ] x":                             "",
		"make":                                      "",
		"":                                          "",
		"[build 2/]":                                "",
	} {
		if got := stageName(name); got != want {
			t.Errorf("stageName(%q) = %q, want %q", name, got, want)
		}
	}
}

// FuzzReadGraph: whatever a client sends is taken apart or refused, and what is taken apart is sound.
func FuzzReadGraph(f *testing.F) {
	def := definition(f, llb.Image("example.com/base:1").Run(llb.Shlex("true")).Root())
	f.Add(def.Def[0], def.Def[1], def.Def[2])
	f.Add([]byte{}, []byte{1}, []byte{0x0a, 0x00})
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		// The digests that connect the ops cannot be guessed: the last two ops point to what is there.
		point := func(to []byte) *pb.Input { return &pb.Input{Digest: digest.FromBytes(to).String()} }
		var op pb.Op
		if op.Unmarshal(b) == nil && len(op.Inputs) > 0 {
			for i := range op.Inputs {
				op.Inputs[i] = point(a)
			}
			b, _ = op.Marshal()
		}
		end, err := (&pb.Op{Inputs: []*pb.Input{point(b)}}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		for _, def := range []*pb.Definition{{Def: [][]byte{a, b, c}}, {Def: [][]byte{a, b, end}}} {
			g, err := readGraph(def, nothingKnown)
			if err != nil {
				continue
			}
			seen := map[*Vertex]bool{}
			for _, v := range g.vertices {
				for _, in := range v.Inputs {
					if !seen[in.Vertex] || in.Index < 0 || in.Index >= outputCount(in.Vertex.Op) {
						t.Fatalf("%q has the input %v", v.Name, in)
					}
				}
				seen[v] = true
			}
			if !seen[g.result.Vertex] {
				t.Fatal("the result is not a vertex of the graph")
			}
			_ = fmt.Sprint(stageName(g.result.Vertex.Name))
		}
	})
}
