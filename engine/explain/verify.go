// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/solver"
)

// Verification says what has come of making again what was found in the cache (build --verify-cache).
type Verification struct {
	// Same says that the files are the same, modification times apart.
	Same bool `json:"same"`
	// Error is why the step could not be done again.
	Error string `json:"error,omitempty"`
	// Files are those that differ.
	Files *Files `json:"files,omitempty"`
}

// NewVerification puts what the solver reports of a vertex into words, nil when nothing was verified.
func NewVerification(v *solver.Verification) *Verification {
	switch {
	case v == nil:
		return nil
	case v.Err != nil:
		return &Verification{Error: v.Err.Error()}
	case v.Same():
		return &Verification{Same: true}
	}
	f := &Files{}
	for _, c := range v.Changes {
		change := FileChange{Path: c.Path, Change: "changed"}
		switch {
		case c.Before == nil:
			f.Added++
			change.Change = "added"
		case c.After == nil:
			f.Removed++
			change.Change = "removed"
		default:
			f.Changed++
			change.Fields = changedFields(c)
		}
		if change.Path == "" {
			change.Path = "/"
		}
		if len(f.List) < maxListed {
			f.List = append(f.List, change)
		}
	}
	return &Verification{Files: f}
}

// changedFields names what differs in the words that are used for what a step reads.
func changedFields(c index.Change) []Field {
	var out []Field
	for _, name := range c.Fields() {
		switch name {
		case "bytes":
			out = append(out, Field{Name: "content"})
		case "type":
			out = append(out, Field{Name: "type", Before: typeName(c.Before.Type), After: typeName(c.After.Type)})
		case "xattr":
			out = append(out, Field{Name: "extended attributes"})
		case "link":
			out = append(out, Field{Name: "link target", Before: c.Before.Target + c.Before.HardLink, After: c.After.Target + c.After.HardLink})
		case "opaque":
			out = append(out, Field{Name: "whether it hides what is below"})
		case "mode":
			out = append(out, Field{Name: "mode", Before: octal(c.Before.Mode), After: octal(c.After.Mode)})
		case "owner":
			out = append(out, Field{Name: "owner", Before: owner(c.Before.UID, c.Before.GID), After: owner(c.After.UID, c.After.GID)})
		case "size":
			out = append(out, sizeField(c.Before.Size, c.After.Size))
		default:
			out = append(out, Field{Name: name})
		}
	}
	return out
}
