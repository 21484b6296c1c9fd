// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

// Bridge serves one Client over gRPC to a frontend that runs in the client's process. References cross the wire as
// names that are valid as long as the build.
type Bridge struct {
	gwpb.UnimplementedLLBBridgeServer
	client *Client
	// ctx ends with the bridge.
	ctx    context.Context
	cancel context.CancelCauseFunc
	making sync.WaitGroup // containers

	mu         sync.Mutex // guards what follows; making grows only while it is held and closed is not set
	closed     bool
	refs       map[string]*Reference
	containers map[string]*container // nil while it is made
	result     *gwclient.Result
	err        error
	done       chan struct{} // closed with result or err set
}

// NewBridge returns a Bridge for c, whose containers end with ctx at the latest. Close it.
func NewBridge(ctx context.Context, c *Client) *Bridge {
	ctx, cancel := context.WithCancelCause(ctx)
	return &Bridge{
		client: c, ctx: ctx, cancel: cancel,
		refs: map[string]*Reference{}, containers: map[string]*container{}, done: make(chan struct{}),
	}
}

// Wait returns what the frontend returned.
func (b *Bridge) Wait(ctx context.Context) (*gwclient.Result, error) {
	select {
	case <-b.done:
		return b.result, b.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (b *Bridge) add(ref gwclient.Reference) *gwpb.Ref {
	r, _ := ref.(*Reference)
	if r == nil {
		return &gwpb.Ref{}
	}
	id := rand.Text()
	b.mu.Lock()
	b.refs[id] = r
	b.mu.Unlock()
	return &gwpb.Ref{Id: id, Def: r.definition}
}

// get returns nil for the empty name, which is scratch.
func (b *Bridge) get(id string) (*Reference, error) {
	if id == "" {
		return nil, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r, ok := b.refs[id]
	if !ok {
		return nil, grpcstatus.Errorf(codes.NotFound, "no such ref: %s", id)
	}
	return r, nil
}

func (b *Bridge) mustGet(id string) (*Reference, error) {
	r, err := b.get(id)
	if err == nil && r == nil {
		err = grpcstatus.Error(codes.InvalidArgument, "empty ref")
	}
	return r, err
}

// Solve implements gwpb.LLBBridgeServer. The answer has the form that the frontend's release of BuildKit knows: a map of
// references, names of references, or one name; with Final it is the frontend's result, too.
func (b *Bridge) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	var imports []gwclient.CacheOptionsEntry
	for _, e := range req.CacheImports {
		imports = append(imports, gwclient.CacheOptionsEntry{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	if slices.Contains(req.SourcePolicies, nil) {
		return nil, grpcstatus.Error(codes.InvalidArgument, "empty source policy")
	}
	res, err := b.client.Solve(ctx, gwclient.SolveRequest{
		Evaluate:       req.Evaluate,
		Definition:     req.Definition,
		Frontend:       req.Frontend,
		FrontendOpt:    req.FrontendOpt,
		FrontendInputs: req.FrontendInputs,
		CacheImports:   imports,
		SourcePolicies: req.SourcePolicies,
	})
	if err != nil {
		return nil, err
	}
	if len(res.Refs) > 0 && !req.AllowResultReturn {
		return nil, errors.New("the result has several references, and the frontend takes only one")
	}
	result := &gwpb.Result{Metadata: res.Metadata}
	if result.Attestations, err = b.attestationsToPB(res.Attestations); err != nil {
		return nil, err
	}
	response := &gwpb.SolveResponse{Result: result}
	if res.Refs != nil {
		refs := make(map[string]*gwpb.Ref, len(res.Refs))
		ids := make(map[string]string, len(res.Refs))
		for name, ref := range res.Refs {
			refs[name] = b.add(ref)
			ids[name] = refs[name].Id
		}
		result.Result = &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: refs}}
		if !req.AllowResultArrayRef {
			result.Result = &gwpb.Result_RefsDeprecated{RefsDeprecated: &gwpb.RefMapDeprecated{Refs: ids}}
		}
		return response, nil
	}
	ref := b.add(res.Ref)
	result.Result = &gwpb.Result_Ref{Ref: ref}
	if !req.AllowResultArrayRef {
		result.Result = &gwpb.Result_RefDeprecated{RefDeprecated: ref.Id}
	}
	if !req.AllowResultReturn {
		response.Ref = ref.Id
	}
	if req.Final {
		final := gwclient.NewResult()
		final.Metadata = map[string][]byte{}
		if len(req.ExporterAttr) > 0 {
			if err := json.Unmarshal(req.ExporterAttr, &final.Metadata); err != nil {
				return nil, grpcstatus.Errorf(codes.InvalidArgument, "ExporterAttr: %v", err)
			}
		}
		maps.Copy(final.Metadata, res.Metadata)
		if res.Ref != nil {
			final.SetRef(res.Ref)
		}
		if err := b.setResult(final, nil); err != nil {
			return nil, err
		}
	}
	return response, nil
}

// Return implements gwpb.LLBBridgeServer.
func (b *Bridge) Return(_ context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	var res *gwclient.Result
	var err error
	if req.Error != nil {
		err = grpcerrors.FromGRPC(grpcstatus.ErrorProto(&status.Status{
			Code: req.Error.Code, Message: req.Error.Message, Details: req.Error.Details,
		}))
	} else if res, err = b.returned(req.Result); err != nil {
		return nil, err
	}
	if err := b.setResult(res, err); err != nil {
		return nil, err
	}
	return &gwpb.ReturnResponse{}, nil
}

// setResult is how the frontend ends, once.
func (b *Bridge) setResult(res *gwclient.Result, err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.done:
		return errors.New("the frontend has returned already")
	default:
	}
	b.result, b.err = res, err
	close(b.done)
	return nil
}

func (b *Bridge) returned(in *gwpb.Result) (*gwclient.Result, error) {
	if in == nil {
		return nil, grpcstatus.Error(codes.InvalidArgument, "return without a result")
	}
	res := gwclient.NewResult()
	res.Metadata = in.Metadata
	set := func(id string) error {
		ref, err := b.get(id)
		if err == nil && ref != nil {
			res.SetRef(ref)
		}
		return err
	}
	add := func(name, id string) error {
		ref, err := b.get(id)
		switch {
		case err != nil:
			return err
		case ref == nil:
			res.AddRef(name, nil)
		default:
			res.AddRef(name, ref)
		}
		return nil
	}
	switch r := in.Result.(type) {
	case *gwpb.Result_RefDeprecated:
		if err := set(r.RefDeprecated); err != nil {
			return nil, err
		}
	case *gwpb.Result_Ref:
		if err := set(r.Ref.GetId()); err != nil {
			return nil, err
		}
	case *gwpb.Result_RefsDeprecated:
		for name, id := range r.RefsDeprecated.GetRefs() {
			if err := add(name, id); err != nil {
				return nil, err
			}
		}
	case *gwpb.Result_Refs:
		for name, ref := range r.Refs.GetRefs() {
			if err := add(name, ref.GetId()); err != nil {
				return nil, err
			}
		}
	}
	if err := b.attestationsFromPB(res, in.Attestations); err != nil {
		return nil, err
	}
	return res, nil
}

// ResolveImageConfig implements gwpb.LLBBridgeServer.
func (b *Bridge) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	opt := sourceresolver.Opt{LogName: req.LogName, SourcePolicies: req.SourcePolicies}
	switch sourceresolver.ResolverType(req.ResolverType) {
	case sourceresolver.ResolverTypeRegistry:
		opt.ImageOpt = &sourceresolver.ResolveImageOpt{ResolveMode: req.ResolveMode, Platform: platformSpec(req.Platform)}
	case sourceresolver.ResolverTypeOCILayout:
		opt.OCILayoutOpt = &sourceresolver.ResolveOCILayoutOpt{
			Platform: platformSpec(req.Platform),
			Store:    sourceresolver.ResolveImageConfigOptStore{SessionID: req.SessionID, StoreID: req.StoreID},
		}
	default:
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "resolver type %d is not known", req.ResolverType)
	}
	ref, dgst, config, err := b.client.ResolveImageConfig(ctx, req.Ref, opt)
	if err != nil {
		return nil, err
	}
	return &gwpb.ResolveImageConfigResponse{Ref: ref, Digest: dgst.String(), Config: config}, nil
}

// ResolveSourceMeta implements gwpb.LLBBridgeServer.
func (b *Bridge) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	if req.Source == nil {
		return nil, grpcstatus.Error(codes.InvalidArgument, "source is required")
	}
	opt := metaOpt(req)
	opt.SourcePolicies = req.SourcePolicies
	md, err := b.client.ResolveSourceMetadata(ctx, req.Source, opt)
	if err != nil {
		return nil, err
	}
	return metaResponse(md), nil
}

func platformSpec(p *pb.Platform) *ocispec.Platform {
	if p == nil {
		return nil
	}
	return &ocispec.Platform{
		OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures,
	}
}

// ReadFile implements gwpb.LLBBridgeServer.
func (b *Bridge) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	ref, err := b.mustGet(req.Ref)
	if err != nil {
		return nil, err
	}
	read := gwclient.ReadRequest{Filename: req.FilePath}
	if req.Range != nil {
		read.Range = &gwclient.FileRange{Offset: int(req.Range.Offset), Length: int(req.Range.Length)}
	}
	data, err := ref.ReadFile(ctx, read)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadFileResponse{Data: data}, nil
}

// ReadDir implements gwpb.LLBBridgeServer.
func (b *Bridge) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	ref, err := b.mustGet(req.Ref)
	if err != nil {
		return nil, err
	}
	entries, err := ref.ReadDir(ctx, gwclient.ReadDirRequest{Path: req.DirPath, IncludePattern: req.IncludePattern})
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadDirResponse{Entries: entries}, nil
}

// StatFile implements gwpb.LLBBridgeServer.
func (b *Bridge) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	ref, err := b.mustGet(req.Ref)
	if err != nil {
		return nil, err
	}
	stat, err := ref.StatFile(ctx, gwclient.StatRequest{Path: req.Path})
	if err != nil {
		return nil, err
	}
	return &gwpb.StatFileResponse{Stat: stat}, nil
}

// Evaluate implements gwpb.LLBBridgeServer.
func (b *Bridge) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	ref, err := b.get(req.Ref)
	if err != nil {
		return nil, err
	}
	if ref != nil {
		if err := ref.Evaluate(ctx); err != nil {
			return nil, err
		}
	}
	return &gwpb.EvaluateResponse{}, nil
}

// Ping implements gwpb.LLBBridgeServer.
func (b *Bridge) Ping(context.Context, *gwpb.PingRequest) (*gwpb.PongResponse, error) {
	response := &gwpb.PongResponse{FrontendAPICaps: Caps(), LLBCaps: LLBCaps()}
	for _, w := range b.client.Workers {
		response.Workers = append(response.Workers, &apitypes.WorkerRecord{
			ID: w.ID, Labels: w.Labels, Platforms: pb.PlatformsFromSpec(w.Platforms),
		})
	}
	return response, nil
}

// Inputs implements gwpb.LLBBridgeServer.
func (b *Bridge) Inputs(context.Context, *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return &gwpb.InputsResponse{Definitions: b.client.inputs}, nil
}

// Warn implements gwpb.LLBBridgeServer.
func (b *Bridge) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	if slices.Contains(req.Ranges, nil) {
		return nil, grpcstatus.Error(codes.InvalidArgument, "empty source range")
	}
	vertex, err := digest.Parse(req.Digest)
	if err != nil {
		return nil, fmt.Errorf("warning for vertex %q: %w", req.Digest, err)
	}
	err = b.client.Warn(ctx, vertex, string(req.Short), gwclient.WarnOpts{
		Level: int(req.Level), SourceInfo: req.Info, Range: req.Ranges, Detail: req.Detail, URL: req.Url,
	})
	if err != nil {
		return nil, err
	}
	return &gwpb.WarnResponse{}, nil
}
