// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"os"
	"path/filepath"
	"testing"
)

func TestVerified(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	s := openStore(t, Options{})
	d := s.NewDraft(nil)
	d.Put(file("file", "text"), text("text"))
	copied, err := d.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	upper, err := s.NewUpper(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(upper, "upper", "file"), []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	tree, err := s.CommitTree(ctx, filepath.Join(upper, "upper"))
	if err != nil {
		t.Fatal(err)
	}
	if s.Verified(tree) {
		t.Error("the tar of a tree that is not packed is verified")
	}
	s.SetVerified(tree)
	if s.Verified(tree) {
		t.Error("what has no tar can be verified")
	}
	if _, err := s.Pack(ctx, tree); err != nil {
		t.Fatal(err)
	}
	for _, id := range []ID{copied, tree} {
		if !s.Verified(id) {
			t.Errorf("%s: its writer does not know that it is good", id)
		}
	}

	// Another process has to see for itself.
	dir := s.dir
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir, Options{Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := again.Stat(ctx, copied); err != nil || again.Verified(copied) {
		t.Errorf("verified by another process: %v, %v", again.Verified(copied), err)
	}
	again.SetVerified(copied)
	if !again.Verified(copied) {
		t.Error("what has been read is not verified")
	}
	if err := again.Delete(ctx, copied); err != nil {
		t.Fatal(err)
	}
	again.SetVerified(copied)
	if again.Verified(copied) {
		t.Error("what has been deleted is verified")
	}
}
