// SPDX-License-Identifier: Apache-2.0

package git

import (
	"os"
	"path/filepath"
	"testing"
)

// TestKnownHostsAreSwept opens the repositories of a process that was killed while git ran.
func TestKnownHostsAreSwept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "git")
	f, err := NewRepositories(dir).temp(knownHostsPrefix)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if filepath.Dir(f.Name()) != dir {
		t.Errorf("%s is not below %s", f.Name(), dir)
	}
	repository := filepath.Join(dir, "0123")
	if err := os.Mkdir(repository, 0o700); err != nil {
		t.Fatal(err)
	}
	NewRepositories(dir)
	if _, err := os.Stat(f.Name()); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", f.Name(), err)
	}
	if _, err := os.Stat(repository); err != nil {
		t.Error(err)
	}
}
