// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newRmCommand(a *app) *cobra.Command {
	var force, volumes bool
	cmd := &cobra.Command{
		Use:               "rm [OPTIONS] CONTAINER...",
		Short:             "Remove containers",
		Args:              args(1, -1),
		ValidArgsFunction: a.offering(-1, containerNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			return a.eachArg(args, func(name string) error {
				_, err := cli.ContainerRemove(cmd.Context(), name, mobyclient.ContainerRemoveOptions{Force: force, RemoveVolumes: volumes})
				if isNotFound(err) && force {
					return nil
				}
				if err != nil {
					return apiError(err)
				}
				fmt.Fprintln(a.out, name)
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill a running container first")
	cmd.Flags().BoolVarP(&volumes, "volumes", "v", false, "remove the container's anonymous volumes too")
	return cmd
}
