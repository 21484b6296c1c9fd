// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
)

// The file: magic, number of entries, the entries in Compare order, SHA-256 of all that. Numbers are varints,
// strings have their length in front. An entry is its type, a byte of flags that say which of the rarer fields
// follow, and the fields in the order of the struct.
const magic = "slipway index 1\n"

const (
	hasSHA256  = 1 << iota // Digest, as 32 bytes
	hasDigest              // Digest, as a string
	hasLink                // Target or HardLink
	hasDevice              // Major, Minor
	hasXattrs              // Xattrs
	hasOffset              // Offset
	isOpaque               // Opaque
	isHardLink             // the link is HardLink
)

// ErrCorrupt is what Decode's errors wrap.
var ErrCorrupt = errors.New("layer index is corrupt")

// Encode returns the index as bytes for a file. Equal indexes give equal bytes.
func (x *Index) Encode() []byte {
	buf := make([]byte, 0, 64+len(x.entries)*112)
	buf = append(buf, magic...)
	buf = binary.AppendUvarint(buf, uint64(len(x.entries)))
	for i := range x.entries {
		buf = appendEntry(buf, &x.entries[i])
	}
	sum := sha256.Sum256(buf)
	return append(buf, sum[:]...)
}

func appendEntry(buf []byte, e *Entry) []byte {
	var flags byte
	raw, isSHA := rawSHA256(e.Digest)
	switch {
	case isSHA:
		flags |= hasSHA256
	case e.Digest != "":
		flags |= hasDigest
	}
	link := e.Target
	if e.HardLink != "" {
		flags |= isHardLink
		link = e.HardLink
	}
	if link != "" {
		flags |= hasLink
	}
	if e.Major != 0 || e.Minor != 0 {
		flags |= hasDevice
	}
	if len(e.Xattrs) > 0 {
		flags |= hasXattrs
	}
	if e.Offset >= 0 {
		flags |= hasOffset
	}
	if e.Opaque {
		flags |= isOpaque
	}
	buf = append(buf, byte(e.Type), flags)
	buf = appendString(buf, e.Path)
	buf = binary.AppendUvarint(buf, uint64(e.Mode))
	buf = binary.AppendUvarint(buf, uint64(e.UID))
	buf = binary.AppendUvarint(buf, uint64(e.GID))
	buf = binary.AppendUvarint(buf, uint64(e.Size))
	buf = binary.AppendVarint(buf, e.ModTime)
	if flags&hasLink != 0 {
		buf = appendString(buf, link)
	}
	if flags&hasDevice != 0 {
		buf = binary.AppendUvarint(buf, uint64(e.Major))
		buf = binary.AppendUvarint(buf, uint64(e.Minor))
	}
	if flags&hasXattrs != 0 {
		buf = appendXattrs(buf, e.Xattrs)
	}
	switch {
	case flags&hasSHA256 != 0:
		buf = append(buf, raw[:]...)
	case flags&hasDigest != 0:
		buf = appendString(buf, string(e.Digest))
	}
	if flags&hasOffset != 0 {
		buf = binary.AppendUvarint(buf, uint64(e.Offset))
	}
	return buf
}

// rawSHA256 returns the 32 bytes of a well-formed sha256 digest.
func rawSHA256(d digest.Digest) (raw [32]byte, ok bool) {
	const prefix = "sha256:"
	if len(d) != len(prefix)+64 || d[:len(prefix)] != prefix {
		return raw, false
	}
	for _, c := range d[len(prefix):] {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return raw, false
		}
	}
	_, err := hex.Decode(raw[:], []byte(d[len(prefix):]))
	return raw, err == nil
}

// Decode reads what Encode has written. Errors wrap ErrCorrupt; whatever the bytes, it neither panics nor
// allocates more than a small multiple of their number.
func Decode(b []byte) (*Index, error) {
	if len(b) < len(magic)+sha256.Size || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: no index or not of this version", ErrCorrupt)
	}
	body, trailer := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], trailer) {
		return nil, fmt.Errorf("%w: checksum does not match", ErrCorrupt)
	}
	x, err := decodeBody(string(body[len(magic):]))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	return x, nil
}

// decodeBody takes a string so that all names can be parts of it.
func decodeBody(s string) (*Index, error) {
	const smallest = 8 // bytes an entry takes at least
	r := reader{s: s}
	n := r.uvarint()
	if n > uint64(len(s)/smallest) {
		return nil, fmt.Errorf("%d entries in %d bytes", n, len(s))
	}
	entries := make([]Entry, n)
	for i := range entries {
		if err := r.entry(&entries[i]); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if i > 0 && Compare(entries[i-1].Path, entries[i].Path) >= 0 {
			return nil, fmt.Errorf("entry %d: %q after %q", i, entries[i].Path, entries[i-1].Path)
		}
	}
	if r.bad || r.s != "" {
		return nil, errors.New("wrong length")
	}
	if !complete(entries) {
		return nil, errors.New("an entry has no parent")
	}
	return build(entries, true)
}

// reader takes values off the front of s; after the first one that is not there, bad is set.
type reader struct {
	s   string
	bad bool
}

func (r *reader) uvarint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		if len(r.s) == 0 {
			break
		}
		c := r.s[0]
		r.s = r.s[1:]
		if c < 0x80 {
			if shift == 63 && c > 1 {
				break
			}
			return v | uint64(c)<<shift
		}
		v |= uint64(c&0x7f) << shift
	}
	r.bad = true
	return 0
}

func (r *reader) uint32() uint32 {
	v := r.uvarint()
	if v > 1<<32-1 {
		r.bad = true
	}
	return uint32(v)
}

func (r *reader) length() int64 {
	v := r.uvarint()
	if v > 1<<63-1 {
		r.bad = true
		return 0
	}
	return int64(v)
}

func (r *reader) bytes(n uint64) string {
	if n > uint64(len(r.s)) {
		r.bad = true
		return ""
	}
	out := r.s[:n]
	r.s = r.s[n:]
	return out
}

func (r *reader) string() string { return r.bytes(r.uvarint()) }

func (r *reader) entry(e *Entry) error {
	head := r.bytes(2)
	if r.bad {
		return errors.New("truncated")
	}
	e.Type = Type(head[0])
	flags := head[1]
	e.Path = r.string()
	e.Mode = r.uint32()
	e.UID = r.uint32()
	e.GID = r.uint32()
	e.Size = r.length()
	zigzag := r.uvarint()
	e.ModTime = int64(zigzag>>1) ^ -int64(zigzag&1)
	if flags&hasLink != 0 {
		if flags&isHardLink != 0 {
			e.HardLink = r.string()
			if CheckPath(e.HardLink) != nil {
				return fmt.Errorf("hard link to %q", e.HardLink)
			}
		} else {
			e.Target = r.string()
		}
	}
	if flags&hasDevice != 0 {
		e.Major = r.uint32()
		e.Minor = r.uint32()
	}
	if flags&hasXattrs != 0 {
		n := r.uvarint()
		if n > uint64(len(r.s)/2) {
			return fmt.Errorf("%d xattrs", n)
		}
		e.Xattrs = make(map[string]string, n)
		for range n {
			name := r.string()
			e.Xattrs[strings.Clone(name)] = strings.Clone(r.string())
		}
	}
	switch {
	case flags&hasSHA256 != 0:
		raw := r.bytes(32)
		var text [71]byte
		copy(text[:], "sha256:")
		hex.Encode(text[7:], []byte(raw))
		e.Digest = digest.Digest(text[:])
	case flags&hasDigest != 0:
		e.Digest = digest.Digest(r.string())
	}
	e.Offset = -1
	if flags&hasOffset != 0 {
		e.Offset = r.length()
	}
	e.Opaque = flags&isOpaque != 0
	switch {
	case r.bad:
		return errors.New("truncated or a number out of range")
	case e.Mode > 0o7777:
		return fmt.Errorf("%q: mode %o", e.Path, e.Mode)
	case e.Opaque && e.Type != Dir:
		return fmt.Errorf("%q: opaque but no directory", e.Path)
	}
	return nil
}
