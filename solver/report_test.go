// SPDX-License-Identifier: Apache-2.0

package solver_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// reportOf evaluates the one step of def and returns what is told of it.
func reportOf(t *testing.T, s *solver.Solver, def *pb.Definition, o solver.BuildOptions) solver.Report {
	t.Helper()
	b := s.NewBuild(o)
	defer b.Close()
	e, err := b.Load(def)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = b.Result(context.Background(), e)
	reports := b.Reports()
	if len(reports) != 1 {
		t.Fatalf("%d reports: %+v", len(reports), reports)
	}
	return reports[0]
}

// TestReports: what a build tells of a step that failed, ran, was found, and was told to run.
func TestReports(t *testing.T) {
	fail := true
	s, def, _, blobs := run(t, func(_ context.Context, env *solver.Env) error {
		if fail {
			env.Progress.Log(2, []byte("this went wrong\n"))
			return errors.New("exit code 1")
		}
		env.Progress.Log(1, []byte("all is well\n"))
		return nil
	})
	r := reportOf(t, s, def, solver.BuildOptions{ID: "first"})
	if r.Outcome != solver.Failed || r.Err == nil || string(blobs.blobs[r.Log]) != "this went wrong\n" || r.Record != nil || len(r.ContentParts) == 0 {
		t.Errorf("failed: %+v", r)
	}
	if step := r.Step(); step.Line != 3 || step.Stage != "build" {
		t.Errorf("the place is %+v", step)
	}
	fail = false
	r = reportOf(t, s, def, solver.BuildOptions{ID: "second"})
	if r.Outcome != solver.Ran || r.FoundBy != "" || r.Record.Build != "second" || string(blobs.blobs[r.Log]) != "all is well\n" {
		t.Errorf("ran: %+v", r)
	}
	ran := r
	r = reportOf(t, s, def, solver.BuildOptions{ID: "third"})
	if r.Outcome != solver.Found || r.FoundBy != record.KindRecipe || r.Record.Build != "second" || r.Log != ran.Log || r.Recipe != ran.Recipe ||
		!slices.Equal(r.RecipeParts, ran.RecipeParts) {
		t.Errorf("found: %+v", r)
	}
	r = reportOf(t, s, def, solver.BuildOptions{ID: "fourth", NoCache: true})
	if r.Outcome != solver.Ran || !r.Fresh || r.Record.Build != "fourth" {
		t.Errorf("told to run: %+v", r)
	}
}
