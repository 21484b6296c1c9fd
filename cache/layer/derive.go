// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Layers that are made from other layers, through their indexes: nothing is mounted or extracted.

// Clamp returns the layer that is id without any time after latest, which counts in whole seconds: such times become
// latest. A layer that has none is its own answer.
func (s *Store) Clamp(ctx context.Context, id ID, latest time.Time) (ID, error) {
	if err := s.Ensure(ctx, id); err != nil {
		return "", err
	}
	x, err := s.Index(ctx, id)
	if err != nil {
		return "", err
	}
	limit := latest.Unix()
	items := make([]tarItem, x.Len())
	late := false
	for i := range items {
		e := x.At(i)
		items[i] = s.derived(ctx, id, e)
		root := i == 0 && !rootInTar(&e) // not in the tar, so that its time is nobody's
		if sec, _ := splitTime(e.ModTime); sec > limit && e.Type != index.Whiteout && !root {
			late = true
		}
		if e.ModTime > limit*1e9 {
			items[i].entry.ModTime = limit * 1e9
		}
	}
	if !late {
		return id, nil
	}
	clamped, err := s.commitTar(ctx, "", items, rootInTar(&items[0].entry))
	if err != nil {
		return "", fmt.Errorf("rewrite the times of layer %s: %w", id, err)
	}
	return clamped, nil
}

// derived is an entry of a layer as an item of another one.
func (s *Store) derived(ctx context.Context, id ID, e index.Entry) tarItem {
	return tarItem{entry: e, open: func() (io.ReadCloser, error) { return s.OpenFile(ctx, id, e.Path) }}
}

// Flatten makes one layer of several, lowest first: over below (nil for nothing) it shows what they show, and it hides nothing
// that is not there. A name of a hard-linked file that a higher layer has replaced comes off the others.
func (s *Store) Flatten(ctx context.Context, ids []ID, below index.Tree) (ID, error) {
	if len(ids) == 0 {
		return "", errors.New("flatten layers: there are none")
	}
	if err := s.Ensure(ctx, ids...); err != nil {
		return "", err
	}
	if below == nil {
		below = index.Merge()
	}
	f := flattening{root: &flatNode{}, below: below}
	for i, id := range ids {
		x, err := s.Index(ctx, id)
		if err != nil {
			return "", err
		}
		for j := range x.Len() {
			f.add(i, x.At(j))
		}
	}
	var items []tarItem
	var from []flatNode // beside items
	f.walk("", f.root, true, func(n flatNode) {
		items = append(items, s.derived(ctx, ids[n.layer], n.entry))
		from = append(from, n)
	})
	canonicalLinks(items, func(i int) any {
		if items[i].entry.Type != index.File {
			return nil
		}
		first := from[i].entry.HardLink
		if first == "" {
			first = from[i].entry.Path
		}
		return flatFile{from[i].layer, first}
	})
	id, err := s.commitTar(ctx, "", items, rootInTar(&items[0].entry))
	if err != nil {
		return "", fmt.Errorf("make one layer of %d: %w", len(ids), err)
	}
	return id, nil
}

// flattening is what a stack of layers shows, with what it hides of what is below it.
type flattening struct {
	root  *flatNode
	below index.Tree
}

type flatNode struct {
	layer    int // which one it is from
	entry    index.Entry
	children map[string]*flatNode
}

// flatFile is a file of one of the layers, by its first name.
type flatFile struct {
	layer int
	path  string
}

// add puts an entry of a layer over what is there; parents come before what is in them, lower layers before higher ones.
func (f *flattening) add(layer int, e index.Entry) {
	if e.Path == "" {
		if e.Opaque {
			f.root.children = nil
		}
		e.Opaque = e.Opaque || f.root.entry.Opaque
		f.root.layer, f.root.entry = layer, e
		return
	}
	parent := f.root
	for rest := index.Parent(e.Path); rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		parent = parent.children[name] // an index has every parent
	}
	name := index.Base(e.Path)
	n := &flatNode{layer: layer, entry: e}
	if old := parent.children[name]; e.Type == index.Dir && old != nil {
		if old.entry.Type == index.Dir && !e.Opaque {
			n.children = old.children
			n.entry.Opaque = old.entry.Opaque
		} else {
			n.entry.Opaque = true // what was there hid what is below, if anything is
		}
	}
	if parent.children == nil {
		parent.children = map[string]*flatNode{}
	}
	parent.children[name] = n
}

// walk calls fn for every entry of the flat layer, in the order of a tar. merged says that what is below n's path shows through.
func (f *flattening) walk(path string, n *flatNode, merged bool, fn func(flatNode)) {
	below := index.Entry{}
	if merged {
		below, merged = f.below.Lookup(path)
	}
	switch n.entry.Type {
	case index.Whiteout:
		if !merged {
			return // of nothing
		}
	case index.Dir:
		merged = merged && below.Type == index.Dir
		n.entry.Opaque = n.entry.Opaque && merged
		merged = merged && !n.entry.Opaque
	}
	fn(*n)
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		f.walk(index.Join(path, name), n.children[name], merged, fn)
	}
}
