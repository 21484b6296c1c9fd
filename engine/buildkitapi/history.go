// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/engine/history"
	"github.com/seed-68981b69/slipway/solver"
)

// The media types of what BuildKit keeps of a build.
const (
	mediaTypeStatus = "application/vnd.buildkit.status.v0"
	mediaTypeError  = "application/vnd.googleapis.google.rpc.status+proto"
)

// comparedBuilds is how many earlier builds an explanation looks at.
const comparedBuilds = 20

// beginHistory notes that a build has begun.
func (s *Server) beginHistory(in *controlapi.SolveRequest, req *request, started time.Time) *controlapi.BuildHistoryRecord {
	rec := &controlapi.BuildHistoryRecord{
		Ref: req.ref, Frontend: req.frontend, FrontendAttrs: explain.Attrs(req.opts, s.WorkerID), CreatedAt: timestamppb.New(started),
	}
	for _, e := range in.Exporters {
		rec.Exporters = append(rec.Exporters, &controlapi.Exporter{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	s.History.Started(proto.CloneOf(rec))
	return rec
}

// project tells what is built: builds of one project are compared with each other first.
func (r *request) project() string {
	parts := []string{r.localDirs["context"], r.opts["context"], r.opts["vcs:source"], r.localDirs["dockerfile"], r.opts["filename"]}
	if strings.Join(parts, "") == "" {
		return ""
	}
	return strings.Join(parts, "|")
}

// finishHistory writes down a build that has ended with err.
func (s *Server) finishHistory(rec *controlapi.BuildHistoryRecord, rc *recorder, req *request, reports []solver.Report, made *outcome, response map[string]string, err error) {
	defer rc.close()
	ctx := context.Background()
	if failure := s.keepHistory(ctx, rec, rc, req, reports, made, response, err); failure != nil {
		s.Log.Warn("keep the record of a build", "build", rec.Ref, "error", failure)
		s.History.Abandoned(rec.Ref)
	}
}

func (s *Server) keepHistory(ctx context.Context, rec *controlapi.BuildHistoryRecord, rc *recorder, req *request, reports []solver.Report, made *outcome, response map[string]string, err error) error {
	redact := explain.NewRedactor(s.WorkerID, req.opts, reports).Text
	var own []ocispec.Descriptor
	put := func(mediaType string, data []byte) (*controlapi.Descriptor, error) {
		desc, err := s.History.Blobs.PutBytes(ctx, mediaType, data)
		if err != nil {
			return nil, err
		}
		own = append(own, desc)
		return &controlapi.Descriptor{MediaType: mediaType, Digest: desc.Digest.String(), Size: desc.Size}, nil
	}
	if err != nil {
		st, ok := grpcerrors.AsGRPCStatus(grpcerrors.ToGRPC(ctx, err))
		if !ok {
			st = status.New(codes.Unknown, err.Error())
		}
		failed := FailedStep(st.Proto())
		rec.Error = recordedError(st.Proto())
		redactError(rec.Error, redact)
		data, err := proto.Marshal(rec.Error)
		if err != nil {
			return err
		}
		if rec.ExternalError, err = put(mediaTypeError, data); err != nil {
			return err
		}
		rec.Error.Details = nil
		if keptStep(failed) != "" {
			if err := addDetail(rec.Error, &errdefs.Solve{InputIDs: failed.InputIDs, MountIDs: failed.MountIDs}); err != nil {
				return err
			}
		}
	}
	stored, shared := map[digest.Digest]digest.Digest{}, []digest.Digest(nil)
	for _, r := range reports {
		if r.Log == "" {
			continue
		}
		shared = append(shared, r.Log)
		if r.Outcome == solver.Ran || r.Outcome == solver.Failed {
			stored[r.Vertex.Digest] = r.Log
		}
	}
	desc, failure := s.keepStatus(ctx, rc, stored, redact)
	if failure != nil {
		return failure
	}
	own = append(own, desc)
	rec.Logs = &controlapi.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}
	rec.NumTotalSteps, rec.NumCachedSteps = int32(rc.total), int32(rc.cached)
	rec.NumCompletedSteps, rec.NumWarnings = int32(rc.completed), int32(rc.warnings)
	rec.ExporterResponse = response

	rec.Result = &controlapi.BuildResultInfo{}
	for i, exported := range made.responses {
		d := exportedDescriptor(exported)
		if d == nil {
			continue
		}
		if rec.Result.ResultDeprecated == nil {
			rec.Result.ResultDeprecated = d
			rec.Result.Results = map[int64]*controlapi.Descriptor{}
		}
		rec.Result.Results[int64(i)] = d
		if read, failure := s.namedByIndex(d); failure == nil {
			shared = append(shared, read...)
		} // or its blobs are at the client, or in a registry
	}
	if err == nil {
		if failure := made.result.keep(ctx, rec, req.attests.builderID, put); failure != nil {
			return failure
		}
	}
	doc := s.explain(ctx, rec, req, reports, err)
	for _, step := range doc.Steps {
		if step.Log != "" {
			shared = append(shared, step.Log)
		}
	}
	data, failure := json.Marshal(doc)
	if failure != nil {
		return failure
	}
	d, failure := put(explain.MediaType, data)
	if failure != nil {
		return failure
	}
	rec.Result.Attestations = append(rec.Result.Attestations, d)
	return s.History.Completed(rec, own, shared)
}

// keepStatus stores the events. logs are the logs of the steps that ran, by vertex.
func (s *Server) keepStatus(ctx context.Context, rc *recorder, logs map[digest.Digest]digest.Digest, redact func(string) string) (ocispec.Descriptor, error) {
	sizes := map[digest.Digest]int64{}
	for v, d := range logs {
		if r, err := s.History.Blobs.Open(d); err == nil {
			sizes[v] = r.Size()
			r.Close()
		}
	}
	w, err := s.History.Blobs.Writer(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer w.Close()
	err = rc.writeTo(w, sizes, func(v digest.Digest) (io.ReadCloser, error) { return s.History.Blobs.Open(logs[v]) }, redact)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaTypeStatus, Digest: w.Digest(), Size: w.Size()}
	return desc, w.Commit(desc.Size, desc.Digest)
}

// exportedDescriptor is what the exporter says it has made, nil when it says nothing.
func exportedDescriptor(response map[string]string) *controlapi.Descriptor {
	data, err := base64.StdEncoding.DecodeString(response["containerimage.descriptor"])
	if err != nil || len(data) == 0 {
		return nil
	}
	var desc ocispec.Descriptor
	if json.Unmarshal(data, &desc) != nil || desc.Digest.Validate() != nil {
		return nil
	}
	return &controlapi.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size, Annotations: desc.Annotations}
}

// explain says why steps ran. Earlier builds are looked at only when some did.
func (s *Server) explain(ctx context.Context, rec *controlapi.BuildHistoryRecord, req *request, reports []solver.Report, err error) *explain.Document {
	doc := explain.New(ctx, explain.Info{
		Build: rec.Ref, Project: req.project(), Created: rec.CreatedAt.AsTime(), Duration: rec.CompletedAt.AsTime().Sub(rec.CreatedAt.AsTime()),
		Err: err, Salt: s.WorkerID, Attrs: req.opts,
	}, reports, s.History.Records.Get)
	if len(doc.Misses()) == 0 {
		return doc
	}
	var earlier []*explain.Document
	for _, old := range s.History.Newest(comparedBuilds) {
		for _, d := range old.GetResult().GetAttestations() {
			if d.MediaType != explain.MediaType {
				continue
			}
			data, err := s.History.Blobs.ReadAll(digest.Digest(d.Digest))
			if err != nil {
				continue // it is not compared with
			}
			var e explain.Document
			if json.Unmarshal(data, &e) == nil {
				earlier = append(earlier, &e)
			}
		}
	}
	doc.Explain(earlier, s.History.Inputs)
	return doc
}

// ListenBuildHistory implements the Control API.
func (s *Server) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	if err := stream.SendHeader(metadata.Pairs(timestampKey, time.Now().Format(time.RFC3339Nano))); err != nil {
		return err
	}
	return historyError(s.History.Listen(stream.Context(), req, func(event *controlapi.BuildHistoryEvent) error {
		return stream.Send(s.withFailedStep(event))
	}))
}

// UpdateBuildHistory implements the Control API. Records are final when they are listed, so there is nothing to finalize
// but to wait.
func (s *Server) UpdateBuildHistory(ctx context.Context, req *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	var err error
	if req.Ref == "" {
		return nil, status.Error(codes.InvalidArgument, "which build? the request has no ref")
	}
	switch {
	case req.Delete:
		if err = s.History.Delete(ctx, req.Ref); err == nil && s.Collect != nil {
			s.Collect()
		}
	case req.Finalize:
		if err = s.History.Settle(ctx); err == nil {
			err = s.pending.finalize(ctx, req.Ref)
		}
	default:
		err = s.History.Pin(ctx, req.Ref, req.Pinned)
	}
	return &controlapi.UpdateBuildHistoryResponse{}, historyError(err)
}

func historyError(err error) error {
	switch {
	case errors.Is(err, history.ErrNotFound), errors.Is(err, blob.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	}
	return err
}

// sendKept sends the events of a build that has ended, from its record. It returns false when there is none.
func (s *Server) sendKept(ref string, stream controlapi.Control_StatusServer) (bool, error) {
	rec, err := s.History.Get(stream.Context(), ref)
	if errors.Is(err, history.ErrNotFound) {
		return false, nil
	}
	if err != nil || rec.Logs == nil {
		return true, err
	}
	r, err := s.History.Blobs.Open(digest.Digest(rec.Logs.Digest))
	if err != nil {
		return true, historyError(err)
	}
	defer r.Close()
	return true, readStatus(r, stream.Send)
}

// contentServer serves containerd's content service, read-only, for the blobs that records of builds name.
type contentServer struct {
	contentapi.UnimplementedContentServer
	history *history.Store
}

// contentChunk is how much is sent at once, in bytes.
const contentChunk = 1 << 20

func (c *contentServer) open(name string) (blob.ReaderAt, error) {
	d, err := digest.Parse(name)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if !c.history.Names(d) {
		return nil, status.Errorf(codes.NotFound, "content %s: not found", d)
	}
	r, err := c.history.Blobs.Open(d)
	return r, historyError(err)
}

func (c *contentServer) Info(_ context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	r, err := c.open(req.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: req.Digest, Size: r.Size()}}, nil
}

func (c *contentServer) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	r, err := c.open(req.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	offset, size := req.Offset, req.Size
	if size == 0 {
		size = r.Size() - offset
	}
	if offset < 0 || size < 0 || offset > r.Size() || size > r.Size()-offset {
		return status.Errorf(codes.OutOfRange, "read of %d bytes at %d past the end of %s, which has %d", req.Size, offset, req.Digest, r.Size())
	}
	buf := make([]byte, min(contentChunk, size))
	for size > 0 {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size)], offset)
		if n == 0 && err != nil {
			return fmt.Errorf("read %s: %w", req.Digest, err)
		}
		if err := stream.Send(&contentapi.ReadContentResponse{Offset: offset, Data: buf[:n]}); err != nil {
			return err
		}
		offset, size = offset+int64(n), size-int64(n)
	}
	return nil
}
