// SPDX-License-Identifier: Apache-2.0

package transport_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry/transport"
)

// memory is an image in memory.
type memory struct {
	root  ocispec.Descriptor
	blobs map[digest.Digest][]byte
}

func (m *memory) add(mediaType string, content []byte) ocispec.Descriptor {
	d := digest.FromBytes(content)
	m.blobs[d] = content
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(content))}
}

func (m *memory) Root(context.Context) (ocispec.Descriptor, error) { return m.root, nil }
func (m *memory) Close() error                                     { return nil }

func (m *memory) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(m.blobs[d.Digest])), nil
}

// An archive of an image has its blobs in the order of the manifest, whatever the scheduler does.
func TestArchiveOrder(t *testing.T) {
	m := &memory{blobs: map[digest.Digest][]byte{}}
	manifest := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: m.add(ocispec.MediaTypeImageConfig, []byte("{}"))}
	want := []string{blob(manifest.Config)}
	for i := range 12 {
		l := m.add(ocispec.MediaTypeImageLayer, fmt.Append(nil, "layer ", i))
		manifest.Layers = append(manifest.Layers, l)
		want = append(want, blob(l))
	}
	raw, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	m.root = m.add(ocispec.MediaTypeImageManifest, raw)
	want = append(want, blob(m.root))
	for range 20 {
		var out bytes.Buffer
		if _, err := transport.Copy(t.Context(), m, transport.StreamArchive(&out, false), transport.Options{}); err != nil {
			t.Fatal(err)
		}
		var got []string
		for tr := tar.NewReader(&out); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, h.Name)
		}
		if !slices.Equal(got[:len(want)], want) {
			t.Fatalf("order:\n%q\nwant\n%q", got, want)
		}
	}
}

func blob(d ocispec.Descriptor) string { return "blobs/sha256/" + d.Digest.Encoded() }
