// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	mobyclient "github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newPullCommand(a *app) *cobra.Command {
	var quiet bool
	var platform string
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] NAME[:TAG|@DIGEST]",
		Short: "Fetch an image from a registry into the local store",
		Args:  args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			cli, err := a.docker(ctx)
			if err != nil {
				return err
			}
			out := a.out
			if quiet {
				out = io.Discard
			}
			name, err := pullImage(ctx, cli, args[0], platform, out)
			if err == nil {
				fmt.Fprintln(a.out, name)
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the name")
	cmd.Flags().StringVar(&platform, "platform", "", "platform to fetch, OS/ARCH[/VARIANT] (default: this machine's)")
	return cmd
}

// pullImage pulls ref, printing progress, and returns its full name.
func pullImage(ctx context.Context, cli *mobyclient.Client, ref, platform string, progress io.Writer) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", ref, err)
	}
	auth, err := registryAuth(ref)
	if err != nil {
		return "", err
	}
	opts := mobyclient.ImagePullOptions{RegistryAuth: auth}
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return "", fmt.Errorf("--platform %q: %w", platform, err)
		}
		opts.Platforms = []ocispec.Platform{p}
	}
	if reference.IsNameOnly(named) {
		named = reference.TagNameOnly(named)
		fmt.Fprintln(progress, "Using default tag: latest")
	}
	resp, err := cli.ImagePull(ctx, named.String(), opts)
	if err != nil {
		return "", interrupted(ctx, apiError(err))
	}
	defer resp.Close()
	return named.String(), interrupted(ctx, showProgress(progress, resp.JSONMessages(ctx), nil))
}
