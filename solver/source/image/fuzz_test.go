// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzManifest feeds what a registry may send as manifests, index and config: an error or an image, no panic, and never
// a layer without digests.
func FuzzManifest(f *testing.F) {
	d := `"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"`
	f.Add([]byte(`{"manifests":[{"digest":`+d+`,"platform":{"os":"linux","architecture":"amd64"}}]}`),
		[]byte(`{"config":{"digest":`+d+`},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":`+d+`}]}`),
		[]byte(`{"rootfs":{"diff_ids":[`+d+`]}}`))
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[]}`), []byte(`{}`), []byte(`{}`))
	f.Add([]byte(`{"manifests":[],"layers":[]}`), []byte(`null`), []byte(`[]`))
	f.Fuzz(func(t *testing.T, top, manifest, config []byte) {
		answers := [][]byte{top, manifest, config}
		found := &found{name: "x"}
		err := found.complete(ocispec.Platform{OS: "linux", Architecture: "amd64"}, func(ocispec.Descriptor) ([]byte, error) {
			if len(answers) == 0 {
				return nil, errors.New("no more")
			}
			a := answers[0]
			answers = answers[1:]
			return a, nil
		})
		if err != nil {
			return
		}
		layers, err := found.layers()
		if err != nil {
			return
		}
		for _, l := range layers {
			if l.desc.Digest.Validate() != nil || l.diffID.Validate() != nil {
				t.Errorf("layer %+v", l)
			}
		}
	})
}
