// SPDX-License-Identifier: Apache-2.0

// Command frontend is a BuildKit frontend for tests. It runs in an image and does what its option "mode" says; without
// one it makes an image with the Dockerfile's text in the file /text.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/frontend/gateway/grpcclient"
	"github.com/moby/buildkit/solver/pb"
)

func main() {
	if os.Getenv("BUILDKIT_FRONTEND_OPT_0") == "" || os.Getenv("BUILDKIT_WORKERS") == "" || os.Getenv("BUILDKIT_EXPORTEDPRODUCT") != "slipway" {
		fmt.Fprintln(os.Stderr, "the environment of a frontend is missing")
		os.Exit(9)
	}
	stay := false
	err := grpcclient.RunFromEnvironment(context.Background(), func(ctx context.Context, c client.Client) (*client.Result, error) {
		opts := c.BuildOpts().Opts
		stay = opts["mode"] == "stay"
		return build(ctx, c, opts)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "frontend:", err)
		os.Exit(1)
	}
	if stay {
		select {}
	}
}

func build(ctx context.Context, c client.Client, opts map[string]string) (*client.Result, error) {
	switch opts["mode"] {
	case "crash":
		fmt.Fprintln(os.Stderr, "about to crash")
		os.Exit(3)
	case "leave":
		os.Exit(0)
	case "hang":
		// The log line tells the test that we are here.
		_, _ = text(ctx, c)
		select {}
	case "error":
		return nil, errors.New("the frontend does not like it")
	case "input":
		inputs, err := c.Inputs(ctx)
		if err != nil {
			return nil, err
		}
		return solve(ctx, c, inputs["it"])
	case "nested":
		return c.Solve(ctx, client.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: map[string]string{"target": opts["target"]}})
	case "container":
		return container(ctx, c, opts)
	}
	data, err := text(ctx, c)
	if err != nil {
		return nil, err
	}
	_, err = os.Stat("/run/config/buildkit/metadata/frontend.bin")
	return solve(ctx, c, llb.Scratch().File(llb.Mkfile("/text", 0o644, data)).
		File(llb.Mkfile("/metadata", 0o644, []byte(fmt.Sprint(err)))))
}

func text(ctx context.Context, c client.Client) ([]byte, error) {
	res, err := c.Solve(ctx, client.SolveRequest{Definition: marshal(ctx, llb.Local("dockerfile", llb.WithCustomName("reading the file"))), Evaluate: true})
	if err != nil {
		return nil, err
	}
	return res.Ref.ReadFile(ctx, client.ReadRequest{Filename: "Dockerfile"})
}

// container runs a command in a container of the frontend's own and makes its output a file.
func container(ctx context.Context, c client.Client, opts map[string]string) (*client.Result, error) {
	res, err := c.Solve(ctx, client.SolveRequest{Definition: marshal(ctx, llb.Image(opts["image"]))})
	if err != nil {
		return nil, err
	}
	ctr, err := c.NewContainer(ctx, client.NewContainerRequest{Mounts: []client.Mount{{Dest: "/", MountType: pb.MountType_BIND, Ref: res.Ref}}})
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	proc, err := ctr.Start(ctx, client.StartRequest{
		Args: strings.Fields(opts["command"]), Env: []string{"PATH=/bin"}, Cwd: "/", Stdout: nopCloser{&out},
	})
	if err != nil {
		return nil, err
	}
	if err := proc.Wait(); err != nil {
		return nil, err
	}
	// The container is left behind on purpose.
	return solve(ctx, c, llb.Scratch().File(llb.Mkfile("/text", 0o644, out.Bytes())))
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func marshal(ctx context.Context, s llb.State) *pb.Definition {
	def, err := s.Marshal(ctx)
	if err != nil {
		panic(err)
	}
	return def.ToPB()
}

func solve(ctx context.Context, c client.Client, s llb.State) (*client.Result, error) {
	res, err := c.Solve(ctx, client.SolveRequest{Definition: marshal(ctx, s)})
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{"Labels": map[string]string{"made-by": "frontend"}}})
	if err != nil {
		return nil, err
	}
	res.AddMeta(exptypes.ExporterImageConfigKey, config)
	return res, nil
}
