// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/jsonstream"
	mobyclient "github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newSaveCommand(a *app) *cobra.Command {
	var output, platform string
	cmd := &cobra.Command{
		Use:               "save [flags] IMAGE…",
		Short:             "Write images to an archive, which docker, podman and others load",
		Args:              args(1, -1),
		ValidArgsFunction: a.offering(-1, imageNames),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			ctx := cmd.Context()
			var options []mobyclient.ImageSaveOption
			if platform != "" {
				p, err := platforms.Parse(platform)
				if err != nil {
					return fmt.Errorf("--platform %s: %w", platform, err)
				}
				options = append(options, mobyclient.ImageSaveWithPlatforms(p))
			}
			if output == "" {
				if _, ok := terminal(a.stdout()); ok {
					return errors.New("standard output is a terminal: name a file with -o FILE, or redirect it")
				}
			}
			cli, err := a.docker(ctx)
			if err != nil {
				return err
			}
			archive, err := cli.ImageSave(ctx, args, options...)
			if err != nil {
				return interrupted(ctx, apiError(err))
			}
			defer archive.Close()
			if output == "" {
				_, err := io.Copy(a.stdout(), archive)
				return interrupted(ctx, err)
			}
			file, err := newOutputFile(output)
			if err != nil {
				return fmt.Errorf("-o %s: %w", output, pathReason(err))
			}
			defer file.discard()
			w, err := file.open(nil)
			if err != nil {
				return fmt.Errorf("-o %s: %w", output, pathReason(err))
			}
			_, err = io.Copy(w, archive)
			if err = errors.Join(err, w.Close()); err != nil {
				return interrupted(ctx, err)
			}
			return file.commit()
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write to this file (default standard output)")
	cmd.Flags().StringVar(&platform, "platform", "", "save what is for this platform")
	return cmd
}

// messages reads docker's stream of progress.
func messages(r io.Reader) func(yield func(jsonstream.Message, error) bool) {
	return func(yield func(jsonstream.Message, error) bool) {
		for dec := json.NewDecoder(r); ; {
			var m jsonstream.Message
			err := dec.Decode(&m)
			if err == io.EOF || !yield(m, err) || err != nil {
				return
			}
		}
	}
}

func newLoadCommand(a *app) *cobra.Command {
	var input, platform string
	cmd := &cobra.Command{
		Use:   "load [flags]",
		Short: "Bring the images of an archive here: docker's or OCI, perhaps compressed",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			var options []mobyclient.ImageLoadOption
			if platform != "" {
				p, err := platforms.Parse(platform)
				if err != nil {
					return fmt.Errorf("--platform %s: %w", platform, err)
				}
				options = append(options, mobyclient.ImageLoadWithPlatforms([]ocispec.Platform{p}...))
			}
			in := a.stdin()
			if input != "" && input != "-" {
				f, err := os.Open(input)
				if err != nil {
					return fmt.Errorf("-i %s: %w", input, pathReason(err))
				}
				defer f.Close()
				in = f
			}
			cli, err := a.docker(ctx)
			if err != nil {
				return err
			}
			resp, err := cli.ImageLoad(ctx, in, options...)
			if err != nil {
				return interrupted(ctx, apiError(err))
			}
			defer resp.Close()
			return interrupted(ctx, showProgress(a.stdout(), messages(resp), nil))
		},
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "read this file (default standard input)")
	cmd.Flags().StringVar(&platform, "platform", "", "load what is for this platform")
	return cmd
}
