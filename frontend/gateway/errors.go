// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"

	"github.com/moby/buildkit/solver/errdefs"

	"github.com/seed-68981b69/slipway/solver"
)

// wrapError adds to the failure of a vertex what lets a client show the file, the line and the text around it.
func wrapError(err error) error {
	var vertexError *solver.VertexError
	if !errors.As(err, &vertexError) || len(errdefs.Sources(err)) > 0 {
		return err
	}
	v := vertexError.Vertex
	for i, l := range v.Locations {
		err = errdefs.WithSource(err, &errdefs.Source{Info: v.Sources[i], Ranges: l.Ranges})
	}
	return errdefs.WrapVertex(err, v.Digest)
}
