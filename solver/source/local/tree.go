// SPDX-License-Identifier: Apache-2.0

package local

import (
	"maps"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// tree is a directory as a scan has found it: what patterns leave of it, with what stat has said and what was read.
// A finished tree is immutable, so that scans, indexes and the writer of the remembered data can share it.
type tree struct {
	nodes []node // by name
}

// node is one name in a directory.
type node struct {
	name  string
	state nodeState
	typ   index.Type
	// sure says that target, digest and xattrs hold as long as stat says the same: nothing had changed for a while
	// when they were read. See racyMargin.
	sure   bool
	stat   stat
	target string            // of a Symlink
	digest digest.Digest     // of a File
	xattrs map[string]string // nil when there are none
	below  *tree             // of a Dir
}

// nodeState is what patterns say about a name.
type nodeState uint8

const (
	left  nodeState = iota // not in the context, nor anything in it; nothing else is known of it
	way                    // a directory that is there only if something in it is
	taken                  // in the context
)

// stat is what the kernel says about a file: when all of it is equal, unless the file was written to just now, then
// its bytes and attributes are equal too.
type stat struct {
	dev, ino     uint64
	mode, nlink  uint32
	size         int64
	mtime, ctime int64
}

// find returns the node of that name, nil when there is none.
func (t *tree) find(name string) *node {
	if t == nil {
		return nil
	}
	lo, hi := 0, len(t.nodes)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch c := strings.Compare(t.nodes[mid].name, name); {
		case c == 0:
			return &t.nodes[mid]
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return nil
}

// lookup returns the node at path, nil when there is none.
func (t *tree) lookup(path string) *node {
	for {
		name, rest, more := strings.Cut(path, "/")
		n := t.find(name)
		if n == nil || !more {
			return n
		}
		t, path = n.below, rest
	}
}

// sameEntries says whether two directories make the same entries of a layer, apart from what is in the directories
// below them.
func sameEntries(a, b []node) bool {
	for {
		for len(a) > 0 && a[0].state == left {
			a = a[1:]
		}
		for len(b) > 0 && b[0].state == left {
			b = b[1:]
		}
		if len(a) == 0 || len(b) == 0 {
			return len(a) == len(b)
		}
		if a[0].name != b[0].name || !a[0].sameEntry(&b[0]) {
			return false
		}
		a, b = a[1:], b[1:]
	}
}

// sameEntry says whether two nodes of one name make the same entry of a layer, apart from what is below them.
func (n *node) sameEntry(o *node) bool {
	return n.state == o.state && n.typ == o.typ &&
		n.stat.mode == o.stat.mode && seconds(n.stat.mtime) == seconds(o.stat.mtime) &&
		(n.typ != index.File || n.stat.size == o.stat.size && n.digest == o.digest &&
			(n.stat.nlink <= 1 && o.stat.nlink <= 1 || n.stat == o.stat)) &&
		n.target == o.target && maps.Equal(n.xattrs, o.xattrs)
}

// seconds cuts a time as layers do.
func seconds(ns int64) int64 {
	s := ns / 1e9
	if ns%1e9 < 0 {
		s--
	}
	return s * 1e9
}

// count returns how many nodes there are.
func (t *tree) count() int {
	if t == nil {
		return 0
	}
	n := len(t.nodes)
	for i := range t.nodes {
		n += t.nodes[i].below.count()
	}
	return n
}

// indexer turns a tree into a layer's index. Everything belongs to 0:0, as in every context.
type indexer struct {
	entries []index.Entry
	bytes   int64
	first   map[[2]uint64]int // device and inode of files with several names → the first entry and ...
	links   map[int]stat      // ... what its stat said
}

// index returns the index of the tree and how many bytes its files have.
func (t *tree) index() (*index.Index, int64, error) {
	x := indexer{entries: make([]index.Entry, 1, t.count()+1), first: map[[2]uint64]int{}, links: map[int]stat{}}
	x.entries[0] = index.Entry{Type: index.Dir, Mode: 0o755, Offset: -1}
	x.add("", t)
	i, err := index.NewChecked(x.entries)
	return i, x.bytes, err
}

func (x *indexer) add(dir string, t *tree) {
	for i := range t.nodes {
		n := &t.nodes[i]
		if n.state == left {
			continue
		}
		at := len(x.entries)
		path := n.name
		if dir != "" {
			path = dir + "/" + n.name
		}
		e := index.Entry{Path: path, Type: n.typ, Mode: n.stat.mode & 0o7777, ModTime: seconds(n.stat.mtime), Xattrs: n.xattrs, Offset: -1}
		switch n.typ {
		case index.Symlink:
			e.Mode, e.Target = 0o777, n.target
		case index.File:
			e.Size, e.Digest = n.stat.size, n.digest
			x.bytes += e.Size
			if n.stat.nlink > 1 {
				id := [2]uint64{n.stat.dev, n.stat.ino}
				if first, ok := x.first[id]; !ok {
					x.first[id], x.links[at] = at, n.stat
				} else if x.links[first] == n.stat {
					// Otherwise it has changed between the two: they are what they were when they were read.
					e.HardLink = x.entries[first].Path
				}
			}
		}
		x.entries = append(x.entries, e)
		if n.typ == index.Dir {
			x.add(path, n.below)
			if n.state == way && len(x.entries) == at+1 {
				x.entries = x.entries[:at]
			}
		}
	}
}
