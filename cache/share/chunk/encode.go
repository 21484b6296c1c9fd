// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/seed-68981b69/slipway/cache/index"
)

// A manifest as bytes: magic, kind, packs, chunks, stream, then the entries or the pieces; then zstd over all that. Numbers are varints, signed ones
// zigzag; strings and lists have their length in front.
const magic = "slipway chunks 1\n"

func (m *manifest) encode() ([]byte, error) {
	b := append([]byte(magic), m.Kind)
	b = binary.AppendUvarint(b, uint64(len(m.Packs)))
	for _, p := range m.Packs {
		b = append(b, p.Sum[:]...)
		b = binary.AppendUvarint(b, uint64(p.Size))
	}
	b = binary.AppendUvarint(b, uint64(len(m.Chunks)))
	for _, c := range m.Chunks {
		b = append(b, c.Sum[:]...)
		b = binary.AppendUvarint(b, uint64(c.Pack))
		b = binary.AppendUvarint(b, uint64(c.Offset))
		b = binary.AppendUvarint(b, uint64(c.Packed))
		b = binary.AppendUvarint(b, uint64(c.Size))
	}
	b = binary.AppendUvarint(b, uint64(len(m.Stream)))
	next := 0
	for _, i := range m.Stream {
		b = binary.AppendVarint(b, int64(i-next)) // mostly 0
		next = i + 1
	}
	b = binary.AppendUvarint(b, uint64(m.Small))
	b = binary.AppendUvarint(b, uint64(m.SmallBytes))
	switch m.Kind {
	case kindTree:
		b = binary.AppendUvarint(b, uint64(len(m.Entries)))
		for i := range m.Entries {
			b = appendEntry(b, i, &m.Entries[i])
		}
	case kindTar:
		b = binary.AppendUvarint(b, uint64(len(m.Tar)))
		for _, p := range m.Tar {
			b = binary.AppendUvarint(b, uint64(p.Other))
			b = binary.AppendUvarint(b, uint64(p.File))
		}
	}
	if len(b) > maxPlain {
		return nil, fmt.Errorf("a manifest of %d bytes is more than the %d that can be read again", len(b), maxPlain)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return nil, err
	}
	packed := enc.EncodeAll(b, nil)
	if len(packed) > maxManifest {
		return nil, fmt.Errorf("a manifest of %d bytes, packed, is more than the %d that can be read again", len(packed), maxManifest)
	}
	return packed, nil
}

func appendEntry(b []byte, number int, e *entry) []byte {
	b = appendString(b, e.Path)
	b = append(b, byte(e.Type))
	if e.Type == typeHardLink {
		return binary.AppendUvarint(b, uint64(number-e.Link))
	}
	b = binary.AppendUvarint(b, uint64(e.Mode))
	b = binary.AppendUvarint(b, uint64(e.UID))
	b = binary.AppendUvarint(b, uint64(e.GID))
	b = binary.LittleEndian.AppendUint64(b, uint64(e.ModTime))
	b = binary.AppendUvarint(b, uint64(len(e.Xattrs)))
	for _, x := range e.Xattrs {
		b = appendString(b, x.Name)
		b = appendString(b, x.Value)
	}
	switch e.Type {
	case typeSymlink:
		b = appendString(b, e.Target)
	case typeFile:
		b = binary.AppendUvarint(b, uint64(e.Size))
		b = binary.AppendUvarint(b, uint64(e.Used))
		b = binary.AppendUvarint(b, uint64(e.Skip))
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// decode reads what encode has written and somebody else may have changed. Its errors wrap ErrCorrupt.
func decode(packed []byte) (*manifest, error) {
	m, err := decodeManifest(packed)
	if err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrCorrupt, err)
	}
	return m, nil
}

func decodeManifest(packed []byte) (*manifest, error) {
	b, err := unpackManifest(packed)
	if err != nil {
		return nil, err
	}
	return decodePlain(b)
}

func decodePlain(b []byte) (*manifest, error) {
	d := &decoder{b: b}
	if got := d.bytes(len(magic)); string(got) != magic {
		return nil, errors.New("not of a version that this program knows")
	}
	m := &manifest{}
	if kind := d.bytes(1); len(kind) == 1 {
		m.Kind = kind[0]
	}
	d.packs(m)
	d.chunks(m)
	length := d.stream(m)
	m.Small = d.number(math.MaxInt32)
	m.SmallBytes = d.number(length)
	switch m.Kind {
	case kindTree:
		d.tree(m, length)
	case kindTar:
		d.tar(m, length)
	default:
		d.fail("kind %d", m.Kind)
	}
	if d.err == nil && len(d.b) > 0 {
		d.fail("%d bytes too many", len(d.b))
	}
	return m, d.err
}

func unpackManifest(packed []byte) ([]byte, error) {
	if len(packed) > maxManifest {
		return nil, fmt.Errorf("%d bytes", len(packed))
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxPlain))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	return dec.DecodeAll(packed, nil)
}

// decoder reads numbers and strings, and remembers the first error: after it everything is empty.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
	d.b = nil
}

func (d *decoder) bytes(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.fail("it ends too early")
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

// number reads one between 0 and limit.
func (d *decoder) number(limit int64) int64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("it ends too early")
		return 0
	}
	if limit < 0 || v > uint64(limit) {
		d.fail("number %d, where %d is the most", v, limit)
		return 0
	}
	d.b = d.b[n:]
	return int64(v)
}

// count reads how many things follow that take at least least bytes each.
func (d *decoder) count(least int) int {
	return int(d.number(int64(len(d.b) / least)))
}

func (d *decoder) string(limit int) string {
	return string(d.bytes(int(d.number(int64(limit)))))
}

func (d *decoder) packs(m *manifest) {
	n := d.count(len(sum{}) + 1)
	if n > maxPacks {
		d.fail("%d packs", n)
		return
	}
	m.Packs = make([]pack, n)
	for i := range m.Packs {
		copy(m.Packs[i].Sum[:], d.bytes(len(sum{})))
		m.Packs[i].Size = d.number(maxPack)
	}
}

func (d *decoder) chunks(m *manifest) {
	m.Chunks = make([]place, d.count(len(sum{})+4))
	for i := range m.Chunks {
		c := &m.Chunks[i]
		copy(c.Sum[:], d.bytes(len(sum{})))
		c.Pack = int(d.number(int64(len(m.Packs)) - 1))
		c.Offset = d.number(maxPack)
		c.Packed = int(d.number(maxChunk))
		c.Size = int(d.number(maxChunk))
		if d.err != nil {
			return
		}
		if c.Size == 0 || c.Packed == 0 || c.Packed > c.Size || c.Offset+int64(c.Packed) > m.Packs[c.Pack].Size {
			d.fail("chunk %d of %d bytes, %d at %d of a pack of %d", i, c.Size, c.Packed, c.Offset, m.Packs[c.Pack].Size)
			return
		}
	}
}

// stream reads the list of chunks and returns its length in bytes.
func (d *decoder) stream(m *manifest) (length int64) {
	m.Stream = make([]int, d.count(1))
	next := 0
	for i := range m.Stream {
		v, n := binary.Varint(d.b)
		at := int64(next) + v
		if n <= 0 || v > math.MaxInt32 || v < math.MinInt32 || at < 0 || at >= int64(len(m.Chunks)) {
			d.fail("place %d of the stream names no chunk", i)
			return 0
		}
		d.b = d.b[n:]
		m.Stream[i] = int(at)
		next = int(at) + 1
		length += int64(m.Chunks[at].Size)
	}
	if length > maxStream {
		d.fail("%d bytes, where %d is the most", length, int64(maxStream))
		return 0
	}
	return length
}

func (d *decoder) tar(m *manifest, length int64) {
	m.Tar = make([]piece, d.count(2))
	var other, small, large int64
	for i := range m.Tar {
		p := &m.Tar[i]
		p.Other = d.number(length)
		p.File = d.number(length)
		other += p.Other
		if p.File < m.Small {
			small += p.File
		} else {
			large += p.File
		}
		if other+small+large > length {
			d.fail("pieces of more bytes than the stream has")
			return
		}
	}
	if d.err == nil && (other+small+large != length || small != m.SmallBytes) {
		d.fail("pieces of %d bytes of a stream of %d", other+small+large, length)
	}
}

// tree reads the entries and gives the files their place in the stream.
func (d *decoder) tree(m *manifest, length int64) {
	n := d.count(3)
	m.Entries = make([]entry, 0, min(n, 1<<16))
	small, large := int64(0), m.SmallBytes
	var parents []string // directories that the entry at hand may be in, outermost first
	for i := range n {
		var e entry
		d.entry(&e, i, m.Entries, length)
		if d.err != nil {
			return
		}
		if err := checkPath(&e, i, m.Entries); err != nil {
			d.fail("entry %d: %w", i, err)
			return
		}
		for len(parents) > 0 && !index.Within(e.Path, parents[len(parents)-1]) {
			parents = parents[:len(parents)-1]
		}
		if i > 0 && (len(parents) == 0 || parents[len(parents)-1] != index.Parent(e.Path)) {
			d.fail("entry %d: %q is in no directory", i, e.Path)
			return
		}
		switch e.Type {
		case typeDir:
			parents = append(parents, e.Path)
		case typeFile:
			at, end := &large, length
			if e.Size < m.Small {
				at, end = &small, m.SmallBytes
			}
			e.offset = *at + e.Skip
			*at = e.offset + e.Size
			if *at > end {
				d.fail("entry %d: %q has bytes beyond the stream", i, e.Path)
				return
			}
		}
		m.Entries = append(m.Entries, e)
	}
	if n == 0 {
		d.fail("no root directory")
	}
}

func (d *decoder) entry(e *entry, number int, before []entry, length int64) {
	e.Path = d.string(maxPathBytes)
	if t := d.bytes(1); len(t) == 1 {
		e.Type = entryType(t[0])
	}
	switch e.Type {
	case typeDir, typeFile, typeSymlink:
	case typeHardLink:
		e.Link = number - int(d.number(int64(number)))
		if d.err == nil && (e.Link >= number || before[e.Link].Type == typeHardLink || before[e.Link].Type == typeDir) {
			d.fail("entry %d: %q is a link to what is no file", number, e.Path)
		}
		return
	default:
		// Devices, pipes and sockets have no business in a cache.
		d.fail("entry %d: %q is neither directory, file nor link but %q", number, e.Path, byte(e.Type))
		return
	}
	e.Mode = uint32(d.number(0o7777))
	e.UID = uint32(d.number(maxID))
	e.GID = uint32(d.number(maxID))
	if t := d.bytes(8); len(t) == 8 {
		e.ModTime = int64(binary.LittleEndian.Uint64(t))
	}
	d.xattrs(e)
	switch e.Type {
	case typeSymlink:
		e.Target = d.string(maxPathBytes - 1)
		if d.err == nil && (e.Target == "" || strings.IndexByte(e.Target, 0) >= 0) {
			d.fail("entry %d: %q is a link to %q", number, e.Path, e.Target)
		}
	case typeFile:
		e.Size = d.number(length)
		e.Used = d.number(math.MaxInt32)
		e.Skip = d.number(length)
	}
}

func (d *decoder) xattrs(e *entry) {
	n := d.count(2)
	if n == 0 {
		return
	}
	total := 0
	for range n {
		x := xattr{Name: d.string(255), Value: d.string(maxXattrs)}
		if total += len(x.Name) + len(x.Value); d.err == nil && total > maxXattrs {
			d.fail("%q: extended attributes of %d bytes", e.Path, total)
		}
		if d.err == nil && (!keepXattr(x.Name) || strings.IndexByte(x.Name, 0) >= 0) {
			d.fail("%q: extended attribute %q", e.Path, x.Name)
		}
		if k := len(e.Xattrs); d.err == nil && k > 0 && e.Xattrs[k-1].Name >= x.Name {
			d.fail("%q: extended attribute %q twice or out of order", e.Path, x.Name)
		}
		if d.err != nil {
			return
		}
		e.Xattrs = append(e.Xattrs, x)
	}
}

// keepXattr says which extended attributes travel: not those that the kernel or a security module gives a meaning beyond the file.
func keepXattr(name string) bool {
	return strings.HasPrefix(name, "user.") && len(name) > len("user.") && !strings.HasPrefix(name, "user.overlay.") || name == "security.capability"
}

// checkPath says what is wrong with the path of entry number i; before are those that come before it.
func checkPath(e *entry, i int, before []entry) error {
	if i == 0 {
		if e.Path != "" || e.Type != typeDir {
			return fmt.Errorf("%q instead of the root directory", e.Path)
		}
		return nil
	}
	for name := range strings.SplitSeq(e.Path, "/") {
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.IndexByte(name, 0) >= 0 {
			return fmt.Errorf("path %q", e.Path)
		}
	}
	if c := index.Compare(before[i-1].Path, e.Path); c == 0 {
		return fmt.Errorf("path %q is there twice", e.Path)
	} else if c > 0 {
		return fmt.Errorf("path %q comes too late", e.Path)
	}
	return nil
}

// sortChunks brings the chunks of a manifest that is being made in order, and what names them with it.
func (m *manifest) sortChunks() {
	order := make([]int, len(m.Chunks))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := &m.Chunks[a], &m.Chunks[b]
		if x.Pack != y.Pack {
			return x.Pack - y.Pack
		}
		return int(x.Offset - y.Offset)
	})
	number := make([]int, len(order))
	sorted := make([]place, len(order))
	for to, from := range order {
		number[from] = to
		sorted[to] = m.Chunks[from]
	}
	m.Chunks = sorted
	for i, c := range m.Stream {
		m.Stream[i] = number[c]
	}
}
