// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
)

const chainSteps = 60

var chain60 = &scenario{
	name:       "chain-60",
	about:      "Sixty times RUN true, one after the other, without the cache: what a step costs besides its command.",
	floorAbout: "sixty times clone with mount, PID, UTS, IPC and network namespaces, execve of a small static program, and its end",
	goal:       4,
	steps:      chainSteps,
	prepare: func(_ context.Context, b *bench) error {
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
	},
	floor:      func(context.Context, *bench) error { return cloneFloor(chainSteps) },
	contestant: building(build{dir: "context", tag: "bench", noCache: true}, 0),
	planted:    building(build{dir: "planted", tag: "bench", noCache: true}, 0),
}
