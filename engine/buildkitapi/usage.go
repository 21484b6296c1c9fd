// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-68981b69/slipway/cache"
)

// DiskUsage implements the Control API.
func (s *Server) DiskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	if err := checkFilters(req.Filter); err != nil {
		return nil, err
	}
	if err := s.settle(ctx); err != nil {
		return nil, err
	}
	usage, err := s.Options.DiskUsage(ctx, cache.UsageFilter{Filters: req.Filter, MinAge: time.Duration(req.AgeLimit)})
	if err != nil {
		return nil, err
	}
	response := &controlapi.DiskUsageResponse{}
	for _, u := range usage {
		response.Record = append(response.Record, usageRecord(u))
	}
	return response, nil
}

// Prune implements the Control API: it sends a record for everything that it has deleted, whose size is what that has freed.
func (s *Server) Prune(req *controlapi.PruneRequest, stream controlapi.Control_PruneServer) error {
	if err := checkFilters(req.Filter); err != nil {
		return err
	}
	if err := s.settle(stream.Context()); err != nil {
		return err
	}
	pruned, err := s.Options.Prune(stream.Context(), []cache.Policy{{
		All:           req.All,
		Filters:       req.Filter,
		KeepDuration:  time.Duration(req.KeepDuration),
		ReservedSpace: req.ReservedSpace,
		MaxUsedSpace:  req.MaxUsedSpace,
		MinFreeSpace:  req.MinFreeSpace,
	}})
	// What was deleted before an error is told as well.
	for _, d := range pruned.Deleted {
		u := d.Usage
		u.Size = d.Freed
		if err := stream.Send(usageRecord(u)); err != nil {
			return err
		}
	}
	return err
}

// checkFilters makes a filter that cannot be read the client's mistake.
func checkFilters(filters []string) error {
	if err := cache.CheckFilters(filters); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return nil
}

func usageRecord(u cache.Usage) *controlapi.UsageRecord {
	r := &controlapi.UsageRecord{
		ID: u.ID, Mutable: u.Mutable, InUse: u.InUse, Size: u.Size, UsageCount: int64(u.UsageCount),
		Description: u.Description, RecordType: string(u.Type), Shared: u.Shared, Parents: u.Parents,
		CreatedAt: timestamppb.New(u.Created),
	}
	if !u.LastUsed.IsZero() {
		r.LastUsedAt = timestamppb.New(u.LastUsed)
	}
	return r
}

func gcPolicies(policies []cache.Policy) []*apitypes.GCPolicy {
	var list []*apitypes.GCPolicy
	for _, p := range policies {
		list = append(list, &apitypes.GCPolicy{
			All: p.All, Filters: p.Filters, KeepDuration: int64(p.KeepDuration),
			ReservedSpace: p.ReservedSpace, MaxUsedSpace: p.MaxUsedSpace, MinFreeSpace: p.MinFreeSpace,
		})
	}
	return list
}
