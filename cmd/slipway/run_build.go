// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/pflag"

	"github.com/seed-68981b69/slipway/exporter/snapshot"
)

// checkBuild refuses flags of --build without it, and what it cannot do.
func (o *runOptions) checkBuild(flags *pflag.FlagSet) error {
	if flags.Changed("build") {
		switch {
		case o.build == "":
			return errors.New("--build: which directory?")
		case o.build == "-" && o.interactive:
			return errors.New("--build -: standard input is for the build, so leave out --interactive")
		case o.pull == "never":
			return errors.New("--pull never: is not for --build, which fetches the base images that it needs")
		}
		return nil
	}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(buildOptions).addFlags(own)
	var err error
	own.VisitAll(func(f *pflag.Flag) {
		if err == nil && flags.Changed(f.Name) {
			err = fmt.Errorf("--%s: is for --build DIR", f.Name)
		}
	})
	return err
}

// buildSnapshot builds what --build says and returns the name by which the engine runs it, for a moment.
func (o *runOptions) buildSnapshot(ctx context.Context, a *app) (string, error) {
	b := &o.built
	b.quiet, b.pull = o.quiet, o.pull == "always"
	if o.platform != "" {
		b.platforms = []string{o.platform}
	}
	solve, cleanup, err := b.request(ctx, a, o.build)
	if err != nil {
		return "", err
	}
	defer cleanup()
	solve.Exports = []bkclient.ExportEntry{{Type: snapshot.Type}}
	_, response, err := a.solve(ctx, b, solve)
	if err != nil {
		return "", err
	}
	name := response.ExporterResponse[snapshot.NameKey]
	if name == "" {
		return "", errors.New("--build: this engine cannot run the result of a build without an image")
	}
	return name, nil
}
