// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// containerRow is one line of `slipway ps`, with docker's names for the fields.
type containerRow struct {
	Command      string
	CreatedAt    string
	ID           string
	Image        string
	Labels       string
	LocalVolumes string
	Mounts       string
	Names        string
	Networks     string
	Ports        string
	RunningFor   string
	Size         string
	State        string
	Status       string
}

// containerColumns are docker's headings.
var containerColumns = map[string]string{
	"Command": "COMMAND", "CreatedAt": "CREATED AT", "ID": "CONTAINER ID", "Image": "IMAGE", "Labels": "LABELS", "LocalVolumes": "LOCAL VOLUMES",
	"Mounts": "MOUNTS", "Names": "NAMES", "Networks": "NETWORKS", "Ports": "PORTS", "RunningFor": "CREATED", "Size": "SIZE", "State": "STATE",
	"Status": "STATUS",
}

func newPsCommand(a *app) *cobra.Command {
	var all, quiet, noTrunc bool
	var template string
	var filters []string
	cmd := &cobra.Command{
		Use:   "ps [OPTIONS]",
		Short: "List containers",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := a.formatter(template, containerColumns)
			if err != nil {
				return err
			}
			opts := mobyclient.ContainerListOptions{All: all}
			if opts.Filters, err = parseFilters(filters); err != nil {
				return err
			}
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			list, err := cli.ContainerList(cmd.Context(), opts)
			if err != nil {
				return apiError(err)
			}
			if quiet {
				for _, c := range list.Items {
					id := c.ID
					if !noTrunc {
						id = shortID(id)
					}
					fmt.Fprintln(a.out, id)
				}
				return nil
			}
			if format != nil {
				var rows []containerRow
				for _, c := range list.Items {
					rows = append(rows, newContainerRow(c, noTrunc, time.Now()))
				}
				return printAll(format, rows)
			}
			return a.table("CONTAINER ID\tIMAGE\tCOMMAND\tCREATED\tSTATUS\tPORTS\tNAMES", func(line func(...string)) {
				for _, c := range list.Items {
					r := newContainerRow(c, noTrunc, time.Now())
					line(r.ID, r.Image, r.Command, r.RunningFor, r.Status, r.Ports, r.Names)
				}
			})
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&all, "all", "a", false, "show stopped containers too")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print only IDs")
	flags.BoolVar(&noTrunc, "no-trunc", false, "do not shorten")
	flags.StringVar(&template, "format", "", "json (one document a line), a Go template, or table and a template of columns")
	flags.StringArrayVarP(&filters, "filter", "f", nil, "show only what matches: id=, name=, status=, label=, exited=, ancestor=, before=, since=")
	return cmd
}

func newContainerRow(c container.Summary, noTrunc bool, now time.Time) containerRow {
	created := time.Unix(c.Created, 0)
	row := containerRow{
		Command: strconv.Quote(c.Command), CreatedAt: created.String(), ID: c.ID, Image: c.Image,
		LocalVolumes: "0", Networks: c.HostConfig.NetworkMode, Ports: portList(c.Ports), Size: "N/A",
		RunningFor: units.HumanDuration(now.Sub(created)) + " ago", State: string(c.State), Status: c.Status,
	}
	if !noTrunc {
		row.ID = shortID(c.ID)
		row.Command = strconv.Quote(ellipsis(c.Command, 20))
	}
	var names, labels, mounts []string
	for _, n := range c.Names {
		names = append(names, strings.TrimPrefix(n, "/"))
	}
	for k, v := range c.Labels {
		labels = append(labels, k+"="+v)
	}
	volumes := 0
	for _, m := range c.Mounts {
		if m.Name != "" {
			volumes++
			mounts = append(mounts, m.Name)
		} else {
			mounts = append(mounts, m.Source)
		}
	}
	row.Names, row.Labels, row.Mounts = strings.Join(names, ","), strings.Join(slices.Sorted(slices.Values(labels)), ","), strings.Join(mounts, ",")
	row.LocalVolumes = strconv.Itoa(volumes)
	return row
}

// portList is docker's short form: "0.0.0.0:8080->80/tcp".
func portList(ports []container.PortSummary) string {
	var out []string
	for _, p := range ports {
		text := fmt.Sprintf("%d/%s", p.PrivatePort, p.Type)
		if p.PublicPort != 0 {
			text = net.JoinHostPort(p.IP.String(), strconv.Itoa(int(p.PublicPort))) + "->" + text
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}
