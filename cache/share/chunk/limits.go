// SPDX-License-Identifier: Apache-2.0

package chunk

// Bounds of what is read. They are far above what is written.
const (
	maxManifest  = 256 << 20 // packed
	maxPlain     = 1 << 30   // of a manifest, unpacked
	maxPacks     = 1 << 16
	maxPack      = 1 << 30
	maxChunk     = 1 << 20 // uncompressed
	maxPathBytes = 4096
	maxXattrs    = 64 << 10 // of one file, names and values
)

const (
	maxStream = 1 << 40
	maxID     = 1<<32 - 2 // 2^32-1 is no owner
)
