// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/solver/op"
)

// Opener opens the list of files that a digest in a key stands for.
type Opener func(d digest.Digest) (io.ReadCloser, error)

// maxListed is how many files of a difference are named.
const maxListed = 100

type fileKey struct {
	action int
	path   string
}

// compareFiles returns what differs between two lists, nil when one of them is not kept.
func compareFiles(open Opener, before, after string) *Files {
	was, err := readFiles(open, before)
	if err != nil {
		return nil
	}
	now, err := readFiles(open, after)
	if err != nil {
		return nil
	}
	f := &Files{}
	byPath := map[string]FileChange{}
	for key, s := range now {
		old, ok := was[key]
		if !ok {
			byPath[key.path] = FileChange{Path: key.path, Change: "added"}
		} else if fields := fieldsOf(old, s); len(fields) > 0 {
			byPath[key.path] = FileChange{Path: key.path, Change: "changed", Fields: fields}
		}
	}
	for key := range was {
		if _, ok := now[key]; !ok {
			byPath[key.path] = FileChange{Path: key.path, Change: "removed"}
		}
	}
	for _, change := range byPath {
		switch change.Change {
		case "added":
			f.Added++
		case "removed":
			f.Removed++
		default:
			f.Changed++
		}
		f.List = append(f.List, change)
	}
	slices.SortFunc(f.List, func(a, b FileChange) int { return cmp.Compare(a.Path, b.Path) })
	f.List = f.List[:min(len(f.List), maxListed)]
	return f
}

func readFiles(open Opener, d string) (map[fileKey]op.Seen, error) {
	r, err := open(digest.Digest(d))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out := map[fileKey]op.Seen{}
	err = op.ReadSeen(r, func(s op.Seen) error {
		out[fileKey{s.Action, s.Path}] = s
		return nil
	})
	return out, err
}

// fieldsOf returns the properties in which two files differ.
func fieldsOf(a, b op.Seen) []Field {
	var out []Field
	add := func(name, before, after string) {
		if before != after {
			out = append(out, Field{Name: name, Before: before, After: after})
		}
	}
	add("type", typeName(a.Type), typeName(b.Type))
	if a.Type == b.Type && a.Digest != b.Digest {
		out = append(out, Field{Name: "content"})
	}
	if a.Size != b.Size && a.Type == b.Type {
		out = append(out, sizeField(a.Size, b.Size))
	}
	add("mode", octal(a.Mode), octal(b.Mode))
	add("owner", owner(a.UID, a.GID), owner(b.UID, b.GID))
	add("link target", a.Target, b.Target)
	add("device", fmt.Sprintf("%d:%d", a.Major, a.Minor), fmt.Sprintf("%d:%d", b.Major, b.Minor))
	add("hard link", a.HardLink, b.HardLink)
	if !maps.Equal(a.Xattrs, b.Xattrs) {
		names := map[string]bool{}
		for k, v := range a.Xattrs {
			if w, ok := b.Xattrs[k]; !ok || v != w {
				names[k] = true
			}
		}
		for k := range b.Xattrs {
			if _, ok := a.Xattrs[k]; !ok {
				names[k] = true
			}
		}
		for _, k := range slices.Sorted(maps.Keys(names)) {
			out = append(out, Field{Name: "extended attribute " + k})
		}
	}
	if a.Way != b.Way {
		out = append(out, Field{Name: "whether it is selected itself"})
	}
	return out
}

func octal(mode uint32) string { return fmt.Sprintf("%04o", mode) }

func owner(uid, gid uint32) string { return fmt.Sprintf("%d:%d", uid, gid) }

func sizeField(before, after int64) Field {
	return Field{Name: "size", Before: fmt.Sprint(before), After: fmt.Sprint(after)}
}

func typeName(t index.Type) string {
	switch t {
	case index.File:
		return "file"
	case index.Dir:
		return "directory"
	case index.Symlink:
		return "symlink"
	case index.CharDevice:
		return "character device"
	case index.BlockDevice:
		return "block device"
	case index.Fifo:
		return "named pipe"
	case index.Whiteout:
		return "deletion"
	}
	return fmt.Sprint("type ", uint8(t))
}
