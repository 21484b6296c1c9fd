// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newInspectCommand(a *app) *cobra.Command {
	var format, kind string
	cmd := &cobra.Command{
		Use:               "inspect [OPTIONS] NAME|ID...",
		Short:             "Show everything about containers and images, as JSON",
		Args:              args(1, -1),
		ValidArgsFunction: a.offering(-1, imagesAndContainers),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch kind {
			case "", "image", "container":
			default:
				return &usageError{fmt.Errorf("--type %q: want image or container", kind), cmd.CommandPath()}
			}
			print, err := a.formatter(format, nil)
			if err != nil {
				return err
			}
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			var found []document
			failed := a.eachArg(args, func(name string) error {
				d, err := inspect(cmd.Context(), cli, kind, name)
				if err == nil {
					found = append(found, d)
				}
				return err
			})
			if print == nil {
				raws := []json.RawMessage{}
				for _, d := range found {
					raws = append(raws, d.raw)
				}
				data, err := json.MarshalIndent(raws, "", "    ")
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "%s\n", data)
				return failed
			}
			for _, d := range found {
				dec := json.NewDecoder(bytes.NewReader(d.raw))
				dec.UseNumber() // sizes and times must not turn into floats
				var v any
				if err := dec.Decode(&v); err != nil {
					return err
				}
				values := []any{d.value, v} // docker's order
				if format == "json" {
					values = []any{v}
				}
				if err := print.print(values[0], values[1:]...); err != nil {
					return err
				}
			}
			return failed
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "json, or a Go template")
	cmd.Flags().StringVar(&kind, "type", "", "look only for an image or a container")
	return cmd
}

// document is what the engine knows about a thing: as its API's type, in which a template may name what is not set,
// and as it came.
type document struct {
	value any
	raw   json.RawMessage
}

// inspect returns the document of the container of that name or, failing that, of the image.
func inspect(ctx context.Context, cli *mobyclient.Client, kind, name string) (document, error) {
	if kind != "image" {
		res, err := cli.ContainerInspect(ctx, name, mobyclient.ContainerInspectOptions{})
		if err == nil {
			return document{res.Container, res.Raw}, nil
		}
		if !isNotFound(err) || kind == "container" {
			return document{}, apiError(err)
		}
	}
	var raw bytes.Buffer
	res, err := cli.ImageInspect(ctx, name, mobyclient.ImageInspectWithRawResponse(&raw))
	switch {
	case err == nil:
		return document{res.InspectResponse, raw.Bytes()}, nil
	case isNotFound(err) && kind == "":
		return document{}, &clientError{fmt.Sprintf("no such object: %s (neither a container nor an image of the local store; slipway pull fetches images)", name), errors.Unwrap(err)}
	}
	return document{}, apiError(err)
}
