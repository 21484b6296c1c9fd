// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
)

// smallBuild is a build of three stages that run one command each.
const smallBuild = `FROM scratch AS base
COPY busybox /bin/busybox
FROM base AS one
COPY src/a /src/a
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox sort /src/a >/a"]
FROM base AS two
COPY src/b /src/b
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox sort /src/b >/b"]
FROM base
COPY --from=one /a /a
COPY --from=two /b /b
`

var noopSmall = &scenario{
	name:       "noop-small",
	about:      "A build of three stages in which nothing has changed: one whole call of the command line, as in every save of a file or every CI job.",
	floorAbout: "one start of a small static program",
	goal:       4,
	prepare: func(_ context.Context, b *bench) error {
		return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
			"Dockerfile": smallBuild, "busybox": "", "src/a": "b\na\n", "src/b": "d\nc\n",
		})
	},
	floor:      execFloor,
	contestant: rebuilding(build{dir: "context", tag: "bench"}),
}
