// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
)

// versions are what `slipway version` tells, with docker's names where docker has them.
type versions struct {
	Client clientVersion
	Server *serverVersion `json:",omitempty"` // nil when no engine runs
}

type clientVersion struct {
	Version    string
	BuildKit   string // whose API this program speaks, and whose frontend it has
	APIVersion string // of the Docker Engine API
	GoVersion  string
	Os, Arch   string
}

type serverVersion struct {
	Version  string
	BuildKit string
	Address  string
}

// newVersionCommand makes `slipway version`. It starts no engine: it is what people run when nothing works.
func newVersionCommand(a *app) *cobra.Command {
	var template string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of the engine that runs, if one does",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := a.formatter(template, nil)
			if err != nil {
				return err
			}
			v := versions{Client: clientVersion{
				Version: engine.Version, BuildKit: buildkitapi.BuildKitVersion, APIVersion: dockerapi.MaxVersion,
				GoVersion: runtime.Version(), Os: runtime.GOOS, Arch: runtime.GOARCH,
			}}
			if a.running(cmd.Context()) {
				if v.Server, err = a.serverVersion(cmd.Context()); err != nil {
					return err
				}
			}
			if format != nil {
				return printAll(format, []versions{v})
			}
			fmt.Fprintf(a.out, "slipway %s (%s, %s/%s)\n", v.Client.Version, v.Client.GoVersion, v.Client.Os, v.Client.Arch)
			fmt.Fprintf(a.out, "BuildKit's API and Dockerfile frontend: %s; Docker Engine API: %s\n", v.Client.BuildKit, v.Client.APIVersion)
			if v.Server == nil {
				fmt.Fprintf(a.out, "Engine: none runs at %s\n", a.address())
				return nil
			}
			fmt.Fprintf(a.out, "Engine: %s at %s\n", v.Server.Version, v.Server.Address)
			return nil
		},
	}
	cmd.Flags().StringVarP(&template, "format", "f", "", "json, or a Go template")
	return cmd
}

func (a *app) serverVersion(ctx context.Context) (*serverVersion, error) {
	client, err := a.buildkit(ctx)
	if err != nil {
		return nil, err
	}
	info, err := client.Info(ctx)
	if err != nil {
		return nil, err
	}
	return &serverVersion{Version: info.BuildkitVersion.Revision, BuildKit: info.BuildkitVersion.Version, Address: a.address()}, nil
}
