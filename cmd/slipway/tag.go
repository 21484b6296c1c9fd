// SPDX-License-Identifier: Apache-2.0

package main

import (
	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newTagCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "tag SOURCE[:TAG] TARGET[:TAG]",
		Short:             "Give an image one more name",
		Args:              args(2, 2),
		ValidArgsFunction: a.offering(1, imageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			cli, err := a.docker(cmd.Context())
			if err != nil {
				return err
			}
			_, err = cli.ImageTag(cmd.Context(), mobyclient.ImageTagOptions{Source: args[0], Target: args[1]})
			return apiError(err)
		},
	}
}
