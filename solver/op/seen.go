// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// What an op sees of an input is written down as a list, for two uses: its hash stands for the input in keys, and two
// lists can be compared to find out which file made the difference. So nothing that is in a key is missing there.
//
// The list is a sequence of items: a tag, then fields, numbers as 8 bytes and strings with their length in front. No two
// lists have the same bytes.
const (
	seenAction = 'c' // the number of a copy
	seenMatch  = 'm' // where it is, the name that it gives to the copy, the digest of an archive
	seenEntry  = 'e' // a file below the last match
	seenUsers  = 'u' // a file that user names are looked up in, and its digest
)

// seenWriter writes such a list. The first error is returned by flush.
type seenWriter struct {
	to  io.Writer
	buf []byte
	err error
}

func (w *seenWriter) string(s string) {
	w.buf = binary.LittleEndian.AppendUint64(w.buf, uint64(len(s)))
	w.buf = append(w.buf, s...)
}

func (w *seenWriter) uint(v uint64) { w.buf = binary.LittleEndian.AppendUint64(w.buf, v) }

func (w *seenWriter) flush() error {
	if w.err == nil {
		_, w.err = w.to.Write(w.buf)
	}
	w.buf = w.buf[:0]
	return w.err
}

func (w *seenWriter) action(n int) {
	w.buf = append(w.buf, seenAction)
	w.uint(uint64(n))
}

// match begins the entries of one match. Only the last component of its path is in what identifies the copy: a moved
// tree is the same tree.
func (w *seenWriter) match(base, archive string) {
	w.buf = append(w.buf, seenMatch)
	w.string(base)
	w.string(archive)
}

func (w *seenWriter) users(name, digest string) {
	w.buf = append(w.buf, seenUsers)
	w.string(name)
	w.string(digest)
}

// entry writes one entry; base is what hard links are relative to.
func (w *seenWriter) entry(v visit, base string) error {
	if v.Type == index.File && v.Digest == "" {
		return fmt.Errorf("%q has not been hashed", "/"+v.Path)
	}
	w.buf = append(w.buf, seenEntry)
	w.string(v.rel)
	w.uint(uint64(v.Type))
	way := uint64(0)
	if v.way {
		way = 1
	}
	w.uint(way)
	w.uint(uint64(v.Mode))
	w.uint(uint64(v.UID))
	w.uint(uint64(v.GID))
	w.uint(uint64(v.Size))
	w.uint(uint64(v.Major))
	w.uint(uint64(v.Minor))
	w.string(v.Target)
	w.string(string(v.Digest))
	w.string(strings.TrimPrefix(v.HardLink, base))
	w.uint(uint64(len(v.Xattrs)))
	if len(v.Xattrs) > 0 {
		for _, k := range slices.Sorted(maps.Keys(v.Xattrs)) {
			w.string(k)
			w.string(v.Xattrs[k])
		}
	}
	if len(w.buf) > 32<<10 {
		return w.flush()
	}
	return nil
}

// Seen is one file of the list that DescribeInput writes.
type Seen struct {
	index.Entry // its Path is empty
	// Action is the number of the action that sees the file.
	Action int
	// Path is below what was selected; the first component is the name that the selected file or directory has.
	Path string
	// Way says that the directory is seen only as the way to something in it.
	Way bool
}

// maxSeenString bounds the strings of a list that is read.
const maxSeenString = 1 << 20

// ReadSeen calls fn for each file in a list that DescribeInput has written.
func ReadSeen(r io.Reader, fn func(Seen) error) error {
	d := &seenReader{r: bufio.NewReaderSize(r, 64<<10)}
	action, base := 0, ""
	for {
		tag, err := d.r.ReadByte()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read list of files: %w", err)
		}
		var s Seen
		switch tag {
		case seenAction:
			action = int(d.uint())
		case seenMatch:
			base = d.string()
			if archive := d.string(); archive != "" {
				s = Seen{Path: base + " (archive)", Entry: index.Entry{Type: index.File}}
				s.Digest = digest.Digest(archive)
			}
		case seenUsers:
			s = Seen{Path: d.string(), Entry: index.Entry{Type: index.File}}
			s.Digest = digest.Digest(d.string())
		case seenEntry:
			s = d.entry(base)
		default:
			return fmt.Errorf("read list of files: unknown item %q", tag)
		}
		if d.err != nil {
			return fmt.Errorf("read list of files: %w", d.err)
		}
		if s.Path == "" {
			continue
		}
		s.Action = action
		if err := fn(s); err != nil {
			return err
		}
	}
}

type seenReader struct {
	r   *bufio.Reader
	err error // the first one; everything reads as nothing then
}

func (d *seenReader) uint() uint64 {
	var b [8]byte
	d.read(b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func (d *seenReader) read(b []byte) {
	if d.err == nil {
		if _, d.err = io.ReadFull(d.r, b); d.err != nil {
			clear(b)
		}
	}
}

func (d *seenReader) string() string {
	n := d.uint()
	if d.err == nil && n > maxSeenString {
		d.err = fmt.Errorf("a string of %d bytes", n)
	}
	if d.err != nil || n == 0 {
		return ""
	}
	b := make([]byte, n)
	d.read(b)
	return string(b)
}

func (d *seenReader) entry(base string) Seen {
	var s Seen
	rel := d.string()
	s.Path = path.Join(base, rel)
	if s.Path == "" || s.Path == "/" || s.Path == "." {
		s.Path = "/"
	}
	s.Type = index.Type(d.uint())
	s.Way = d.uint() == 1
	s.Mode = uint32(d.uint())
	s.UID = uint32(d.uint())
	s.GID = uint32(d.uint())
	s.Size = int64(d.uint())
	s.Major = uint32(d.uint())
	s.Minor = uint32(d.uint())
	s.Target = d.string()
	s.Digest = digest.Digest(d.string())
	s.HardLink = d.string()
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		k := d.string()
		if s.Xattrs == nil {
			s.Xattrs = map[string]string{}
		}
		s.Xattrs[k] = d.string()
	}
	return s
}
