// SPDX-License-Identifier: Apache-2.0

package solver

// How work is named. Work has two names, and each answers what the other cannot.
//
// The recipe key is known before anything runs: it is made of the op and of the recipe keys of what it reads. It lets
// a build stop at the highest step that is still good, without a look at anything below. But it changes whenever
// anything below changes, even to no effect.
//
// The content key is known once the inputs are there: it is made of the op and of the content digests of what the op
// can see of them. It survives changes to no effect (early cutoff), and it is the only name that can be trusted below
// a step that was run without its cache.
//
// A local context has no recipe worth a name: it enters the recipe key of what reads it by content as well.

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"io"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
)

// The salts keep the two kinds of keys and the versions of their making apart. Change the number when the same
// parts no longer mean the same work.
const (
	recipeSalt  = "slipway recipe key 1"
	contentSalt = "slipway content key 1"
	stepSalt    = "slipway step 1"
)

// recipeKey is the only maker of recipe keys.
func recipeKey(parts []record.Part) RecipeKey { return RecipeKey(hashParts(recipeSalt, parts)) }

// contentKey is the only maker of content keys.
func contentKey(parts []record.Part) ContentKey { return ContentKey(hashParts(contentSalt, parts)) }

// stepKey names what a step does whatever its inputs are; how long that took last time is kept under it.
func stepKey(parts []record.Part) string { return string(hashParts(stepSalt, parts)) }

// recipeInput is what the recipe key says of one input: the recipe of its vertex and which output, or, for an input
// that is known by content only, the digest of what the op sees of it.
type recipeInput struct {
	recipe  RecipeKey
	output  int
	content digest.Digest
}

// recipeParts lists what a recipe key is made of: what the vertex does itself, and its inputs.
func recipeParts(own []record.Part, inputs []recipeInput) []record.Part {
	parts := slices.Grow(slices.Clone(own), len(inputs))
	for i, in := range inputs {
		value := "content " + string(in.content)
		if in.content == "" {
			value = "recipe " + string(in.recipe) + " output " + strconv.Itoa(in.output)
		}
		parts = append(parts, record.Part{Name: "input " + strconv.Itoa(i), Value: value})
	}
	return parts
}

// contentParts lists what a content key is made of: what the vertex does itself, and what it sees of its inputs.
func contentParts(own []record.Part, inputs []digest.Digest) []record.Part {
	parts := slices.Grow(slices.Clone(own), len(inputs))
	for i, in := range inputs {
		parts = append(parts, record.Part{Name: "input " + strconv.Itoa(i), Value: "content " + string(in)})
	}
	return parts
}

// keyParts lists what e does itself: its op, for a source what it stands for now, and how many results there are.
func (e *entry) keyParts(pin Pin) []record.Part {
	parts := slices.Concat(e.parts, pin.Parts)
	if e.outputs != 1 {
		parts = append(parts, record.Part{Name: "outputs", Value: strconv.Itoa(e.outputs)})
	}
	return parts
}

// hashParts hashes names and values with their lengths, so that no two lists run together to the same bytes.
func hashParts(salt string, parts []record.Part) digest.Digest {
	h := sha256.New()
	writeString(h, salt)
	for _, p := range parts {
		writeString(h, p.Name)
		writeString(h, p.Value)
	}
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(h.Sum(nil)))
}

func writeString(h hash.Hash, s string) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(s)))
	h.Write(n[:])
	io.WriteString(h, s)
}
