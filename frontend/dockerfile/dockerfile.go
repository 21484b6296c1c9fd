// SPDX-License-Identifier: Apache-2.0

// Package dockerfile turns Dockerfiles into LLB. It is BuildKit's own frontend, compiled in, so the language is complete:
// everything that a release of docker/dockerfile understands is understood here.
package dockerfile

import (
	"context"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/dockerfile/version"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
)

// Name is what a build request calls this frontend.
const Name = "dockerfile.v0"

// Build runs the frontend for one request. Errors in the Dockerfile carry their place as BuildKit's errdefs.Source.
func Build(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
	return builder.Build(ctx, c)
}

// Version is the release of docker/dockerfile whose language this is. The module calls every build without its own linker flags
// a development version; what go.mod names is a release.
func Version() string { return strings.TrimSuffix(version.Version(), "-dev") }
