// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/seed-68981b69/slipway/cache/index"
)

// In a tar, a file ".wh.NAME" hides NAME of the layers below, and ".wh..wh..opq" everything that they have in the
// directory that holds it. Other names that begin with ".wh..wh." were aufs's own and mean nothing.
const (
	whPrefix = ".wh."
	whMeta   = ".wh..wh."
	whOpaque = ".wh..wh..opq"
)

// On disk, overlayfs marks an opaque directory with an xattr and a hidden name with a character device 0:0.
const (
	xattrOverlay      = "trusted.overlay."
	xattrOpaque       = "trusted.overlay.opaque"
	xattrWhiteout     = "trusted.overlay.whiteout"
	xattrUserOverlay  = "user.overlay."
	xattrUserOpaque   = "user.overlay.opaque"
	xattrUserWhiteout = "user.overlay.whiteout"
	xattrPaxPrefix    = "SCHILY.xattr."
	maxNameLen        = 255
	maxSymlinkTarget  = 4095
	maxEntries        = 16 << 20 // more entries than any real layer; a bound for hostile ones
)

// isOverlayXattr says whether an xattr is overlayfs's own business: it is never part of a layer.
func isOverlayXattr(name string) bool {
	return strings.HasPrefix(name, xattrOverlay) || strings.HasPrefix(name, xattrUserOverlay)
}

// OpaqueXattr is the name that marks opaque directories for the overlay mounts of this process.
func OpaqueXattr() string {
	if UserXattrs() {
		return xattrUserOpaque
	}
	return xattrOpaque
}

// isOpaqueXattr and isWhiteoutXattr say whether an xattr marks an opaque directory, or an empty file as a whiteout. Those of users do only
// where there are no others: any step can set them, and the mounts of a privileged engine do not ask for them.
func isOpaqueXattr(name string) bool {
	return name == xattrOpaque || name == xattrUserOpaque && UserXattrs()
}

func isWhiteoutXattr(name string) bool {
	return name == xattrWhiteout || name == xattrUserWhiteout && UserXattrs()
}

// UserXattrs says whether overlay mounts of this process mark directories and whiteouts by xattrs of the namespace "user" (overlay's
// option userxattr): the usual ones are for root of the host, and not for root of a user namespace.
func UserXattrs() bool { return userXattrs() }

var userXattrs = sync.OnceValue(func() bool {
	uids, err := os.ReadFile("/proc/self/uid_map")
	return os.Geteuid() != 0 || err != nil || !slices.Equal(strings.Fields(string(uids)), []string{"0", "0", "4294967295"})
})

// whiteoutName returns the name that hides path, in a tar.
func whiteoutName(path string) string {
	return index.Join(index.Parent(path), whPrefix+index.Base(path))
}
