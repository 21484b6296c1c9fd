// SPDX-License-Identifier: Apache-2.0

package index

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"github.com/cespare/xxhash/v2"
	"github.com/opencontainers/go-digest"
)

// The file: magic, number of entries, the entries in Compare order, XXH64 of all that (little-endian), which
// is there to find damage. Numbers are varints of the
// shortest form, strings have their length in front. An entry is, in this order,
//
//	path
//	content:  type, a byte of flags, mode, UID, GID, size, then what the flags say
//	marks:    a byte of flags, and the path that a hard link points to
//	modification time: 8 bytes, little-endian, of which none is worth leaving out
//	offset + 1; 0 for none
//
// so that what counts for a Merkle digest (content) and for the digest of a layer (all but the last two) stand in one
// piece. There is one way to write an index: whatever else is refused.
const magic = "slipway index 3\n"

const (
	sumBytes     = 8
	modTimeBytes = 8
)

// The flags in the content.
const (
	hasSHA256 = 1 << iota // Digest, as 32 bytes
	hasDigest             // Digest, as a string
	hasTarget             // Target
	hasDevice             // Major, Minor
	hasXattrs             // their number, then names and values, by name

	contentFlags = 1<<iota - 1
)

// The marks.
const (
	isHardLink = 1 << iota
	isOpaque

	markFlags = 1<<iota - 1
)

// ErrCorrupt is what Decode's errors wrap.
var ErrCorrupt = errors.New("layer index is corrupt")

// Encode returns the index as bytes for a file. Equal indexes give equal bytes.
func (x *Index) Encode() []byte {
	buf := make([]byte, 0, len(magic)+binary.MaxVarintLen64+len(x.data)+sumBytes)
	buf = append(buf, magic...)
	buf = binary.AppendUvarint(buf, uint64(len(x.nodes)))
	buf = append(buf, x.data...)
	return binary.LittleEndian.AppendUint64(buf, xxhash.Sum64(buf))
}

func appendEntry(buf []byte, e *Entry) []byte {
	buf = appendString(buf, e.Path)
	buf = appendContent(buf, e)
	var marks byte
	if e.HardLink != "" {
		marks |= isHardLink
	}
	if e.Opaque {
		marks |= isOpaque
	}
	buf = append(buf, marks)
	if e.HardLink != "" {
		buf = appendString(buf, e.HardLink)
	}
	buf = binary.LittleEndian.AppendUint64(buf, uint64(e.ModTime))
	return binary.AppendUvarint(buf, uint64(max(e.Offset, -1)+1))
}

// appendContent appends what counts as content of e besides its place: type, mode, owner, size, device, symlink
// target, xattrs, digest. Every part has a length or a fixed place, so different entries never look the same.
func appendContent(buf []byte, e *Entry) []byte {
	var flags byte
	raw, isSHA := rawSHA256(e.Digest)
	switch {
	case isSHA:
		flags |= hasSHA256
	case e.Digest != "":
		flags |= hasDigest
	}
	if e.Target != "" {
		flags |= hasTarget
	}
	if e.Major != 0 || e.Minor != 0 {
		flags |= hasDevice
	}
	if len(e.Xattrs) > 0 {
		flags |= hasXattrs
	}
	buf = append(buf, byte(e.Type), flags)
	buf = binary.AppendUvarint(buf, uint64(e.Mode))
	buf = binary.AppendUvarint(buf, uint64(e.UID))
	buf = binary.AppendUvarint(buf, uint64(e.GID))
	buf = binary.AppendUvarint(buf, uint64(e.Size))
	switch {
	case isSHA:
		buf = append(buf, raw[:]...)
	case e.Digest != "":
		buf = appendString(buf, string(e.Digest))
	}
	if flags&hasTarget != 0 {
		buf = appendString(buf, e.Target)
	}
	if flags&hasDevice != 0 {
		buf = binary.AppendUvarint(buf, uint64(e.Major))
		buf = binary.AppendUvarint(buf, uint64(e.Minor))
	}
	if flags&hasXattrs != 0 {
		buf = appendXattrs(buf, e.Xattrs)
	}
	return buf
}

func appendString(buf []byte, s string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

func appendXattrs(buf []byte, xattrs map[string]string) []byte {
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	buf = binary.AppendUvarint(buf, uint64(len(xattrs)))
	for _, name := range names {
		buf = appendString(buf, name)
		buf = appendString(buf, xattrs[name])
	}
	return buf
}

// rawSHA256 returns the 32 bytes of a well-formed sha256 digest.
func rawSHA256(d digest.Digest) (raw [32]byte, ok bool) {
	const prefix = "sha256:"
	if len(d) != len(prefix)+64 || d[:len(prefix)] != prefix {
		return raw, false
	}
	text := d[len(prefix):]
	for i := range raw {
		hi, lo := hexValues[text[2*i]], hexValues[text[2*i+1]]
		if hi|lo > 15 {
			return raw, false
		}
		raw[i] = hi<<4 | lo
	}
	return raw, true
}

// hexValues has the value of each lower-case hexadecimal digit, 255 for everything else.
var hexValues = func() (values [256]byte) {
	for i := range values {
		values[i] = 255
		if n := strings.IndexByte("0123456789abcdef", byte(i)); n >= 0 {
			values[i] = byte(n)
		}
	}
	return values
}()

// Decode reads what Encode has written; b belongs to the index from now on. All of it is checked, though no Entry is
// made yet. Errors wrap ErrCorrupt; whatever the bytes, it neither panics nor allocates more than a small multiple of
// their number.
func Decode(b []byte) (*Index, error) {
	if len(b) < len(magic)+sumBytes || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: no index or not of this version", ErrCorrupt)
	}
	body, trailer := b[:len(b)-sumBytes], b[len(b)-sumBytes:]
	if binary.LittleEndian.Uint64(trailer) != xxhash.Sum64(body) {
		return nil, fmt.Errorf("%w: checksum does not match", ErrCorrupt)
	}
	// All names are parts of this string.
	entries := body[len(magic):]
	x, err := decodeBody(unsafe.String(unsafe.SliceData(entries), len(entries)))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	return x, nil
}

func decodeBody(s string) (*Index, error) {
	const smallest = 16 // bytes an entry takes at least
	r := reader{s: s}
	n := r.uvarint()
	if r.bad || n > uint64(len(s)/smallest) {
		return nil, fmt.Errorf("%d entries in %d bytes", n, len(s))
	}
	return scan(r.s[r.i:], int(n))
}

// scan makes the index of n encoded entries, which it checks.
func scan(data string, n int) (*Index, error) {
	if len(data) > 1<<32-1 || n > 1<<31-1 {
		return nil, fmt.Errorf("%d entries of %d bytes are too many", n, len(data))
	}
	if n == 0 {
		return nil, errors.New("there is no root")
	}
	x := &Index{data: data, nodes: make([]node, n), paths: newHashTable(n)}
	hashed := x.hashPaths()
	defer hashed.end()
	// open are the directories that the entry at hand may be in, from the root; last is the name of the last entry of
	// each so far.
	type openDir struct {
		pos        int32
		path, last string
	}
	var open []openDir
	dirs := int32(0)
	r := reader{s: data}
	for i := range n {
		hashed.until(i)
		x.nodes[i].off = uint32(r.i)
		path, typ, opaque, err := r.check()
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		node := &x.nodes[i]
		node.dir = -1
		if i == 0 {
			if path != "" || typ != Dir {
				return nil, errors.New("the root is not a directory")
			}
		} else {
			for len(open) > 0 && !(len(path) > len(open[len(open)-1].path) && Within(path, open[len(open)-1].path)) {
				x.nodes[open[len(open)-1].pos].end = int32(i)
				open = open[:len(open)-1]
			}
			if len(open) == 0 {
				return nil, fmt.Errorf("entry %d: %q is out of order", i, path)
			}
			parent := &open[len(open)-1]
			name := path[len(parent.path):]
			if parent.path != "" {
				name = name[1:]
			}
			switch {
			case name == "." || name == ".." || strings.IndexByte(name, 0) >= 0:
				return nil, fmt.Errorf("entry %d: path %q is not clean", i, path)
			case strings.IndexByte(name, '/') >= 0:
				return nil, fmt.Errorf("path %q: its parent is missing or not a directory", path)
			case name <= parent.last:
				return nil, fmt.Errorf("entry %d: %q after %q", i, path, Join(parent.path, parent.last))
			}
			parent.last = name
			node.parent = parent.pos
			node.shadow = x.nodes[parent.pos].shadow
		}
		node.end = int32(i + 1)
		if typ == Dir {
			node.dir = dirs
			dirs++
			node.opaque, node.shadow = opaque, node.shadow || opaque
			open = append(open, openDir{pos: int32(i), path: path})
		}
		x.unhashed = x.unhashed || typ == File && !r.hashed
	}
	hashed.until(n)
	for _, d := range open {
		x.nodes[d.pos].end = int32(n)
	}
	if r.i != len(data) {
		return nil, errors.New("there is something behind the last entry")
	}
	x.dirs = int(dirs)
	return x, nil
}

// record returns a reader that stands at the beginning of entry i.
func (x *Index) record(i int) reader { return reader{s: x.data, i: int(x.nodes[i].off)} }

// reader takes values from s, beginning at i; after the first one that is not there or not well-formed, bad is set.
type reader struct {
	s   string
	i   int
	bad bool
	// hashed says that the last entry checked had a Digest.
	hashed bool
}

func (r *reader) uvarint() uint64 {
	if r.i < len(r.s) && r.s[r.i] < 0x80 {
		r.i++
		return uint64(r.s[r.i-1])
	}
	return r.longUvarint()
}

func (r *reader) longUvarint() uint64 {
	var v uint64
	for shift := 0; shift < 64 && r.i < len(r.s); shift += 7 {
		c := r.s[r.i]
		r.i++
		if c < 0x80 {
			if shift == 63 && c > 1 || shift > 0 && c == 0 {
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

func (r *reader) int64() int64 {
	v := r.uvarint()
	if v > 1<<63-1 {
		r.bad = true
		return 0
	}
	return int64(v)
}

func (r *reader) byte() byte {
	if r.i >= len(r.s) {
		r.bad = true
		return 0
	}
	r.i++
	return r.s[r.i-1]
}

func (r *reader) bytes(n uint64) string {
	if n > uint64(len(r.s)-r.i) {
		r.bad = true
		return ""
	}
	r.i += int(n)
	return r.s[r.i-int(n) : r.i]
}

func (r *reader) string() string { return r.bytes(r.uvarint()) }

// path returns the path of the record that r stands at the beginning of.
func (r reader) path() string { return r.string() }

// typ returns its type.
func (r reader) typ() Type {
	r.string()
	return Type(r.byte())
}

// identity returns the part of a record that counts for the digest of a layer.
func (r reader) identity() string {
	start := r.i
	r.string()
	r.skipContent()
	if r.byte()&isHardLink != 0 {
		r.string()
	}
	return r.s[start:r.i]
}

// hardLink returns the HardLink of a record.
func (r reader) hardLink() string {
	r.string()
	r.skipContent()
	if r.byte()&isHardLink == 0 {
		return ""
	}
	return r.string()
}

// content returns the part of a record that counts for a Merkle digest.
func (r reader) content() string {
	r.string()
	start := r.i
	r.skipContent()
	return r.s[start:r.i]
}

// skipContent passes over the content of a record that has been checked.
func (r *reader) skipContent() {
	r.byte()
	flags := r.byte()
	for range 4 {
		r.uvarint()
	}
	switch {
	case flags&hasSHA256 != 0:
		r.bytes(sha256.Size)
	case flags&hasDigest != 0:
		r.string()
	}
	if flags&hasTarget != 0 {
		r.string()
	}
	if flags&hasDevice != 0 {
		r.uvarint()
		r.uvarint()
	}
	if flags&hasXattrs != 0 {
		for n := r.uvarint(); n > 0 && !r.bad; n-- {
			r.string()
			r.string()
		}
	}
}

// check reads one record and refuses what Encode would not have written. The path is not looked at.
func (r *reader) check() (path string, typ Type, opaque bool, err error) {
	path = r.string()
	typ = Type(r.byte())
	flags := r.byte()
	mode := r.uint32()
	r.uint32()
	r.uint32()
	r.int64()
	r.hashed = flags&(hasSHA256|hasDigest) != 0
	switch {
	case flags&hasSHA256 != 0:
		r.bytes(sha256.Size)
		if flags&hasDigest != 0 {
			r.bad = true
		}
	case flags&hasDigest != 0:
		text := r.string()
		if _, short := rawSHA256(digest.Digest(text)); short || text == "" {
			r.bad = true
		}
	}
	if flags&hasTarget != 0 && r.string() == "" {
		r.bad = true
	}
	if flags&hasDevice != 0 {
		if major, minor := r.uint32(), r.uint32(); major == 0 && minor == 0 {
			r.bad = true
		}
	}
	if flags&hasXattrs != 0 {
		n := r.uvarint()
		last := ""
		if n == 0 {
			r.bad = true
		}
		for i := uint64(0); i < n && !r.bad; i++ {
			name := r.string()
			r.string()
			if i > 0 && name <= last {
				return path, typ, false, fmt.Errorf("%q: xattr %q after %q", path, name, last)
			}
			last = name
		}
	}
	marks := r.byte()
	opaque = marks&isOpaque != 0
	if marks&isHardLink != 0 {
		if link := r.string(); link == "" || CheckPath(link) != nil {
			return path, typ, false, fmt.Errorf("%q: hard link to %q", path, link)
		}
	}
	r.bytes(modTimeBytes)
	if r.uvarint() > 1<<63 {
		r.bad = true
	}
	switch {
	case r.bad:
		return path, typ, false, errors.New("truncated or a value out of range")
	case typ < Dir || typ > Whiteout:
		return path, typ, false, fmt.Errorf("path %q: unknown type %d", path, typ)
	case flags&^contentFlags != 0 || marks&^markFlags != 0:
		return path, typ, false, fmt.Errorf("%q: unknown flags", path)
	case mode > 0o7777:
		return path, typ, false, fmt.Errorf("%q: mode %o", path, mode)
	case opaque && typ != Dir:
		return path, typ, false, fmt.Errorf("%q: opaque but no directory", path)
	}
	return path, typ, opaque, nil
}

// entry decodes a record that has been checked.
func (r reader) entry(e *Entry) {
	e.Path = r.string()
	e.Type = Type(r.byte())
	flags := r.byte()
	e.Mode = r.uint32()
	e.UID = r.uint32()
	e.GID = r.uint32()
	e.Size = r.int64()
	switch {
	case flags&hasSHA256 != 0:
		e.Digest = hexDigest(r.bytes(sha256.Size))
	case flags&hasDigest != 0:
		e.Digest = digest.Digest(r.string())
	}
	if flags&hasTarget != 0 {
		e.Target = r.string()
	}
	if flags&hasDevice != 0 {
		e.Major = r.uint32()
		e.Minor = r.uint32()
	}
	if flags&hasXattrs != 0 {
		n := r.uvarint()
		e.Xattrs = make(map[string]string, n)
		for range n {
			name := r.string()
			e.Xattrs[name] = r.string()
		}
	}
	marks := r.byte()
	e.Opaque = marks&isOpaque != 0
	if marks&isHardLink != 0 {
		e.HardLink = r.string()
	}
	e.ModTime = int64(binary.LittleEndian.Uint64([]byte(r.bytes(modTimeBytes))))
	e.Offset = int64(r.uvarint()) - 1
}

func hexDigest(raw string) digest.Digest {
	text := make([]byte, 7, 71)
	copy(text, "sha256:")
	text = hex.AppendEncode(text, unsafe.Slice(unsafe.StringData(raw), len(raw)))
	return digest.Digest(unsafe.String(unsafe.SliceData(text), len(text)))
}
