// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"fmt"
	"slices"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/solver"
)

// gitObjects adds the objects by which a signature of a commit or a tag can be checked.
func gitObjects(ctx context.Context, env *solver.Env, source solver.Source, to *sourceresolver.ResolveGitResponse) error {
	reader, ok := source.(solver.PinObjectReader)
	if !ok {
		return fmt.Errorf("not supported: objects of a source that is no git repository (ReturnObject)")
	}
	objects, err := reader.PinObjects(ctx, env)
	if err != nil {
		return err
	}
	to.CommitObject, to.TagObject = objects.Commit, objects.Tag
	to.CommitChecksum = ""
	if objects.Tag != nil {
		to.CommitChecksum = objects.CommitID
	}
	return nil
}

// maxChecksumSuffix is BuildKit's bound for what is hashed after a file, in bytes.
const maxChecksumSuffix = 4 << 10

// checksum hashes a file and what comes after it, which is what some signatures are made of.
func checksum(ctx context.Context, env *solver.Env, source solver.Source, req *sourceresolver.ResolveHTTPChecksumRequest) (*sourceresolver.ResolveHTTPChecksumResponse, error) {
	algorithms := map[sourceresolver.ResolveHTTPChecksumAlgo]digest.Algorithm{
		sourceresolver.ResolveHTTPChecksumAlgoSHA256: digest.SHA256,
		sourceresolver.ResolveHTTPChecksumAlgoSHA384: digest.SHA384,
		sourceresolver.ResolveHTTPChecksumAlgoSHA512: digest.SHA512,
	}
	algorithm, ok := algorithms[req.Algo]
	if !ok {
		return nil, fmt.Errorf("checksum request: unknown algorithm %d", req.Algo)
	}
	if len(req.Suffix) > maxChecksumSuffix {
		return nil, fmt.Errorf("checksum request: suffix of %d bytes: at most %d", len(req.Suffix), maxChecksumSuffix)
	}
	hasher, ok := source.(solver.PinHasher)
	if !ok {
		return nil, fmt.Errorf("not supported: checksum request for a source that is no file (ChecksumRequest)")
	}
	sum, err := hasher.PinDigest(ctx, env, algorithm, req.Suffix)
	if err != nil {
		return nil, err
	}
	return &sourceresolver.ResolveHTTPChecksumResponse{Digest: sum.String(), Suffix: slices.Clone(req.Suffix)}, nil
}
