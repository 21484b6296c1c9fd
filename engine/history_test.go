// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/solver"
)

// history returns what ListenBuildHistory sends at once.
func (te *testEngine) history(req *controlapi.BuildHistoryRequest) []*controlapi.BuildHistoryRecord {
	te.t.Helper()
	req.EarlyExit = true
	stream, err := te.client.ControlClient().ListenBuildHistory(te.t.Context(), req)
	if err != nil {
		te.t.Fatal(err)
	}
	var out []*controlapi.BuildHistoryRecord
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			te.t.Fatal(err)
		}
		out = append(out, e.Record)
	}
}

// blob reads what a record names as BuildKit's own clients do.
func (te *testEngine) blob(d *controlapi.Descriptor) []byte {
	te.t.Helper()
	store := proxy.NewContentStore(te.client.ContentClient())
	data, err := content.ReadBlob(te.t.Context(), store, ocispec.Descriptor{Digest: digest.Digest(d.Digest), Size: d.Size, MediaType: d.MediaType})
	if err != nil {
		te.t.Fatalf("read %s: %v", d, err)
	}
	return data
}

func (te *testEngine) explanation(rec *controlapi.BuildHistoryRecord) *explain.Document {
	te.t.Helper()
	for _, d := range rec.GetResult().GetAttestations() {
		if d.MediaType == explain.MediaType {
			var doc explain.Document
			if err := json.Unmarshal(te.blob(d), &doc); err != nil {
				te.t.Fatal(err)
			}
			return &doc
		}
	}
	te.t.Fatalf("nothing is attached to %v", rec)
	return nil
}

// events returns what Status tells of a build: its output and the errors of its vertices.
func (te *testEngine) events(ref string) (logs, failures string) {
	te.t.Helper()
	stream, err := te.client.ControlClient().Status(te.t.Context(), &controlapi.StatusRequest{Ref: ref})
	if err != nil {
		te.t.Fatal(err)
	}
	for {
		s, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return logs, failures
		}
		if err != nil {
			te.t.Fatal(err)
		}
		for _, l := range s.Logs {
			logs += string(l.Msg)
		}
		for _, v := range s.Vertexes {
			failures += v.Error
		}
	}
}

// TestBuildHistory: what BuildKit's clients ask of builds that have ended.
func TestBuildHistory(t *testing.T) {
	te := openTest(t)
	te.base()
	te.mustBuild(request{name: "app", files: map[string]string{"Dockerfile": "FROM base\nRUN echo hello\n"}})
	_, err := te.build(t.Context(), request{
		files: map[string]string{"Dockerfile": "FROM base\nRUN echo hello\nRUN echo before; exit 7\n"},
		attrs: map[string]string{"build-arg:MY_SECRET": "hunter2"},
	})
	if err == nil {
		t.Fatal("exit 7 is no failure")
	}

	all := te.history(&controlapi.BuildHistoryRequest{})
	if len(all) != 3 {
		t.Fatalf("%d builds: %v", len(all), all)
	}
	failed, app := all[0], all[1]
	if failed.Error == nil || !strings.Contains(failed.Error.Message, "exit code: 7") || failed.ExternalError == nil || len(te.blob(failed.ExternalError)) == 0 {
		t.Errorf("the failure is recorded as %v", failed.Error)
	}
	for name, value := range failed.FrontendAttrs {
		if strings.HasPrefix(name, "slipway.") || strings.Contains(value, "hunter2") {
			t.Errorf("attribute %s=%s", name, value)
		}
	}
	if app.Error != nil || app.Frontend != "dockerfile.v0" || app.CompletedAt == nil || app.NumCompletedSteps == 0 || app.NumTotalSteps < app.NumCompletedSteps ||
		len(app.Exporters) != 1 || app.Exporters[0].Type != "image" || app.ExporterResponse["image.name"] == "" {
		t.Errorf("the record is %v", app)
	}
	if failed.NumCachedSteps == 0 {
		t.Errorf("no step is counted as cached: %v", failed)
	}
	if got := te.history(&controlapi.BuildHistoryRequest{Ref: app.Ref}); len(got) != 1 || got[0].Ref != app.Ref {
		t.Errorf("by ref: %v", got)
	}
	if got := te.history(&controlapi.BuildHistoryRequest{Filter: []string{"status==error"}, Limit: 1}); len(got) != 1 || got[0].Ref != failed.Ref {
		t.Errorf("by status: %v", got)
	}

	doc := te.explanation(failed)
	last := doc.Steps[len(doc.Steps)-1]
	if last.Outcome != solver.Failed || last.Log == "" || string(te.blob(&controlapi.Descriptor{Digest: last.Log.String(), Size: 7})) != "before\n" {
		t.Errorf("the failed step is %+v", last)
	}

	// The events are there after a restart, complete.
	te.stop()
	te = openAt(t, te.root)
	logs, failures := te.events(failed.Ref)
	if logs != "before\n" || !strings.Contains(failures, "exit code: 7") {
		t.Errorf("events: %q, %q", logs, failures)
	}
	if logs, _ := te.events(app.Ref); logs != "hello\n" {
		t.Errorf("events: %q", logs)
	}

	control := te.client.ControlClient()
	if _, err := control.UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: app.Ref, Pinned: true}); err != nil {
		t.Fatal(err)
	}
	if got := te.history(&controlapi.BuildHistoryRequest{Ref: app.Ref}); len(got) != 1 || !got[0].Pinned {
		t.Errorf("pinned: %v", got)
	}
	if _, err := control.UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: app.Ref, Delete: true}); err != nil {
		t.Fatal(err)
	}
	if got := te.history(&controlapi.BuildHistoryRequest{}); len(got) != 2 {
		t.Errorf("after the deletion: %v", got)
	}
	_, err = te.client.ContentClient().Info(t.Context(), &contentapi.InfoRequest{Digest: app.Logs.Digest})
	if grpcerrors.Code(err) != codes.NotFound {
		t.Errorf("the log of a deleted build: %v", err)
	}
	_, err = control.UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "nothing", Delete: true})
	if grpcerrors.Code(err) != codes.NotFound {
		t.Errorf("delete what is not there: %v", err)
	}
	// What no build names is not for everybody to read.
	if d := app.GetResult().GetResultDeprecated(); d != nil {
		if _, err := te.client.ContentClient().Info(t.Context(), &contentapi.InfoRequest{Digest: d.Digest}); grpcerrors.Code(err) != codes.NotFound {
			t.Errorf("the manifest of an image: %v", err)
		}
	}
}

// TestHistorySurvivesCollection: what is kept of builds is nothing that garbage collection may take.
func TestHistorySurvivesCollection(t *testing.T) {
	te := openTest(t)
	te.base()
	te.mustBuild(request{files: map[string]string{"Dockerfile": "FROM base\nCOPY a /a\nRUN echo hello\n", "a": "1"}})
	if err := te.client.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	rec := te.history(&controlapi.BuildHistoryRequest{Limit: 1})[0]
	te.blob(rec.Logs)
	te.explanation(rec)
	te.mustBuild(request{files: map[string]string{"Dockerfile": "FROM base\nCOPY a /a\nRUN echo hello\n", "a": "2"}})
	doc := te.explanation(te.history(&controlapi.BuildHistoryRequest{Limit: 1})[0])
	for _, s := range doc.Steps {
		if s.Kind != "file" {
			continue
		}
		if s.Reason == nil || len(s.Reason.Differences) != 1 || s.Reason.Differences[0].Files == nil || len(s.Reason.Differences[0].Files.List) != 1 {
			t.Errorf("the reason is %+v", s.Reason)
		}
	}
}
