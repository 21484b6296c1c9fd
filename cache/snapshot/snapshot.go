// SPDX-License-Identifier: Apache-2.0

// Package snapshot mounts stacks of layers. A Snapshot is a value: the names of its layers.
//
// A Store mounts a snapshot as an overlay over its layers, read-only or with an upper directory that Commit
// turns into one more layer; or, where overlay is not to be had, as a copy (copy.go). Unmounting happens in the background: nobody waits for it but Close and a mount
// that needs the very directory. What a snapshot contains can be asked of its View, without a mount.
package snapshot

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// Snapshot is a root file system as a value: its layers, lowest first. nil is an empty root ("scratch").
type Snapshot []layer.ID

// Layers is what a Store needs of the layer store; *layer.Store has it.
type Layers interface {
	Stat(context.Context, layer.ID) (layer.Info, error)
	Index(context.Context, layer.ID) (*index.Index, error)
	Indexes(context.Context, []layer.ID) ([]*index.Index, error)
	// Materialise brings remote layers here, all at once.
	Materialise(context.Context, ...layer.ID) error
	OpenFile(ctx context.Context, id layer.ID, path string) (io.ReadCloser, error)
	Mount(context.Context, layer.ID) (dir string, err error)
	NewUpper(context.Context) (dir string, err error)
	// Unmount ends what Mount began.
	Unmount(layer.ID)
	CommitTreeOver(ctx context.Context, upper string, below layer.Below) (layer.ID, error)
	// CopyTree makes the files of tree in an empty directory.
	CopyTree(ctx context.Context, tree layer.Files, dir string) error
	// IndexTree says what is in a directory.
	IndexTree(ctx context.Context, dir string) (*index.Index, error)
	// CopyEntries makes the entries of x, with the bytes of the files below from, in an empty directory.
	CopyEntries(ctx context.Context, x *index.Index, from, dir string) error
	// Root returns the entry of a layer's root directory, sooner than Index where the layer was just committed.
	Root(context.Context, layer.ID) (index.Entry, error)
}

// View is what a snapshot shows when it is mounted, read without a mount. It implements layer.Files. It is
// immutable and safe for concurrent use; it needs its layers only to open files.
type View struct {
	*index.View
	layers Layers
	snap   Snapshot
}

// View returns the merged view of snap.
func (s *Store) View(ctx context.Context, snap Snapshot) (*View, error) {
	stack, err := s.layers.Indexes(ctx, snap)
	if err != nil {
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	return &View{View: index.Merge(stack...), layers: s.layers, snap: snap}, nil
}

// OpenFile opens the regular file at path, a clean path whose symlinks are not followed. Errors wrap
// fs.ErrNotExist or fs.ErrInvalid (it is something else).
func (v *View) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	e, i, ok := v.Find(path)
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: "/" + path, Err: fs.ErrNotExist}
	}
	if e.Type != index.File {
		return nil, &fs.PathError{Op: "open", Path: "/" + path, Err: fmt.Errorf("not a regular file: %w", fs.ErrInvalid)}
	}
	return v.layers.OpenFile(ctx, v.snap[i], path)
}

// Content returns a digest over the content digests of snap's layers, in order. Equal digests mean equal file
// systems; the same files split into other layers have another digest. Remote layers without an index are brought here.
func (s *Store) Content(ctx context.Context, snap Snapshot) (digest.Digest, error) {
	return s.content(ctx, snap, true)
}

// Identity is Content for who does not look into snap: a remote layer whose content is not known is named by its ID, which says
// what it is as well, and stays where it is. It has another Identity when its content is known.
func (s *Store) Identity(ctx context.Context, snap Snapshot) (digest.Digest, error) {
	return s.content(ctx, snap, false)
}

func (s *Store) content(ctx context.Context, snap Snapshot, known bool) (digest.Digest, error) {
	if known {
		if _, err := s.layers.Indexes(ctx, unknown(ctx, s.layers, snap)); err != nil {
			return "", fmt.Errorf("content of snapshot: %w", err)
		}
	}
	h := sha256.New()
	io.WriteString(h, "slipway snapshot v1\n")
	for _, id := range snap {
		info, err := s.layers.Stat(ctx, id)
		switch {
		case err != nil:
			return "", fmt.Errorf("content of snapshot: %w", err)
		case info.Content != "":
			fmt.Fprintln(h, info.Content)
		case known:
			return "", fmt.Errorf("content of snapshot: layer %s has none", id)
		default:
			fmt.Fprintln(h, id)
		}
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// unknown returns the layers of which nobody knows what is in them.
func unknown(ctx context.Context, layers Layers, snap Snapshot) []layer.ID {
	var ids []layer.ID
	for _, id := range snap {
		if info, err := layers.Stat(ctx, id); err == nil && info.Content == "" {
			ids = append(ids, id)
		}
	}
	return ids
}
