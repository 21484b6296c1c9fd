// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"slices"
	"time"

	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// What the shell offers after the tab key. Nothing here starts an engine, waits long, or complains: a key press is no wish for any of that.

// offerWait is how long a shell waits for an engine that runs.
const offerWait = time.Second

// running says whether an engine listens, without starting one.
func (a *app) running(ctx context.Context) bool {
	if a.standalone {
		return false
	}
	dial := unixDialer(a.socket())
	if tcp, remote := tcpAddress(a.host); remote {
		var err error
		if dial, err = a.tlsDialer(tcp); err != nil {
			return false
		}
	}
	ctx, cancel := context.WithTimeout(ctx, offerWait)
	defer cancel()
	conn, err := dial(ctx)
	return err == nil && conn.Close() == nil
}

// offering makes a completion of what list finds, for the first most arguments; most -1 means for any number.
func (a *app) offering(most int, list func(ctx context.Context, cli *mobyclient.Client) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveDefault
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), offerWait)
		defer cancel()
		if a.settle() != nil || !a.running(ctx) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		cli, err := a.docker(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names, err := list(ctx, cli)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(args, n) }), cobra.ShellCompDirectiveNoFileComp
	}
}

// imageNames are the names of the images that are here.
func imageNames(ctx context.Context, cli *mobyclient.Client) ([]string, error) {
	list, err := cli.ImageList(ctx, mobyclient.ImageListOptions{})
	var names []string
	for _, img := range list.Items {
		names = append(names, img.RepoTags...)
	}
	return names, err
}

// imagesAndContainers are what `inspect` knows.
func imagesAndContainers(ctx context.Context, cli *mobyclient.Client) ([]string, error) {
	images, err := imageNames(ctx, cli)
	containers, containersErr := containerNames(ctx, cli)
	return append(containers, images...), errors.Join(err, containersErr)
}

// containerNames are the names of all containers.
func containerNames(ctx context.Context, cli *mobyclient.Client) ([]string, error) {
	list, err := cli.ContainerList(ctx, mobyclient.ContainerListOptions{All: true})
	var names []string
	for _, c := range list.Items {
		for _, n := range c.Names {
			names = append(names, n[1:]) // "/name"
		}
	}
	return names, err
}
