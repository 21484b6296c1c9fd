// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/json"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzPatch: whatever config a frontend gives, it is refused, or the result has one line of history for each layer, and patching it again changes
// nothing.
func FuzzPatch(f *testing.F) {
	f.Add([]byte(`{"os":"linux","architecture":"amd64","history":[{"created_by":"RUN a"},{"empty_layer":true}]}`), byte(2), byte(1))
	f.Add([]byte(`{"os":"linux","architecture":"amd64","created":"2020-01-01T00:00:00Z"}`), byte(0), byte(0))
	f.Fuzz(func(t *testing.T, config []byte, layers, base byte) {
		p := patch{diffIDs: diffIDs(int(layers % 20)), created: time.Unix(1, 0).UTC()}
		var img ocispec.Image
		if json.Unmarshal(config, &img) == nil {
			p.base = img.History[:min(int(base), len(img.History))]
		}
		once, err := p.apply(config)
		if err != nil {
			return
		}
		var got ocispec.Image
		if err := json.Unmarshal(once, &got); err != nil {
			t.Fatal(err)
		}
		if n := count(got.History); n != len(p.diffIDs) || len(got.RootFS.DiffIDs) != n {
			t.Errorf("%d lines with a layer, %d diff IDs, want %d", n, len(got.RootFS.DiffIDs), len(p.diffIDs))
		}
		if len(p.base) > 0 {
			return // its lines keep what they lack
		}
		twice, err := p.apply(once)
		if err != nil || string(twice) != string(once) {
			t.Errorf("applied twice: %v\n%s\n%s", err, once, twice)
		}
	})
}
