// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/containerd/typeurl/v2"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/seed-68981b69/slipway/cache"
)

// The keys of an errdefs.Solve's description: the step's name, as BuildKit's LLB has it, and until when the files of a failed step
// are kept, as RFC 3339, which only a record of the history says.
const (
	DescriptionName  = "llb.customname"
	DescriptionUntil = "slipway.kept-until"
)

// FailedStep returns the detail of an error that says what a step was that failed and what its files are called, nil when
// there is none.
func FailedStep(st *rpcstatus.Status) *errdefs.Solve {
	for _, d := range st.GetDetails() {
		if m, err := typeurl.UnmarshalAny(d); err == nil {
			if solve, ok := m.(*errdefs.Solve); ok {
				return solve
			}
		}
	}
	return nil
}

// keptStep is the ID of the failed step that the names in an error's detail belong to, "" when the store does not keep one.
func keptStep(solve *errdefs.Solve) string {
	for _, name := range slices.Concat(solve.GetMountIDs(), solve.GetInputIDs()) {
		if id, ok := cache.FailedStepOf(name); ok {
			return id
		}
	}
	return ""
}

// recordedError is an error for the history: of a failed step it has the names of what the store keeps, and not its definition, which
// may say things (build arguments) that must not stay for longer than the files do.
func recordedError(st *rpcstatus.Status) *rpcstatus.Status {
	st = proto.CloneOf(st)
	st.Details = slices.DeleteFunc(st.Details, func(d *anypb.Any) bool {
		m, err := typeurl.UnmarshalAny(d)
		_, ok := m.(*errdefs.Solve)
		return err == nil && ok
	})
	return st
}

// addDetail adds a failed step to an error.
func addDetail(st *rpcstatus.Status, solve *errdefs.Solve) error {
	url, err := typeurl.TypeURL(solve)
	if err != nil {
		return err
	}
	data, err := json.Marshal(solve)
	if err != nil {
		return err
	}
	st.Details = append(st.Details, &anypb.Any{TypeUrl: url, Value: data})
	return nil
}

// withFailedStep returns the event of a build with what the store still keeps of the step that has failed: its definition and until
// when. Once that is gone the event has the names alone.
func (s *Server) withFailedStep(event *controlapi.BuildHistoryEvent) *controlapi.BuildHistoryEvent {
	solve := FailedStep(event.GetRecord().GetError())
	if solve == nil || s.FailedStep == nil {
		return event
	}
	kept, err := s.FailedStep(keptStep(solve))
	if err != nil {
		return event
	}
	solve.Op = &pb.Op{}
	if err := solve.Op.UnmarshalVT(kept.Op); err != nil {
		s.Log.Warn("read a failed step", "id", kept.ID, "error", err)
		return event
	}
	solve.Description = map[string]string{DescriptionName: kept.Name, DescriptionUntil: kept.Expires().UTC().Format(time.RFC3339)}
	event = proto.CloneOf(event)
	event.Record.Error = recordedError(event.Record.Error)
	if err := addDetail(event.Record.Error, solve); err != nil {
		s.Log.Warn("describe a failed step", "id", kept.ID, "error", err)
	}
	return event
}
