// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !s.db.IsClosed() {
			s.Close()
		}
	})
	return s
}

func sample() *Record {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	return &Record{
		Outputs:  []snapshot.Snapshot{{"a", "b"}, nil},
		Kind:     KindRecipe,
		Parts:    []Part{{"args", "go build"}, {"env", "A=1"}},
		Step:     Step{Name: "[2/3] RUN go build", Stage: "build", File: "Dockerfile", Line: 7},
		Build:    "b1",
		Created:  at,
		LastUsed: at,
		Duration: 3 * time.Second, PeakMemory: 1 << 20,
		Log: "sha256:" + "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
	}
}

func mustGet(t *testing.T, s *Store, key string, want bool) *Record {
	t.Helper()
	rec, ok, err := s.Get(t.Context(), key)
	if err != nil || ok != want {
		t.Fatalf("Get(%q) = found %v, error %v; want found %v", key, ok, err, want)
	}
	return rec
}

func TestPutGet(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	rec := sample()
	if err := s.Put(t.Context(), rec, "recipe1", "content1"); err != nil {
		t.Fatal(err)
	}
	want := *rec
	want.BootID = s.bootID
	for _, key := range []string{"recipe1", "content1"} {
		if diff := cmp.Diff(&want, mustGet(t, s, key, true)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", key, diff)
		}
	}
	if rec.BootID != "" {
		t.Error("Put changed its argument")
	}
	mustGet(t, s, "recipe", false)
	if err := s.Delete(t.Context(), "recipe1", "never there"); err != nil {
		t.Fatal(err)
	}
	mustGet(t, s, "recipe1", false)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if diff := cmp.Diff(&want, mustGet(t, s, "content1", true)); diff != "" {
		t.Errorf("after reopening (-want +got):\n%s", diff)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	if _, err := Open(dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("second Open: %v, want ErrInUse", err)
	}
}

func TestDurability(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put := func(key string, durable bool) {
		t.Helper()
		rec := sample()
		rec.Durable = durable
		if err := s.Put(t.Context(), rec, key); err != nil {
			t.Fatal(err)
		}
	}
	put("synced", false)
	if err := s.Sync(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if !mustGet(t, s, "synced", true).Durable {
		t.Error("Sync did not mark a record")
	}
	put("born durable", true)
	put("never synced", false)
	put("synced, then put again", false)
	if err := s.Sync(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	put("synced, then put again", false)
	put("never synced", false)

	s.bootID = "another boot" // as if the machine had gone down
	mustGet(t, s, "synced", true)
	mustGet(t, s, "born durable", true)
	mustGet(t, s, "never synced", false)
	// A sync in the new boot says nothing about what the old one wrote.
	if err := s.Sync(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	mustGet(t, s, "synced, then put again", false)
	var left []string
	if err := s.Walk(t.Context(), func(key string, _ *Record) error { left = append(left, key); return nil }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"born durable", "synced"}, left); diff != "" {
		t.Errorf("records left (-want +got):\n%s", diff)
	}
}

// A record that is put while the disk is syncing may name a layer that the sync has missed.
func TestSyncLeavesLaterPuts(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.Put(t.Context(), sample(), "k"); err != nil {
		t.Fatal(err)
	}
	pending := map[string][]byte{}
	if err := s.scan(t.Context(), pendingPrefix, func(key string, n []byte) error { pending[key] = bytes.Clone(n); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), sample(), "k"); err != nil { // while syncfs runs
		t.Fatal(err)
	}
	if err := s.markDurable(pending); err != nil {
		t.Fatal(err)
	}
	if mustGet(t, s, "k", true).Durable {
		t.Error("a record put during the sync was marked durable")
	}
	if err := s.Sync(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if !mustGet(t, s, "k", true).Durable {
		t.Error("the next sync did not mark it")
	}
}

func mustCBOR(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := encoding.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What a step's arguments are need not be text.
func TestBytesInParts(t *testing.T) {
	s := open(t, t.TempDir())
	rec := &Record{Durable: true, Parts: []Part{{"arg", "a\xffb"}}}
	if err := s.Put(t.Context(), rec, "k"); err != nil {
		t.Fatal(err)
	}
	if got := mustGet(t, s, "k", true).Parts; !reflect.DeepEqual(got, rec.Parts) {
		t.Errorf("got %q", got)
	}
}

// BenchmarkDecode reads the record of a step that stands on a hundred layers.
func BenchmarkDecode(b *testing.B) {
	rec := sample()
	for i := range 100 {
		rec.Outputs[0] = append(rec.Outputs[0], layer.ID(digest.FromString(fmt.Sprint(i)).Encoded()))
	}
	raw, err := encodeRecord(rec)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if _, err := decodeRecord(raw); err != nil {
			b.Fatal(err)
		}
	}
}

func TestUnreadableIsAMiss(t *testing.T) {
	s := open(t, t.TempDir())
	good, err := encodeRecord(&Record{Durable: true})
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	newer := bytes.Clone(good)
	newer[0] = formatVersion + 1
	for name, raw := range map[string][]byte{
		"empty": {}, "short": good[:3], "cut": good[:len(good)-1], "flipped bit": flipped, "newer version": newer,
		"no CBOR": seal([]byte("no")), "JSON": seal([]byte(`{"durable":true}`)), "wrong type": seal(mustCBOR(t, map[string]any{"outputs": 7})),
		"bad digest": seal(mustCBOR(t, map[string]any{"log": "../../x", "durable": true})),
	} {
		t.Run(name, func(t *testing.T) {
			var w writes
			w.set(recordPrefix+"k", raw)
			w.set("v/b/k", raw[:min(len(raw), 4)])
			if err := s.write(w, false); err != nil {
				t.Fatal(err)
			}
			n := 0
			if err := s.WalkValues("b", func(string, []byte) error { n++; return nil }); err != nil || n != 0 {
				t.Errorf("WalkValues: %d values, error %v", n, err)
			}
			mustGet(t, s, "k", false)
			for _, key := range []string{recordPrefix + "k", "v/b/k"} {
				if raw, err := s.get(key); err != nil || raw != nil {
					t.Errorf("%s is still there: %q, %v", key, raw, err)
				}
			}
		})
	}
}

func TestTouch(t *testing.T) {
	s := open(t, t.TempDir())
	rec := sample()
	if err := s.Put(t.Context(), rec, "k"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		later, want time.Duration
	}{{touchInterval / 2, 0}, {2 * touchInterval, 2 * touchInterval}, {0, 2 * touchInterval}} {
		s.now = func() time.Time { return rec.LastUsed.Add(c.later) }
		if err := s.Touch("k", "not there"); err != nil {
			t.Fatal(err)
		}
		got := mustGet(t, s, "k", true)
		if !got.LastUsed.Equal(rec.LastUsed.Add(c.want)) || !got.Created.Equal(rec.Created) {
			t.Errorf("touched %v later: last used %v", c.later, got.LastUsed)
		}
	}
	mustGet(t, s, "not there", false)
}

func TestValues(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for _, kv := range [][3]string{{"a", "k/1", "one"}, {"a", "k", ""}, {"ab", "k", "other bucket"}} {
		if err := s.PutValue(kv[0], kv[1], []byte(kv[2])); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutValue("a", "nil", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteValue("a", "none"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, dir)
	got := map[string]string{}
	if err := s.WalkValues("a", func(k string, v []byte) error { got[k] = string(v); return nil }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"k": "", "k/1": "one", "nil": ""}, got); diff != "" {
		t.Errorf("bucket a (-want +got):\n%s", diff)
	}
	if v, ok, err := s.GetValue("ab", "k"); err != nil || !ok || string(v) != "other bucket" {
		t.Errorf("GetValue = %q, %v, %v", v, ok, err)
	}
	if _, ok, err := s.GetValue("ab", "k2"); err != nil || ok {
		t.Errorf("GetValue of a missing key = %v, %v", ok, err)
	}
	for _, bucket := range []string{"", "a/b"} {
		if err := s.PutValue(bucket, "k", nil); err == nil {
			t.Errorf("bucket %q was accepted", bucket)
		}
	}
	if err := s.PutValue("a", "big", make([]byte, maxValueBytes)); err == nil {
		t.Error("a value of 1 MiB was accepted")
	}
	if err := s.PutValue("a", "largest", make([]byte, maxValueBytes-headerLen)); err != nil {
		t.Errorf("a value just below 1 MiB: %v", err)
	}
}

func TestTrimValues(t *testing.T) {
	s := open(t, t.TempDir())
	for _, key := range []string{"d", "a", "c", "b", "d"} { // d is the newest
		if err := s.PutValue("trim", key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutValue("trimmed", "other", nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		keep int
		want string
	}{{9, "abcd"}, {4, "abcd"}, {2, "bd"}, {0, ""}} {
		if err := s.TrimValues("trim", c.keep); err != nil {
			t.Fatal(err)
		}
		if got := valueKeys(t, s, "trim"); got != c.want {
			t.Errorf("with %d kept: %q, want %q", c.keep, got, c.want)
		}
	}
	if got := valueKeys(t, s, "trimmed"); got != "other" {
		t.Errorf("the other bucket has %q", got)
	}
}

func valueKeys(t *testing.T, s *Store, bucket string) (keys string) {
	t.Helper()
	if err := s.WalkValues(bucket, func(k string, _ []byte) error { keys += k; return nil }); err != nil {
		t.Fatal(err)
	}
	return keys
}

// A batch far larger than one Badger transaction.
func TestLargeBatch(t *testing.T) {
	s := open(t, t.TempDir())
	rec := sample()
	rec.Durable = true
	rec.Parts = append(rec.Parts, Part{"big", strings.Repeat("x", 20000)})
	var items []Item
	for i := range 300 {
		items = append(items, Item{rec, []string{fmt.Sprint("a", i), fmt.Sprint("b", i)}})
	}
	if err := s.PutBatch(t.Context(), items); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := s.Walk(t.Context(), func(string, *Record) error { n++; return nil }); err != nil || n != 600 {
		t.Fatalf("%d records, error %v; want 600", n, err)
	}
	stop := errors.New("stop")
	if err := s.Walk(t.Context(), func(string, *Record) error { return stop }); err != stop {
		t.Errorf("Walk returned %v, want fn's error", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if err := s.Put(ctx, rec, "k"); err != stop {
		t.Errorf("Put with an ended context: %v", err)
	}
}

// On a full disk a put is refused while a delete still works; Badger alone would be killed by SIGBUS.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("slipway-test", dir, "tmpfs", 0, "size=100m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, filepath.Join(dir, "records"))
	if err := s.Put(t.Context(), sample(), "k", "gone"); err != nil {
		t.Fatal(err)
	}
	fill := func(n int) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, "big"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		f.Write(make([]byte, n))
	}
	fill(60 << 20)
	if err := s.Put(t.Context(), sample(), "later"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "MB left") {
		t.Errorf("put on a full disk: %v", err)
	}
	if err := s.Delete(t.Context(), "gone"); err != nil {
		t.Errorf("delete on a full disk: %v", err)
	}
	mustGet(t, s, "k", true)
	mustGet(t, s, "gone", false)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	fill(40 << 20)
	if _, err := Open(filepath.Join(dir, "records")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("open on a full disk: %v", err)
	}
	os.Remove(filepath.Join(dir, "big"))
	mustGet(t, open(t, filepath.Join(dir, "records")), "k", true)
}

func FuzzDecodeRecord(f *testing.F) {
	good, err := encodeRecord(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(seal(mustCBOR(f, map[string]any{"outputs": [][]string{{"x"}, nil}, "log": ""})))
	f.Add([]byte{formatVersion, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := decodeRecord(raw); err != nil && !errors.Is(err, errUnreadable) {
			t.Fatalf("error of no class: %v", err)
		}
		// The checksum keeps random bytes away from the CBOR: try them behind a good one.
		rec, err := decodeRecord(seal(raw))
		if err != nil {
			if !errors.Is(err, errUnreadable) {
				t.Fatalf("error of no class: %v", err)
			}
			return
		}
		again, err := encodeRecord(rec)
		if err != nil {
			if strings.Contains(err.Error(), "year outside of range") {
				return
			}
			t.Fatalf("a decoded record cannot be encoded: %v", err)
		}
		back, err := decodeRecord(again)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := json.Marshal(rec)
		b, _ := json.Marshal(back)
		if !bytes.Equal(a, b) {
			t.Fatalf("round trip changed\n%s\nto\n%s", a, b)
		}
	})
}

// TestCloseWithoutDirectory: Badger alone would try for ever, and the engine with it.
func TestCloseWithoutDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.closePatience = 100 * time.Millisecond
	if err := s.PutValue("bucket", "key", []byte("value")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("Close: %v", err)
	}
	// With its directory it ends after all, in the background.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.closed:
	case <-time.After(20 * time.Second):
		t.Error("the database is still open")
	}
}
