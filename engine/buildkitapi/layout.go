// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"fmt"

	cerrdefs "github.com/containerd/errdefs"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/solver"
)

// layoutPrefix tells the layouts that a client offers from its other content stores.
const layoutPrefix = "oci:"

var _ solver.LayoutSession = (*clientSession)(nil)

// LayoutBlob implements solver.LayoutSession.
func (s *clientSession) LayoutBlob(ctx context.Context, session, store string, dgst digest.Digest) (solver.LayoutBlob, error) {
	if err := dgst.Validate(); err != nil {
		return nil, fmt.Errorf("blob %q of OCI layout %s: %w", dgst, store, err)
	}
	if session == "" {
		session = s.id
	}
	caller, err := s.caller(ctx, session)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", store, err)
	}
	b, err := sessioncontent.NewCallerStore(caller, layoutPrefix+store).ReaderAt(ctx, ocispec.Descriptor{Digest: dgst})
	switch {
	case cerrdefs.IsNotFound(err):
		return nil, fmt.Errorf("the client offers no layout of that name, or it has no such blob (%v): %w", err, solver.ErrNotFound)
	case cerrdefs.IsNotImplemented(err):
		return nil, fmt.Errorf("the client offers no OCI layouts: %w", solver.ErrNotFound)
	case err != nil:
		return nil, err
	}
	if b.Size() < 0 {
		_ = b.Close()
		return nil, fmt.Errorf("the client says that blob %s of OCI layout %s has %d bytes", dgst, store, b.Size())
	}
	return b, nil
}
