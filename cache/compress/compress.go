// SPDX-License-Identifier: Apache-2.0

// Package compress has the compressed forms of layers: what media types mean, reading them, making gzip with all
// processors and always the same bytes, and remembering which blob is which layer's compressed form, so that nothing is
// compressed twice.
package compress

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Kind is how the bytes of a layer blob are compressed.
type Kind string

// The kinds of compression.
const (
	None Kind = "uncompressed"
	Gzip Kind = "gzip"
	Zstd Kind = "zstd"
)

// Docker's media types of layers.
const (
	dockerLayer = "application/vnd.docker.image.rootfs.diff.tar"
	// DockerForeignLayer is one that registries need not have.
	dockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

// MediaTypeKind returns the compression that a layer's media type names. An error says that it is not a layer of files
// that we can read.
func MediaTypeKind(mediaType string) (Kind, error) {
	base, suffix := mediaType, ""
	if i := strings.LastIndexByte(mediaType, '+'); i >= 0 {
		base, suffix = mediaType[:i], mediaType[i+1:]
	} else if b, s, ok := strings.Cut(mediaType, ".tar."); ok { // docker's spelling
		base, suffix = b+".tar", s
	}
	switch base {
	case ocispec.MediaTypeImageLayer, "application/vnd.oci.image.layer.nondistributable.v1.tar", dockerLayer, dockerForeignLayer:
	default:
		return "", fmt.Errorf("layer media type not supported yet: %q", mediaType)
	}
	switch suffix {
	case "":
		return None, nil
	case "gzip":
		return Gzip, nil
	case "zstd":
		return Zstd, nil
	}
	return "", fmt.Errorf("layer media type not supported yet: %q", mediaType)
}

// MediaType returns the media type of a layer that is compressed by k, docker's or OCI's.
func MediaType(k Kind, docker bool) string {
	switch {
	case docker && k == None:
		return dockerLayer
	case docker:
		return dockerLayer + "." + string(k)
	case k == None:
		return ocispec.MediaTypeImageLayer
	}
	return ocispec.MediaTypeImageLayer + "+" + string(k)
}

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// NewReader returns the uncompressed bytes of r. The bytes decide what they are, not their media type: registries and
// builders have been known to confuse them. The returned kind is what was found.
func NewReader(r io.Reader) (io.ReadCloser, Kind, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, "", fmt.Errorf("gzip: %w", err)
		}
		return z, Gzip, nil
	case bytes.HasPrefix(head, zstdMagic), len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], []byte{0x2a, 0x4d, 0x18}):
		// The second is a skippable frame, with which zstd:chunked and estargz-like files may begin.
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, "", fmt.Errorf("zstd: %w", err)
		}
		return z.IOReadCloser(), Zstd, nil
	}
	return io.NopCloser(br), None, nil
}
