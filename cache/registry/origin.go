// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// OriginScheme begins the origins of layers that a registry has (layer.Remote).
const OriginScheme = "registry"

// Origin is where a layer's blob is: in the repository of an image.
type Origin struct {
	// Ref is the full name of the image.
	Ref string
	// Desc is the blob: media type, digest and size count.
	Desc ocispec.Descriptor
}

// origin is an Origin as it is written.
type origin struct {
	Ref       string        `json:"ref"`
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
}

// String writes the origin in one line, for ParseOrigin.
func (o Origin) String() string {
	b, err := json.Marshal(origin{o.Ref, o.Desc.MediaType, o.Desc.Digest, o.Desc.Size})
	if err != nil {
		panic("registry: " + err.Error()) // strings and numbers always marshal
	}
	return OriginScheme + ":" + string(b)
}

// ParseOrigin reads what String has written.
func ParseOrigin(s string) (Origin, error) {
	var o origin
	raw, ok := strings.CutPrefix(s, OriginScheme+":")
	if !ok {
		return Origin{}, fmt.Errorf("origin %q: not of a registry", s)
	}
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		return Origin{}, fmt.Errorf("origin %q: %w", s, err)
	}
	if err := o.Digest.Validate(); err != nil {
		return Origin{}, fmt.Errorf("origin %q: %w", s, err)
	}
	if o.Size < 0 {
		return Origin{}, fmt.Errorf("origin %q: a blob of %d bytes", s, o.Size)
	}
	return Origin{o.Ref, ocispec.Descriptor{MediaType: o.MediaType, Digest: o.Digest, Size: o.Size}}, nil
}
