// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
)

func newCachePruneCommand(a *app) *cobra.Command {
	var format string
	var filters []string
	var all, verbose bool
	var keep string
	var reserved, maxUsed, minFree size
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Delete what takes room and nothing uses",
		Long: `Delete results of build steps and cache mounts that no running build uses, least recently used first.

With --max-used-space or --min-free-space only as much as that needs; otherwise everything that matches. Images and their
layers stay ('slipway rmi' removes them). Without --all, so do results that are also images'.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, err := a.formatter(format, nil)
			if err != nil {
				return err
			}
			f, age, err := usageFilters(filters)
			if err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			if keep != "" {
				if age, err = parseAge(keep); err != nil {
					return &usageError{fmt.Errorf("--keep-duration: %w", err), cmd.CommandPath()}
				}
			}
			client, err := a.buildkit(cmd.Context())
			if err != nil {
				return err
			}
			opts := []bkclient.PruneOption{
				bkclient.WithFilter(f), bkclient.WithKeepOpt(age, int64(reserved), int64(maxUsed), int64(minFree)),
			}
			if all {
				opts = append(opts, bkclient.PruneAll)
			}
			list, err := prune(cmd, client, opts)
			if printErr := a.printPruned(list, print, verbose); err == nil {
				err = printErr
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&all, "all", "a", false, "delete internal things and what images share, too")
	flags.StringArrayVarP(&filters, "filter", "f", nil, "delete only what matches one of these; until=24h: not used for so long")
	flags.StringVar(&keep, "keep-duration", "", "keep what was used within this time (36h, 7d)")
	flags.Var(&reserved, "reserved-space", "always keep this much (10GB)")
	flags.Var(&maxUsed, "max-used-space", "delete until the cache takes no more than this")
	flags.Var(&minFree, "min-free-space", "delete until this much of the disk is free")
	flags.StringVar(&format, "format", "", "json (one document a line), table, or a Go template")
	flags.BoolVarP(&verbose, "verbose", "v", false, "show everything that is known")
	return cmd
}

// prune returns what was deleted, also before an error.
func prune(cmd *cobra.Command, client *bkclient.Client, opts []bkclient.PruneOption) ([]*bkclient.UsageInfo, error) {
	deleted := make(chan bkclient.UsageInfo)
	collected := make(chan []*bkclient.UsageInfo)
	go func() {
		var list []*bkclient.UsageInfo
		for u := range deleted {
			list = append(list, &u)
		}
		collected <- list
	}()
	err := client.Prune(cmd.Context(), deleted, opts...)
	close(deleted)
	return <-collected, err
}

func (a *app) printPruned(list []*bkclient.UsageInfo, format *formatter, verbose bool) error {
	if format != nil {
		return printAll(format, list)
	}
	var total int64
	for _, u := range list {
		total += u.Size
	}
	var err error
	switch {
	case verbose:
		err = a.printUsageVerbose(list)
	case len(list) > 0:
		err = a.printUsage(list)
		fmt.Fprintln(a.out)
	}
	fmt.Fprintf(a.out, "Freed:\t%s\n", units.HumanSizeWithPrecision(float64(total), 4))
	return err
}

// size is a flag in bytes, with the units that docker takes ("10GB", "512mb").
type size int64

// String implements pflag.Value.
func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return units.HumanSize(float64(*s))
}

// Set implements pflag.Value.
func (s *size) Set(text string) error {
	n, err := units.FromHumanSize(text)
	if err != nil {
		return err
	}
	*s = size(n)
	return nil
}

// Type implements pflag.Value.
func (*size) Type() string { return "bytes" }
