// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"fmt"
	"io"
	"testing"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	exportregistry "github.com/seed-68981b69/slipway/exporter/registry"
)

// guards are the ways in which registries keep people out, which take turns.
var guards = []registrytest.Options{
	{},
	{User: "mia", Password: "s3cret"},
	{User: "mia", Password: "s3cret", Token: true, TokenUses: 10}, // tokens expire all the time
	{User: "mia", Password: "s3cret", TLS: true},
	{User: "mia", Password: "s3cret", Token: true, TLS: true},
}

func (o guarded) String() string {
	return fmt.Sprintf("user=%t,token=%t,tls=%t", o.User != "", o.Token, o.TLS)
}

type guarded registrytest.Options

// faultyWorld is a registry and who may use it.
type faultyWorld struct {
	*registrytest.Server
	creds registry.Credentials
	opts  registry.Options
}

func newFaultyWorld(t *testing.T, o registrytest.Options) *faultyWorld {
	w := &faultyWorld{Server: registrytest.Start(t, o), opts: registry.Options{CertDirs: []string{}}}
	if o.User != "" {
		w.creds = func(context.Context, string) (string, string, error) { return o.User, o.Password, nil }
	}
	if o.TLS {
		w.opts.CertDirs = []string{w.CertDir(t)}
	}
	return w
}

// small is an image of two layers, of which one takes more than a few packets.
func (s *side) small(t *testing.T) image.Image {
	t.Helper()
	snap := s.layer(t, nil, map[string]string{"hello": "hello world\n"})
	snap = s.layer(t, snap, map[string]string{"big": big(200 << 10), "etc": "x"})
	r, err := exporter.NewResult(map[string][]byte{exptypes.ExporterImageConfigKey: []byte(config)}, map[string]snapshot.Snapshot{"": snap})
	if err != nil {
		t.Fatal(err)
	}
	s.export(t, r, map[string]string{"name": "app"})
	img, err := s.Images.Get(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// checkPull pulls into a new store, and reads the image if that works.
func (w *faultyWorld) checkPull(t *testing.T, ref string) error {
	t.Helper()
	s := newSideWith(t, w.opts)
	return w.checkPullInto(t, s, ref)
}

func (w *faultyWorld) checkPullInto(t *testing.T, s *side, ref string) error {
	t.Helper()
	ctx := t.Context()
	img, err := s.puller.Pull(ctx, ref, nil, w.creds, nil)
	if err != nil {
		if _, err := s.Images.Get(ctx, ref); err == nil {
			t.Error("the pull has failed, and the image has its name")
		}
		return err
	}
	snap, ok, err := s.Images.Layers(ctx, img.Target.Digest)
	if err != nil || !ok {
		t.Fatalf("layers: %v, %v", ok, err)
	}
	view, err := s.Snapshots.View(ctx, snap)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"hello": "hello world\n", "big": big(200 << 10), "etc": "x"} {
		r, err := view.OpenFile(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes that are wrong, %v", name, len(got), err)
		}
	}
	return nil
}

// TestFaultyPulls: whatever the wire and the registry do, what is pulled is right or not there; what passes is got over; and the
// next pull into the same store, which may have a part, is right.
func TestFaultyPulls(t *testing.T) {
	for i, tc := range []struct {
		kind registrytest.Kind
		part string
		// once says that one such fault does not matter, always that any number does not.
		once, always bool
	}{
		{registrytest.Drop, "/blobs/", true, false},
		{registrytest.Busy, "/blobs/", true, false},
		{registrytest.Fail, "/blobs/", true, false},
		{registrytest.Gone, "/blobs/", true, false},
		{registrytest.Truncate, "/blobs/", true, false},
		{registrytest.Short, "/blobs/", true, false},
		{registrytest.Corrupt, "/blobs/", true, false},
		{registrytest.Missing, "/blobs/", false, false},
		{registrytest.WrongName, "/blobs/", true, true}, // what counts is what comes
		{registrytest.Slow, "/blobs/", true, true},
		{registrytest.Drop, "/manifests/", true, false},
		{registrytest.Busy, "/manifests/", true, false},
		{registrytest.Truncate, "/manifests/", false, false},
		{registrytest.Corrupt, "/manifests/", true, false},
		{registrytest.WrongName, "/manifests/", false, false},
	} {
		o := guards[i%len(guards)]
		t.Run(fmt.Sprintf("%s%s%s", tc.kind, tc.part, guarded(o)), func(t *testing.T) {
			w := newFaultyWorld(t, o)
			maker := newSideWith(t, w.opts)
			ref := w.Host + "/app:1"
			if _, err := maker.pusher.Push(t.Context(), maker.small(t), ref, exportregistry.Options{Credentials: w.creds}); err != nil {
				t.Fatal(err)
			}
			method := "GET"
			if tc.part == "/manifests/" {
				method = ""
			}
			w.Fault.Break(tc.kind, 1, method, tc.part)
			if err := w.checkPull(t, ref); err != nil && tc.once {
				t.Errorf("one fault: %v", err)
			}
			if w.Fault.Heal() != 0 {
				t.Error("the fault has not happened")
			}
			s := newSideWith(t, w.opts)
			w.Fault.Break(tc.kind, 1000, method, tc.part)
			if err := w.checkPullInto(t, s, ref); (err == nil) != tc.always {
				t.Errorf("always: %v", err)
			}
			w.Fault.Heal()
			if err := w.checkPullInto(t, s, ref); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestFaultyPushes: the tag is set if all is well, and otherwise it is not there; the next push finishes the work.
func TestFaultyPushes(t *testing.T) {
	for i, tc := range []struct {
		kind         registrytest.Kind
		method, part string
		once, always bool
	}{
		{registrytest.Drop, "POST", "/uploads/", true, false},
		{registrytest.Fail, "POST", "/uploads/", true, false},
		{registrytest.Busy, "POST", "/uploads/", true, false},
		{registrytest.Drop, "PUT", "/uploads/", true, false},
		{registrytest.DropBody, "PUT", "/uploads/", true, false},
		{registrytest.Half, "PUT", "/uploads/", true, false},
		{registrytest.Fail, "PUT", "/uploads/", true, false},
		{registrytest.Busy, "PUT", "/uploads/", true, false},
		{registrytest.WrongName, "PUT", "/uploads/", false, false},
		{registrytest.Slow, "", "/v2/", true, true},
		{registrytest.Drop, "PUT", "/manifests/", true, false},
		{registrytest.Gone, "PUT", "/manifests/", true, false},
		{registrytest.Fail, "HEAD", "/blobs/", true, false},
		{registrytest.Drop, "HEAD", "/blobs/", true, false},
	} {
		o := guards[i%len(guards)]
		t.Run(fmt.Sprintf("%s %s%s%s", tc.kind, tc.method, tc.part, guarded(o)), func(t *testing.T) {
			w := newFaultyWorld(t, o)
			s := newSideWith(t, w.opts)
			img := s.small(t)
			push := func(repo string) error {
				_, err := s.pusher.Push(t.Context(), img, w.Host+"/"+repo+":1", exportregistry.Options{Credentials: w.creds})
				return err
			}
			w.Fault.Break(tc.kind, 1, tc.method, tc.part)
			err := push("one")
			if err != nil && tc.once {
				t.Errorf("one fault: %v", err)
			}
			if w.Fault.Heal() != 0 {
				t.Error("the fault has not happened")
			}
			if perr := w.checkPull(t, w.Host+"/one:1"); perr == nil != (err == nil) {
				t.Errorf("pushed: %v, pulled: %v", err, perr)
			}
			w.Fault.Break(tc.kind, 1000, tc.method, tc.part)
			err = push("always")
			if (err == nil) != tc.always {
				t.Errorf("always: %v", err)
			}
			w.Fault.Heal()
			if perr := w.checkPull(t, w.Host+"/always:1"); perr == nil != (err == nil) {
				t.Errorf("pushed: %v, pulled: %v", err, perr)
			}
			if err := push("always"); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if err := w.checkPull(t, w.Host+"/always:1"); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}
