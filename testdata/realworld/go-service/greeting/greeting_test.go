// SPDX-License-Identifier: Apache-2.0

package greeting

import (
	"os"
	"path/filepath"
	"testing"
)

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "message")
	if err := os.WriteFile(path, []byte("ahoy\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(path); err != nil || got != "ahoy" {
		t.Errorf("Read = %q, %v; want ahoy", got, err)
	}
}
