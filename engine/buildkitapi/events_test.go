// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

func logEvent(vertex digest.Digest, text []byte) *bkclient.SolveStatus {
	return &bkclient.SolveStatus{Logs: []*bkclient.VertexLog{{Vertex: vertex, Stream: 1, Data: text}}}
}

// collect reads everything a listener sees.
func collect(ctx context.Context, e *events) (all bkclient.SolveStatus, err error) {
	err = e.listen(ctx, func(s *bkclient.SolveStatus) error {
		all.Vertexes = append(all.Vertexes, s.Vertexes...)
		all.Logs = append(all.Logs, s.Logs...)
		return nil
	})
	return all, err
}

func TestEventsReachEveryListenerFromTheBeginning(t *testing.T) {
	e := newEvents()
	v := digest.FromString("v")
	e.Write(logEvent(v, []byte("first")))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			got, err := collect(t.Context(), e)
			if err != nil || len(got.Logs) != 101 || string(got.Logs[0].Data) != "first" {
				t.Errorf("%d logs, %v", len(got.Logs), err)
			}
		})
	}
	for range 100 {
		e.Write(logEvent(v, []byte("more")))
	}
	e.end()
	wg.Wait()
	if got, err := collect(t.Context(), e); err != nil || len(got.Logs) != 101 {
		t.Errorf("after the end: %d logs, %v", len(got.Logs), err)
	}
	e.Write(logEvent(v, []byte("late")))
	if got, _ := collect(t.Context(), e); len(got.Logs) != 101 {
		t.Errorf("an event after the end was kept")
	}
}

func TestEventsEndOpenVertices(t *testing.T) {
	e := newEvents()
	now := time.Now()
	open, done := digest.FromString("open"), digest.FromString("done")
	e.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: open, Started: &now}, {Digest: done, Started: &now}}})
	e.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: done, Started: &now, Completed: &now}}})
	e.end()
	got, _ := collect(t.Context(), e)
	last := got.Vertexes[len(got.Vertexes)-1]
	if len(got.Vertexes) != 4 || last.Digest != open || last.Completed == nil || last.Error == "" {
		t.Errorf("got %+v", got.Vertexes)
	}
}

func TestEventsBoundTheirLogs(t *testing.T) {
	e := newEvents()
	v := digest.FromString("v")
	now := time.Now()
	e.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: v, Started: &now}}})
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	for range 40 {
		e.Write(logEvent(v, chunk))
	}
	e.end()
	got, err := collect(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	size, notices := 0, 0
	for _, l := range got.Logs {
		if size += len(l.Data); bytes.Contains(l.Data, []byte("left out")) {
			notices++
		}
	}
	if size > maxKeptLog+1<<10 || size < maxKeptLog/2 || notices != 1 {
		t.Errorf("%d bytes kept, %d notices", size, notices)
	}
	if len(got.Vertexes) < 1 || got.Vertexes[0].Digest != v {
		t.Errorf("the vertex got lost")
	}
}

func TestListenerEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("gone")
	cancel(cause)
	if _, err := collect(ctx, newEvents()); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
}

func TestBuilds(t *testing.T) {
	bs := newBuilds()
	found := make(chan *build)
	go func() {
		b, err := bs.get(t.Context(), "x")
		if err != nil {
			t.Error(err)
		}
		found <- b
	}()
	b := &build{ref: "x", events: newEvents()}
	if err := bs.add(b); err != nil {
		t.Fatal(err)
	}
	if <-found != b {
		t.Error("another build was found")
	}
	if err := bs.add(&build{ref: "x"}); err == nil {
		t.Error("a ref was given twice")
	}
	bs.end(b)
	if got, err := bs.get(t.Context(), "x"); err != nil || got != b || bs.active() != 0 {
		t.Errorf("after the end: %v, %v, %d active", got, err, bs.active())
	}
	for i := range keptBuilds {
		other := &build{ref: string(rune('a' + i)), events: newEvents()}
		if err := bs.add(other); err != nil && other.ref != "x" {
			t.Fatal(err)
		}
		bs.end(other)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bs.get(ctx, "x"); err == nil {
		t.Error("an old build is kept for ever")
	}
}
