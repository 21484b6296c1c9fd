// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"crypto/sha256"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// sum names a chunk: the SHA-256 of its bytes.
type sum [sha256.Size]byte

// The kinds of a manifest.
const (
	kindTree = 'd'
	kindTar  = 't'
)

// manifest is what a manifest blob says. The stream is, for a tree, the contents of its files; for a tar, first all that is not content of a
// file, then the contents. Files shorter than Small come before the others, so that they make chunks together, and the others begin and end
// chunks of their own; among themselves they are in the order of their paths, or of the tar.
type manifest struct {
	Kind  byte
	Packs []pack
	// Chunks are those of the stream, each once, by pack and place.
	Chunks []place
	// Stream is the stream, as numbers of Chunks.
	Stream []int
	// Small is the length from which on a file is cut apart.
	Small int64
	// SmallBytes is how many bytes of the stream the small files have, with what lies between them.
	SmallBytes int64

	Entries []entry // of a tree
	Tar     []piece // of a tar
}

// pack is a blob of chunks.
type pack struct {
	Sum  sum
	Size int64
}

func (p pack) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: MediaTypePack, Digest: digest.NewDigestFromBytes(digest.SHA256, p.Sum[:]), Size: p.Size}
}

// place is where a chunk is. It is stored as it is if Packed is Size, else as one zstd frame.
type place struct {
	Sum    sum
	Pack   int
	Offset int64
	Packed int // bytes in the pack
	Size   int // bytes of the chunk
}

// piece is a stretch of a tar: Other bytes that are no content of a file, then File bytes that are.
type piece struct{ Other, File int64 }

// entryType is what an entry is.
type entryType byte

const (
	typeDir      entryType = 'd'
	typeFile     entryType = 'f'
	typeSymlink  entryType = 'l'
	typeHardLink entryType = 'h'
)

// entry is one path of a tree.
type entry struct {
	Path string // as index.Entry has it: relative, clean, "" for the root
	Type entryType
	// Link is the first name of a hard link: an index of Entries. What follows is not set for it.
	Link    int
	Mode    uint32
	UID     uint32
	GID     uint32
	ModTime int64 // nanoseconds since 1970
	Target  string
	Xattrs  []xattr // by name

	// Of files.
	Size int64
	// Used is the hour, since 1970, of the last use.
	Used int64
	// Skip is how many bytes of the stream before those of the file are nobody's.
	Skip int64

	offset int64 // in the stream; not encoded
}

type xattr struct{ Name, Value string }

// length is that of the stream.
func (m *manifest) length() (n int64) {
	for _, i := range m.Stream {
		n += int64(m.Chunks[i].Size)
	}
	return n
}
