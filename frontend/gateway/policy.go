// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/sourcepolicy"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// PolicyVerifier asks the client whether a source may be used. See sourcepolicy/policysession of BuildKit.
type PolicyVerifier func(ctx context.Context, req *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error)

// maxPolicyRounds is how often a policy may change one source, or ask for more about it.
const maxPolicyRounds = 10

// CheckPolicy refuses a policy that cannot be evaluated.
func CheckPolicy(p *spb.Policy) error {
	if p == nil {
		return errors.New("invalid nil policy")
	}
	for _, r := range p.Rules {
		switch {
		case r == nil:
			return errors.New("invalid nil rule in policy")
		case r.Selector == nil:
			return errors.New("invalid nil selector in policy")
		case slices.Contains(r.Selector.Constraints, nil):
			return errors.New("invalid nil constraint in policy")
		}
	}
	return nil
}

// policies are what sources are checked with.
type policies struct {
	*shared
	engine *sourcepolicy.Engine
}

// policies returns the build's policy with more, which count for one request. It is nil when there is nothing to check.
func (s *shared) policies(more []*spb.Policy) (*policies, error) {
	var all []*spb.Policy
	if s.Policy != nil {
		all = append(all, s.Policy)
	}
	all = append(all, more...)
	if len(all) == 0 && s.Verifier == nil {
		return nil, nil
	}
	for _, p := range all {
		if err := CheckPolicy(p); err != nil {
			return nil, err
		}
	}
	return &policies{shared: s, engine: sourcepolicy.NewEngine(all)}, nil
}

// apply evaluates the sources of a definition, before any of them is resolved. What the policies convert gets a new digest, and
// with it everything that depends on it.
func (p *policies) apply(ctx context.Context, def *pb.Definition) (*pb.Definition, error) {
	if p == nil {
		return def, nil
	}
	renamed := map[string]string{} // digests, old to new
	out := def.CloneVT()
	for i, data := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(data); err != nil {
			return nil, fmt.Errorf("load LLB: %w", err)
		}
		changed := false
		if op.GetSource() != nil {
			before := op.CloneVT()
			if err := p.evaluate(ctx, &op, maxPolicyRounds); err != nil {
				return nil, fmt.Errorf("error evaluating the source policy: %w", err)
			}
			changed = !before.EqualVT(&op)
		}
		for _, in := range op.Inputs { // which come before it
			if to, ok := renamed[in.Digest]; ok {
				in.Digest = to
				changed = true
			}
		}
		if !changed {
			continue
		}
		marshalled, err := op.Marshal()
		if err != nil {
			return nil, err
		}
		from, to := digest.FromBytes(data).String(), digest.FromBytes(marshalled).String()
		renamed[from] = to
		out.Def[i] = marshalled
		if m, ok := out.Metadata[from]; ok {
			delete(out.Metadata, from)
			out.Metadata[to] = m
		}
		if l, ok := out.Source.GetLocations()[from]; ok {
			delete(out.Source.Locations, from)
			out.Source.Locations[to] = l
		}
	}
	return out, nil
}

// evaluate checks and perhaps converts one source.
func (p *policies) evaluate(ctx context.Context, op *pb.Op, rounds int) error {
	source := op.GetSource()
	source.Identifier = canonical(source.Identifier)
	if _, err := p.engine.Evaluate(ctx, source); err != nil {
		return err
	}
	if p.Verifier == nil {
		return nil
	}
	req := &policysession.CheckPolicyRequest{
		Platform: op.Platform,
		Source:   &gwpb.ResolveSourceMetaResponse{Source: source},
	}
	for range rounds {
		resp, err := p.Verifier(ctx, req)
		if err != nil {
			return err
		}
		if asked := resp.GetRequest(); asked != nil {
			if req.Source, err = p.tell(ctx, source, asked); err != nil {
				return fmt.Errorf("error resolving source metadata from policy request: %w", err)
			}
			continue
		}
		decision := resp.GetDecision()
		if decision == nil {
			return errors.New("no decision in policy response")
		}
		switch decision.Action {
		case spb.PolicyAction_ALLOW:
			return nil
		case spb.PolicyAction_CONVERT:
			if decision.Update == nil {
				return errors.New("convert action requires updated source")
			}
			source.Identifier, source.Attrs = decision.Update.Identifier, decision.Update.Attrs
			return p.evaluate(ctx, op, rounds-1)
		}
		err = fmt.Errorf("source %q not allowed by policy: action %s", source.Identifier, decision.Action)
		return policysession.WrapDenyMessages(err, decision.GetDenyMessages())
	}
	return errors.New("too many policy requests")
}

// tell answers what a policy wants to know of a source before it decides.
func (p *policies) tell(ctx context.Context, source *pb.SourceOp, asked *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	if asked.GetSource().GetIdentifier() != source.Identifier {
		return nil, fmt.Errorf("policy requested different source identifier: %q != %q", asked.GetSource().GetIdentifier(), source.Identifier)
	}
	if !(&pb.SourceOp{Attrs: source.Attrs}).EqualVT(&pb.SourceOp{Attrs: asked.Source.Attrs}) {
		return nil, errors.New("policy requested different source attrs")
	}
	md, err := p.client(nil, nil).resolveSource(ctx, source.CloneVT(), metaOpt(asked))
	if err != nil {
		return nil, err
	}
	return metaResponse(md), nil
}

// canonical gives image names the form in which policies name them.
func canonical(id string) string {
	name, ok := strings.CutPrefix(id, "docker-image://")
	if !ok {
		return id
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return id
	}
	return "docker-image://" + reference.TagNameOnly(named).String()
}

// metaOpt and metaResponse are the two directions between the wire and sourceresolver.
func metaOpt(req *gwpb.ResolveSourceMetaRequest) sourceresolver.Opt {
	opt := sourceresolver.Opt{
		LogName: req.LogName,
		ImageOpt: &sourceresolver.ResolveImageOpt{
			ResolveMode:         req.ResolveMode,
			Platform:            platformSpec(req.Platform),
			NoConfig:            req.Image.GetNoConfig(),
			AttestationChain:    req.Image.GetAttestationChain(),
			ResolveAttestations: req.Image.GetResolveAttestations(),
		},
		OCILayoutOpt: &sourceresolver.ResolveOCILayoutOpt{Platform: platformSpec(req.Platform)},
	}
	if req.Git != nil {
		opt.GitOpt = &sourceresolver.ResolveGitOpt{ReturnObject: req.Git.ReturnObject}
	}
	if c := req.GetHTTP().GetChecksumRequest(); c != nil {
		opt.HTTPOpt = &sourceresolver.ResolveHTTPOpt{
			ChecksumReq: &sourceresolver.ResolveHTTPChecksumRequest{Algo: sourceresolver.ResolveHTTPChecksumAlgo(c.Algo), Suffix: c.Suffix},
		}
	}
	return opt
}

func metaResponse(md *sourceresolver.MetaResponse) *gwpb.ResolveSourceMetaResponse {
	response := &gwpb.ResolveSourceMetaResponse{Source: md.Op}
	if md.Image != nil {
		response.Image = &gwpb.ResolveSourceImageResponse{
			Digest: md.Image.Digest.String(), Config: md.Image.Config, AttestationChain: chainToWire(md.Image.AttestationChain),
		}
	}
	if g := md.Git; g != nil {
		response.Git = &gwpb.ResolveSourceGitResponse{Checksum: g.Checksum, Ref: g.Ref, CommitChecksum: g.CommitChecksum, CommitObject: g.CommitObject, TagObject: g.TagObject}
	}
	if h := md.HTTP; h != nil {
		response.HTTP = &gwpb.ResolveSourceHTTPResponse{Checksum: h.Digest.String(), Filename: h.Filename}
		if h.LastModified != nil {
			response.HTTP.LastModified = timestamppb.New(*h.LastModified)
		}
		if sum := h.ChecksumResponse; sum != nil {
			response.HTTP.ChecksumResponse = &gwpb.ChecksumResponse{Digest: sum.Digest, Suffix: sum.Suffix}
		}
	}
	return response
}

func chainToWire(chain *sourceresolver.AttestationChain) *gwpb.AttestationChain {
	if chain == nil {
		return nil
	}
	out := &gwpb.AttestationChain{
		Root: chain.Root.String(), ImageManifest: chain.ImageManifest.String(), AttestationManifest: chain.AttestationManifest.String(),
		Blobs: map[string]*gwpb.Blob{},
	}
	for _, d := range chain.SignatureManifests {
		out.SignatureManifests = append(out.SignatureManifests, d.String())
	}
	for d, b := range chain.Blobs {
		out.Blobs[d.String()] = &gwpb.Blob{
			Descriptor_: &gwpb.Descriptor{
				MediaType: b.Descriptor.MediaType, Digest: b.Descriptor.Digest.String(), Size: b.Descriptor.Size, Annotations: b.Descriptor.Annotations,
			},
			Data: b.Data,
		}
	}
	return out
}
