// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os/exec"
	"slices"
	"time"
)

var runBridge = &scenario{
	name: "run-bridge",
	about: "A container in the foreground that runs \"true\" on the bridge network with a published port (one of the host's, on localhost, that is free), and is removed: one call " +
		"of the command line. The goal is 60 ms.",
	goals:      []goal{callWithin(60 * time.Millisecond)},
	floorAbout: "clone with mount, PID, UTS, IPC and network namespaces, execve of a small static program, and its end",
	prepare:    runTrue.prepare,
	floor:      runTrue.floor,
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		r, ok := p.(runner)
		if _, bare := p.(*runcPeer); !ok || bare { // runc makes no networks
			return nil, nil
		}
		call, daemons, end, err := r.ready(ctx, b, b.stateDir(p.name()))
		if err != nil {
			return nil, err
		}
		return &contestant{
			name: p.name(), daemons: daemons, close: end,
			run: func(_ context.Context, c *calls) error { return c.do(published(call())) },
		}, nil
	},
}

// published makes a call without a network one on the bridge with a published port; slipway, podman and docker have the same flags.
func published(cmd *exec.Cmd) *exec.Cmd {
	if i := slices.Index(cmd.Args, "--network"); i >= 0 {
		cmd.Args = slices.Replace(cmd.Args, i, i+2, "--network", "bridge", "-p", "127.0.0.1::8080")
	}
	return cmd
}
