// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
)

var runTrue = &scenario{
	name:       "run-true",
	about:      "A container in the foreground that runs \"true\", without a network, and is removed: one call of the command line. runc has neither an image nor a store to ask: it runs a directory.",
	floorAbout: "clone with mount, PID, UTS, IPC and network namespaces, execve of a small static program, and its end",
	prepare: func(_ context.Context, b *bench) error {
		return b.writeInput(filepath.Join(b.dir, "image"), map[string]string{"busybox": "", "Dockerfile": smallImage})
	},
	goals: []goal{fasterThan("runc", 1)},
	floor: func(context.Context, *bench) error { return cloneFloor(1) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		r, ok := p.(runner)
		if !ok {
			return nil, nil
		}
		call, daemons, end, err := r.ready(ctx, b, b.stateDir(p.name()))
		if err != nil {
			return nil, err
		}
		return &contestant{
			name: p.name(), daemons: daemons, close: end,
			run: func(_ context.Context, c *calls) error { return c.do(call()) },
		}, nil
	},
}
