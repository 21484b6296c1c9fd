// SPDX-License-Identifier: Apache-2.0

package index

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
)

// Index is the table of contents of one layer. It always has its root, and the parent of every entry, as
// directories. It is immutable and safe for concurrent use.
type Index struct {
	entries []Entry
	nodes   []node // beside entries

	digestOnce sync.Once
	digest     digest.Digest
}

// node holds what makes an entry's place in the tree cheap to ask for.
type node struct {
	parent int32 // position of the parent; the root is its own
	end    int32 // position after the last entry of the subtree
	shadow bool  // this directory or one above it is opaque: nothing below this layer shows through
}

// New makes an index of entries, which need no order and now belong to the index. Of two entries with one path
// the last one counts. Missing parents, the root included, are added as 0755 0:0. It panics on what NewChecked
// refuses otherwise: use NewChecked for entries that come from outside.
func New(entries []Entry) *Index {
	x, err := build(entries, false)
	if err != nil {
		panic("index: " + err.Error())
	}
	return x
}

// NewChecked is New for entries that nobody has looked at: two entries with one path, a path that is not clean,
// an unknown type, or an entry below something that is no directory is an error.
func NewChecked(entries []Entry) (*Index, error) {
	return build(entries, true)
}

// CheckPath says whether path is one an Entry may have: "" or slash-separated names, none of them empty, "." or
// "..", without NUL bytes.
func CheckPath(path string) error {
	if path == "" {
		return nil
	}
	if strings.IndexByte(path, 0) >= 0 {
		return fmt.Errorf("path %q: NUL byte in name", path)
	}
	for rest := path; ; {
		name, after, more := strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." {
			return fmt.Errorf("path %q is not clean", path)
		}
		if !more {
			return nil
		}
		rest = after
	}
}

// Within says whether path is dir or lies below it.
func Within(path, dir string) bool {
	return dir == "" || strings.HasPrefix(path, dir) && (len(path) == len(dir) || path[len(dir)] == '/')
}

func build(entries []Entry, strict bool) (*Index, error) {
	byPath := func(a, b Entry) int { return Compare(a.Path, b.Path) }
	if !slices.IsSortedFunc(entries, byPath) {
		slices.SortStableFunc(entries, byPath)
	}
	for i := range entries {
		e := &entries[i]
		if err := CheckPath(e.Path); err != nil {
			return nil, err
		}
		if e.Type < Dir || e.Type > Whiteout {
			return nil, fmt.Errorf("path %q: unknown type %d", e.Path, e.Type)
		}
		if i > 0 && strict && entries[i-1].Path == e.Path {
			return nil, fmt.Errorf("path %q appears twice", e.Path)
		}
	}
	x := &Index{}
	if complete(entries) {
		x.entries = entries
	} else {
		x.entries = addParents(entries)
	}
	if err := x.link(); err != nil {
		return nil, err
	}
	return x, nil
}

// complete says that the sorted entries have no duplicates and start with the root, and that each one's parent is
// there: then they can be used as they are.
func complete(entries []Entry) bool {
	if len(entries) == 0 || entries[0].Path != "" {
		return false
	}
	var stack []string
	for i := range entries {
		path := entries[i].Path
		if i > 0 && entries[i-1].Path == path {
			return false
		}
		for len(stack) > 0 && !Within(path, stack[len(stack)-1]) {
			stack = stack[:len(stack)-1]
		}
		if i > 0 && stack[len(stack)-1] != Parent(path) {
			return false
		}
		stack = append(stack, path)
	}
	return true
}

// addParents drops all but the last of equal paths and inserts missing parents.
func addParents(entries []Entry) []Entry {
	out := make([]Entry, 0, len(entries)+8)
	if len(entries) == 0 || entries[0].Path != "" {
		out = append(out, Entry{Type: Dir, Mode: 0o755, Offset: -1})
	}
	for i := range entries {
		if i+1 < len(entries) && entries[i+1].Path == entries[i].Path {
			continue
		}
		path := entries[i].Path
		if path != "" {
			// The last entry and its ancestors are the only ones that can hold path.
			have := out[len(out)-1].Path
			for !Within(path, have) {
				have = Parent(have)
			}
			for parent := Parent(path); have != parent; {
				rest := parent[len(have):]
				rest = strings.TrimPrefix(rest, "/")
				name, _, _ := strings.Cut(rest, "/")
				have = Join(have, name)
				out = append(out, Entry{Path: have, Type: Dir, Mode: 0o755, Offset: -1})
			}
		}
		out = append(out, entries[i])
	}
	return out
}

// link fills in nodes.
func (x *Index) link() error {
	x.nodes = make([]node, len(x.entries))
	var stack []int32
	for i := range x.entries {
		e := &x.entries[i]
		for len(stack) > 0 && !Within(e.Path, x.entries[stack[len(stack)-1]].Path) {
			x.nodes[stack[len(stack)-1]].end = int32(i)
			stack = stack[:len(stack)-1]
		}
		n := &x.nodes[i]
		if len(stack) > 0 {
			n.parent = stack[len(stack)-1]
			if p := &x.entries[n.parent]; p.Type != Dir {
				return fmt.Errorf("path %q: %q is not a directory", e.Path, p.Path)
			}
		} else if e.Type != Dir {
			return fmt.Errorf("the root is not a directory")
		}
		n.shadow = x.nodes[n.parent].shadow || e.Type == Dir && e.Opaque
		stack = append(stack, int32(i))
	}
	for _, i := range stack {
		x.nodes[i].end = int32(len(x.entries))
	}
	return nil
}

// Join puts a name behind a directory's path.
func Join(dir, name string) string {
	switch {
	case dir == "":
		return name
	case name == "":
		return dir
	}
	return dir + "/" + name
}

// Base returns the last name of path; that of the root is "".
func Base(path string) string {
	return path[strings.LastIndexByte(path, '/')+1:]
}

// Len returns the number of entries, the root included.
func (x *Index) Len() int { return len(x.entries) }

// At returns entry number i in Compare order.
func (x *Index) At(i int) Entry { return x.entries[i] }

// All yields every entry in Compare order, whiteouts included. The root is first.
func (x *Index) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for i := range x.entries {
			if !yield(x.entries[i]) {
				return
			}
		}
	}
}

// search returns the position of path, or where it would be.
func (x *Index) search(path string) (int, bool) {
	lo, hi := 0, len(x.entries)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch c := Compare(x.entries[mid].Path, path); {
		case c == 0:
			return mid, true
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return lo, false
}

// deepest returns the position of path if it is there, otherwise of the last of its ancestors that is.
func (x *Index) deepest(path string) (int, bool) {
	i, ok := x.search(path)
	if ok {
		return i, true
	}
	// What lies between an ancestor and path in order is inside that ancestor, so the entry before path is too.
	for i--; i > 0 && !Within(path, x.entries[i].Path); {
		i = int(x.nodes[i].parent)
	}
	return i, false
}

// Lookup returns the entry at path. It may be a whiteout.
func (x *Index) Lookup(path string) (Entry, bool) {
	if i, ok := x.search(path); ok {
		return x.entries[i], true
	}
	return Entry{}, false
}

// ReadDir returns what this layer has in the directory at path, by name, whiteouts included; nil if it has no
// such directory.
func (x *Index) ReadDir(path string) []Entry {
	i, ok := x.search(path)
	if !ok || x.entries[i].Type != Dir {
		return nil
	}
	out := make([]Entry, 0, 8)
	for j := i + 1; j < int(x.nodes[i].end); j = int(x.nodes[j].end) {
		out = append(out, x.entries[j])
	}
	return out
}

// Digest returns the digest of the layer's content: of everything in its entries, whiteouts, opaque marks and
// hard links included, except modification times and offsets. It says nothing useful as long as files have no
// Digest.
func (x *Index) Digest() digest.Digest {
	x.digestOnce.Do(func() {
		h := sha256.New()
		buf := append(make([]byte, 0, 64<<10), "slipway layer content 1\n"...)
		for i := range x.entries {
			e := &x.entries[i]
			buf = appendString(buf, e.Path)
			buf = appendContent(buf, e)
			buf = appendString(buf, e.HardLink)
			if e.Opaque {
				buf = append(buf, 1)
			} else {
				buf = append(buf, 0)
			}
			if len(buf) > 60<<10 {
				h.Write(buf)
				buf = buf[:0]
			}
		}
		h.Write(buf)
		x.digest = digest.NewDigest(digest.SHA256, h)
	})
	return x.digest
}

// appendContent appends what counts as content of e besides its place: type, mode, owner, size, device, symlink
// target, xattrs, digest. Every part has a length or a fixed place, so different entries never look the same.
func appendContent(buf []byte, e *Entry) []byte {
	buf = append(buf, byte(e.Type))
	buf = binary.AppendUvarint(buf, uint64(e.Mode))
	buf = binary.AppendUvarint(buf, uint64(e.UID))
	buf = binary.AppendUvarint(buf, uint64(e.GID))
	buf = binary.AppendUvarint(buf, uint64(e.Size))
	buf = binary.AppendUvarint(buf, uint64(e.Major))
	buf = binary.AppendUvarint(buf, uint64(e.Minor))
	buf = appendString(buf, e.Target)
	buf = appendXattrs(buf, e.Xattrs)
	return appendString(buf, string(e.Digest))
}

func appendString(buf []byte, s string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

func appendXattrs(buf []byte, xattrs map[string]string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(xattrs)))
	if len(xattrs) == 0 {
		return buf
	}
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		buf = appendString(buf, name)
		buf = appendString(buf, xattrs[name])
	}
	return buf
}

// Pos returns the number of the entry at path, as At takes it.
func (x *Index) Pos(path string) (int, bool) {
	i, ok := x.search(path)
	return i, ok
}

// ParentPos returns the number of the directory that holds entry i; that of the root is 0, itself.
func (x *Index) ParentPos(i int) int { return int(x.nodes[i].parent) }

// Children yields the numbers of the entries right inside entry i, by name.
func (x *Index) Children(i int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for j := i + 1; j < int(x.nodes[i].end); j = int(x.nodes[j].end) {
			if !yield(j) {
				return
			}
		}
	}
}
