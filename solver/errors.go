// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

// ErrNotFound is wrapped by a Session's errors when the client has nothing of that name.
var ErrNotFound = errors.New("not found")

// ErrClosed is returned by the methods of a Build that has been closed.
var ErrClosed = errors.New("the build has been closed")

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
