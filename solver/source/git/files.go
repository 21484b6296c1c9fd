// SPDX-License-Identifier: Apache-2.0

package git

import (
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// settle gives everything below root the modes that git means, whatever the umask of this process is, and the time
// when, in nanoseconds since the epoch, unless it is 0.
func settle(root string, when int64) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if mode := info.Mode(); mode.IsDir() || mode.IsRegular() {
			want := uint32(0o644)
			if mode.IsDir() || mode&0o100 != 0 {
				want = 0o755
			} else if mode&0o200 == 0 {
				want = 0o444 // git's objects
			}
			if uint32(mode.Perm()) != want {
				if err := unix.Fchmodat(unix.AT_FDCWD, path, want, 0); err != nil {
					return fmt.Errorf("set the mode of %s: %w", path, err)
				}
			}
		}
		if when == 0 {
			return nil
		}
		ts := unix.NsecToTimespec(when)
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set the time of %s: %w", path, err)
		}
		return nil
	})
}
