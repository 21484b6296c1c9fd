// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"sync"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/solver"
)

// maxKeptLog bounds the output that an event log keeps in memory for listeners, in bytes. The full logs are in the store.
const maxKeptLog = 32 << 20

// events keeps the events of one build for any number of listeners, each of which sees them from the beginning. When the
// output grows beyond maxKeptLog its oldest part is dropped for those who have not read it yet, with a notice;
// vertex states are never dropped.
type events struct {
	mu       sync.Mutex // guards all
	list     []*bkclient.SolveStatus
	ended    bool
	changed  chan struct{} // closed and replaced at every change
	logBytes int
	trimmed  int // events before this one have lost their logs
	noticed  map[digest.Digest]bool
}

var _ solver.Writer = (*events)(nil)

func newEvents() *events {
	return &events{changed: make(chan struct{}), noticed: map[digest.Digest]bool{}}
}

// Write implements solver.Writer.
func (e *events) Write(s *bkclient.SolveStatus) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return
	}
	e.list = append(e.list, s)
	e.logBytes += logSize(s)
	for e.logBytes > maxKeptLog && e.trimmed < len(e.list)-1 {
		e.trim()
	}
	e.wake()
}

func logSize(s *bkclient.SolveStatus) int {
	n := 0
	for _, l := range s.Logs {
		n += len(l.Data)
	}
	return n
}

// trim takes the logs out of the oldest event that has some. Listeners may hold the event, so it is replaced.
func (e *events) trim() {
	old := e.list[e.trimmed]
	if len(old.Logs) > 0 {
		kept := *old
		kept.Logs = nil
		for _, l := range old.Logs {
			e.logBytes -= len(l.Data)
			if !e.noticed[l.Vertex] {
				e.noticed[l.Vertex] = true
				kept.Logs = append(kept.Logs, &bkclient.VertexLog{
					Vertex: l.Vertex, Stream: l.Stream, Timestamp: l.Timestamp, Data: []byte("[output left out: more than is kept for display]\n"),
				})
			}
		}
		e.list[e.trimmed] = &kept
	}
	e.trimmed++
}

func (e *events) wake() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// end says that nothing will follow. Vertices that a frontend or op left open are closed, by the event that it returns.
func (e *events) end() *bkclient.SolveStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return nil
	}
	var last *bkclient.SolveStatus
	if open := openVertices(e.list); len(open) > 0 {
		last = &bkclient.SolveStatus{Vertexes: open}
		e.list = append(e.list, last)
	}
	e.ended = true
	e.wake()
	return last
}

// all returns what has happened so far.
func (e *events) all() []*bkclient.SolveStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list[:len(e.list):len(e.list)]
}

// openVertices returns the last state of each vertex that has begun and not ended, ended now.
func openVertices(list []*bkclient.SolveStatus) []*bkclient.Vertex {
	last := map[digest.Digest]*bkclient.Vertex{}
	var order []digest.Digest
	for _, s := range list {
		for _, v := range s.Vertexes {
			if last[v.Digest] == nil {
				order = append(order, v.Digest)
			}
			last[v.Digest] = v
		}
	}
	now := time.Now()
	var open []*bkclient.Vertex
	for _, d := range order {
		if v := last[d]; v.Started != nil && v.Completed == nil {
			ended := *v
			ended.Completed = &now
			ended.Error = context.Canceled.Error()
			open = append(open, &ended)
		}
	}
	return open
}

// listen sends all events, what has happened and what happens, until the build ends. Events that are waiting are merged.
func (e *events) listen(ctx context.Context, send func(*bkclient.SolveStatus) error) error {
	for next := 0; ; {
		e.mu.Lock()
		pending := e.list[next:]
		next = len(e.list)
		merged := merge(pending)
		ended, changed := e.ended, e.changed
		e.mu.Unlock()
		if merged != nil {
			if err := send(merged); err != nil {
				return err
			}
			continue
		}
		if ended {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func merge(list []*bkclient.SolveStatus) *bkclient.SolveStatus {
	switch len(list) {
	case 0:
		return nil
	case 1:
		return list[0]
	}
	merged := &bkclient.SolveStatus{}
	for _, s := range list {
		merged.Vertexes = append(merged.Vertexes, s.Vertexes...)
		merged.Statuses = append(merged.Statuses, s.Statuses...)
		merged.Logs = append(merged.Logs, s.Logs...)
		merged.Warnings = append(merged.Warnings, s.Warnings...)
	}
	return merged
}
