// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/image"
	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// imageRow is one line of `slipway images`, with docker's names for the fields.
type imageRow struct {
	Containers   string
	CreatedAt    string
	CreatedSince string
	Digest       string
	ID           string
	Repository   string
	SharedSize   string
	Size         string
	Tag          string
	UniqueSize   string
	VirtualSize  string
}

// imageColumns are docker's headings.
var imageColumns = map[string]string{
	"Containers": "CONTAINERS", "CreatedAt": "CREATED AT", "CreatedSince": "CREATED", "Digest": "DIGEST", "ID": "IMAGE ID", "Repository": "REPOSITORY",
	"SharedSize": "SHARED SIZE", "Size": "SIZE", "Tag": "TAG", "UniqueSize": "UNIQUE SIZE", "VirtualSize": "VIRTUAL SIZE",
}

func newImagesCommand(a *app) *cobra.Command {
	var all, quiet, noTrunc, digests bool
	var template string
	var filters []string
	cmd := &cobra.Command{
		Use:   "images [OPTIONS] [REPOSITORY[:TAG]]",
		Short: "List the images of the local store",
		Args:  args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := a.formatter(template, imageColumns)
			if err != nil {
				return err
			}
			opts := mobyclient.ImageListOptions{All: all}
			if opts.Filters, err = parseFilters(filters); err != nil {
				return err
			}
			if len(args) == 1 {
				opts.Filters = opts.Filters.Add("reference", args[0])
			}
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			list, err := cli.ImageList(cmd.Context(), opts)
			if err != nil {
				return apiError(err)
			}
			if quiet {
				for _, img := range list.Items {
					id := img.ID
					if !noTrunc {
						id = shortID(id)
					}
					fmt.Fprintln(a.out, id)
				}
				return nil
			}
			var rows []imageRow
			for _, img := range list.Items {
				rows = append(rows, imageRows(img, noTrunc, time.Now())...)
			}
			if format != nil {
				return printAll(format, rows)
			}
			header := "REPOSITORY\tTAG\tIMAGE ID\tCREATED\tSIZE"
			if digests {
				header = "REPOSITORY\tTAG\tDIGEST\tIMAGE ID\tCREATED\tSIZE"
			}
			return a.table(header, func(line func(...string)) {
				for _, r := range rows {
					cells := []string{r.Repository, r.Tag, r.ID, r.CreatedSince, r.Size}
					if digests {
						cells = slices.Insert(cells, 2, r.Digest)
					}
					line(cells...)
				}
			})
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&all, "all", "a", false, "show all images (there are no intermediate ones)")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print only IDs")
	flags.BoolVar(&noTrunc, "no-trunc", false, "do not shorten IDs")
	flags.BoolVar(&digests, "digests", false, "show digests")
	flags.StringVar(&template, "format", "", "json (one document a line), a Go template, or table and a template of columns")
	flags.StringArrayVarP(&filters, "filter", "f", nil, "show only what matches: dangling=, label=, reference=, before=, since=, until=")
	return cmd
}

// parseFilters reads NAME=VALUE.
func parseFilters(list []string) (mobyclient.Filters, error) {
	filters := make(mobyclient.Filters)
	for _, f := range list {
		name, value, ok := strings.Cut(f, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--filter %q: want NAME=VALUE", f)
		}
		filters = filters.Add(name, value)
	}
	return filters, nil
}

// imageRows is a row for each tag of img, or one without.
func imageRows(img image.Summary, noTrunc bool, now time.Time) []imageRow {
	base := imageRow{
		Containers: "N/A", SharedSize: "N/A", UniqueSize: "N/A",
		Digest: "<none>", Repository: "<none>", Tag: "<none>",
		ID: img.ID, Size: units.HumanSizeWithPrecision(float64(img.Size), 3),
		CreatedAt: "N/A", CreatedSince: "N/A",
	}
	base.VirtualSize = base.Size
	if img.Created > 0 {
		created := time.Unix(img.Created, 0)
		base.CreatedAt = created.String()
		base.CreatedSince = units.HumanDuration(now.Sub(created)) + " ago"
	}
	if !noTrunc {
		base.ID = shortID(img.ID)
	}
	digests := map[string]string{}
	for _, ref := range img.RepoDigests {
		repo, digest, _ := strings.Cut(ref, "@")
		digests[repo] = digest
	}
	var rows []imageRow
	for _, ref := range img.RepoTags {
		row := base
		if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
			row.Repository, row.Tag = ref[:i], ref[i+1:]
		} else {
			row.Repository = ref
		}
		if d := digests[row.Repository]; d != "" {
			row.Digest = d
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		return rows
	}
	for _, ref := range img.RepoDigests {
		row := base
		row.Repository, row.Digest, _ = strings.Cut(ref, "@")
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		rows = append(rows, base)
	}
	return rows
}
