// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"

	bkclient "github.com/moby/buildkit/client"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/frontend/subrequests/lint"
	"github.com/moby/buildkit/util/progress/progressui"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// frontendCall is what --call asks the frontend instead of a build.
type frontendCall struct {
	name   string // as the frontend knows it
	format string // "" or "json"
	// ignoreStatus makes violations no failure.
	ignoreStatus bool
}

// frontendCalls are the names that docker buildx has for the frontend's requests.
var frontendCalls = map[string]string{
	"check": "frontend.lint", "lint": "frontend.lint", "outline": "frontend.outline", "targets": "frontend.targets",
	"subrequests.describe": "frontend.subrequests.describe",
}

// parseCall reads --call and --check; nil means a build.
func parseCall(call string, check bool) (*frontendCall, error) {
	if check {
		if call != "" && call != "build" && call != "check" {
			return nil, fmt.Errorf("--check is --call=check: it cannot be given with --call=%s", call)
		}
		call = "check"
	}
	name, rest, _ := strings.Cut(call, ",")
	if call == "" || name == "build" {
		return nil, nil
	}
	c := &frontendCall{name: frontendCalls[name]}
	if c.name == "" {
		return nil, fmt.Errorf("--call %s: want build, check, outline or targets", call)
	}
	fields, err := parseCSV(rest, "--call")
	if err != nil {
		return nil, err
	}
	for key, value := range fields {
		switch {
		case key == "format" && (value == "text" || value == ""):
		case key == "format" && value == "json":
			c.format = value
		case key == "ignorestatus" && (value == "true" || value == "false"):
			c.ignoreStatus = value == "true"
		default:
			return nil, fmt.Errorf("--call %s: not supported: %s=%s", call, key, value)
		}
	}
	return c, nil
}

// call asks the frontend and prints its answer.
func (a *app) call(ctx context.Context, c *frontendCall, solve bkclient.SolveOpt, progress string) error {
	client, err := a.buildkit(ctx)
	if err != nil {
		return err
	}
	mode := progressui.DisplayMode(progress)
	if mode == progressui.AutoMode || mode == "" {
		mode = progressui.QuietMode // the answer is what is wanted
	}
	display, err := progressui.NewDisplay(a.stderr(), mode)
	if err != nil {
		return fmt.Errorf("--progress %s: %w", progress, err)
	}
	attrs := maps.Clone(solve.FrontendAttrs)
	for key := range attrs {
		if key == buildkitapi.HostAttr || strings.HasPrefix(key, buildkitapi.LocalDirAttr) {
			delete(attrs, key) // the request is made through the session's gateway
		}
	}
	attrs["requestid"] = c.name
	frontend := solve.Frontend
	solve.Frontend, solve.Exports = "", nil
	var answer map[string][]byte
	events := make(chan *bkclient.SolveStatus)
	group := errgroup.Group{}
	group.Go(func() error {
		_, err := client.Build(ctx, solve, "slipway", func(ctx context.Context, g gwclient.Client) (*gwclient.Result, error) {
			res, err := g.Solve(ctx, gwclient.SolveRequest{Frontend: frontend, FrontendOpt: attrs})
			if err != nil {
				return nil, err
			}
			answer = res.Metadata
			return gwclient.NewResult(), nil
		}, events)
		return err
	})
	group.Go(func() error {
		_, err := display.UpdateFrom(context.WithoutCancel(ctx), events)
		return err
	})
	if err := group.Wait(); err != nil {
		return a.buildError(ctx, err, nil)
	}
	return c.print(a.stdout(), answer)
}

// print shows the answer. A check that has failed is an error.
func (c *frontendCall) print(w io.Writer, answer map[string][]byte) error {
	text, ok := answer["result.txt"]
	if c.format == "json" || !ok {
		if text, ok = answer["result.json"]; !ok {
			return fmt.Errorf("the frontend does not answer %s", c.name)
		}
	}
	if c.name == frontendCalls["check"] {
		return c.printCheck(w, answer["result.json"])
	}
	_, err := fmt.Fprintln(w, strings.TrimRight(string(text), "\n"))
	return err
}

func (c *frontendCall) printCheck(w io.Writer, data []byte) error {
	var results lint.LintResults
	if err := json.Unmarshal(data, &results); err != nil {
		return fmt.Errorf("read the result of the check: %w", err)
	}
	switch n := len(results.Warnings); {
	case c.format == "json":
		fmt.Fprintln(w, strings.TrimRight(string(data), "\n"))
	default:
		if err := results.PrintTo(w, nil); err != nil {
			return err
		}
		if results.Error != nil {
			results.PrintErrorTo(w, nil)
		}
		switch {
		case n == 1:
			fmt.Fprintln(w, "Check complete, 1 warning has been found!")
		case n > 1:
			fmt.Fprintf(w, "Check complete, %d warnings have been found!\n", n)
		case results.Error == nil:
			fmt.Fprintln(w, "Check complete, no warnings found.")
		}
	}
	if results.Error != nil && !c.ignoreStatus {
		return errors.New(results.Error.Message)
	}
	return nil
}
