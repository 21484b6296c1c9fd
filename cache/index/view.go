// SPDX-License-Identifier: Apache-2.0

package index

import (
	"slices"
	"strings"
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
}

// Merge returns the view of a stack of layers, lowest first. Without layers it is an empty root directory.
func Merge(layers ...*Index) *View {
	return &View{layers: slices.Clone(layers)}
}

// Lookup returns the visible entry at path.
func (v *View) Lookup(path string) (Entry, bool) {
	layer, i, ok := v.find(path)
	if !ok {
		if path == "" {
			return Entry{Type: Dir, Mode: 0o755, Offset: -1}, true
		}
		return Entry{}, false
	}
	return v.clean(layer, v.layers[layer].entries[i]), true
}

// Layer returns which layer the visible entry at path comes from: for a directory that several layers have, the
// highest, whose metadata counts.
func (v *View) Layer(path string) (i int, ok bool) {
	layer, _, ok := v.find(path)
	return layer, ok
}

// find goes down the layers until one has path or hides it from those below.
func (v *View) find(path string) (layer, pos int, ok bool) {
	for layer := len(v.layers) - 1; layer >= 0; layer-- {
		x := v.layers[layer]
		i, found := x.deepest(path)
		if found {
			return layer, i, x.entries[i].Type != Whiteout
		}
		if x.entries[i].Type != Dir || x.nodes[i].shadow {
			break
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

// ReadDir returns what the directory at path shows.
func (v *View) ReadDir(path string) []Entry {
	type child struct {
		layer int
		entry *Entry
	}
	var children []child // of all layers, highest layer first
	layers := 0
	isDir := false
	for layer := len(v.layers) - 1; layer >= 0; layer-- {
		x := v.layers[layer]
		i, found := x.deepest(path)
		if x.entries[i].Type != Dir {
			break // a whiteout or a file: it hides what is below, and is not merged with directories above
		}
		if found {
			isDir = true
			layers++
			for j := i + 1; j < int(x.nodes[i].end); j = int(x.nodes[j].end) {
				children = append(children, child{layer, &x.entries[j]})
			}
		}
		if x.nodes[i].shadow {
			break
		}
	}
	if !isDir {
		if path == "" {
			return []Entry{}
		}
		return nil
	}
	if layers > 1 {
		// Stable, so that of equal names the highest layer's comes first.
		slices.SortStableFunc(children, func(a, b child) int { return strings.Compare(a.entry.Path, b.entry.Path) })
	}
	out := make([]Entry, 0, len(children))
	for i, c := range children {
		if i > 0 && children[i-1].entry.Path == c.entry.Path || c.entry.Type == Whiteout {
			continue
		}
		out = append(out, v.clean(c.layer, *c.entry))
	}
	return out
}
