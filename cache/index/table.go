// SPDX-License-Identifier: Apache-2.0

package index

import (
	"crypto/sha256"
	"fmt"
	"hash/maphash"
	"iter"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"github.com/opencontainers/go-digest"
)

// Index is the table of contents of one layer. It always has its root, and the parent of every entry, as
// directories. It is immutable and safe for concurrent use.
//
// In memory it is what it is in its file (see encode.go), with a table of where each entry begins, of the shape of the
// tree, and of the paths by hash. An Entry is decoded when somebody asks for it. The hashes are made while the paths
// are being read anyway: later, that would cost three times as much, and more than the questions of most builds.
type Index struct {
	data  string    // the entries, encoded
	nodes []node    // one for each
	paths hashTable // when hashing is done
	// hashing is what still puts the paths of a large index into the table.
	hashing sync.WaitGroup
	dirs    int // how many of the entries are directories
	// unhashed says that some file has no Digest.
	unhashed bool

	digestOnce sync.Once
	digest     digest.Digest
	merkleOnce sync.Once
	merkles    [][sha256.Size]byte // of each directory, by node.dir
	linksOnce  sync.Once
	links      map[string][]int32 // see laterNames
}

// node holds what makes an entry's place in the tree cheap to ask for.
type node struct {
	off    uint32 // where the entry begins in Index.data
	parent int32  // position of the parent; the root is its own
	end    int32  // position after the last entry of the subtree
	dir    int32  // number of this directory among the directories; -1 for anything else
	// shadow says that this directory or one above it is opaque: nothing below this layer shows through.
	shadow bool
	// opaque says that this directory is.
	opaque bool
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

// MaxPath is the longest path of an entry in bytes, twice what the kernel takes in one piece, and MaxDepth how many names it may have. Indexes of
// deeper trees would soon need more memory than there is: a name of a megabyte in a tar is half a million directories, each with a path.
const (
	MaxPath  = 8 << 10
	MaxDepth = 1 << 10
)

// CheckLength refuses a path longer than MaxPath or deeper than MaxDepth. The error wraps syscall.ENAMETOOLONG.
func CheckLength(path string) error {
	const short = 2*MaxDepth - 1 // cannot be too deep
	if len(path) <= short || len(path) <= MaxPath && strings.Count(path, "/") < MaxDepth {
		return nil
	}
	return fmt.Errorf("path of %d bytes, %.256q…: %w", len(path), path, syscall.ENAMETOOLONG)
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
	if !complete(entries) {
		entries = addParents(entries)
	}
	buf := make([]byte, 0, 64+len(entries)*112)
	for i := range entries {
		buf = appendEntry(buf, &entries[i])
	}
	return scan(unsafe.String(unsafe.SliceData(buf), len(buf)), len(entries))
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
func (x *Index) Len() int { return len(x.nodes) }

// At returns entry number i in Compare order.
func (x *Index) At(i int) Entry {
	var e Entry
	x.record(i).entry(&e)
	return e
}

// Path returns the path of entry number i. It costs less than At.
func (x *Index) Path(i int) string { return x.record(i).path() }

// IsDir says whether entry number i is a directory. It costs less than At.
func (x *Index) IsDir(i int) bool { return x.nodes[i].dir >= 0 }

// All yields every entry in Compare order, whiteouts included. The root is first.
func (x *Index) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for i := range x.nodes {
			if !yield(x.At(i)) {
				return
			}
		}
	}
}

// Lookup returns the entry at path. It may be a whiteout.
func (x *Index) Lookup(path string) (Entry, bool) {
	if i, ok := x.Pos(path); ok {
		return x.At(i), true
	}
	return Entry{}, false
}

// ReadDir returns what this layer has in the directory at path, by name, whiteouts included; nil if it has no
// such directory.
func (x *Index) ReadDir(path string) []Entry {
	i, ok := x.Pos(path)
	if !ok || x.nodes[i].dir < 0 {
		return nil
	}
	out := make([]Entry, 0, 8)
	for j := range x.Children(i) {
		out = append(out, x.At(j))
	}
	return out
}

// Digest returns the digest of the layer's content: of everything in its entries, whiteouts, opaque marks and
// hard links included, except modification times and offsets. It says nothing useful as long as files have no
// Digest.
func (x *Index) Digest() digest.Digest {
	x.digestOnce.Do(func() {
		h := sha256.New()
		buf := append(make([]byte, 0, 64<<10), "slipway layer content 2\n"...)
		for i := range x.nodes {
			buf = append(buf, x.record(i).identity()...)
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

// Pos returns the number of the entry at path, as At takes it.
func (x *Index) Pos(path string) (int, bool) { return x.pos(hashPath(path), path) }

// pos is Pos for a path whose hash is known.
func (x *Index) pos(hash uint64, path string) (int, bool) {
	x.hashing.Wait()
	if !x.paths.may(hash) {
		return 0, false
	}
	for slot := x.paths.first(hash); ; slot = x.paths.next(slot) {
		i, same, _ := x.paths.at(slot, hash)
		if i < 0 {
			return 0, false
		}
		if same && x.Path(i) == path {
			return i, true
		}
	}
}

// hiding returns the number of the entry at path if it hides what layers below have in a directory there: if it is an
// opaque directory, or none. It is for paths that are directories in some layer: those of the others need not be looked
// at, only their places in the table.
func (x *Index) hiding(hash uint64, path string) (int, bool) {
	x.hashing.Wait()
	if !x.paths.may(hash) {
		return 0, false
	}
	for slot := x.paths.first(hash); ; slot = x.paths.next(slot) {
		i, same, merges := x.paths.at(slot, hash)
		if i < 0 {
			return 0, false
		}
		if same && !merges && x.Path(i) == path {
			return i, true
		}
	}
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

// hashTable finds the position of a path by its hash: open addressing, at most half full, four bytes a slot so that the
// tables of a whole stack stay in the processor's cache. A slot has, from its lowest bit, the position + 1 (0 is free),
// whether the entry is a directory that merges with those of layers below, and as much of the upper end of the hash as
// fits. Most paths that are not there cost one look into it.
type hashTable struct {
	slots []uint32
	bits  int // of a position
	// filter has a bit for each path, at a place that follows from its hash: of those that are not there, seven in eight or more are
	// told without a look at the slots, which take 16 times as much room.
	filter []uint64
}

const filterBitsPerSlot = 4

var hashSeed = maphash.MakeSeed()

func hashPath(path string) uint64 { return maphash.String(hashSeed, path) }

// newHashTable makes a table for n paths, of which there are fewer than 1<<31.
func newHashTable(n int) hashTable {
	slots := 1 << bits.Len(uint(2*n-1))
	return hashTable{
		slots: make([]uint32, slots), bits: bits.Len(uint(n)),
		filter: make([]uint64, (slots*filterBitsPerSlot+63)/64),
	}
}

// may says whether a path with this hash may be in the table.
func (t *hashTable) may(hash uint64) bool {
	bit := t.filterBit(hash)
	return t.filter[bit/64]>>(bit%64)&1 != 0
}

func (t *hashTable) filterBit(hash uint64) uint64 {
	return hash & uint64(len(t.slots)*filterBitsPerSlot-1)
}

func (t *hashTable) first(hash uint64) int { return int(hash & uint64(len(t.slots)-1)) }
func (t *hashTable) next(slot int) int     { return (slot + 1) & (len(t.slots) - 1) }

// at returns the position in a slot, -1 when it is free, whether it may be the path with this hash, and whether it is a
// directory that merges with those below.
func (t *hashTable) at(slot int, hash uint64) (pos int, same, merges bool) {
	v := t.slots[slot]
	return int(v&(1<<t.bits-1)) - 1, v>>(t.bits+1) == t.tag(hash), v>>t.bits&1 != 0
}

func (t *hashTable) tag(hash uint64) uint32 { return uint32(hash>>32) >> (t.bits + 1) }

func (t *hashTable) put(hash uint64, pos int, merges bool) {
	bit := t.filterBit(hash)
	t.filter[bit/64] |= 1 << (bit % 64)
	slot := t.first(hash)
	for t.slots[slot] != 0 {
		slot = t.next(slot)
	}
	v := t.tag(hash)<<(t.bits+1) | uint32(pos+1)
	if merges {
		v |= 1 << t.bits
	}
	t.slots[slot] = v
}

// hashing puts the paths of an index into its table while the entries behind them are still being read.
type hashing struct {
	x    *Index
	done int      // entries before this one are in the table, or have been handed over
	more chan int // up to which entry there is something to do; nil while one goroutine does both
}

// hashBatch is how many entries are worth telling another goroutine.
const hashBatch = 4096

func (x *Index) hashPaths() *hashing { return &hashing{x: x} }

// until says that the entries before n are complete.
func (h *hashing) until(n int) {
	switch {
	case n == len(h.x.nodes) && h.more == nil:
		h.x.putPaths(h.done, n)
	case n == len(h.x.nodes) || n-h.done >= hashBatch:
		if h.more == nil {
			h.more = make(chan int, 1+len(h.x.nodes)/hashBatch)
			h.x.hashing.Go(h.work)
		}
		h.more <- n
	default:
		return
	}
	h.done = n
}

func (h *hashing) work() {
	done := 0
	for n := range h.more {
		h.x.putPaths(done, n)
		done = n
	}
}

// end says that until will not be called any more. The table is complete when Index.hashing is done.
func (h *hashing) end() {
	if h.more != nil {
		close(h.more)
	}
}

// putPaths puts the paths of entries [from, to) into the table.
func (x *Index) putPaths(from, to int) {
	for i := from; i < to; i++ {
		n := &x.nodes[i]
		x.paths.put(hashPath(x.Path(i)), i, n.dir >= 0 && !n.opaque)
	}
}

// laterNames returns the positions of the second and later names of the file whose first name is path, in order.
func (x *Index) laterNames(path string) []int32 {
	x.linksOnce.Do(func() {
		x.links = map[string][]int32{}
		for i := range x.nodes {
			if first := x.record(i).hardLink(); first != "" {
				x.links[first] = append(x.links[first], int32(i))
			}
		}
	})
	return x.links[path]
}
