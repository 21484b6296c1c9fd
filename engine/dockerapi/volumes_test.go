// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"os"
	"path/filepath"
	"testing"
)

// TestFillUsedVolume fills a volume that somebody is writing to: nothing goes through the symlink that is there meanwhile.
func TestFillUsedVolume(t *testing.T) {
	v, err := openVolumes(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	data, err := v.ensure("shared", false, "")
	if err != nil {
		t.Fatal(err)
	}
	image, host := t.TempDir(), t.TempDir()
	for _, name := range []string{"etc", "var"} {
		if err := os.Mkdir(filepath.Join(image, name), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(image, name, "file"), []byte("image's"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(image, 0o705); err != nil {
		t.Fatal(err)
	}
	// What a container does after the volume has been found empty.
	if err := os.Symlink(host, filepath.Join(data, "etc")); err != nil {
		t.Fatal(err)
	}
	if err := v.fillUsed(data, image); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(host); len(entries) > 0 {
		t.Errorf("%s has been written outside of the volume", entries[0].Name())
	}
	if b, err := os.ReadFile(filepath.Join(data, "var", "file")); err != nil || string(b) != "image's" {
		t.Errorf("the volume has %q, %v", b, err)
	}
	if info, err := os.Stat(data); err != nil || info.Mode().Perm() != 0o705 {
		t.Errorf("the volume is %v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(v.dir); len(entries) != 1 {
		t.Errorf("left over: %v", entries)
	}
}
