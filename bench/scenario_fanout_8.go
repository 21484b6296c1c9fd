// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

const fanoutStages = 8

var fanout8 = &scenario{
	name:       "fanout-8",
	about:      "Eight stages that sleep for a second each, and one that takes a file from each, without the cache: do independent stages run at the same time? Every builder may run eight steps at once.",
	floorAbout: "one second of sleep",
	ideal:      1,
	goals:      []goal{aboveIdeal(0.1)},
	prepare: func(_ context.Context, b *bench) error {
		stage := func(i int) string {
			return fmt.Sprintf("FROM base AS s%d\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"/bin/busybox sleep 1; echo %d >/out%d\"]\n", i, i, i)
		}
		last := "FROM base\n" + repeat(fanoutStages, func(i int) string { return fmt.Sprintf("COPY --from=s%d /out%d /\n", i, i) })
		return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
			"busybox": "", "Dockerfile": "FROM scratch AS base\nCOPY busybox /bin/busybox\n" + repeat(fanoutStages, stage) + last,
		})
	},
	floor: func(context.Context, *bench) error {
		time.Sleep(time.Second)
		return nil
	},
	contestant: building(build{dir: "context", tag: "bench", noCache: true}, fanoutStages),
}
