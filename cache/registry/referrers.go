// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Referrers lists what in ref's repository says of itself that it is about the manifest dgst: signatures, for instance. A registry that
// knows no referrers is asked for the tag that stands for them (OCI distribution 1.1); one that has neither has none.
func (r *Registry) Referrers(ctx context.Context, ref string, dgst digest.Digest) ([]ocispec.Descriptor, error) {
	named, err := Parse(ref)
	if err != nil {
		return nil, err
	}
	if err := dgst.Validate(); err != nil {
		return nil, fmt.Errorf("referrers of %q in %s: %w", dgst, named, err)
	}
	ctx = r.context(ctx)
	fetcher, err := r.resolve.Fetcher(ctx, named.String())
	if err != nil {
		return nil, r.explain(ctx, "pull", named, err)
	}
	referrers, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return nil, fmt.Errorf("referrers of %s in %s: the client for registries does not know them", dgst, named)
	}
	list, err := referrers.FetchReferrers(ctx, dgst)
	if err != nil {
		return nil, r.explain(ctx, "pull", named, err)
	}
	return list, nil
}
