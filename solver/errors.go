// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// ErrNotFound is wrapped by a Session's errors when the client has nothing of that name.
var ErrNotFound = errors.New("not found")

// ErrClosed is returned by the methods of a Build that has been closed.
var ErrClosed = errors.New("the build has been closed")

// FilesError is the error of an op together with the files that were there when it failed, for whoever wants to look at them.
type FilesError struct {
	Err error
	// Inputs are what the op had: of an exec for each of its mounts, of a file op its inputs. Mounts are what there was at the
	// end: of an exec for each of its mounts, of a file op for each of its actions. Without files an element is empty.
	Inputs, Mounts []snapshot.Snapshot
	// InputIDs and MountIDs name those that the store keeps beyond the build, for cache.Store.FailedResult; nil when it keeps none.
	InputIDs, MountIDs []string
	// Action is the number of the file action that failed, -1 when it is about none.
	Action int
	// Unread is the number of the input that could not be read for the content key, -1 when that was not the trouble. Inputs
	// has this input alone then.
	Unread int
}

// Error is Err's.
func (e *FilesError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *FilesError) Unwrap() error { return e.Err }

// VertexError is why a vertex has no result.
type VertexError struct {
	Vertex *Vertex
	// Err is what the op, its pin or its input digest returned.
	Err error
	// Locations and Sources are those of Vertex: where to point the user.
	Locations []*pb.Location
	Sources   []*pb.SourceInfo
	// Log is the end of what the vertex wrote, whole lines, at most logTailLines of them.
	Log []byte
}

// Error says where, what and why on one line: "Dockerfile:12: [2/3] RUN make: exit code 2".
func (e *VertexError) Error() string {
	s := e.Vertex.Name + ": " + e.Err.Error()
	if file, line := position(e.Vertex); file != "" {
		s = fmt.Sprintf("%s:%d: %s", file, line, s)
	}
	return s
}

// Unwrap returns Err.
func (e *VertexError) Unwrap() error { return e.Err }

func newVertexError(v *Vertex, err error, log []byte) *VertexError {
	return &VertexError{Vertex: v, Err: err, Locations: v.Locations, Sources: v.Sources, Log: log}
}

// position returns the first line that the vertex comes from.
func position(v *Vertex) (file string, line int) {
	for i, loc := range v.Locations {
		for _, r := range loc.GetRanges() {
			if r.GetStart() != nil {
				return v.Sources[i].GetFilename(), int(r.Start.Line)
			}
		}
	}
	return "", 0
}

// failuresError makes one error of the vertices that failed in one evaluation, the first one first.
func failuresError(failures []*VertexError) error {
	if len(failures) == 1 {
		return failures[0]
	}
	return &multiError{failures}
}

// failuresOf is the reverse of failuresError; none for other errors.
func failuresOf(err error) []*VertexError {
	var one *VertexError
	var several *multiError
	switch {
	case errors.As(err, &several):
		return several.failures
	case errors.As(err, &one):
		return []*VertexError{one}
	}
	return nil
}

// multiError is several vertices that failed before the others could be stopped.
type multiError struct{ failures []*VertexError }

func (m *multiError) Error() string {
	lines := make([]string, len(m.failures))
	for i, f := range m.failures {
		lines[i] = f.Error()
	}
	return strings.Join(lines, "\n")
}

func (m *multiError) Unwrap() []error {
	errs := make([]error, len(m.failures))
	for i, f := range m.failures {
		errs[i] = f
	}
	return errs
}
