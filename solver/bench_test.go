// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"fmt"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"

	"github.com/seed-68981b69/slipway/cache/record"
)

// BenchmarkKey is the recipe key of one step: its parts, as large as those of a RUN with an environment, and one input.
func BenchmarkKey(b *testing.B) {
	own := []record.Part{
		{Name: "op", Value: "exec"},
		{Name: "args", Value: "/bin/sh -c go build ./..."},
		{Name: "env", Value: strings.Repeat("NAME=value ", 20)},
		{Name: "platform", Value: "linux/amd64"},
	}
	below := recipeKey(own)
	for b.Loop() {
		below = recipeKey(recipeParts(own, []recipeInput{{recipe: below}}))
	}
}

// BenchmarkReadGraph is a definition of 100 steps that becomes a graph.
func BenchmarkReadGraph(b *testing.B) {
	state := llb.Image("example.com/base:1")
	for i := range 100 {
		state = state.Run(llb.Shlexf("make %d", i), llb.WithCustomName(fmt.Sprint(i))).Root()
	}
	def := definition(b, state)
	for b.Loop() {
		if _, err := readGraph(def, nothingKnown); err != nil {
			b.Fatal(err)
		}
	}
}
