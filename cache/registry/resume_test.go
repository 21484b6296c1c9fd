// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// TestUploadGoesOn breaks an upload again and again: a registry that says how far it came gets the rest, any other all of it again.
func TestUploadGoesOn(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{1})
	blob := make([]byte, 4<<20)
	_, _ = rng.Read(blob)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }
	for _, tc := range []struct {
		name    string
		breaks  int // of the PUT, then of PATCHes
		forgets bool
		patches int
		err     error
	}{
		{"whole", 0, false, 0, nil},
		{"broken once", 1, false, 1, nil},
		{"broken more often than is tried", 5, false, 5, nil}, // because it gets on each time
		{"a registry that forgets", 2, true, 0, nil},
		{"a registry that forgets, broken too often", 5, true, 0, registry.ErrUnreachable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			s := registrytest.Start(t, registrytest.Options{})
			r := newRegistry(t, registry.Options{})
			switch {
			case tc.forgets:
				s.Fault.Break(registrytest.Half, tc.breaks, "PUT", "/uploads/")
				s.Fault.Break(registrytest.Missing, tc.breaks, "GET", "/uploads/")
			case tc.breaks > 0:
				s.Fault.Break(registrytest.Half, 1, "PUT", "/uploads/")
				s.Fault.Break(registrytest.Half, tc.breaks-1, "PATCH", "/uploads/")
			}
			err := r.Push(ctx, s.Host+"/a", desc, open, nil)
			if !errors.Is(err, tc.err) || tc.err == nil && err != nil {
				t.Fatalf("push: %v, want %v", err, tc.err)
			}
			if tc.err != nil {
				return
			}
			if left := s.Fault.Heal(); left != 0 {
				t.Errorf("%d requests were not broken", left)
			}
			if got := len(s.Requests("PATCH")); got != tc.patches {
				t.Errorf("%d PATCHes, want %d", got, tc.patches)
			}
			b, err := r.FetchBytes(ctx, s.Host+"/a", desc)
			if err != nil || !bytes.Equal(b, blob) {
				t.Errorf("%d bytes came back, %v", len(b), err)
			}
		})
	}
}
