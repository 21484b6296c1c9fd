// SPDX-License-Identifier: Apache-2.0

package op

import (
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

func TestInputDigests(t *testing.T) {
	d := &inputDigests{}
	computed := 0
	ask := func(i int, in snapshot.Snapshot, p ...record.Part) digest.Digest {
		t.Helper()
		sum, err := d.of(p, i, in, func() (digest.Digest, error) {
			computed++
			return digest.FromString(fmt.Sprint(computed)), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	op := record.Part{Name: "src", Value: "/a"}
	first := ask(0, snapshot.Snapshot{"h1", "h2"}, op)
	if ask(0, snapshot.Snapshot{"h1", "h2"}, op) != first || computed != 1 {
		t.Error("an equal question was answered again")
	}
	seen := map[digest.Digest]bool{first: true}
	for _, other := range []digest.Digest{
		ask(1, snapshot.Snapshot{"h1", "h2"}, op), ask(0, snapshot.Snapshot{"h2", "h1"}, op), ask(0, snapshot.Snapshot{"h1h2"}, op),
		ask(0, nil, op), ask(0, snapshot.Snapshot{"h1", "h2"}), ask(0, snapshot.Snapshot{"h1", "h2"}, op, op),
		ask(0, snapshot.Snapshot{"h1", "h2"}, record.Part{Name: "src/", Value: "a"}),
	} {
		if seen[other] {
			t.Error("another question got the answer of an earlier one")
		}
		seen[other] = true
	}
	broken := errors.New("broken")
	for range 2 {
		if _, err := d.of(nil, 9, nil, func() (digest.Digest, error) { return "", broken }); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	}
	for i := range maxInputDigests + 10 {
		ask(0, snapshot.Snapshot{layer.ID(fmt.Sprint("n", i))}, op)
	}
	if len(d.m) > maxInputDigests {
		t.Errorf("%d answers are kept", len(d.m))
	}
}

// TestFalseIndexIsForgotten: what a copy sees of a remote layer whose index was false is not what it sees of the layer later.
func TestFalseIndexIsForgotten(t *testing.T) {
	d := newDeps(t)
	env, _ := newEnv(t)
	op, err := New(*d)(vertex(copyOp(dockerCopy("/f", "/")), 2))
	if err != nil {
		t.Fatal(err)
	}
	see := func(content string) digest.Digest {
		t.Helper()
		x, err := index.NewChecked([]index.Entry{
			{Type: index.Dir, Mode: 0o755, Offset: -1},
			{Path: "f", Type: index.File, Mode: 0o644, Size: int64(len(content)), Digest: digest.FromString(content), Offset: -1},
		})
		if err != nil {
			t.Fatal(err)
		}
		id, err := d.Layers.AddRemote(t.Context(), layer.Remote{DiffID: digest.FromString("its tar"), Index: x})
		if err != nil {
			t.Fatal(err)
		}
		sum, err := op.InputDigest(t.Context(), env, 1, snapshot.Snapshot{id})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Layers.Forget(t.Context(), id); err != nil { // as when its bytes do not fit the index
			t.Fatal(err)
		}
		return sum
	}
	if see("false") == see("true") {
		t.Error("the digest of what was said first is still given")
	}
}
