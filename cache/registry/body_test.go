// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// stored puts b into a store and returns how Push opens it there.
func stored(t *testing.T, desc ocispec.Descriptor, b []byte) (*blob.Store, func() (io.ReadCloser, error)) {
	t.Helper()
	s, err := blob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), bytes.NewReader(b), desc); err != nil {
		t.Fatal(err)
	}
	return s, func() (io.ReadCloser, error) {
		r, err := s.Open(desc.Digest)
		if err != nil {
			return nil, err
		}
		return unread{t, r.(registry.Stored)}, nil
	}
}

// unread is a stored blob that nobody may read but from its file.
type unread struct {
	t *testing.T
	registry.Stored
}

func (u unread) Read([]byte) (int, error) {
	u.t.Error("a stored blob is read to be sent")
	return 0, io.ErrUnexpectedEOF
}

// TestPushStored: the bytes of a store are sent from their file, whether the kernel does it or TLS is in between, whole and from the
// middle on.
func TestPushStored(t *testing.T) {
	for _, tc := range []struct {
		name string
		tls  bool
		half int
	}{
		{"plain", false, 0},
		{"TLS", true, 0},
		{"broken", false, 2},
		{"TLS, broken", true, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			s := registrytest.Start(t, registrytest.Options{TLS: tc.tls})
			opts := registry.Options{}
			if tc.tls {
				opts.CertDirs = []string{s.CertDir(t)}
			}
			r := newRegistry(t, opts)
			desc, b := blobOf(t, 4<<20)
			_, open := stored(t, desc, b)
			if tc.half > 0 {
				s.Fault.Break(registrytest.Half, 1, "PUT", "/uploads/")
				s.Fault.Break(registrytest.Half, tc.half-1, "PATCH", "/uploads/")
			}
			var mu sync.Mutex
			var last int64
			err := r.Push(ctx, s.Host+"/a", desc, open, func(n int64) {
				mu.Lock()
				defer mu.Unlock()
				if last = n; n < 0 || n > desc.Size {
					t.Errorf("progress: %d of %d bytes", n, desc.Size)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if left := s.Fault.Heal(); left != 0 {
				t.Errorf("%d requests were not broken", left)
			}
			if last != desc.Size {
				t.Errorf("progress ends at %d of %d bytes", last, desc.Size)
			}
			got, err := r.FetchBytes(ctx, s.Host+"/a", desc)
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes came back, %v", len(got), err)
			}
		})
	}
}

// TestPushStoredDamaged: the registry refuses the blob, the store puts it aside, and the error says where the damage is.
func TestPushStoredDamaged(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{})
	r := newRegistry(t, registry.Options{})
	desc, b := blobOf(t, 2<<20)
	store, open := stored(t, desc, b)
	bad := bytes.Clone(b)
	bad[1<<20] ^= 1
	if err := os.WriteFile(filepath.Join(store.Dir(), "blobs", "sha256", desc.Digest.Encoded()), bad, 0o600); err != nil {
		t.Fatal(err)
	}
	err := r.Push(ctx, s.Host+"/a", desc, open, nil)
	check(t, err, registry.ErrCorrupt)
	if !errors.Is(err, blob.ErrDigest) || !strings.Contains(err.Error(), "local store is damaged") {
		t.Errorf("the error does not say where the damage is: %v", err)
	}
	if store.Has(desc.Digest) {
		t.Error("the store still has it")
	}
	if _, err := r.FetchBytes(ctx, s.Host+"/a", desc); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("the registry has it: %v", err)
	}
}

// TestPushGarbled: bytes that are changed on the way are sent again, and at last it is said that the blob here is good.
func TestPushGarbled(t *testing.T) {
	for name, fromStore := range map[string]bool{"stored": true, "stream": false} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			s := registrytest.Start(t, registrytest.Options{})
			r := newRegistry(t, registry.Options{})
			desc, b := blobOf(t, 2<<20)
			store, open := stored(t, desc, b)
			if !fromStore {
				open = opener(b)
			}
			s.Fault.Break(registrytest.Garble, 99, "PUT", "/uploads/")
			err := r.Push(ctx, s.Host+"/a", desc, open, nil)
			check(t, err, registry.ErrCorrupt)
			if !strings.Contains(err.Error(), "the blob here is good") {
				t.Errorf("the error does not say where the damage is: %v", err)
			}
			if !store.Has(desc.Digest) {
				t.Error("the store has lost it")
			}
			if left := s.Fault.Heal(); left != 96 {
				t.Errorf("tried %d times", 99-left)
			}
			s.Fault.Break(registrytest.Garble, 2, "PUT", "/uploads/")
			if err := r.Push(ctx, s.Host+"/b", desc, open, nil); err != nil {
				t.Errorf("twice: %v", err)
			}
			if got, err := r.FetchBytes(ctx, s.Host+"/b", desc); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes came back, %v", len(got), err)
			}
		})
	}
}
