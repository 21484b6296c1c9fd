// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
)

// load reads and checks the manifest of a Ref.
func load(ctx context.Context, b Blobs, ref Ref) (*manifest, error) {
	if err := ref.Check(); err != nil {
		return nil, err
	}
	r, err := b.Open(ctx, ref.Manifest, 0, -1)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", ref.Manifest.Digest, err)
	}
	defer r.Close()
	packed := make([]byte, ref.Manifest.Size)
	if _, err := io.ReadFull(r, packed); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", ref.Manifest.Digest, err)
	}
	if got := digest.FromBytes(packed); got != ref.Manifest.Digest {
		return nil, fmt.Errorf("%w: manifest %s has the bytes of %s", ErrCorrupt, ref.Manifest.Digest, got)
	}
	m, err := decode(packed)
	if err != nil {
		return nil, fmt.Errorf("%w (%s)", err, ref.Manifest.Digest)
	}
	if ref.Packs == nil {
		return m, nil
	}
	if len(m.Packs) != len(ref.Packs) {
		return nil, fmt.Errorf("%w: manifest %s has %d packs, and the cache names %d for it", ErrCorrupt, ref.Manifest.Digest, len(m.Packs), len(ref.Packs))
	}
	for i, p := range m.Packs {
		if d := p.descriptor(); d.Digest != ref.Packs[i].Digest || d.Size != ref.Packs[i].Size {
			return nil, fmt.Errorf("%w: manifest %s has a pack %s, which the cache does not name for it", ErrCorrupt, ref.Manifest.Digest, d.Digest)
		}
	}
	return m, nil
}

// mustDecode returns the bytes of a digest that was made here.
func mustDecode(d digest.Digest) []byte {
	b, err := hex.DecodeString(d.Encoded())
	if err != nil {
		panic(err)
	}
	return b
}
