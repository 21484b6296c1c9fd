// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/solver"
)

// What our own clients may ask for that BuildKit does not know, as frontend attributes (docs/verify.md). Another daemon
// ignores them, so a client that needs to know looks for their names in the label OptionsLabel of the worker first.
const (
	// VerifyCacheAttr set to true makes every result that is found in the cache again and compares. The response has a
	// CacheVerification as JSON under the same name.
	VerifyCacheAttr = "slipway.verify-cache"
	// JobsAttr is how many steps of the build run at once: a number from 1.
	JobsAttr = "slipway.jobs"
	// PlanAttr set to true runs nothing: the response has a CachePlan as JSON under the same name.
	PlanAttr = "slipway.plan"
	// WholeCacheAttr set to true has the imports and exports of the request be about everything: all that the imported caches have becomes
	// known, and all that the engine knows is exported, beside the build, which may be of nothing. The response says under the same name how many
	// records have been imported.
	WholeCacheAttr = "slipway.whole-cache"
	// OptionsLabel lists the attributes above, with commas between them.
	OptionsLabel = "slipway.options"
	// ownPrefix is what all attributes of ours begin with.
	ownPrefix = "slipway."
)

// ownOptions is the value of OptionsLabel.
var ownOptions = strings.Join([]string{JobsAttr, PlanAttr, VerifyCacheAttr, WholeCacheAttr}, ",")

// HasOption reports whether a worker's labels promise an attribute.
func HasOption(labels map[string]string, attr string) bool {
	return slices.Contains(strings.Split(labels[OptionsLabel], ","), attr)
}

// CacheVerification is what has come of a build with VerifyCacheAttr.
type CacheVerification struct {
	// Verified is how many steps were found in the cache and made again.
	Verified int `json:"verified"`
	// Different are those of them that made something else, or failed.
	Different []DifferentStep `json:"different,omitempty"`
}

// DifferentStep is a step whose result in the cache is not what it makes now.
type DifferentStep struct {
	Name string `json:"name"`
	File string `json:"file,omitempty"`
	// Line counts from 1; 0 when it is not known.
	Line         int                   `json:"line,omitempty"`
	Verification *explain.Verification `json:"verification"`
}

// ownRequest is what the attributes say.
type ownRequest struct {
	// verifyCache has every hit made again and compared; jobs bounds the steps of this build, 0 is the engine's default.
	verifyCache bool
	jobs        int
	// plan asks only what would be found, and wholeCache imports and exports everything.
	plan, wholeCache bool
}

// takeOptions removes the attributes from attrs and returns what they say. It is called when those of local.go are gone.
func takeOptions(attrs map[string]string) (r ownRequest, err error) {
	flags := map[string]*bool{VerifyCacheAttr: &r.verifyCache, PlanAttr: &r.plan, WholeCacheAttr: &r.wholeCache}
	for name, value := range attrs {
		if !strings.HasPrefix(name, ownPrefix) {
			continue
		}
		flag, isFlag := flags[name]
		switch {
		case isFlag:
			if *flag, err = strconv.ParseBool(value); err != nil {
				return ownRequest{}, fmt.Errorf("%s=%s: want true or false", name, value)
			}
		case name == JobsAttr:
			if r.jobs, err = strconv.Atoi(value); err != nil || r.jobs < 1 {
				return ownRequest{}, fmt.Errorf("%s=%s: want a number from 1", name, value)
			}
		default:
			return ownRequest{}, fmt.Errorf("unknown attribute %s", name)
		}
		delete(attrs, name)
	}
	if _, noCache := attrs["no-cache"]; r.verifyCache && noCache && attrs["no-cache"] == "" {
		return ownRequest{}, fmt.Errorf("%s compares with the cache that no-cache leaves out", VerifyCacheAttr)
	}
	return r, nil
}

// cacheVerification sums up what the vertices of a build report.
func cacheVerification(reports []solver.Report) CacheVerification {
	var out CacheVerification
	for _, r := range reports {
		if r.Verification == nil {
			continue
		}
		out.Verified++
		if !r.Verification.Same() {
			step := r.Step()
			out.Different = append(out.Different, DifferentStep{
				Name: r.Vertex.Name, File: step.File, Line: step.Line, Verification: explain.NewVerification(r.Verification),
			})
		}
	}
	return out
}
