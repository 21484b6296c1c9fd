// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

const chainSteps = 60

var chain60 = &scenario{
	name:       "chain-60",
	about:      "Sixty times RUN true, one after the other, without the cache: what a step costs besides its command.",
	floorAbout: "sixty times clone with mount, PID, UTS, IPC and network namespaces, execve of a small static program, and its end",
	group:      "chain", // the second one finds in the cache what the first one has built
	goal:       4,
	goals:      []goal{stepWithin(20 * time.Millisecond)},
	steps:      chainSteps,
	prepare:    prepareChain,
	floor:      func(context.Context, *bench) error { return cloneFloor(chainSteps) },
	contestant: building(build{dir: "context", tag: "bench", noCache: true}, 0),
	planted:    building(build{dir: "planted", tag: "bench", noCache: true}, 0),
}

var chain60Cached = &scenario{
	name:       "chain-60-cached",
	about:      "The same sixty steps when all of them are in the cache: one whole call of the command line.",
	floorAbout: "one start of a small static program",
	group:      "chain", // the second one finds in the cache what the first one has built
	goal:       4,
	prepare:    prepareChain,
	floor:      execFloor,
	contestant: rebuilding(build{dir: "context", tag: "bench"}),
}

// prepareChain writes the sixty steps, and sixty that sleep.
func prepareChain(_ context.Context, b *bench) error {
	err := b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
		"busybox":    "",
		"Dockerfile": smallImage + repeat(chainSteps, func(int) string { return "RUN [\"/bin/busybox\", \"true\"]\n" }),
	})
	if err != nil {
		return err
	}
	slow := fmt.Sprintf("RUN [\"/bin/busybox\", \"usleep\", \"%d\"]\n", b.plant.Microseconds())
	return b.writeInput(filepath.Join(b.dir, "planted"), map[string]string{
		"busybox": "", "Dockerfile": smallImage + repeat(chainSteps, func(int) string { return slow }),
	})
}
