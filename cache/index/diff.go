// SPDX-License-Identifier: Apache-2.0

package index

import (
	"iter"
	"maps"
)

// Change is a path at which two layers differ.
type Change struct {
	Path string
	// Before is nil when the path is only in the second layer, After when it is only in the first.
	Before, After *Entry
}

// Diff returns where two sequences of entries in Compare order differ, in that order: those of two layers (Index.All, with
// whiteouts) or of two trees. Modification times and places in a tar do not count, as in Index.Digest.
func Diff(before, after iter.Seq[Entry]) []Change {
	next, stop := iter.Pull(before)
	defer stop()
	var out []Change
	a, more := next()
	take := func() *Entry {
		e := a
		a, more = next()
		return &e
	}
	for b := range after {
		for more && Compare(a.Path, b.Path) < 0 {
			e := take()
			out = append(out, Change{Path: e.Path, Before: e})
		}
		if !more || a.Path != b.Path {
			out = append(out, Change{Path: b.Path, After: &b})
			continue
		}
		if c := (Change{Path: b.Path, Before: take(), After: &b}); len(c.Fields()) > 0 {
			out = append(out, c)
		}
	}
	for more {
		e := take()
		out = append(out, Change{Path: e.Path, Before: e})
	}
	return out
}

// Fields says what differs at a path that both have: "type", "bytes", "size", "mode", "owner", "link", "device", "xattr",
// "opaque". nil when one of them does not have it.
func (c Change) Fields() []string {
	a, b := c.Before, c.After
	if a == nil || b == nil {
		return nil
	}
	var out []string
	add := func(name string, differs bool) {
		if differs {
			out = append(out, name)
		}
	}
	add("type", a.Type != b.Type)
	add("bytes", a.Digest != b.Digest && a.Type == b.Type)
	add("size", a.Size != b.Size && a.Type == b.Type)
	add("mode", a.Mode != b.Mode)
	add("owner", a.UID != b.UID || a.GID != b.GID)
	add("link", a.Target != b.Target || a.HardLink != b.HardLink)
	add("device", a.Major != b.Major || a.Minor != b.Minor)
	add("xattr", !maps.Equal(a.Xattrs, b.Xattrs))
	add("opaque", a.Opaque != b.Opaque)
	return out
}
