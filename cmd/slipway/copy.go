// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/transport"
	"github.com/seed-68981b69/slipway/cmd/slipway/clientgc"
)

const locationHelp = `A place is NAME[:TAG|@DIGEST] in a registry (or docker://NAME), oci:DIR[:TAG] for an OCI layout,
oci-archive:FILE[:TAG], or docker-archive:FILE[:NAME[:TAG]].`

// copyFlags are those of all commands that speak to registries by themselves.
type copyFlags struct {
	insecure bool
	platform string
}

func (f *copyFlags) registry() *registry.Registry {
	reg := registry.New(registry.Options{})
	if f.insecure {
		reg = reg.Lenient()
	}
	return reg
}

func (f *copyFlags) options() (transport.Options, error) {
	if f.platform == "" {
		return transport.Options{}, nil
	}
	p, err := platforms.Parse(f.platform)
	if err != nil {
		return transport.Options{}, fmt.Errorf("--platform %s: %w", f.platform, err)
	}
	return transport.Options{Platform: &p}, nil
}

func newCopyCommand(a *app) *cobra.Command {
	var f copyFlags
	var quiet bool
	cmd := &cobra.Command{
		Use:   "copy [flags] SRC DST",
		Short: "Copy an image between registries, OCI layouts and archives as it is",
		Long: "Copy an image, with all its platforms and attestations, without touching what is in it. The engine is not needed.\n\n" +
			locationHelp,
		Args: args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			clientgc.End()
			desc, err := a.copy(cmd.Context(), &f, quiet, args[0], args[1])
			if err != nil {
				return interrupted(cmd.Context(), err)
			}
			fmt.Fprintln(a.stdout(), desc.Digest)
			return nil
		},
	}
	cmd.Flags().StringVar(&f.platform, "platform", "", "copy only what is for this platform")
	cmd.Flags().BoolVar(&f.insecure, "insecure", false, "speak to registries whose certificate nobody vouches for, or that have none")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the digest")
	return cmd
}

func (a *app) copy(ctx context.Context, f *copyFlags, quiet bool, src, dst string) (ocispec.Descriptor, error) {
	options, err := f.options()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	reg := f.registry()
	from, err := openSource(reg, src)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", src, err)
	}
	defer from.Close()
	to, err := openDestination(reg, dst, from)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", dst, err)
	}
	defer to.Close()
	if !quiet {
		options.Progress = a.copyProgress()
	}
	return transport.Copy(ctx, from, to, options)
}

// copyProgress says of each blob once that it is there.
func (a *app) copyProgress() func(string, int64, int64) {
	lines := make(chan struct{}, 1) // held while a line is written
	done := map[string]bool{}
	return func(id string, current, total int64) {
		if current < total {
			return
		}
		lines <- struct{}{}
		defer func() { <-lines }()
		if !done[id] {
			done[id] = true
			fmt.Fprintf(a.stderr(), "%s %d bytes\n", id, total)
		}
	}
}

// location takes a place apart.
func location(place string) (scheme, path, tag string) {
	scheme, path, ok := strings.Cut(place, ":")
	switch {
	case ok && (scheme == "oci" || scheme == "oci-archive" || scheme == "docker-archive"):
		path, tag, _ = strings.Cut(path, ":")
		return scheme, path, tag
	case ok && scheme == "docker" && strings.HasPrefix(path, "//"):
		return "docker", strings.TrimPrefix(path, "//"), ""
	}
	return "docker", place, ""
}

// elsewhere are the places of other tools, which would be taken for names of images.
var elsewhere = []string{"containers-storage", "dir", "docker-daemon", "ostree", "sif", "tarball"}

// checkPlace refuses what is no place of ours.
func checkPlace(place string) error {
	if scheme, _, ok := strings.Cut(place, ":"); ok && slices.Contains(elsewhere, scheme) {
		return fmt.Errorf("%s: places of the kind %s: are not supported: use a registry, oci:, oci-archive: or docker-archive: "+
			"(slipway save and load for the local store, docker://docker.io/library/%s for an image of that name)", place, scheme, place)
	}
	return nil
}

func openSource(reg *registry.Registry, place string) (transport.Source, error) {
	if err := checkPlace(place); err != nil {
		return nil, err
	}
	scheme, path, tag := location(place)
	switch scheme {
	case "oci":
		return transport.NewLayout(path, tag), nil
	case "oci-archive", "docker-archive":
		return transport.OpenArchive(path, tag)
	}
	return transport.NewRemote(reg, path)
}

func openDestination(reg *registry.Registry, place string, from ...transport.Source) (transport.Destination, error) {
	if err := checkPlace(place); err != nil {
		return nil, err
	}
	scheme, path, tag := location(place)
	switch scheme {
	case "oci":
		return transport.NewLayout(path, tag), nil
	case "oci-archive", "docker-archive":
		return transport.CreateArchive(path, tag, scheme == "docker-archive")
	}
	to, err := transport.NewRemote(reg, path)
	if err == nil && len(from) == 1 {
		to.From, _ = from[0].(*transport.Remote)
	}
	return to, err
}

func newManifestCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "manifest", Short: "Look at manifests and make indexes of several platforms"}
	var f copyFlags
	cmd.PersistentFlags().BoolVar(&f.insecure, "insecure", false, "speak to registries whose certificate nobody vouches for, or that have none")
	inspect := &cobra.Command{
		Use:   "inspect PLACE",
		Short: "Print the manifest or index of an image",
		Long:  "Print the manifest or index of an image.\n\n" + locationHelp,
		Args:  args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := openSource(f.registry(), args[0])
			if err != nil {
				return err
			}
			defer from.Close()
			_, raw, err := transport.Read(cmd.Context(), from)
			if err != nil {
				return interrupted(cmd.Context(), err)
			}
			var pretty bytes.Buffer
			if json.Indent(&pretty, raw, "", "  ") != nil {
				pretty = *bytes.NewBuffer(raw)
			}
			_, err = io.Copy(a.stdout(), io.MultiReader(&pretty, strings.NewReader("\n")))
			return err
		},
	}
	create := &cobra.Command{
		Use:   "create DST SRC…",
		Short: "Make an index of several images, each for one platform or more, at DST",
		Long:  "Make an index of several images at DST, where what is missing of them is copied to.\n\n" + locationHelp,
		Args:  args(2, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			reg := f.registry()
			var from []transport.Source
			for _, place := range args[1:] {
				source, err := openSource(reg, place)
				if err != nil {
					return fmt.Errorf("%s: %w", place, err)
				}
				defer source.Close()
				from = append(from, source)
			}
			to, err := openDestination(reg, args[0], from...)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			defer to.Close()
			desc, err := transport.Index(cmd.Context(), from, to, transport.Options{})
			if err != nil {
				return interrupted(cmd.Context(), err)
			}
			fmt.Fprintln(a.stdout(), desc.Digest)
			return nil
		},
	}
	push := &cobra.Command{
		Use:   "push SRC DST",
		Short: "Send an index with all that it names to a registry",
		Long:  "Send an index, and the images that it names, from where `manifest create` has made it.\n\n" + locationHelp,
		Args:  args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			desc, err := a.copy(cmd.Context(), &f, true, args[0], args[1])
			if err != nil {
				return interrupted(cmd.Context(), err)
			}
			fmt.Fprintln(a.stdout(), desc.Digest)
			return nil
		},
	}
	cmd.AddCommand(inspect, create, push)
	return cmd
}
