// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"encoding/binary"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// inputDigests remembers what InputDigest has answered for selections: it depends on nothing but the op's parts, the
// input's number and the layers of the input, which never change. A context of 50,000 files that has not changed is
// then not gone through again. What was said of remote layers is not remembered: their indexes are somebody's word until
// the bytes are here, and may turn out to be false. Safe for concurrent use.
type inputDigests struct {
	remote func(snapshot.Snapshot) bool // says that a layer is remote; nil is for never

	mu sync.Mutex // guards m
	m  map[digest.Digest]digest.Digest
}

// maxInputDigests bounds the memory: some 300 bytes each.
const maxInputDigests = 4096

// of returns the digest that stands for input i of an op with these parts, made by compute if it is not known.
func (d *inputDigests) of(parts []record.Part, i int, in snapshot.Snapshot, compute func() (digest.Digest, error)) (digest.Digest, error) {
	key := inputDigestKey(parts, i, in)
	d.mu.Lock()
	known, ok := d.m[key]
	d.mu.Unlock()
	if ok {
		return known, nil
	}
	sum, err := compute()
	if err != nil {
		return "", err
	}
	if d.remote != nil && d.remote(in) {
		return sum, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.m == nil || len(d.m) >= maxInputDigests {
		d.m = map[digest.Digest]digest.Digest{}
	}
	d.m[key] = sum
	return sum, nil
}

// hasRemote says that a layer's bytes are elsewhere, or that this cannot be found out.
func (d *Deps) hasRemote(in snapshot.Snapshot) bool {
	return slices.ContainsFunc(in, func(id layer.ID) bool {
		info, err := d.Layers.Stat(context.Background(), id)
		return err != nil || info.Form == layer.FormRemote
	})
}

func inputDigestKey(parts []record.Part, i int, in snapshot.Snapshot) digest.Digest {
	h := newHash("input digest")
	var buf []byte
	add := func(s string) {
		buf = binary.AppendUvarint(buf, uint64(len(s)))
		buf = append(buf, s...)
	}
	buf = binary.AppendUvarint(buf, uint64(i))
	buf = binary.AppendUvarint(buf, uint64(len(parts)))
	for _, p := range parts {
		add(p.Name)
		add(p.Value)
	}
	for _, id := range in {
		add(string(id))
	}
	h.Write(buf)
	return digest.NewDigest(digest.SHA256, h)
}
