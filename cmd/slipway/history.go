// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// historyRow is one line of `slipway history`, with docker's names for the fields.
type historyRow struct {
	Comment      string
	CreatedAt    string
	CreatedBy    string
	CreatedSince string
	ID           string
	Size         string
}

// historyColumns are docker's headings.
var historyColumns = map[string]string{
	"Comment": "COMMENT", "CreatedAt": "CREATED AT", "CreatedBy": "CREATED BY", "CreatedSince": "CREATED", "ID": "IMAGE", "Size": "SIZE",
}

func newHistoryCommand(a *app) *cobra.Command {
	var template string
	var noTrunc, quiet bool
	cmd := &cobra.Command{
		Use:               "history [OPTIONS] IMAGE",
		Short:             "Show the steps that made an image",
		Args:              args(1, 1),
		ValidArgsFunction: a.offering(1, imageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := a.formatter(template, historyColumns)
			if err != nil {
				return err
			}
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			res, err := cli.ImageHistory(cmd.Context(), args[0])
			if err != nil {
				return apiError(err)
			}
			var rows []historyRow
			for _, h := range res.Items {
				created := time.Unix(h.Created, 0)
				row := historyRow{
					Comment: h.Comment, CreatedBy: strings.ReplaceAll(h.CreatedBy, "\t", " "), ID: h.ID,
					CreatedAt: "N/A", CreatedSince: "N/A",
					Size: units.HumanSizeWithPrecision(float64(h.Size), 3),
				}
				if h.Created > 0 {
					row.CreatedAt = created.Format(time.RFC3339)
					row.CreatedSince = units.HumanDuration(time.Since(created)) + " ago"
				}
				if !noTrunc {
					if strings.HasPrefix(row.ID, "sha256:") {
						row.ID = shortID(row.ID)
					}
					row.CreatedBy = ellipsis(row.CreatedBy, 45)
				}
				rows = append(rows, row)
			}
			switch {
			case quiet:
				for _, r := range rows {
					fmt.Fprintln(a.out, r.ID)
				}
				return nil
			case format == nil:
				return a.table("IMAGE\tCREATED\tCREATED BY\tSIZE\tCOMMENT", func(line func(...string)) {
					for _, r := range rows {
						line(r.ID, r.CreatedSince, r.CreatedBy, r.Size, r.Comment)
					}
				})
			}
			return printAll(format, rows)
		},
	}
	cmd.Flags().StringVar(&template, "format", "", "json (one document a line), a Go template, or table and a template of columns")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "do not shorten IDs and commands")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only IDs")
	return cmd
}

// ellipsis shortens s to n characters; line breaks would break a table.
func ellipsis(s string, n int) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), " ")
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}
