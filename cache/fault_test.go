// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/cachetest/faultfs"
	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// TestFaults fails every call by which an image with its layers and blobs, a record, and the removal of both reach the
// disk. The store opens afterwards, what was there before is there, and a sweep leaves nothing that is not named.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("opens hundreds of stores")
	}
	ctx := context.Background()
	add := func(s *Store, name string) error {
		id, err := s.Layers.Unpack(ctx, oneFile(t, name, name), "", nil)
		if err != nil {
			return err
		}
		config, err := json.Marshal(ocispec.Image{Author: name, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
		if err != nil {
			return err
		}
		cd, err := s.Blobs.PutBytes(ctx, ocispec.MediaTypeImageConfig, config)
		if err != nil {
			return err
		}
		raw, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: cd, Layers: []ocispec.Descriptor{}})
		if err != nil {
			return err
		}
		target, err := s.Blobs.PutBytes(ctx, ocispec.MediaTypeImageManifest, raw)
		if err != nil {
			return err
		}
		if err := s.Images.SetLayers(ctx, target.Digest, snapshot.Snapshot{id}); err != nil {
			return err
		}
		if _, err := s.Images.Add(ctx, image.Image{Name: name, Target: target}); err != nil {
			return err
		}
		return s.Records.Put(ctx, &record.Record{Outputs: []snapshot.Snapshot{{id}}}, name)
	}
	for _, c := range []struct {
		name string
		op   func(*Store) error
		// gone says that the operation removes the image "old".
		gone bool
	}{
		{"add image", func(s *Store) error { return add(s, "new") }, false},
		{"sync", (*Store).syncForTest, false},
		{"remove image", func(s *Store) error {
			if _, err := s.Images.Remove(ctx, "old", false); err != nil && !errors.Is(err, image.ErrNotFound) {
				return err
			}
			if err := s.Records.Delete(ctx, "old"); err != nil {
				return err
			}
			_, err := s.Sweep(ctx)
			return err
		}, true},
	} {
		for _, sticky := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sticky=%v", c.name, sticky), func(t *testing.T) {
				for k := 1; ; k++ {
					dir := faultfs.Dir(t)
					s := open(t, dir)
					if err := add(s, "old"); err != nil {
						t.Fatal(err)
					}
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					fault := &faultfs.Fault{FS: fsys.OS}
					s, err := OpenWith(ctx, dir, Options{FS: fault})
					if err != nil {
						t.Fatal(err)
					}
					fault.At, fault.Sticky = fault.Calls()+k, sticky
					err = c.op(s)
					where := fault.Failed()
					if err != nil && !errors.Is(err, faultfs.ErrInjected) {
						t.Errorf("%s: the error hides its cause: %v", where, err)
					}
					s.Close()

					s = open(t, dir)
					_, nerr := s.Images.Get(ctx, "old")
					if nerr != nil && !c.gone {
						t.Errorf("%s: lost: %v", where, nerr)
					}
					if _, err := s.Sweep(ctx); err != nil {
						t.Errorf("%s: sweep: %v", where, err)
					}
					problems, cerr := s.Check(ctx, CheckOptions{})
					if cerr != nil || len(problems) > 0 {
						t.Errorf("%s: %+v, %v", where, problems, cerr)
					}
					if where == "" {
						if err != nil {
							t.Errorf("without a fault: %v", err)
						}
						return
					}
					if err := c.op(s); err != nil {
						t.Errorf("%s: the next attempt: %v", where, err)
					}
					if err := s.Close(); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

func (s *Store) syncForTest() error { return s.Sync(context.Background()) }
