// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"encoding/json"
	"strconv"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// CachePlan says which steps of a build are in the imported caches, as far as that can be said before anything runs: by their recipe keys.
type CachePlan struct {
	Steps []PlannedStep `json:"steps"`
}

// PlannedStep is a step of a build that has not run.
type PlannedStep struct {
	Name string `json:"name"`
	File string `json:"file,omitempty"`
	// Line counts from 1; 0 when it is not known.
	Line int `json:"line,omitempty"`
	// Found is the imported cache that has the step's result, "" when none has.
	Found string `json:"found,omitempty"`
	// Build is the build that made it.
	Build string `json:"build,omitempty"`
}

// plan says what of a frontend's result would be found.
func plan(ctx context.Context, b *solver.Build, res *gwclient.Result, imports *remotecache.Imports) (map[string]string, error) {
	var out CachePlan
	seen := map[digest.Digest]bool{}
	err := res.EachRef(func(ref gwclient.Reference) error {
		r, err := gateway.AsReference(ref)
		if err != nil || r == nil {
			return err
		}
		planned, err := b.Plan(ctx, r.Edge())
		if err != nil {
			return err
		}
		for _, p := range planned {
			if seen[p.Vertex.Digest] || p.ByContent {
				continue
			}
			seen[p.Vertex.Digest] = true
			report := solver.Report{Vertex: p.Vertex}
			step := report.Step()
			s := PlannedStep{Name: step.Name, File: step.File, Line: step.Line}
			if rec, ok := imports.Find(ctx, string(p.Recipe)); ok && !p.Unnamed {
				s.Found, s.Build = rec.From, rec.Build
			}
			out.Steps = append(out.Steps, s)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(out)
	return map[string]string{PlanAttr: string(raw)}, err
}

// takeWhole makes everything known that the imports have.
func takeWhole(ctx context.Context, imports *remotecache.Imports) (map[string]string, error) {
	n, err := imports.Take(ctx)
	return map[string]string{WholeCacheAttr: strconv.Itoa(n)}, err
}
