// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	bkclient "github.com/moby/buildkit/client"

	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// exitDifferent is the exit status of build --verify-cache when the cache holds something that a step does not make now.
const exitDifferent = 3

// ownAttrs are the attributes of ours that an engine has to know, with the flags that they come from.
var ownAttrs = []struct{ attr, flag string }{
	{buildkitapi.VerifyCacheAttr, "--verify-cache"},
	{buildkitapi.JobsAttr, "--jobs"},
	{buildkitapi.WholeCacheAttr, "cache import and export"},
	{buildkitapi.PlanAttr, "cache inspect --for"},
}

// addOwnAttrs translates the flags that BuildKit does not have.
func (o *buildOptions) addOwnAttrs(a *app, solve *bkclient.SolveOpt) error {
	switch {
	case o.jobs < 0:
		return fmt.Errorf("--jobs %d: want a number from 1", o.jobs)
	case o.verifyCache && o.noCache:
		return errors.New("--verify-cache and --no-cache exclude each other: without the cache there is nothing to compare with")
	case o.maxMemory > 0 && !a.standalone:
		return fmt.Errorf("--max-memory %s: is for --standalone; the memory of an engine in the background is for all its builds: "+
			"set SLIPWAY_MAX_MEMORY before it starts, or use 'slipway daemon --max-memory'", o.maxMemory.String())
	}
	if o.jobs > 0 {
		solve.FrontendAttrs[buildkitapi.JobsAttr] = strconv.Itoa(o.jobs)
	}
	if o.verifyCache {
		solve.FrontendAttrs[buildkitapi.VerifyCacheAttr] = "true"
	}
	if o.maxMemory > 0 {
		a.maxMemory = o.maxMemory
	}
	return nil
}

// checkOwnAttrs asks the engine whether it knows what we ask for: another one would ignore it.
func (a *app) checkOwnAttrs(ctx context.Context, client *bkclient.Client, attrs map[string]string) error {
	for _, own := range ownAttrs {
		if _, ok := attrs[own.attr]; !ok {
			continue
		}
		workers, err := client.ListWorkers(ctx)
		if err != nil {
			return fmt.Errorf("%s: ask the engine whether it can do that: %w", own.flag, err)
		}
		for _, w := range workers {
			if !buildkitapi.HasOption(w.Labels, own.attr) {
				return fmt.Errorf("%s: the engine at %s cannot do that: it is BuildKit %s, or an older slipway", own.flag, a.socket(), w.BuildkitVersion.Version)
			}
		}
	}
	return nil
}

// verificationDone says what has come of --verify-cache.
func (a *app) verificationDone(o buildOptions, response map[string]string) error {
	var found buildkitapi.CacheVerification
	if err := json.Unmarshal([]byte(response[buildkitapi.VerifyCacheAttr]), &found); err != nil {
		return fmt.Errorf("--verify-cache: the engine does not say what came of it: %w", err)
	}
	if len(found.Different) == 0 {
		switch {
		case o.quiet:
		case found.Verified == 0:
			fmt.Fprintln(a.stderr(), "verified nothing: no step was found in the cache")
		default:
			fmt.Fprintf(a.stderr(), "verified %s found in the cache: made again, all are the same\n", count(found.Verified, "step"))
		}
		return nil
	}
	for _, step := range found.Different {
		place := ""
		if step.File != "" {
			place = fmt.Sprintf("%s:%d: ", step.File, step.Line)
		}
		v := step.Verification
		if v.Error != "" {
			fmt.Fprintf(a.stderr(), "%s%s: cannot be made again: %s\n", place, step.Name, v.Error)
			continue
		}
		fmt.Fprintf(a.stderr(), "%s%s: made again, it differs:\n", place, step.Name)
		for _, line := range v.Files.Lines() {
			fmt.Fprintf(a.stderr(), "    %s\n", line)
		}
	}
	return &exitError{code: exitDifferent, err: fmt.Errorf("%d of %s found in the cache are not what their steps make now (see above)",
		len(found.Different), count(found.Verified, "result"))}
}
