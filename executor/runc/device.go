// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// deviceNode describes the device node at path; ok is false when it is none (any more).
func deviceNode(path string) (dev specs.LinuxDevice, ok bool) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return dev, false
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		dev.Type = "c"
	case unix.S_IFBLK:
		dev.Type = "b"
	default:
		return dev, false
	}
	mode := os.FileMode(st.Mode & 0o7777)
	dev.Path = path
	dev.Major, dev.Minor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	dev.FileMode, dev.UID, dev.GID = &mode, &st.Uid, &st.Gid
	return dev, true
}
