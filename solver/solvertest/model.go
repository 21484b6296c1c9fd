// SPDX-License-Identifier: Apache-2.0

package solvertest

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
)

// Key names work as the model sees it: the readable parts of a content key in one string.
type Key string

func keyOf(own []record.Part, inputs []digest.Digest) Key {
	var b strings.Builder
	for _, p := range own {
		fmt.Fprintf(&b, "%s=%s ", p.Name, p.Value)
	}
	for i, d := range inputs {
		fmt.Fprintf(&b, "input%d=%s ", i, d.Encoded()[:12])
	}
	return Key(b.String())
}

// keyOfRecord returns the key of a content record.
func keyOfRecord(rec *record.Record) Key {
	var own []record.Part
	var inputs []digest.Digest
	for _, p := range rec.Parts {
		if d, ok := strings.CutPrefix(p.Value, "content "); ok {
			inputs = append(inputs, digest.Digest(d))
		} else if p.Name != "outputs" {
			own = append(own, p)
		}
	}
	return keyOf(own, inputs)
}

// Model is what has to come out of a graph, found by going through it once, one step after the other, without any cache.
// A cache must not change results. And as everything deterministic is found again by content, what has to run is simply
// what is not recorded under its content key: the model needs to know nothing of recipe keys, probing and order.
type Model struct {
	Result Content
	// Needed has the steps that the result depends on, in order.
	Needed []int
	// Contents, Keys and Fresh are by step.
	Contents [][]Content
	Keys     []Key
	Fresh    []bool
}

// Model evaluates g in w as it is now.
func (w *World) Model(g Graph, noCache bool) *Model {
	m := &Model{Contents: make([][]Content, len(g.Steps)), Keys: make([]Key, len(g.Steps)), Fresh: make([]bool, len(g.Steps))}
	needed := make([]bool, len(g.Steps))
	needed[g.Root] = true
	for i, s := range slices.Backward(g.Steps) {
		for _, in := range s.Inputs {
			needed[in.Step] = needed[in.Step] || needed[i]
		}
	}
	for i, s := range g.Steps {
		if !needed[i] {
			continue
		}
		m.Needed = append(m.Needed, i)
		m.Fresh[i] = s.IgnoreCache || noCache && s.Kind == Run
		switch s.Kind {
		case Pin:
			m.Contents[i] = []Content{pinned(w.Pins[s.Source])}
			m.Keys[i] = keyOf(append(s.parts(), pinPart(w.Pins[s.Source])), nil)
		case Local:
			m.Contents[i] = []Content{w.Locals[s.Source]}
			m.Keys[i] = keyOf(s.parts(), nil)
		default:
			var sees []int
			var inputs []Content
			var digests []digest.Digest
			for _, in := range s.Inputs {
				c := m.Contents[in.Step][in.Output]
				sees = append(sees, in.Sees)
				inputs = append(inputs, c)
				digests = append(digests, in.seen(c))
			}
			m.Contents[i] = produce(s.Command, s.Outputs, sees, inputs)
			m.Keys[i] = keyOf(s.parts(), digests)
		}
	}
	m.Result = m.Contents[g.Root][g.Output]
	return m
}

// MustRun lists the steps that have to run when recorded is there, without local contexts, which are read every time.
func (m *Model) MustRun(g Graph, recorded map[Key]bool) []int {
	var run []int
	for _, i := range m.Needed {
		if g.Steps[i].Kind != Local && (m.Fresh[i] || !recorded[m.Keys[i]]) {
			run = append(run, i)
		}
	}
	return run
}

// Bounds returns how long the steps in run take when everything that can be at once is, and one after the other. Steps
// with the same key are done once.
func (w *World) Bounds(g Graph, m *Model, run []int) (parallel, serial time.Duration) {
	ends := make([]time.Duration, len(g.Steps))
	ran := make(map[Key]time.Duration)
	for _, i := range m.Needed {
		for _, in := range g.Steps[i].Inputs {
			ends[i] = max(ends[i], ends[in.Step])
		}
		if slices.Contains(run, i) {
			d := w.duration(g.Steps[i])
			ends[i] += d
			ran[m.Keys[i]] = d
		}
		parallel = max(parallel, ends[i])
	}
	for _, d := range ran {
		serial += d
	}
	return parallel, serial
}
