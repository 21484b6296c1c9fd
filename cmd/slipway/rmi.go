// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newRmiCommand(a *app) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rmi [OPTIONS] IMAGE...",
		Short:             "Remove names of images, and images with their last name",
		Args:              args(1, -1),
		ValidArgsFunction: a.offering(-1, imageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			return a.eachArg(args, func(ref string) error {
				res, err := cli.ImageRemove(cmd.Context(), ref, mobyclient.ImageRemoveOptions{Force: force, PruneChildren: true})
				if isNotFound(err) && force {
					return nil
				}
				if err != nil {
					return apiError(err)
				}
				for _, item := range res.Items {
					if item.Untagged != "" {
						fmt.Fprintln(a.out, "Untagged:", item.Untagged)
					}
					if item.Deleted != "" {
						fmt.Fprintln(a.out, "Deleted:", item.Deleted)
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove an image with several names, or that a stopped container uses")
	return cmd
}
