// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FetchDigest opens a blob or manifest of ref's repository of which nothing but the digest is known. size, in bytes, is
// what the registry says. Reading verifies as with Fetch.
func (r *Registry) FetchDigest(ctx context.Context, ref string, dgst digest.Digest) (rc io.ReadCloser, size int64, err error) {
	named, err := Parse(ref)
	if err != nil {
		return nil, 0, err
	}
	if err := dgst.Validate(); err != nil {
		return nil, 0, fmt.Errorf("fetch %q from %s: %w", dgst, named, err)
	}
	ctx = r.context(ctx)
	fetcher, err := r.resolve.Fetcher(ctx, named.String())
	if err != nil {
		return nil, 0, r.explain(ctx, "pull", named, err)
	}
	byDigest, ok := fetcher.(remotes.FetcherByDigest)
	if !ok {
		return nil, 0, fmt.Errorf("fetch %s from %s: the registry client cannot fetch by digest", dgst, named)
	}
	rc, desc, err := byDigest.FetchByDigest(ctx, dgst)
	if err != nil {
		return nil, 0, r.explain(ctx, "pull", named, err)
	}
	if desc.Size < 0 {
		_ = rc.Close()
		return nil, 0, r.explain(ctx, "pull", named, errors.New("the registry does not say how large "+dgst.String()+" is"))
	}
	desc = ocispec.Descriptor{Digest: dgst, Size: desc.Size}
	return &download{ctx: ctx, r: r, named: named, desc: desc, rc: rc, hash: dgst.Algorithm().Hash()}, desc.Size, nil
}
