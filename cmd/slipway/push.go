// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/distribution/reference"
	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newPushCommand(a *app) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:               "push [OPTIONS] NAME[:TAG]",
		Short:             "Send an image to its registry",
		Args:              args(1, 1),
		ValidArgsFunction: a.offering(1, imageNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			named, err := reference.ParseNormalizedNamed(args[0])
			if err != nil {
				return fmt.Errorf("image name %q: %w", args[0], err)
			}
			if _, ok := named.(reference.Digested); ok {
				return fmt.Errorf("image name %q: push wants a tag, not a digest", args[0])
			}
			named = reference.TagNameOnly(named)
			auth, err := registryAuth(args[0])
			if err != nil {
				return err
			}
			cli, err := a.docker(ctx)
			if err != nil {
				return err
			}
			resp, err := cli.ImagePush(ctx, named.String(), mobyclient.ImagePushOptions{RegistryAuth: auth})
			if err != nil {
				return interrupted(ctx, apiError(err))
			}
			defer resp.Close()
			out := a.out
			if quiet {
				out = io.Discard
			}
			if err := showProgress(out, resp.JSONMessages(ctx), nil); err != nil {
				return interrupted(ctx, err)
			}
			if quiet {
				fmt.Fprintln(a.out, named.String())
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the name")
	return cmd
}
