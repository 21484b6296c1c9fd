// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"

	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/frontend/gateway"
)

// bridges serves the gateway API and hands every call to the build that its metadata names.
type bridges struct {
	gwpb.UnimplementedLLBBridgeServer
	builds *builds
}

func (bs *bridges) bridge(ctx context.Context) (*gateway.Bridge, error) {
	ref := buildid.FromIncomingContext(ctx)
	if ref == "" {
		return nil, status.Error(codes.InvalidArgument, "the call names no build")
	}
	b, err := bs.builds.get(ctx, ref)
	if err != nil {
		return nil, err
	}
	if b.bridge == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "build %s has its frontend here", ref)
	}
	return b.bridge, nil
}

// forward calls method on the bridge of the build that ctx names.
func forward[Req, Resp any](bs *bridges, ctx context.Context, req Req, method func(*gateway.Bridge, context.Context, Req) (Resp, error)) (Resp, error) {
	b, err := bs.bridge(ctx)
	if err != nil {
		var none Resp
		return none, err
	}
	return method(b, ctx, req)
}

func (bs *bridges) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ResolveImageConfig)
}

func (bs *bridges) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ResolveSourceMeta)
}

func (bs *bridges) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Solve)
}

func (bs *bridges) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ReadFile)
}

func (bs *bridges) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ReadDir)
}

func (bs *bridges) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).StatFile)
}

func (bs *bridges) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Evaluate)
}

func (bs *bridges) Ping(ctx context.Context, req *gwpb.PingRequest) (*gwpb.PongResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Ping)
}

func (bs *bridges) Return(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Return)
}

func (bs *bridges) Inputs(ctx context.Context, req *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Inputs)
}

func (bs *bridges) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).Warn)
}

func (bs *bridges) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).NewContainer)
}

func (bs *bridges) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ReleaseContainer)
}

func (bs *bridges) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ReadFileContainer)
}

func (bs *bridges) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).ReadDirContainer)
}

func (bs *bridges) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return forward(bs, ctx, req, (*gateway.Bridge).StatFileContainer)
}

func (bs *bridges) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error {
	b, err := bs.bridge(stream.Context())
	if err != nil {
		return err
	}
	return b.ExecProcess(stream)
}
