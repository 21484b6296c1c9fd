// SPDX-License-Identifier: Apache-2.0

package history

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/record"
)

// open opens a history on stores in dir.
func open(t *testing.T, dir string, maxBuilds int, maxBytes int64) (*Store, func()) {
	t.Helper()
	records, err := record.Open(filepath.Join(dir, "records"))
	if err != nil {
		t.Fatal(err)
	}
	blobs, err := blob.Open(filepath.Join(dir, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(Options{Records: records, Blobs: blobs, MaxBuilds: maxBuilds, MaxBytes: maxBytes})
	if err != nil {
		t.Fatal(err)
	}
	return s, func() {
		s.Close()
		if err := records.Close(); err != nil {
			t.Error(err)
		}
	}
}

// add keeps a build that took n seconds and began at second n, with a log of its own.
func add(t *testing.T, s *Store, ref string, n int64, failed string) digest.Digest {
	t.Helper()
	desc, err := s.Blobs.PutBytes(t.Context(), "text/plain", []byte("log of "+ref+strings.Repeat(".", 100-7-len(ref))))
	if err != nil {
		t.Fatal(err)
	}
	rec := &controlapi.BuildHistoryRecord{
		Ref: ref, CreatedAt: timestamppb.New(time.Unix(n, 0)), Logs: &controlapi.Descriptor{Digest: desc.Digest.String()},
		FrontendAttrs: map[string]string{"vcs:source": "host/" + ref},
	}
	s.Started(rec)
	s.Closing(ref)
	rec.CompletedAt = timestamppb.New(time.Unix(2*n, 0))
	if failed != "" {
		rec.Error = &spb.Status{Message: failed}
	}
	if err := s.Completed(rec, []ocispec.Descriptor{desc}, nil); err != nil {
		t.Fatal(err)
	}
	return desc.Digest
}

func list(t *testing.T, s *Store, req *controlapi.BuildHistoryRequest) string {
	t.Helper()
	req.EarlyExit = true
	var refs []string
	err := s.Listen(t.Context(), req, func(e *controlapi.BuildHistoryEvent) error {
		ref := e.Record.Ref
		if e.Type == controlapi.BuildHistoryEventType_STARTED {
			ref += "*"
		}
		refs = append(refs, ref)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(refs, " ")
}

// TestLimits: the oldest builds go with their blobs, pinned ones stay, and all of that lasts.
func TestLimits(t *testing.T) {
	dir := t.TempDir()
	s, closeStores := open(t, dir, 2, 0)
	logs := map[string]digest.Digest{}
	for i, ref := range []string{"a", "b", "c"} {
		logs[ref] = add(t, s, ref, int64(i+1), "")
		if ref == "a" {
			if err := s.Pin(t.Context(), "a", true); err != nil {
				t.Fatal(err)
			}
		}
	}
	logs["d"] = add(t, s, "d", 4, "")
	if got := list(t, s, &controlapi.BuildHistoryRequest{}); got != "d c a" {
		t.Errorf("kept %s", got)
	}
	for ref, there := range map[string]bool{"a": true, "b": false, "c": true, "d": true} {
		if s.Blobs.Has(logs[ref]) != there || s.Names(logs[ref]) != there {
			t.Errorf("the log of %s is there: %v, want %v", ref, s.Blobs.Has(logs[ref]), there)
		}
	}
	closeStores()

	s, closeStores = open(t, dir, 2, 0)
	defer closeStores()
	if got := list(t, s, &controlapi.BuildHistoryRequest{}); got != "d c a" {
		t.Errorf("after opening again: %s", got)
	}
	rec, err := s.Get(t.Context(), "a")
	if err != nil || !rec.Pinned || rec.Generation != 1 {
		t.Errorf("%v, %v", rec, err)
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if s.Blobs.Has(logs["a"]) {
		t.Error("the log of a deleted build is there")
	}
	if err := s.Delete(t.Context(), "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestBytesLimit(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 250)
	defer closeStores()
	for i, ref := range []string{"a", "b", "c", "d"} {
		add(t, s, ref, int64(i+1), "")
	}
	if got := list(t, s, &controlapi.BuildHistoryRequest{}); got != "d c" {
		t.Errorf("kept %s", got)
	}
}

func TestListen(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 0)
	defer closeStores()
	add(t, s, "good", 100, "")
	add(t, s, "bad", 200, "exit code 1")
	add(t, s, "stopped", 300, "rpc error: context canceled")
	s.Started(&controlapi.BuildHistoryRecord{Ref: "running", CreatedAt: timestamppb.Now()})
	for _, c := range []struct {
		req  *controlapi.BuildHistoryRequest
		want string
	}{
		{&controlapi.BuildHistoryRequest{}, "running* stopped bad good"},
		{&controlapi.BuildHistoryRequest{ActiveOnly: true}, "running*"},
		{&controlapi.BuildHistoryRequest{Ref: "bad"}, "bad"},
		{&controlapi.BuildHistoryRequest{Ref: "none"}, ""},
		{&controlapi.BuildHistoryRequest{Limit: 1}, "running* stopped"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"status==error"}}, "running* bad"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"status==canceled", "status==completed"}}, "running* stopped good"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"status!=error,duration>=3m"}}, "running* stopped"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"repository==host/good"}}, "running* good"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"ref~=^b"}}, "running* bad"},
		{&controlapi.BuildHistoryRequest{Filter: []string{"startedAt<1970-01-01T00:02:00Z"}}, "running* good"},
	} {
		if got := list(t, s, c.req); got != c.want {
			t.Errorf("%v: %s, want %s", c.req, got, c.want)
		}
	}
	if err := s.Listen(t.Context(), &controlapi.BuildHistoryRequest{Filter: []string{"duration>soon"}}, nil); err == nil {
		t.Error("a bad filter is accepted")
	}
}

// TestListenOn: without EarlyExit what happens later comes as well.
func TestListenOn(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 0)
	defer closeStores()
	add(t, s, "first", 1, "")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	events := make(chan string, 10)
	ended := make(chan error, 1)
	go func() {
		ended <- s.Listen(ctx, &controlapi.BuildHistoryRequest{}, func(e *controlapi.BuildHistoryEvent) error {
			events <- e.Type.String() + " " + e.Record.Ref
			return nil
		})
	}()
	if got := <-events; got != "COMPLETE first" {
		t.Fatal(got)
	}
	add(t, s, "second", 2, "")
	if err := s.Delete(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"STARTED second", "COMPLETE second", "DELETED first"} {
		if got := <-events; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	s.Close()
	if err := <-ended; err != nil {
		t.Errorf("the end: %v", err)
	}
}

// TestSettle: who asks right after a build has ended sees it.
func TestSettle(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 0)
	defer closeStores()
	s.Started(&controlapi.BuildHistoryRecord{Ref: "a"})
	s.Closing("a")
	asked := make(chan string, 1)
	go func() { asked <- list(t, s, &controlapi.BuildHistoryRequest{}) }()
	select {
	case got := <-asked:
		t.Fatalf("not waited for: %q", got)
	case <-time.After(20 * time.Millisecond):
	}
	add(t, s, "a", 1, "")
	if got := <-asked; got != "a" {
		t.Errorf("got %q", got)
	}
}

func TestInputs(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 60)
	defer closeStores()
	keep := func(name string) (d digest.Digest, wrote bool) {
		d = digest.FromString(name)
		s.Keep(t.Context(), d, func(w io.Writer) error {
			wrote = true
			_, err := io.WriteString(w, "the files of "+name)
			return err
		})
		return d, wrote
	}
	a, _ := keep("a")
	if _, wrote := keep("a"); wrote {
		t.Error("a list that is known is written again")
	}
	r, err := s.Inputs(a)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil || string(data) != "the files of a" {
		t.Errorf("%q, %v", data, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	keep("b")
	c, _ := keep("c") // each has some 27 bytes
	if _, err := s.Inputs(a); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("the oldest is still there: %v", err)
	}
	if r, err := s.Inputs(c); err != nil {
		t.Error(err)
	} else {
		r.Close()
	}
	bad := digest.FromString("bad")
	s.Keep(t.Context(), bad, func(io.Writer) error { return errors.New("no") })
	if _, err := s.Inputs(bad); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("a list that could not be written is there: %v", err)
	}
}

// TestMaxAge: with an age, only what is older goes because it is too much (BuildKit's rule); without a number only the age counts.
func TestMaxAge(t *testing.T) {
	dir := t.TempDir()
	s, closeStores := open(t, dir, 0, 0)
	defer closeStores()
	now := time.Now().Unix()
	s.MaxBuilds, s.MaxAge = 1, time.Hour
	// add ends a build that begins at n at 2n: the first three are long over, the others are not.
	for ref, n := range map[string]int64{"old1": 1, "old2": 2, "old3": 3} {
		add(t, s, ref, n, "")
	}
	refs := func() string {
		var list []string
		for _, rec := range s.Newest(10) {
			list = append(list, rec.Ref)
		}
		return strings.Join(list, " ")
	}
	if got := refs(); got != "old3" {
		t.Errorf("kept %q, want one old build", got)
	}
	add(t, s, "new1", now, "")
	add(t, s, "new2", now+1, "")
	if got := refs(); got != "new2 new1" {
		t.Errorf("kept %q, want both that are not old", got)
	}
	s.MaxBuilds, s.MaxAge = 0, time.Hour
	add(t, s, "old4", 4, "")
	add(t, s, "new3", now+2, "")
	if got := refs(); got != "new3 new2 new1" {
		t.Errorf("kept %q, want those that are not old", got)
	}
}

func TestAttach(t *testing.T) {
	s, closeStores := open(t, t.TempDir(), 0, 0)
	defer closeStores()
	add(t, s, "a", 1, "")
	desc, err := s.Blobs.PutBytes(t.Context(), "application/x", []byte("a trace"))
	if err != nil {
		t.Fatal(err)
	}
	attach := func(ref string) error {
		return s.Attach(ref, []ocispec.Descriptor{desc}, func(rec *controlapi.BuildHistoryRecord) {
			rec.Trace = &controlapi.Descriptor{Digest: desc.Digest.String()}
		})
	}
	if err := attach("a"); err != nil {
		t.Fatal(err)
	}
	rec, err := s.Get(t.Context(), "a")
	if err != nil || rec.Trace.GetDigest() != desc.Digest.String() || rec.Generation != 1 {
		t.Errorf("record %v, %v", rec, err)
	}
	if !s.Names(desc.Digest) {
		t.Error("the blob is nobody's")
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := attach("a"); err != nil { // it is gone: nothing happens
		t.Error(err)
	}
	if s.Names(desc.Digest) {
		t.Error("a deleted build names the blob")
	}
}
