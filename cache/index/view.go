// SPDX-License-Identifier: Apache-2.0

package index

import (
	"crypto/sha256"
	"slices"
	"strings"
	"sync"
)

// Tree is read access to a whole file tree. It shows no whiteouts and no opaque marks.
type Tree interface {
	// Lookup returns the entry at path, a clean path relative to the root. It does not follow symlinks.
	Lookup(path string) (Entry, bool)
	// ReadDir returns what the directory at path holds, sorted by name; nil if it is not a directory.
	ReadDir(path string) []Entry
}

// View is what a stack of layers shows when overlayfs mounts it. It implements Tree, is immutable and safe for
// concurrent use.
//
// HardLink is only set on an entry when the name it points to is visible too, as the same file.
type View struct {
	layers []*Index // lowest first

	mu     sync.RWMutex // guards lowest
	lowest map[string]int
}

// Merge returns the view of a stack of layers, lowest first. Without layers it is an empty root directory.
func Merge(layers ...*Index) *View {
	return &View{layers: slices.Clone(layers)}
}

// Lookup returns the visible entry at path.
func (v *View) Lookup(path string) (Entry, bool) {
	e, _, ok := v.Find(path)
	return e, ok
}

// Find is Lookup and Layer in one. The layer of an empty view's root is -1.
func (v *View) Find(path string) (e Entry, layer int, ok bool) {
	layer, i, ok := v.find(path)
	switch {
	case ok:
		return v.clean(layer, v.layers[layer].At(i)), layer, true
	case path == "":
		return Entry{Type: Dir, Mode: 0o755, Offset: -1}, layer, true
	}
	return Entry{}, layer, false
}

// Layer returns which layer the visible entry at path comes from: for a directory that several layers have, the
// highest, whose metadata counts.
func (v *View) Layer(path string) (i int, ok bool) {
	layer, _, ok := v.find(path)
	return layer, ok
}

// find goes down the layers that show at the parent of path until one has path itself.
func (v *View) find(path string) (layer, pos int, ok bool) {
	if path == "" {
		return len(v.layers) - 1, 0, len(v.layers) > 0
	}
	hash := hashPath(path)
	for layer, low := len(v.layers)-1, v.lowestAt(Parent(path)); layer >= low; layer-- {
		x := v.layers[layer]
		if i, found := x.pos(hash, path); found {
			return layer, i, x.record(i).typ() != Whiteout
		}
	}
	return -1, 0, false
}

// clean turns a layer's entry into one of the view.
func (v *View) clean(layer int, e Entry) Entry {
	e.Opaque = false
	if e.HardLink != "" {
		if first, _, ok := v.find(e.HardLink); !ok || first != layer {
			e.HardLink = ""
		}
	}
	return e
}

// place is an entry of one of the layers.
type place struct{ layer, pos int }

// maxKnown bounds the directories that a view remembers.
const maxKnown = 1 << 16

// lowestAt returns the lowest layer of which the directory at path shows, if it has one: those below are hidden by an opaque
// directory, or by something else than a directory, at path or above it. The answer is remembered, as the neighbours of a
// path will be asked for too.
func (v *View) lowestAt(path string) int {
	v.mu.RLock()
	low, ok := v.lowest[path]
	v.mu.RUnlock()
	if ok {
		return low
	}
	if path != "" {
		low = v.lowestAt(Parent(path))
	}
	hash := hashPath(path)
	for layer := len(v.layers) - 1; layer >= low; layer-- {
		x := v.layers[layer]
		if i, hides := x.hiding(hash, path); hides {
			if low = layer; x.nodes[i].dir < 0 {
				low = layer + 1
			}
			break
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.lowest == nil || len(v.lowest) >= maxKnown {
		v.lowest = map[string]int{}
	}
	v.lowest[path] = low
	return low
}

// directory returns the directories that show at path together, highest first; nil if there is none.
func (v *View) directory(path string) []place {
	var dirs []place
	hash := hashPath(path)
	for layer, low := len(v.layers)-1, v.lowestAt(path); layer >= low; layer-- {
		if i, found := v.layers[layer].pos(hash, path); found {
			dirs = append(dirs, place{layer, i})
		}
	}
	return dirs
}

// child is a name that a directory of several layers shows.
type child struct {
	place
	name string
}

// children returns what dirs, which show together, have in them: by name, and of equal names the highest first.
func (v *View) children(dirs []place) []child {
	var out []child
	for _, d := range dirs {
		x := v.layers[d.layer]
		prefix := len(x.Path(d.pos))
		if prefix > 0 {
			prefix++
		}
		for j := range x.Children(d.pos) {
			out = append(out, child{place{d.layer, j}, x.Path(j)[prefix:]})
		}
	}
	if len(dirs) > 1 {
		slices.SortFunc(out, func(a, b child) int {
			if c := strings.Compare(a.name, b.name); c != 0 {
				return c
			}
			return b.layer - a.layer
		})
	}
	return out
}

// ReadDir returns what the directory at path shows.
func (v *View) ReadDir(path string) []Entry {
	dirs := v.directory(path)
	if dirs == nil {
		if path == "" {
			return []Entry{}
		}
		return nil
	}
	children := v.children(dirs)
	out := make([]Entry, 0, len(children))
	for i, c := range children {
		if i > 0 && children[i-1].name == c.name {
			continue
		}
		if e := v.layers[c.layer].At(c.pos); e.Type != Whiteout {
			out = append(out, v.clean(c.layer, e))
		}
	}
	return out
}

// digestOf returns the Merkle hash of the directory at path. It is not ok if there is none, or if files are not hashed.
func (v *View) digestOf(path string) (sum [sha256.Size]byte, ok bool) {
	for _, x := range v.layers {
		if x.unhashed {
			return sum, false
		}
	}
	dirs := v.directory(path)
	if dirs == nil {
		return sum, false
	}
	return v.merkle(dirs), true
}

// merkle returns the hash of what dirs show together.
func (v *View) merkle(dirs []place) [sha256.Size]byte {
	top := v.layers[dirs[0].layer]
	if len(dirs) == 1 {
		return *top.merkle(dirs[0].pos)
	}
	buf := append(make([]byte, 0, 4096), top.record(dirs[0].pos).content()...)
	children := v.children(dirs)
	var below []place
	for len(children) > 0 {
		same := 1
		for same < len(children) && children[same].name == children[0].name {
			same++
		}
		c := children[0]
		x := v.layers[c.layer]
		switch r := x.record(c.pos); r.typ() {
		case Whiteout:
		case Dir:
			below = below[:0]
			for _, c := range children[:same] {
				n := v.layers[c.layer].nodes[c.pos]
				if n.dir < 0 {
					break
				}
				below = append(below, c.place)
				if n.shadow {
					break
				}
			}
			sum := v.merkle(slices.Clone(below))
			buf = appendString(buf, c.name)
			buf = append(append(buf, byte(Dir)), sum[:]...)
		default:
			buf = appendString(buf, c.name)
			buf = append(buf, r.content()...)
		}
		children = children[same:]
	}
	return sha256.Sum256(buf)
}
