// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"

	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/solver"
)

func newLogsCommand(a *app) *cobra.Command {
	var build, last bool
	var step string
	cmd := &cobra.Command{
		Use:   "logs --build [flags] [BUILD | --last]",
		Short: "Print all output of the steps of a build",
		Args:  args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := buildRef(args, last)
			switch {
			case err != nil:
				return &usageError{err, cmd.CommandPath()}
			case !build:
				return errors.New("not supported yet: logs of containers (for those of a build add --build)")
			}
			client, _, doc, err := a.explanation(cmd.Context(), ref)
			if err != nil {
				return err
			}
			if step != "" {
				one, err := findStep(doc, step)
				if err != nil {
					return err
				}
				return printLog(cmd.Context(), client, one, a.stdout())
			}
			return printLogs(cmd.Context(), client, doc, a.stdout())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&build, "build", false, "the logs of a build")
	f.BoolVar(&last, "last", false, "the newest build (the default)")
	f.StringVar(&step, "step", "", "only the output of this step, also when it was found in the cache: its number in 'slipway explain', or a part of its name")
	return cmd
}

// printLogs prints the output of every step that ran, under its name.
func printLogs(ctx context.Context, client *bkclient.Client, doc *explain.Document, w io.Writer) error {
	for _, s := range doc.Steps {
		if s.Number == 0 {
			continue
		}
		state := string(s.Outcome)
		switch s.Outcome {
		case solver.Found, solver.Skipped:
			state = "cached"
		case solver.Failed:
			state = "failed: " + s.Error
		}
		if _, err := fmt.Fprintf(w, "#%d %s (%s)\n", s.Number, s.Name, state); err != nil {
			return err
		}
		if s.Outcome != solver.Ran && s.Outcome != solver.Failed {
			continue
		}
		if err := printLog(ctx, client, s, w); err != nil {
			return err
		}
	}
	return nil
}

// printLog prints the output of one step, which ends with the end of a line.
func printLog(ctx context.Context, client *bkclient.Client, s *explain.Step, w io.Writer) error {
	if s.Log == "" {
		return nil
	}
	end := byte('\n')
	err := copyContent(ctx, client, s.Log.String(), func(b []byte) error {
		if len(b) > 0 {
			end = b[len(b)-1]
		}
		_, err := w.Write(b)
		return err
	})
	if err != nil {
		return fmt.Errorf("log of step %d: %w", s.Number, err)
	}
	if end != '\n' {
		_, err = w.Write([]byte{'\n'})
	}
	return err
}
