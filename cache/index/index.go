// SPDX-License-Identifier: Apache-2.0

// Package index is a layer's table of contents: every path with its metadata and the digest of its bytes,
// sorted, made once while the layer's bytes are in hand, and asked ever after instead of the layer.
//
// Content keys, COPY selection, early cutoff, miss explanation and diffs are questions to an Index or to a
// View, which is what a stack of layers shows when it is mounted. Nothing here touches a file system.
package index

import (
	"strings"

	"github.com/opencontainers/go-digest"
)

// Type says what kind of file an Entry is.
type Type uint8

// The types of an Entry. A Whiteout hides what the layers below have at its path.
const (
	Dir Type = iota + 1
	File
	Symlink
	CharDevice
	BlockDevice
	Fifo
	Whiteout
)

// Entry is one path of a layer.
type Entry struct {
	// Path is relative to the layer's root, slash-separated and clean, without a leading slash. The root is "".
	// It is bytes, not text: it need not be UTF-8.
	Path string
	Type Type
	// Mode has the permission bits with set-user-ID, set-group-ID and sticky (07777), no type bits.
	Mode uint32
	UID  uint32
	GID  uint32
	// Size is the length of a File in bytes, 0 for everything else.
	Size int64
	// ModTime is in nanoseconds since the Unix epoch. It never enters a content digest.
	ModTime int64
	// Target is where a Symlink points.
	Target string
	// HardLink is set on the second and later names of one file: the Path of its first name, in this layer.
	// Such an entry has the metadata, Size and Digest of that file.
	HardLink string
	// Major and Minor are the device number of a CharDevice or BlockDevice.
	Major, Minor uint32
	// Xattrs are the extended attributes (without overlayfs's own), name to raw value; nil when there are none.
	Xattrs map[string]string
	// Opaque directories hide everything that the layers below have in them.
	Opaque bool
	// Digest is the digest of a File's bytes.
	Digest digest.Digest
	// Offset is where a File's bytes begin in the layer's tar; -1 when the layer has no tar form.
	Offset int64
}

// Compare orders paths so that a directory comes right before what is in it, and the names of one
// directory are in byte order: it compares component by component.
func Compare(a, b string) int {
	for i := 0; i < len(a) && i < len(b); i++ {
		if a[i] != b[i] {
			switch {
			case a[i] == '/':
				return -1
			case b[i] == '/':
				return 1
			case a[i] < b[i]:
				return -1
			default:
				return 1
			}
		}
	}
	return len(a) - len(b)
}

// Parent returns the path of the directory that holds path; the parent of a top-level name is "".
func Parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i]
	}
	return ""
}
