// SPDX-License-Identifier: Apache-2.0

package main

import "context"

var cliStart = &scenario{
	name:       "cli-start",
	about:      "The command line prints its help: what every call costs before it does anything.",
	floorAbout: "one start of a small static program",
	floor:      execFloor,
	contestant: func(_ context.Context, _ *bench, p peer) (*contestant, error) {
		return &contestant{
			name: p.name(), daemons: func() []int { return nil },
			run: func(_ context.Context, c *calls) error { return c.do(p.help()) },
		}, nil
	},
}
