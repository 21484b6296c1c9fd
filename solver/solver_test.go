// SPDX-License-Identifier: Apache-2.0

package solver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/solvertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// funcOp is an op that calls a function.
type funcOp struct {
	vertex *solver.Vertex
	run    func(ctx context.Context, env *solver.Env) error
}

func (o funcOp) Parts() []record.Part {
	return []record.Part{{Name: "op", Value: o.vertex.Digest.String()}}
}

func (o funcOp) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return digest.FromString("input"), nil
}

func (o funcOp) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	return []snapshot.Snapshot{nil}, o.run(ctx, env)
}

// noLayers is for results without layers.
type noLayers struct{}

func (noLayers) Stat(context.Context, layer.ID) (layer.Info, error) { return layer.Info{}, nil }
func (noLayers) Ensure(context.Context, ...layer.ID) error          { return nil }
func (noLayers) Materialise(context.Context, ...layer.ID) error     { return nil }

// logs keeps blobs in memory.
type logs struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
}

func (l *logs) Put(_ context.Context, r io.Reader, want ocispec.Descriptor) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if digest.FromBytes(b) != want.Digest || int64(len(b)) != want.Size {
		return fmt.Errorf("%d bytes %s are not %v", len(b), digest.FromBytes(b), want)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.blobs[want.Digest] = b
	return nil
}

// run makes a solver whose every op calls f, and a definition of one step in line 3 of a Dockerfile.
func run(t *testing.T, f func(ctx context.Context, env *solver.Env) error) (*solver.Solver, *pb.Definition, *solvertest.Records, *logs) {
	t.Helper()
	records, blobs := solvertest.NewRecords(), &logs{blobs: map[digest.Digest][]byte{}}
	s := solver.New(solver.Options{
		Layers: noLayers{}, Records: records, Blobs: blobs, Jobs: 2,
		NewOp: func(v *solver.Vertex) (solver.Op, error) { return funcOp{v, f}, nil },
	})
	file := llb.NewSourceMap(nil, "Dockerfile", "Dockerfile", []byte("FROM scratch AS build\n\nRUN make\n"))
	at := file.Location([]*pb.Range{{Start: &pb.Position{Line: 3}, End: &pb.Position{Line: 3}}})
	def, err := llb.Scratch().Run(llb.Shlex("make"), llb.WithCustomName("[build 1/1] RUN make"), at).Root().Marshal(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s, def.ToPB(), records, blobs
}

func evaluate(s *solver.Solver, def *pb.Definition, o solver.BuildOptions) error {
	b := s.NewBuild(o)
	defer b.Close()
	e, err := b.Load(def)
	if err != nil {
		return err
	}
	_, err = b.Result(context.Background(), e)
	return err
}

func TestRecordSaysWhereFrom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		long := strings.Repeat("a line of the log\n", 100_000)
		s, def, records, blobs := run(t, func(_ context.Context, env *solver.Env) error {
			env.Progress.Log(1, []byte(long))
			env.Progress.Log(2, []byte("end\n"))
			env.ReportPeakMemory(7 << 20)
			env.ReportPeakMemory(5 << 20)
			env.ReportUsage(time.Second, 10, 20)
			env.ReportUsage(2*time.Second, 1, 2)
			time.Sleep(3 * time.Second)
			return nil
		})
		if err := evaluate(s, def, solver.BuildOptions{ID: "the build"}); err != nil {
			t.Fatal(err)
		}
		kinds := map[string]int{}
		for key, rec := range records.All() {
			kinds[rec.Kind]++
			want := record.Step{Name: "[build 1/1] RUN make", Stage: "build", File: "Dockerfile", Line: 3}
			if rec.Step != want || rec.Build != "the build" || rec.Duration != 3*time.Second || rec.PeakMemory != 7<<20 || rec.CPUTime != 3*time.Second || rec.ReadBytes != 11 || rec.WrittenBytes != 22 || len(rec.Parts) == 0 {
				t.Errorf("record %s is %+v", key, rec)
			}
			if got := string(blobs.blobs[rec.Log]); got != long+"end\n" {
				t.Errorf("the log of record %s has %d bytes, want %d", key, len(got), len(long)+4)
			}
		}
		if kinds[record.KindContent] != 1 || kinds[record.KindRecipe] != 1 {
			t.Errorf("records by kind: %v", kinds)
		}
	})
}

func TestVertexError(t *testing.T) {
	cause := errors.New("exit code 2")
	s, def, records, _ := run(t, func(_ context.Context, env *solver.Env) error {
		for i := range 1000 {
			env.Progress.Log(2, fmt.Appendf(nil, "line %d\n", i))
		}
		return cause
	})
	screen := new(solvertest.Screen)
	err := evaluate(s, def, solver.BuildOptions{Writer: screen})
	var v *solver.VertexError
	if !errors.As(err, &v) || !errors.Is(err, cause) {
		t.Fatalf("error is %v", err)
	}
	if got, want := err.Error(), "Dockerfile:3: [build 1/1] RUN make: exit code 2"; got != want {
		t.Errorf("error is %q, want %q", got, want)
	}
	if lines := bytes.Split(bytes.TrimSpace(v.Log), []byte("\n")); len(lines) != 50 || string(lines[49]) != "line 999" {
		t.Errorf("the log has %d lines: %.40q…", len(lines), v.Log)
	}
	if len(v.Sources) != 1 || v.Sources[0].Filename != "Dockerfile" || v.Locations[0].Ranges[0].Start.Line != 3 {
		t.Errorf("the error is at %v in %v", v.Locations, v.Sources)
	}
	if n := len(records.All()); n != 0 {
		t.Errorf("%d records of a failed step", n)
	}
	if shown := screen.Last(v.Vertex.Digest); shown.Error != "exit code 2" || shown.Completed == nil {
		t.Errorf("shown as %+v", shown)
	}
}

// secretSession has one secret.
type secretSession struct {
	solver.Session
	value string
}

func (s secretSession) Secret(context.Context, string) ([]byte, error) { return []byte(s.value), nil }

// Work that two builds wait for asks the client of the second one when the first one has gone.
func TestSharedRunChangesSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked []string
		s, def, _, _ := run(t, func(ctx context.Context, env *solver.Env) error {
			for range 3 {
				b, err := env.Session.Secret(ctx, "token")
				if err != nil {
					return err
				}
				asked = append(asked, string(b))
				select {
				case <-time.After(10 * time.Second):
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			return nil
		})
		first := s.NewBuild(solver.BuildOptions{Session: secretSession{value: "first"}})
		e, err := first.Load(def)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := first.Result(t.Context(), e); !errors.Is(err, solver.ErrClosed) {
				t.Errorf("the build that was closed returned %v", err)
			}
		})
		wg.Go(func() {
			time.Sleep(time.Second)
			if err := evaluate(s, def, solver.BuildOptions{Session: secretSession{value: "second"}}); err != nil {
				t.Errorf("the other build returned %v", err)
			}
		})
		time.Sleep(12 * time.Second)
		first.Close()
		wg.Wait()
		if got := fmt.Sprint(asked); got != "[first first second]" {
			t.Errorf("clients asked: %s", got)
		}
		if _, err := first.Result(t.Context(), e); !errors.Is(err, solver.ErrClosed) {
			t.Errorf("a closed build returns %v", err)
		}
	})
}

// dyingSession is that of a client that goes while it is asked.
type dyingSession struct{ solver.Session }

func (dyingSession) Secret(context.Context, string) ([]byte, error) {
	time.Sleep(10 * time.Second)
	return nil, errors.New("the connection is gone")
}

// A client that goes in the middle of an answer does not fail the builds of others that wait for the same work.
func TestSharedRunOutlivesSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, def, _, _ := run(t, func(ctx context.Context, env *solver.Env) error {
			b, err := env.Session.Secret(ctx, "token")
			if err == nil && string(b) != "second" {
				err = fmt.Errorf("the secret is %q", b)
			}
			return err
		})
		var wg sync.WaitGroup
		for i, session := range []solver.Session{dyingSession{}, secretSession{value: "second"}} {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Second)
				if err := evaluate(s, def, solver.BuildOptions{Session: session}); err != nil {
					t.Errorf("build %d returned %v", i, err)
				}
			})
		}
		wg.Wait()
		// Alone it fails, as nobody else can be asked.
		s, def, _, _ = run(t, func(ctx context.Context, env *solver.Env) error {
			_, err := env.Session.Secret(ctx, "token")
			return err
		})
		if err := evaluate(s, def, solver.BuildOptions{Session: dyingSession{}}); err == nil || !strings.Contains(err.Error(), "the connection is gone") {
			t.Errorf("got %v", err)
		}
	})
}

// slowWriter takes its time for every event.
type slowWriter struct{ solvertest.Screen }

func (w *slowWriter) Write(st *client.SolveStatus) {
	time.Sleep(time.Minute)
	w.Screen.Write(st)
}

// A client that reads slowly does not hold up the build, and is told so instead of filling the memory.
func TestSlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		chunk := bytes.Repeat([]byte("0123456789abcde\n"), 1<<16) // 1 MiB
		s, def, _, _ := run(t, func(_ context.Context, env *solver.Env) error {
			for range 40 {
				env.Progress.Log(1, chunk)
			}
			return nil
		})
		w := &slowWriter{}
		b := s.NewBuild(solver.BuildOptions{Writer: w})
		e, err := b.Load(def)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := b.Result(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("the build waited %v for its client", took)
		}
		b.Close()
		log := w.Log(e.Vertex.Digest)
		if len(log) > 20<<20 || !strings.Contains(log, "some output is not shown") {
			t.Errorf("the client was sent %d bytes", len(log))
		}
		if shown := w.Last(e.Vertex.Digest); shown.Completed == nil {
			t.Errorf("shown as %+v", shown)
		}
	})
}
