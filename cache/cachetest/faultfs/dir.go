// SPDX-License-Identifier: Apache-2.0

package faultfs

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// shmBytes is the room that Dir wants in memory.
const shmBytes = 512 << 20

// Dir returns a directory that goes with the test: in memory where there is room, because a test that makes hundreds of
// stores would spend its time in fsync.
func Dir(t testing.TB) string {
	t.Helper()
	const shm = "/dev/shm"
	var st unix.Statfs_t
	if err := unix.Statfs(shm, &st); err != nil || st.Type != unix.TMPFS_MAGIC || int64(st.Bavail)*st.Bsize < shmBytes {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(shm, "slipway-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
