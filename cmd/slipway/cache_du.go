// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
)

func newCacheDuCommand(a *app) *cobra.Command {
	var format string
	var filters []string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "du [OPTIONS]",
		Short: "Show what takes room",
		Long: `Show what takes room in the state directory: results of build steps, cache mounts, and what only images have.

A layer that several results share is counted once. A size with a star is also an image's: it goes with the image.
Filters are those of buildctl: type==exec.cachemount, description~=RUN, inuse, mutable, shared, private, id==…`,
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
			client, err := a.buildkit(cmd.Context())
			if err != nil {
				return err
			}
			list, err := client.DiskUsage(cmd.Context(), bkclient.WithFilter(f), bkclient.WithAgeLimit(age))
			if err != nil {
				return err
			}
			if print != nil {
				return printAll(print, list)
			}
			if verbose {
				return a.printUsageVerbose(list)
			}
			if err := a.printUsage(list); err != nil {
				return err
			}
			return a.printUsageSum(list)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&format, "format", "", "json (one document a line), table, or a Go template")
	flags.StringArrayVarP(&filters, "filter", "f", nil, "show only what matches one of these; until=24h: not used for so long")
	flags.BoolVarP(&verbose, "verbose", "v", false, "show everything that is known")
	return cmd
}

// usageFilters reads filters: containerd's, where FIELD=VALUE means FIELD==VALUE, and until=DURATION.
func usageFilters(list []string) (filters []string, age time.Duration, err error) {
	for _, f := range list {
		if value, ok := strings.CutPrefix(f, "until="); ok {
			if age, err = parseAge(value); err != nil {
				return nil, 0, fmt.Errorf("--filter %s: %w", f, err)
			}
			continue
		}
		if i := strings.IndexByte(f, '='); i > 0 && !strings.ContainsAny(f[i-1:i], "!~=") && !strings.HasPrefix(f[i+1:], "=") {
			f = f[:i] + "=" + f[i:]
		}
		filters = append(filters, f)
	}
	return filters, age, nil
}

// parseAge is a duration as Go writes them, or days: "7d".
func parseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n float64
		if _, err := fmt.Sscanf(days, "%g", &n); err == nil && n >= 0 {
			return time.Duration(n * float64(24*time.Hour)), nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is no duration: want 90m, 36h or 7d", s)
	}
	return d, nil
}

func (a *app) printUsage(list []*bkclient.UsageInfo) error {
	return a.table("ID\tTYPE\tRECLAIMABLE\tSIZE\tLAST USED\tDESCRIPTION", func(line func(...string)) {
		for _, u := range list {
			line(usageLine(u)...)
		}
	})
}

func usageLine(u *bkclient.UsageInfo) []string {
	id, size, used := u.ID, units.HumanSizeWithPrecision(float64(u.Size), 3), ""
	if u.Mutable {
		id += "*"
	}
	if u.Shared {
		size += "*"
	}
	if u.LastUsedAt != nil {
		used = units.HumanDuration(time.Since(*u.LastUsedAt)) + " ago"
	}
	description := u.Description
	if runes := []rune(description); len(runes) > 60 {
		description = string(runes[:59]) + "…"
	}
	return []string{id, string(u.RecordType), fmt.Sprint(!u.InUse), size, used, description}
}

func (a *app) printUsageVerbose(list []*bkclient.UsageInfo) error {
	w := tabwriter.NewWriter(a.out, 1, 8, 1, '\t', 0)
	for _, u := range list {
		row := func(name string, value any) { fmt.Fprintf(w, "%s:\t%v\n", name, value) }
		row("ID", u.ID)
		if len(u.Parents) > 0 {
			row("Parents", strings.Join(u.Parents, ";"))
		}
		if u.CreatedAt.Unix() > 0 {
			row("Created at", u.CreatedAt)
		}
		row("Mutable", u.Mutable)
		row("Reclaimable", !u.InUse)
		row("Shared", u.Shared)
		row("Size", units.HumanSizeWithPrecision(float64(u.Size), 4))
		row("Description", u.Description)
		row("Usage count", u.UsageCount)
		if u.LastUsedAt != nil {
			row("Last used", u.LastUsedAt)
		}
		row("Type", u.RecordType)
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func (a *app) printUsageSum(list []*bkclient.UsageInfo) error {
	var total, reclaimable, shared int64
	for _, u := range list {
		total += u.Size
		if u.Shared {
			shared += u.Size
		} else if !u.InUse {
			reclaimable += u.Size
		}
	}
	w := tabwriter.NewWriter(a.out, 1, 8, 1, '\t', 0)
	row := func(name string, n int64) {
		fmt.Fprintf(w, "%s:\t%s\n", name, units.HumanSizeWithPrecision(float64(n), 4))
	}
	fmt.Fprintln(w)
	row("Shared", shared)
	row("Private", total-shared)
	row("Reclaimable", reclaimable)
	row("Total", total)
	return w.Flush()
}
