// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"

	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// maxOpInError is the size of an operation, in bytes, that an error carries at most: it travels in a header.
const maxOpInError = 4 << 20

// wrapError adds to the failure of a vertex what lets a client show the file, the line and the text around it, and look at the
// files that were there: BuildKit's errdefs.Source, Vertex and Solve.
func (s *shared) wrapError(err error) error {
	var vertexError *solver.VertexError
	var solved *errdefs.SolveError
	if !errors.As(err, &vertexError) || errors.As(err, &solved) {
		return err
	}
	v := vertexError.Vertex
	err = &errdefs.SolveError{Err: err, Solve: s.solveDetail(vertexError)}
	for i, l := range v.Locations {
		err = errdefs.WithSource(err, &errdefs.Source{Info: v.Sources[i], Ranges: l.Ranges})
	}
	return errdefs.WrapVertex(err, v.Digest)
}

// solveDetail names the files of a failed vertex so that NewContainer can mount them.
func (s *shared) solveDetail(failure *solver.VertexError) *errdefs.Solve {
	v := failure.Vertex
	d := &errdefs.Solve{Op: v.Op, Description: maps.Clone(v.Meta.GetDescription())}
	if v.Op.SizeVT() > maxOpInError {
		d.Op = nil
	}
	var files *solver.FilesError
	if !errors.As(failure, &files) {
		return d
	}
	if d.InputIDs, d.MountIDs = files.InputIDs, files.MountIDs; d.MountIDs == nil {
		d.InputIDs, d.MountIDs = s.nameResults(files.Inputs), s.nameResults(files.Mounts)
	}
	switch {
	case files.Action >= 0:
		d.Subject = &errdefs.Solve_File{File: &errdefs.FileAction{Index: int64(files.Action)}}
	case files.Unread >= 0:
		d.Subject = &errdefs.Solve_Cache{Cache: &errdefs.ContentCache{Index: int64(files.Unread)}}
	}
	return d
}

// nameResults gives snapshots names that are valid as long as the build, "" for those without files.
func (s *shared) nameResults(snaps []snapshot.Snapshot) []string {
	ids := make([]string, len(snaps))
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, snap := range snaps {
		if len(snap) == 0 {
			continue
		}
		ids[i] = "result-" + rand.Text()
		s.results[ids[i]] = slices.Clone(snap)
	}
	return ids
}

// result is the snapshot of a name in an error's details: of this build, or of a failed step that the store keeps.
func (s *shared) result(ctx context.Context, id string) (snapshot.Snapshot, error) {
	s.mu.Lock()
	snap, ok := s.results[id]
	s.mu.Unlock()
	if ok {
		return snap, nil
	}
	if s.FailedResult == nil {
		return nil, grpcstatus.Errorf(codes.NotFound, "no such ref: %s", id)
	}
	snap, err := s.FailedResult(ctx, id)
	if err != nil {
		return nil, grpcstatus.Errorf(codes.NotFound, "no such ref: %s: %v", id, err)
	}
	return snap, nil
}
