// SPDX-License-Identifier: Apache-2.0

package compress

import (
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// bucket of the record database: from a layer's diff ID and a compression to the descriptor of the blob.
const bucket = "blobs"

// Values is the part of the record store that a Memo needs.
type Values interface {
	GetValue(bucket, key string) ([]byte, bool, error)
	PutValue(bucket, key string, value []byte) error
}

// Has is the part of the blob store that a Memo needs.
type Has interface {
	Has(digest.Digest) bool
}

// Memo remembers which blobs are the compressed forms of layers. It may be used concurrently.
type Memo struct {
	Values Values
	Blobs  Has
}

// Get returns the blob with the layer of diffID as compressed by k, if it is known and still there.
func (m Memo) Get(diffID digest.Digest, k Kind) (ocispec.Descriptor, bool, error) {
	raw, ok, err := m.Values.GetValue(bucket, key(diffID, k))
	if err != nil || !ok {
		return ocispec.Descriptor{}, false, err
	}
	var d ocispec.Descriptor
	if err := json.Unmarshal(raw, &d); err != nil || d.Digest.Validate() != nil {
		slog.Warn("ignoring an unreadable note on a compressed layer", "layer", diffID, "error", err)
		return ocispec.Descriptor{}, false, nil
	}
	return d, m.Blobs.Has(d.Digest), nil
}

// Put notes that blob d is the layer of diffID as compressed by k. Only its digest, size and media type are kept.
func (m Memo) Put(diffID digest.Digest, k Kind, d ocispec.Descriptor) error {
	raw, err := json.Marshal(ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
	if err != nil {
		return fmt.Errorf("note compressed layer %s: %w", diffID, err)
	}
	return m.Values.PutValue(bucket, key(diffID, k), raw)
}

func key(diffID digest.Digest, k Kind) string { return diffID.String() + "+" + string(k) }
