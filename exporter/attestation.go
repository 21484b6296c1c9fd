// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/moby/buildkit/solver/result"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// Attestation is something said about the result for one platform: how it was made, what is in it. Exporters turn it into an in-toto
// statement about what they make of the result.
type Attestation struct {
	// Path is the name of the file, for exports that write files; of its directories only the last part counts.
	Path string
	// PredicateType says what kind of predicate it is: in-toto's URI.
	PredicateType string
	// Subjects are what it is about; none means the result itself.
	Subjects []result.InTotoSubject
	// InlineOnly is for images and nothing else (BuildKit's rule for provenance that nobody asked for by name).
	InlineOnly bool
	// CoreSBOM is the SPDX document about the files of the result, to which the layers they are in can be added.
	CoreSBOM bool
	// Predicate makes the predicate, JSON. It may be called once for each export.
	Predicate func(ctx context.Context, layers LayerBlobs) (json.RawMessage, error)
}

// LayerBlobs are the layers of an image as its manifest names them; nil for exports that have no layers.
type LayerBlobs map[layer.ID]ocispec.Descriptor

// Attested says whether anything is said about any platform of the result.
func (r Result) Attested() bool {
	return slices.ContainsFunc(r.Refs, func(ref Ref) bool { return len(ref.Attestations) > 0 })
}

// WithoutInlineOnly leaves out the attestations that are only for images, where nothing else makes an index. BuildKit's rule: in an index
// that there is anyway, for several platforms or other attestations, they stay.
func (r Result) WithoutInlineOnly() Result {
	indexed := r.MultiPlatform || slices.ContainsFunc(r.Refs, func(ref Ref) bool {
		return slices.ContainsFunc(ref.Attestations, func(a Attestation) bool { return !a.InlineOnly })
	})
	if indexed {
		return r
	}
	return r.WithoutAttestations(func(a Attestation) bool { return a.InlineOnly })
}

// WithoutAttestations returns the result without the attestations that drop chooses.
func (r Result) WithoutAttestations(drop func(Attestation) bool) Result {
	r.Refs = slices.Clone(r.Refs)
	for i := range r.Refs {
		r.Refs[i].Attestations = slices.DeleteFunc(slices.Clone(r.Refs[i].Attestations), drop)
	}
	return r
}
