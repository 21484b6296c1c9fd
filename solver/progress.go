// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"context"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

// maxPendingLog bounds how many bytes of logs are kept for a client that does not read. What comes on top is not
// shown; it is still in the stored log.
const maxPendingLog = 16 << 20

// display turns what happens to the vertices of one build into BuildKit's events and brings them to the build's Writer
// in order, from a goroutine of its own: a client that reads slowly holds up nobody.
type display struct {
	writer Writer
	wake   chan struct{} // has room for one
	ended  chan struct{} // closed when the goroutine has returned

	mu         sync.Mutex // guards what follows
	shown      map[digest.Digest]*shown
	last       time.Time // of the newest event
	pending    client.SolveStatus
	pendingLog int
	skippedLog map[digest.Digest]int
	closed     bool
}

// shown is what the client has been told about one vertex.
type shown struct {
	vertex client.Vertex
	// users counts the evaluations in which the vertex is at work now.
	users int
}

func newDisplay(w Writer) *display {
	d := &display{
		writer: w, wake: make(chan struct{}, 1), ended: make(chan struct{}),
		shown: make(map[digest.Digest]*shown), skippedLog: make(map[digest.Digest]int),
	}
	go d.deliver()
	return d
}

// deliver hands over what is pending until the display is closed and everything has been handed over.
func (d *display) deliver() {
	defer close(d.ended)
	for range d.wake {
		for {
			status, closed := d.take()
			if status != nil && d.writer != nil {
				d.writer.Write(status)
			}
			if status == nil && closed {
				return
			}
			if status == nil {
				break
			}
		}
	}
}

func (d *display) take() (*client.SolveStatus, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pending
	if len(p.Vertexes)+len(p.Statuses)+len(p.Logs)+len(p.Warnings) == 0 {
		return nil, d.closed
	}
	d.pending, d.pendingLog = client.SolveStatus{}, 0
	clear(d.skippedLog)
	return &p, d.closed
}

// close waits until everything has been written. What comes later is dropped.
func (d *display) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.notify()
	<-d.ended
}

func (d *display) notify() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// update runs f under the lock, with a time later than that of any event before, so that sorting by time (which is
// what printers do) keeps the order.
func (d *display) update(f func(now time.Time)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	now := time.Now()
	if !now.After(d.last) {
		now = d.last.Add(1)
	}
	d.last = now
	f(now)
	d.notify()
}

// announce tells of vertices, in the order given, before anything happens to them. Those that are known already are left out.
func (d *display) announce(vertices []*Vertex) {
	d.update(func(time.Time) {
		for _, v := range vertices {
			d.get(v)
		}
	})
}

// get returns what was shown of v, announcing it the first time. mu is held.
func (d *display) get(v *Vertex) *shown {
	s, ok := d.shown[v.Digest]
	if !ok {
		s = &shown{vertex: client.Vertex{Digest: v.Digest, Name: v.Name, ProgressGroup: v.Meta.GetProgressGroup()}}
		for _, in := range v.Inputs {
			s.vertex.Inputs = append(s.vertex.Inputs, in.Vertex.Digest)
		}
		d.shown[v.Digest] = s
		d.emit(s)
	}
	return s
}

// emit sends a copy, since s goes on changing. mu is held.
func (d *display) emit(s *shown) {
	v := s.vertex
	d.pending.Vertexes = append(d.pending.Vertexes, &v)
}

// start shows v at work. A vertex may be at work again after it has ended (two evaluations in one build).
func (d *display) start(v *Vertex) {
	d.update(func(now time.Time) {
		s := d.get(v)
		s.users++
		d.open(s, now)
	})
}

// open sets the start time unless v is shown at work already. mu is held.
func (d *display) open(s *shown, now time.Time) {
	if s.vertex.Started != nil && s.vertex.Completed == nil {
		return
	}
	s.vertex.Started, s.vertex.Completed, s.vertex.Cached, s.vertex.Error = &now, nil, false, ""
	d.emit(s)
}

// complete shows v ended, once.
func (d *display) complete(v *Vertex, err error) {
	d.update(func(now time.Time) {
		s := d.get(v)
		s.users = 0
		if s.vertex.Started == nil || s.vertex.Completed != nil {
			return
		}
		s.vertex.Completed = &now
		if err != nil {
			s.vertex.Error = err.Error()
		}
		d.emit(s)
	})
}

// cached shows that the result of v, or of everything that reads it, was found. What has ended already stays as it is, and
// what another evaluation of this build has at work was not found but has just been made.
func (d *display) cached(v *Vertex) {
	d.update(func(now time.Time) {
		s := d.get(v)
		found := s.users == 0
		s.users = 0
		if s.vertex.Completed != nil {
			return
		}
		if s.vertex.Started == nil {
			s.vertex.Started = &now
		}
		s.vertex.Completed, s.vertex.Cached = &now, found
		d.emit(s)
	})
}

// cancel shows v as canceled if it is shown at work and no other evaluation of the build goes on with it. worked says
// that it was at work in the evaluation that is canceled, not only preparing. Printers know the state by the text of
// the error.
func (d *display) cancel(v *Vertex, worked bool) {
	d.update(func(now time.Time) {
		s := d.get(v)
		if worked && s.users > 0 {
			s.users--
		}
		if s.users > 0 || s.vertex.Started == nil || s.vertex.Completed != nil {
			return
		}
		s.vertex.Completed, s.vertex.Error = &now, context.Canceled.Error()
		d.emit(s)
	})
}

func (d *display) log(v *Vertex, stream int, data []byte) {
	d.update(func(now time.Time) {
		d.open(d.get(v), now)
		if d.pendingLog+len(data) > maxPendingLog {
			if d.skippedLog[v.Digest] == 0 {
				d.addLog(v, stream, []byte("\n[slipway: the client reads too slowly, some output is not shown; the stored log is complete]\n"), now)
			}
			d.skippedLog[v.Digest] += len(data)
			return
		}
		d.addLog(v, stream, data, now)
	})
}

func (d *display) addLog(v *Vertex, stream int, data []byte, now time.Time) {
	d.pendingLog += len(data)
	d.pending.Logs = append(d.pending.Logs, &client.VertexLog{Vertex: v.Digest, Stream: stream, Data: data, Timestamp: now})
}

func (d *display) status(v *Vertex, st client.VertexStatus) {
	d.update(func(now time.Time) {
		d.open(d.get(v), now)
		st.Vertex, st.Timestamp = v.Digest, now
		d.pending.Statuses = append(d.pending.Statuses, &st)
	})
}

func (d *display) warn(v *Vertex, short string) {
	d.update(func(time.Time) {
		w := &client.VertexWarning{Vertex: v.Digest, Level: 1, Short: []byte(short)}
		for i, loc := range v.Locations {
			w.SourceInfo, w.Range = v.Sources[i], loc.GetRanges()
			break
		}
		d.pending.Warnings = append(d.pending.Warnings, w)
	})
}
