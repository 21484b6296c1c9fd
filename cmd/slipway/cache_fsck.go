// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cmd/slipway/clientgc"
	"github.com/seed-68981b69/slipway/engine"
)

func newCacheFsckCommand(a *app) *cobra.Command {
	var repair bool
	var format string
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Check every blob, layer and record of the state directory",
		Long: `Check every blob, layer and record of the state directory against its digest, and what names what;
cache mounts, volumes and the build history as far as anybody can know how they should be.

The engine must not be running: 'slipway daemon stop' ends it. With --repair, what is damaged is moved to the folder
"quarantine" of the state directory and gets pulled or built again when it is needed; what nothing names is removed.
The exit status is 1 when damage is left.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return &usageError{fmt.Errorf("--format %s: want table or json", format), cmd.CommandPath()}
			}
			clientgc.End()
			return a.cacheFsck(cmd.Context(), repair, format)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "put what is damaged into quarantine, remove what nothing names")
	cmd.Flags().StringVar(&format, "format", "table", "table or json")
	return cmd
}

func (a *app) cacheFsck(ctx context.Context, repair bool, format string) error {
	if a.host != "" {
		return errors.New("cache fsck reads a state directory itself, no engine: give --root instead of --host")
	}
	if _, err := os.Stat(filepath.Join(a.root, "version")); err != nil {
		return fmt.Errorf("%s is no state directory: %w", a.root, reason(err))
	}
	problems, err := engine.Check(ctx, a.root, cache.CheckOptions{Repair: repair, Progress: a.fsckProgress(format)})
	var locked *cache.LockedError
	if errors.As(err, &locked) {
		return fmt.Errorf("an engine (process %d) has %s open: stop it first ('slipway daemon stop')", locked.Pid, a.root)
	}
	if err != nil {
		return err
	}
	if err := a.printProblems(problems, format); err != nil {
		return err
	}
	left := 0
	for _, p := range problems {
		if p.Repair == "" && p.Kind != cache.ProblemOrphan {
			left++
		}
	}
	switch {
	case left == 0:
		return nil
	case repair:
		return fmt.Errorf("%s cannot be repaired here", count(left, "problem"))
	}
	return fmt.Errorf("%s found: 'slipway cache fsck --repair' puts what is damaged into quarantine", count(left, "problem"))
}

// fsckProgress shows on a terminal how far the check is.
func (a *app) fsckProgress(format string) func(string, int, int) {
	f, ok := a.err.(*os.File)
	if !ok || format != "table" {
		return nil
	}
	if st, err := f.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	return func(what string, done, total int) { fmt.Fprintf(f, "\r\x1b[K%s %d/%d\r", what, done, total) }
}

func (a *app) printProblems(problems []cache.Problem, format string) error {
	if format == "json" {
		if problems == nil {
			problems = []cache.Problem{}
		}
		enc := json.NewEncoder(a.stdout())
		enc.SetIndent("", "  ")
		return enc.Encode(problems)
	}
	if len(problems) == 0 {
		_, err := fmt.Fprintln(a.stdout(), "nothing is wrong")
		return err
	}
	w := tabwriter.NewWriter(a.stdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KIND\tNAME\tPART\tREPAIR\tDETAIL")
	for _, p := range problems {
		part, done, detail := p.Part, p.Repair, p.Detail
		if part == "" {
			part = "-"
		}
		if done == "" {
			done = "-"
		}
		if p.Advice != "" {
			detail += " (" + p.Advice + ")"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", p.Kind, p.Name, part, done, detail)
	}
	return w.Flush()
}
