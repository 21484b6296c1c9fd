// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// childEnv makes a copy of the test binary an engine that is killed: it opens the store of that directory and uses it.
const childEnv = "SLIPWAY_CACHE_KILL_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		workUntilKilled(dir)
	}
	goleak.VerifyTestMain(m)
}

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), " "+dir+"/") {
			t.Errorf("something is left mounted below %s (%v)", dir, err)
		}
	})
	return s
}

func oneFile(t testing.TB, name, content string) io.Reader {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, content)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func (s *Store) unpack(t testing.TB, name string) layer.ID {
	t.Helper()
	id, err := s.Layers.Unpack(t.Context(), oneFile(t, name, name), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (s *Store) blob(t testing.TB, mediaType, content string) ocispec.Descriptor {
	t.Helper()
	d, err := s.Blobs.PutBytes(t.Context(), mediaType, []byte(content))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// image stores an image that runs from snap, with one compressed layer.
func (s *Store) image(t testing.TB, name string, snap snapshot.Snapshot, packed ocispec.Descriptor) image.Image {
	t.Helper()
	config, err := json.Marshal(ocispec.Image{Author: name, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		Config:    s.blob(t, ocispec.MediaTypeImageConfig, string(config)), Layers: []ocispec.Descriptor{packed},
	})
	if err != nil {
		t.Fatal(err)
	}
	target := s.blob(t, ocispec.MediaTypeImageManifest, string(raw))
	if err := s.Images.SetLayers(t.Context(), target.Digest, snap); err != nil {
		t.Fatal(err)
	}
	m, err := s.Images.Add(t.Context(), image.Image{Name: name, Target: target})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (s *Store) has(t testing.TB, id layer.ID) bool {
	t.Helper()
	_, err := s.Layers.Stat(t.Context(), id)
	if err != nil && !errors.Is(err, layer.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	s := open(t, dir)
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory: %v, %v", st.Mode(), err)
	}
	_, err = Open(t.Context(), dir)
	var locked *LockedError
	if !errors.Is(err, ErrLocked) || !errors.As(err, &locked) || locked.Pid != os.Getpid() {
		t.Fatalf("second Open: %v", err)
	}
	if !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
		t.Errorf("the error does not say who: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := open(t, dir).Close(); err != nil {
		t.Error(err)
	}
}

func TestDirectoryIsPrivate(t *testing.T) {
	for _, c := range []struct {
		name  string
		files []string
		want  os.FileMode
	}{{"empty", nil, 0o700}, {"store", []string{"version"}, 0o700}, {"something else", []string{"precious"}, 0o755}} {
		dir := filepath.Join(t.TempDir(), "root")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range c.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		open(t, dir)
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != c.want {
			t.Errorf("%s: mode %v, %v; want %v", c.name, st.Mode(), err, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, c := range []struct{ version, wantErr string }{
		{"1\n", ""}, {"2\n", "newer slipway"}, {"0\n", "older slipway"}, {"", "no layout version"}, {"x", "no layout version"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "version"), []byte(c.version), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), dir)
		if c.wantErr == "" {
			if err != nil {
				t.Errorf("version %q: %v", c.version, err)
			} else {
				s.Close()
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.wantErr) {
			t.Errorf("version %q: error %v, want %q", c.version, err, c.wantErr)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 2 {
			t.Errorf("version %q: a refused store was written to: %v", c.version, entries)
		}
		// The refusal has let go of the lock.
		if f, err := lock(dir); err != nil {
			t.Error(err)
		} else {
			unlock(f)
		}
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	named, recorded, mounted, loose := s.unpack(t, "named"), s.unpack(t, "recorded"), s.unpack(t, "mounted"), s.unpack(t, "loose")
	packed := s.blob(t, ocispec.MediaTypeImageLayerGzip, "packed form of the named layer")
	other := s.blob(t, ocispec.MediaTypeImageLayerZstd, "another form of the recorded layer")
	log := s.blob(t, "text/plain", "what a step has printed")
	stray := s.blob(t, "text/plain", "stray")
	m := s.image(t, "app", snapshot.Snapshot{named}, packed)
	info, err := s.Layers.Stat(ctx, recorded)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Records.PutValue(packedBucket, info.DiffID.String()+"+zstd", []byte(`{"digest":"`+other.Digest.String()+`"}`)); err != nil {
		t.Fatal(err)
	}
	if err := s.Records.Put(ctx, &record.Record{Outputs: []snapshot.Snapshot{{recorded}}, Log: log.Digest}, "key"); err != nil {
		t.Fatal(err)
	}
	if err := s.Images.SetLayers(ctx, stray.Digest, snapshot.Snapshot{loose}); err != nil {
		t.Fatal(err)
	}
	unmount := func() {}
	if os.Geteuid() == 0 {
		mnt, err := s.Snapshots.Mount(ctx, snapshot.Snapshot{mounted}, snapshot.MountOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		unmount = func() { mnt.Release() }
	}
	sweep := func(wantLayers, wantBlobs int) {
		t.Helper()
		swept, err := s.Sweep(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(swept.Layers) != wantLayers || len(swept.Blobs) != wantBlobs || swept.PutOff {
			t.Errorf("swept %+v, want %d layers and %d blobs", swept, wantLayers, wantBlobs)
		}
	}
	if os.Geteuid() == 0 {
		sweep(1, 1)
		unmount()
		sweep(1, 0)
	} else {
		sweep(2, 1)
	}
	if s.has(t, loose) || s.has(t, mounted) || s.Blobs.Has(stray.Digest) {
		t.Error("something that nothing names is still there")
	}
	if _, ok, err := s.Images.Layers(ctx, stray.Digest); ok || err != nil {
		t.Errorf("the layers of no image are still noted: %v, %v", ok, err)
	}
	if r, err := s.Images.Remove(ctx, "app", false); err != nil || r.Deleted != m.ID {
		t.Fatalf("remove: %+v, %v", r, err)
	}
	sweep(1, 1)
	if s.has(t, named) || s.Blobs.Has(packed.Digest) || !s.has(t, recorded) || !s.Blobs.Has(log.Digest) || !s.Blobs.Has(other.Digest) {
		t.Error("the wrong things are gone")
	}
	if err := s.Records.Delete(ctx, "key"); err != nil {
		t.Fatal(err)
	}
	sweep(1, 2)
	sweep(0, 0)
	if _, ok, _ := s.Records.GetValue(packedBucket, info.DiffID.String()+"+zstd"); ok {
		t.Error("a packed form that is gone is still noted")
	}
}

func TestLeasePutsSweepOff(t *testing.T) {
	s := open(t, t.TempDir())
	build, pull := s.Lease("build"), s.Lease("pull")
	id := s.unpack(t, "result")
	build.Add(id)
	m := s.image(t, "app", snapshot.Snapshot{id}, s.blob(t, "x", "packed"))
	if _, err := s.Images.Remove(t.Context(), "app", false); err != nil {
		t.Fatal(err)
	}
	if swept, err := s.Sweep(t.Context()); err != nil || !swept.PutOff || len(swept.Layers) != 0 {
		t.Fatalf("sweep under a lease: %+v, %v", swept, err)
	}
	build.Release()
	build.Release()
	if !s.has(t, id) || !s.Blobs.Has(m.ID) {
		t.Fatal("swept in spite of a lease")
	}
	pull.Release()
	s.sweeps.Wait()
	if s.has(t, id) || s.Blobs.Has(m.ID) || s.Blobs.Has(m.Target.Digest) {
		t.Error("the sweep that was put off did not take place")
	}
	s.Lease("later").Release()
}

// workUntilKilled commits layers over each other, with records and images of them, leaving mounts behind.
func workUntilKilled(dir string) {
	t := &childT{}
	s, err := Open(t.Context(), dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var snap snapshot.Snapshot
	if m, err := s.Images.Get(t.Context(), "app"); err == nil {
		if snap, _, err = s.Images.Layers(t.Context(), m.Target.Digest); err != nil {
			t.Fatal(err)
		}
	}
	for i := len(snap); ; i++ {
		if _, err := s.Snapshots.Mount(t.Context(), snap, snapshot.MountOptions{}); err != nil {
			t.Fatal(err)
		}
		m, err := s.Snapshots.Mount(t.Context(), snap, snapshot.MountOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(m.Path(), fmt.Sprint("f", i)), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if snap, err = m.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Records.Put(t.Context(), &record.Record{Outputs: []snapshot.Snapshot{snap}}, fmt.Sprint("step", i)); err != nil {
			t.Fatal(err)
		}
		s.image(t, "app", snap, s.blob(t, "x", "x"))
		fmt.Println(i)
	}
}

// childT is what the helpers need of a testing.T.
type childT struct{ testing.TB }

func (*childT) Context() context.Context { return context.Background() }

func (*childT) Helper() {}
func (*childT) Fatal(v ...any) {
	fmt.Fprintln(os.Stderr, v...)
	os.Exit(1)
}

func TestKill(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	last := -1
	for _, more := range []int{1, 7, 15} {
		child := exec.Command(exe)
		child.Env = append(os.Environ(), childEnv+"="+dir)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		stop := last + more
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			fmt.Sscan(lines.Text(), &last)
			if last == stop {
				child.Process.Kill()
			}
		}
		child.Wait()
		if last < stop {
			t.Fatalf("the child ended after step %d", last)
		}
		begin := time.Now()
		s := open(t, dir)
		t.Logf("killed after step %d; opened in %v", last, time.Since(begin).Round(time.Millisecond))
		for i := range last + 1 {
			rec, ok, err := s.Records.Get(t.Context(), fmt.Sprint("step", i))
			if err != nil || !ok || len(rec.Outputs[0]) != i+1 {
				t.Fatalf("record of step %d: %v, %v, %v", i, rec, ok, err)
			}
			v, err := s.Snapshots.View(t.Context(), rec.Outputs[0])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.OpenFile(t.Context(), fmt.Sprint("f", i)); err != nil {
				t.Errorf("step %d: %v", i, err)
			}
		}
		m, err := s.Images.Get(t.Context(), "app")
		if err != nil {
			t.Fatal(err)
		}
		snap, _, err := s.Images.Layers(t.Context(), m.Target.Digest)
		if err != nil || len(snap) < last+1 {
			t.Fatalf("image of %d layers, %v; want %d", len(snap), err, last+1)
		}
		mnt, err := s.Snapshots.Mount(t.Context(), snap, snapshot.MountOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if names, err := os.ReadDir(mnt.Path()); err != nil || len(names) != len(snap) {
			t.Errorf("%d files in %d layers, %v", len(names), len(snap), err)
		}
		mnt.Release()
		if _, err := s.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if err := s.Sync(t.Context()); err != nil {
			t.Error(err)
		}
		if rec, _, _ := s.Records.Get(t.Context(), "step0"); !rec.Durable {
			t.Error("Sync did not make a record durable")
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
