// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

const (
	wideStages = 8
	wideSteps  = 10 // of each stage
)

// wide8 beside chain-60: "median a step" is all the time by all the steps, so that with enough processors it is less than there, and
// what steps at once cost each other is the difference in processor time.
var wide8 = &scenario{
	name:       "wide-8",
	about:      "Eight stages of ten times RUN true each, eight steps at a time, without the cache: what steps that run at once cost besides their commands. Compare the time and the processor time of a step with those of chain-60, where it is alone.",
	floorAbout: "eighty times clone with mount, PID, UTS, IPC and network namespaces, execve of a small static program, and its end, in eight threads",
	goals:      []goal{stepLikeAlone(2)},
	steps:      wideStages * wideSteps,
	prepare: func(_ context.Context, b *bench) error {
		file := "FROM scratch AS base\nCOPY busybox /bin/busybox\n" + repeat(wideStages, func(i int) string {
			return fmt.Sprintf("FROM base AS s%d\n", i) + repeat(wideSteps, func(k int) string {
				return fmt.Sprintf("RUN [\"/bin/busybox\", \"test\", \"%d-%d\"]\n", i, k)
			})
		})
		file += "FROM base\n" + repeat(wideStages, func(i int) string {
			return fmt.Sprintf("COPY --from=s%d /bin/busybox /s%d\n", i, i)
		})
		return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{"busybox": "", "Dockerfile": file})
	},
	floor: func(context.Context, *bench) error {
		var group errgroup.Group
		for range wideStages {
			group.Go(func() error { return cloneFloor(wideSteps) })
		}
		return group.Wait()
	},
	contestant: building(build{dir: "context", tag: "bench", noCache: true}, wideStages),
}
