// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// ErrChanged is what errors about a file that is not (or no longer) what its entry says wrap.
var ErrChanged = errors.New("changed while it was being copied")

// tarItem is one entry to be written, and where its bytes come from (a File with Size > 0 and no HardLink).
type tarItem struct {
	entry index.Entry
	open  func() (io.ReadCloser, error)
}

// rootInTar says whether a layer's tar names its root directory. Other tools leave the root out, and so do we
// unless it is something special.
func rootInTar(root *index.Entry) bool {
	return root.Mode != 0o755 || root.UID != 0 || root.GID != 0 || len(root.Xattrs) > 0
}

// tarHeader returns the header of an entry: the smallest that holds everything, the same bytes at any time on any
// machine. Times are whole seconds.
func tarHeader(e *index.Entry) (*tar.Header, error) {
	if strings.HasPrefix(index.Base(e.Path), whPrefix) {
		return nil, fmt.Errorf("%q: names that begin with %s are reserved in image layers", e.Path, whPrefix)
	}
	if e.Type == index.Whiteout {
		return &tar.Header{Typeflag: tar.TypeReg, Name: whiteoutName(e.Path), ModTime: time.Unix(0, 0)}, nil
	}
	sec, _ := splitTime(e.ModTime)
	h := &tar.Header{
		Name:    e.Path,
		Mode:    int64(e.Mode & 0o7777),
		Uid:     int(e.UID),
		Gid:     int(e.GID),
		ModTime: time.Unix(sec, 0),
	}
	if e.HardLink != "" {
		h.Typeflag = tar.TypeLink
		h.Linkname = e.HardLink
		return h, nil
	}
	switch e.Type {
	case index.Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if e.Path == "" {
			h.Name = "./"
		}
	case index.File:
		h.Typeflag = tar.TypeReg
		h.Size = e.Size
	case index.Symlink:
		h.Typeflag = tar.TypeSymlink
		h.Linkname = e.Target
	case index.CharDevice, index.BlockDevice:
		h.Typeflag = tar.TypeChar
		if e.Type == index.BlockDevice {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(e.Major), int64(e.Minor)
	case index.Fifo:
		h.Typeflag = tar.TypeFifo
	default:
		return nil, fmt.Errorf("%q: unknown type %d", e.Path, e.Type)
	}
	if len(e.Xattrs) > 0 {
		h.PAXRecords = make(map[string]string, len(e.Xattrs))
		for name, value := range e.Xattrs {
			if strings.Contains(name, "=") {
				return nil, fmt.Errorf("%q: a tar cannot hold an xattr named %q", e.Path, name)
			}
			h.PAXRecords[xattrPaxPrefix+name] = value
		}
	}
	return h, nil
}

// appendHeader appends the header blocks of an entry.
func appendHeader(buf []byte, e *index.Entry) ([]byte, error) {
	if buf, ok := appendPlainHeader(buf, e); ok {
		return buf, nil
	}
	h, err := tarHeader(e)
	if err != nil {
		return nil, err
	}
	return appendTarHeader(buf, h)
}

func appendTarHeader(buf []byte, h *tar.Header) ([]byte, error) {
	var w bytes.Buffer
	if err := tar.NewWriter(&w).WriteHeader(h); err != nil {
		return nil, fmt.Errorf("%q: %w", h.Name, err)
	}
	return append(buf, w.Bytes()...), nil
}

const tarBlock = 512

// appendPlainHeader does what appendHeader does, byte for byte, for entries that fit into one block without any
// extension, which are nearly all: archive/tar takes some microseconds for each. It is not ok for others.
func appendPlainHeader(buf []byte, e *index.Entry) (_ []byte, ok bool) {
	name, link, flag := e.Path, "", byte('0')
	mode, uid, gid, size := uint64(e.Mode&0o7777), uint64(e.UID), uint64(e.GID), uint64(0)
	sec, _ := splitTime(e.ModTime)
	var major, minor uint64
	slash := ""
	switch {
	case len(e.Xattrs) > 0 || e.Path == "" || strings.HasPrefix(index.Base(e.Path), whPrefix) || e.Type == index.Whiteout:
		return buf, false
	case e.HardLink != "":
		flag, link = '1', e.HardLink
	case e.Type == index.File:
		size = uint64(e.Size)
	case e.Type == index.Symlink:
		flag, link = '2', e.Target
	case e.Type == index.CharDevice:
		flag, major, minor = '3', uint64(e.Major), uint64(e.Minor)
	case e.Type == index.BlockDevice:
		flag, major, minor = '4', uint64(e.Major), uint64(e.Minor)
	case e.Type == index.Dir:
		flag, slash = '5', "/"
	case e.Type == index.Fifo:
		flag = '6'
	default:
		return buf, false
	}
	const max8, max12 = 1<<21 - 1, 1<<33 - 1 // what octal digits have room for in fields of 8 and of 12 bytes
	if len(name)+len(slash) > 100 || len(link) > 100 || !isASCII(name) || !isASCII(link) || sec < 0 || sec > max12 ||
		size > max12 || max(uid, gid, major, minor) > max8 {
		return buf, false
	}
	at := len(buf)
	buf = append(buf, emptyBlock[:]...)
	b := buf[at:]
	copy(b[copy(b, name):], slash)
	putOctal(b[100:107], mode)
	putOctal(b[108:115], uid)
	putOctal(b[116:123], gid)
	putOctal(b[124:135], size)
	putOctal(b[136:147], uint64(sec))
	copy(b[148:], "        ") // where the checksum goes counts as blanks
	b[156] = flag
	copy(b[157:], link)
	copy(b[257:], "ustar\x0000")
	putOctal(b[329:336], major)
	putOctal(b[337:344], minor)
	sum := uint64(0)
	for _, c := range b {
		sum += uint64(c)
	}
	putOctal(b[148:154], sum)
	b[154] = 0
	return buf, true
}

var emptyBlock [tarBlock]byte

func putOctal(field []byte, v uint64) {
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = '0' + byte(v&7)
		v >>= 3
	}
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 || s[i] == 0 {
			return false
		}
	}
	return true
}

// hasData says whether an item's bytes have to be read.
func (it *tarItem) hasData() bool {
	return it.entry.Type == index.File && it.entry.HardLink == "" && it.entry.Size > 0
}

// emptyDigest is the digest of no bytes.
var emptyDigest = digest.FromBytes(nil)

// canonicalLinks makes the first name, in Compare order, of each file the one that the others link to. items must
// be in that order; key gives the items that are names of one file the same value, and nil to those alone.
func canonicalLinks(items []tarItem, key func(i int) any) {
	type group struct{ first int }
	groups := map[any]*group{}
	for i := range items {
		k := key(i)
		if k == nil {
			continue
		}
		g := groups[k]
		if g == nil {
			groups[k] = &group{i}
			items[i].entry.HardLink = ""
			continue
		}
		path := items[i].entry.Path
		items[i] = tarItem{entry: items[g.first].entry}
		items[i].entry.Path = path
		items[i].entry.HardLink = items[g.first].entry.Path
	}
}

// indexOf makes the index of written items.
func indexOf(items []tarItem) (*index.Index, error) {
	entries := make([]index.Entry, len(items))
	for i := range items {
		entries[i] = items[i].entry
	}
	return index.NewChecked(entries)
}
