// SPDX-License-Identifier: Apache-2.0

package op

import (
	"slices"
	"testing"
)

// A step that writes nothing makes no layer, not even in an image without the files that are mounted over, for which
// mount points have to be made.
func TestRunTrueMakesNoLayer(t *testing.T) {
	e := newExecEnv(t)
	view, err := e.Snapshots.View(t.Context(), e.root)
	if err != nil {
		t.Fatal(err)
	}
	draft := e.Layers.NewDraft(view)
	for _, path := range []string{"etc/hosts", "etc/hostname", "etc/resolv.conf"} {
		draft.Remove(path)
	}
	id, err := draft.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e.root = with(e.root, id)
	out, log, err := e.run(t.Context(), shell("true"), nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	if !slices.Equal(out[0], e.root) {
		x, _ := e.Layers.Index(t.Context(), out[0][len(out[0])-1])
		for entry := range x.All() {
			t.Errorf("in the new layer: %+v", entry)
		}
	}
}
