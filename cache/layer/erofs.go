// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/seed-68981b69/slipway/cache/index"
)

// This file writes the EROFS image of a layer in tar form: inodes, directories, symlinks and xattrs; the bytes of
// files stay in the tar, which is the image's one extra device. The format is described in the kernel's
// Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h. go-erofs (our reader in the tests) can write such
// images too, but each name gets an inode of its own there, so hard links come apart; POSIX ACLs get lost; and the
// chunk index of a file with xattrs may be off by four bytes.
//
//	0      nothing
//	1024   superblock
//	1152   device slot 1: the tar
//	1536   inodes, each at a multiple of 32 bytes (its "nid"), with its xattrs, then the position of its bytes in
//	       the tar or its small directory or symlink right behind it
//	...    blocks of larger directories and symlinks
//
// Blocks have 512 bytes, because that is what files in a tar are aligned to.
const (
	erofsBlockBits  = 9
	erofsBlock      = 1 << erofsBlockBits
	erofsSuperblock = 1024
	erofsSlot       = 128
	erofsMetaStart  = 1536
	erofsInode      = 64
	erofsDirent     = 12

	erofsMagic = 0xe0f5e1e2

	erofsCompatMtime     = 0x2
	erofsIncompatChunked = 0x4
	erofsIncompatDevices = 0x8

	erofsFlatPlain  = 0
	erofsFlatInline = 2
	erofsChunked    = 4

	erofsChunkIndexes = 0x20
	erofsMaxChunkBits = 31
)

// errNoEROFS explains why a layer cannot have an EROFS image; it is mounted as a tree then.
type errNoEROFS struct{ reason string }

func (e *errNoEROFS) Error() string { return "not representable in EROFS: " + e.reason }

// erofsNode is the place of an entry's inode in the image.
type erofsNode struct {
	off    int // from erofsMetaStart; -1 for a hard link, which has none of its own
	layout uint16
	xattrs []byte // as they follow the inode
	size   int    // of a directory or symlink
	block  uint32 // where they are when not inline
	nlink  uint32
}

// encodeEROFS returns the image for a layer whose files lie in a tar of tarSize bytes, at their Offset.
func encodeEROFS(x *index.Index, tarSize int64) ([]byte, error) {
	if tarSize>>erofsBlockBits >= 1<<32 {
		return nil, &errNoEROFS{"the tar has 2 TiB or more"}
	}
	nodes := make([]erofsNode, x.Len())
	inodes := 0
	meta := 0   // bytes of inodes so far
	blocks := 0 // blocks behind them so far
	var names []string

	for i := range nodes {
		e := x.At(i)
		n := &nodes[i]
		n.nlink++
		if e.HardLink != "" {
			n.off = -1
			first, ok := x.Pos(e.HardLink)
			if !ok || first > i || nodes[first].off < 0 {
				return nil, fmt.Errorf("hard link %q to %q, which is no first name", e.Path, e.HardLink)
			}
			nodes[first].nlink++
			continue
		}
		inodes++
		var err error
		if n.xattrs, err = erofsXattrs(&e); err != nil {
			return nil, err
		}
		header := erofsInode + len(n.xattrs)
		behind := 0
		if meta%erofsBlock > erofsBlock-erofsInode {
			meta = alignUp(meta, erofsBlock)
		}
		switch e.Type {
		case index.File:
			if e.Size > 0 {
				if e.Offset < 0 || e.Offset%erofsBlock != 0 {
					return nil, &errNoEROFS{fmt.Sprintf("file %q has no place in the tar", e.Path)}
				}
				n.layout = erofsChunked
				behind = alignUp(header, 8) - header + 8
			}
		case index.Dir, index.Symlink:
			n.size = len(e.Target)
			if e.Type == index.Dir {
				n.nlink++ // "."
				names = erofsNames(x, i, names[:0])
				n.size = direntSize(names)
			}
			n.layout = erofsFlatInline
			if !inlineFits(meta, header, n.size) {
				if next := alignUp(meta, erofsBlock); n.size <= erofsBlock && inlineFits(next, header, n.size) {
					meta = next
				} else {
					n.layout = erofsFlatPlain
					n.block = uint32(blocks)
					blocks += alignUp(n.size, erofsBlock) / erofsBlock
				}
			}
			if n.layout == erofsFlatInline {
				behind = n.size
			}
		}
		if e.Type == index.Dir && i > 0 {
			nodes[x.ParentPos(i)].nlink++
		}
		n.off = meta
		meta = alignUp(meta+header+behind, 32)
	}

	metaEnd := alignUp(erofsMetaStart+meta, erofsBlock)
	img := make([]byte, metaEnd+blocks*erofsBlock)
	firstBlock := uint32(metaEnd / erofsBlock)

	sb := img[erofsSuperblock:]
	le := binary.LittleEndian
	le.PutUint32(sb[0:], erofsMagic)
	le.PutUint32(sb[8:], erofsCompatMtime)
	sb[12] = erofsBlockBits
	le.PutUint64(sb[16:], uint64(inodes))
	le.PutUint32(sb[36:], uint32(len(img)/erofsBlock))
	le.PutUint32(sb[40:], erofsMetaStart/erofsBlock)
	le.PutUint32(sb[80:], erofsIncompatChunked|erofsIncompatDevices)
	le.PutUint16(sb[86:], 1)                               // one extra device
	le.PutUint16(sb[88:], (erofsSuperblock+128)/erofsSlot) // whose slot is here
	slot := img[erofsSuperblock+128:]
	le.PutUint32(slot[64:], uint32((tarSize+erofsBlock-1)>>erofsBlockBits))

	nid := func(i int) uint64 {
		if nodes[i].off < 0 {
			i, _ = x.Pos(x.At(i).HardLink)
		}
		return uint64(nodes[i].off / 32)
	}
	for i := range nodes {
		n := &nodes[i]
		if n.off < 0 {
			continue
		}
		e := x.At(i)
		at := erofsMetaStart + n.off
		b := img[at:]
		le.PutUint16(b[0:], n.layout<<1|1)
		if len(n.xattrs) > 0 {
			le.PutUint16(b[2:], uint16((len(n.xattrs)-12)/4+1))
		}
		le.PutUint16(b[4:], uint16(e.Mode&0o7777)|typeBits(e.Type))
		le.PutUint32(b[20:], uint32(i+1)) // inode number for 32-bit programs
		le.PutUint32(b[24:], e.UID)
		le.PutUint32(b[28:], e.GID)
		sec, nsec := splitTime(e.ModTime)
		le.PutUint64(b[32:], uint64(sec))
		le.PutUint32(b[40:], uint32(nsec))
		le.PutUint32(b[44:], n.nlink)
		copy(b[erofsInode:], n.xattrs)
		header := erofsInode + len(n.xattrs)
		switch e.Type {
		case index.File:
			le.PutUint64(b[8:], uint64(e.Size))
			if e.Size > 0 {
				bits := uint32(0)
				for int64(erofsBlock)<<bits < e.Size {
					bits++
				}
				if bits > erofsMaxChunkBits {
					return nil, &errNoEROFS{fmt.Sprintf("file %q has more than 1 TiB", e.Path)}
				}
				le.PutUint32(b[16:], erofsChunkIndexes|bits)
				chunk := b[alignUp(header, 8):]
				le.PutUint16(chunk[2:], 1) // device
				le.PutUint32(chunk[4:], uint32(e.Offset>>erofsBlockBits))
			}
		case index.Dir, index.Symlink:
			le.PutUint64(b[8:], uint64(n.size))
			data := b[header:]
			if n.layout == erofsFlatPlain {
				le.PutUint32(b[16:], firstBlock+n.block)
				data = img[int(firstBlock+n.block)*erofsBlock:]
			}
			if e.Type == index.Symlink {
				copy(data, e.Target)
				break
			}
			names = erofsNames(x, i, names[:0])
			children := make(map[string]int, len(names))
			for j := range x.Children(i) {
				children[index.Base(x.At(j).Path)] = j
			}
			putDirents(data, names, func(name string) (uint64, byte) {
				switch name {
				case ".":
					return nid(i), 2
				case "..":
					return nid(x.ParentPos(i)), 2
				}
				j := children[name]
				return nid(j), direntType(x.At(j).Type)
			})
		case index.CharDevice, index.BlockDevice:
			le.PutUint32(b[16:], e.Minor&0xff|e.Major<<8|e.Minor&^0xff<<12)
		}
	}
	return img, nil
}

func alignUp(n, to int) int { return (n + to - 1) &^ (to - 1) }

// inlineFits says whether size bytes behind a header at offset at stay within one block.
func inlineFits(at, header, size int) bool {
	return (at+header)%erofsBlock+size <= erofsBlock
}

// erofsNames appends the names of a directory in the order that EROFS wants: all of them by bytes, "." and ".." too.
func erofsNames(x *index.Index, dir int, names []string) []string {
	names = append(names, ".", "..")
	for j := range x.Children(dir) {
		names = append(names, index.Base(x.At(j).Path))
	}
	slices.Sort(names)
	return names
}

// direntFill returns how many of names fit into one block, and how many bytes they take.
func direntFill(names []string) (n, size int) {
	for _, name := range names {
		if size+erofsDirent+len(name) > erofsBlock {
			break
		}
		size += erofsDirent + len(name)
		n++
	}
	return n, size
}

func direntSize(names []string) int {
	total := 0
	for {
		n, size := direntFill(names)
		if n == len(names) {
			return total + size
		}
		total += erofsBlock
		names = names[n:]
	}
}

// putDirents writes the blocks of a directory: in each, fixed-size records, then the names.
func putDirents(data []byte, names []string, at func(name string) (nid uint64, ftype byte)) {
	le := binary.LittleEndian
	for len(names) > 0 {
		n, _ := direntFill(names)
		nameOff := n * erofsDirent
		for k, name := range names[:n] {
			nid, ftype := at(name)
			rec := data[k*erofsDirent:]
			le.PutUint64(rec[0:], nid)
			le.PutUint16(rec[8:], uint16(nameOff))
			rec[10] = ftype
			copy(data[nameOff:], name)
			nameOff += len(name)
		}
		names = names[n:]
		if len(names) > 0 {
			data = data[erofsBlock:]
		}
	}
}

func direntType(t index.Type) byte {
	switch t {
	case index.File:
		return 1
	case index.Dir:
		return 2
	case index.CharDevice, index.Whiteout:
		return 3
	case index.BlockDevice:
		return 4
	case index.Fifo:
		return 5
	case index.Symlink:
		return 7
	}
	return 0
}

// xattrPrefixes are the namespaces that EROFS stores as a number. The ACL names are whole names.
var xattrPrefixes = []struct {
	prefix string
	number byte
	whole  bool
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", 4, false},
	{"security.", 6, false},
}

// erofsXattrs returns the xattrs of e as they follow its inode; nil if there are none. Names in no namespace of
// Linux are left out: no file system could show them.
func erofsXattrs(e *index.Entry) ([]byte, error) {
	if len(e.Xattrs) == 0 && !e.Opaque {
		return nil, nil
	}
	names := make([]string, 0, len(e.Xattrs)+1)
	for name := range e.Xattrs {
		names = append(names, name)
	}
	if e.Opaque {
		names = append(names, xattrOpaque)
	}
	slices.Sort(names)
	out := make([]byte, 12, 64)
	for _, name := range names {
		value := e.Xattrs[name]
		if name == xattrOpaque {
			value = "y"
		}
		for _, p := range xattrPrefixes {
			rest, ok := strings.CutPrefix(name, p.prefix)
			if !ok || p.whole != (rest == "") {
				continue
			}
			if len(rest) > 255 || len(value) > 65535 {
				return nil, &errNoEROFS{fmt.Sprintf("%q: xattr %q is too long", e.Path, name)}
			}
			out = append(out, byte(len(rest)), p.number)
			out = binary.LittleEndian.AppendUint16(out, uint16(len(value)))
			out = append(out, rest...)
			out = append(out, value...)
			for len(out)%4 != 0 {
				out = append(out, 0)
			}
		}
	}
	if len(out) == 12 {
		return nil, nil
	}
	if (len(out)-12)/4+1 > 65535 {
		return nil, &errNoEROFS{fmt.Sprintf("%q has too many xattrs", e.Path)}
	}
	return out, nil
}

// splitTime splits nanoseconds since the epoch into seconds and 0 to 999,999,999 nanoseconds.
func splitTime(ns int64) (sec, nsec int64) {
	sec, nsec = ns/1e9, ns%1e9
	if nsec < 0 {
		sec--
		nsec += 1e9
	}
	return sec, nsec
}

// typeBits returns the file type bits of st_mode.
func typeBits(t index.Type) uint16 {
	switch t {
	case index.Dir:
		return 0o040000
	case index.File:
		return 0o100000
	case index.Symlink:
		return 0o120000
	case index.CharDevice, index.Whiteout:
		return 0o020000
	case index.BlockDevice:
		return 0o060000
	case index.Fifo:
		return 0o010000
	}
	return 0
}
