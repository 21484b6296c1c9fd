// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// BenchmarkMount is the root of one step: ten layers mounted, writable, and given back.
func BenchmarkMount(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("overlay mounts need root")
	}
	dir := b.TempDir()
	layers, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer layers.Close()
	s, err := OpenWith(filepath.Join(dir, "snapshots"), layers, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var snap Snapshot
	for i := range 10 {
		var raw bytes.Buffer
		w := tar.NewWriter(&raw)
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
			b.Fatal(err)
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		id, err := layers.Unpack(b.Context(), &raw, "", nil)
		if err != nil {
			b.Fatal(err)
		}
		snap = append(snap, id)
	}
	for b.Loop() {
		m, err := s.Mount(b.Context(), snap, MountOptions{Writable: true})
		if err != nil {
			b.Fatal(err)
		}
		m.Release()
	}
}
