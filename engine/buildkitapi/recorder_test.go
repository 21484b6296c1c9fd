// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

// TestRecorderIsComplete: the stream that is kept has all events, and the stored log where less was shown.
func TestRecorderIsComplete(t *testing.T) {
	for _, size := range []int{10, 3 * recordInMemory} {
		r := newRecorder(newEvents())
		defer r.close()
		a, b := digest.FromString("a"), digest.FromString("b")
		now := time.Now()
		for _, v := range []digest.Digest{a, b} {
			r.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: v, Name: v.String(), Started: &now}}})
		}
		shown := strings.Repeat("x", size)
		r.Write(&bkclient.SolveStatus{Logs: []*bkclient.VertexLog{{Vertex: a, Stream: 1, Data: []byte(shown), Timestamp: now}}})
		r.Write(&bkclient.SolveStatus{Logs: []*bkclient.VertexLog{{Vertex: b, Stream: 1, Data: []byte("only the end"), Timestamp: now}}})
		r.Write(&bkclient.SolveStatus{Warnings: []*bkclient.VertexWarning{{Vertex: b, Short: []byte("w")}}})
		r.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: b, Started: &now, Completed: &now, Cached: true}}})
		r.end() // closes a
		whole := strings.Repeat("the whole log\n", 10000)
		var kept bytes.Buffer
		err := r.writeTo(&kept, map[digest.Digest]int64{a: int64(size), b: int64(len(whole))}, func(v digest.Digest) (io.ReadCloser, error) {
			if v != b {
				t.Errorf("the log of %s is asked for", v)
			}
			return io.NopCloser(strings.NewReader(whole)), nil
		}, func(s string) string { return s })
		if err != nil {
			t.Fatal(err)
		}
		logs := map[digest.Digest]string{}
		completed := map[digest.Digest]bool{}
		err = readStatus(&kept, func(m *controlapi.StatusResponse) error {
			s := bkclient.NewSolveStatus(m)
			for _, l := range s.Logs {
				logs[l.Vertex] += string(l.Data)
				if completed[l.Vertex] {
					t.Errorf("output after the end")
				}
			}
			for _, v := range s.Vertexes {
				completed[v.Digest] = v.Completed != nil
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if logs[a] != shown || logs[b] != whole {
			t.Errorf("logs of %d and %d bytes, want %d and %d", len(logs[a]), len(logs[b]), len(shown), len(whole))
		}
		if !completed[a] || !completed[b] {
			t.Errorf("completed: %v", completed)
		}
		if r.total != 2 || r.cached != 1 || r.completed != 2 || r.warnings != 1 {
			t.Errorf("counts are %+v", r.counts)
		}
	}
}

func FuzzReadStatus(f *testing.F) {
	var b bytes.Buffer
	_ = writeStatus(&b, &bkclient.SolveStatus{Logs: []*bkclient.VertexLog{{Data: []byte("x")}}})
	f.Add(b.Bytes())
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = readStatus(bytes.NewReader(data), func(*controlapi.StatusResponse) error { return nil })
	})
}
