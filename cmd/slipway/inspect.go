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
		Use:   "inspect [OPTIONS] NAME|ID...",
		Short: "Show everything about containers and images, as JSON",
		Args:  args(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch kind {
			case "", "image", "container":
			default:
				return &usageError{fmt.Errorf("--type %q: want image or container", kind), cmd.CommandPath()}
			}
			print, err := a.formatter(format)
			if err != nil {
				return err
			}
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			found := []json.RawMessage{}
			failed := a.eachArg(args, func(name string) error {
				raw, err := inspect(cmd.Context(), cli, kind, name)
				if err == nil {
					found = append(found, raw)
				}
				return err
			})
			if print == nil {
				data, err := json.MarshalIndent(found, "", "    ")
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "%s\n", data)
				return failed
			}
			for _, raw := range found {
				dec := json.NewDecoder(bytes.NewReader(raw))
				dec.UseNumber() // sizes and times must not turn into floats
				var v any
				if err := dec.Decode(&v); err != nil {
					return err
				}
				if err := print(v); err != nil {
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

// inspect returns the document of the container of that name or, failing that, of the image.
func inspect(ctx context.Context, cli *mobyclient.Client, kind, name string) (json.RawMessage, error) {
	if kind != "image" {
		res, err := cli.ContainerInspect(ctx, name, mobyclient.ContainerInspectOptions{})
		if err == nil {
			return res.Raw, nil
		}
		if !isNotFound(err) || kind == "container" {
			return nil, apiError(err)
		}
	}
	var raw bytes.Buffer
	_, err := cli.ImageInspect(ctx, name, mobyclient.ImageInspectWithRawResponse(&raw))
	switch {
	case err == nil:
		return raw.Bytes(), nil
	case isNotFound(err) && kind == "":
		return nil, &clientError{fmt.Sprintf("no such object: %s (neither a container nor an image of the local store; slipway pull fetches images)", name), errors.Unwrap(err)}
	}
	return nil, apiError(err)
}
