// SPDX-License-Identifier: Apache-2.0

package index

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
)

// maxSteps is how many symlinks Resolve follows; the kernel's own limit is 40, docker's library's 255.
const maxSteps = 255

// Resolve returns the path in t that path, taken from the root, leads to, with symlinks resolved inside the
// root: an absolute target starts at the root and ".." never leaves it. The last component is only followed when
// followLast is set. Components that do not exist (or lie below a file) are kept as they are. The error, after
// 255 symlinks, wraps syscall.ELOOP; that of a path longer than MaxPath, or that becomes so, ENAMETOOLONG.
func Resolve(t Tree, path string, followLast bool) (string, error) {
	if err := CheckLength(strings.TrimPrefix(path, "/")); err != nil {
		return "", fmt.Errorf("resolve %w", err)
	}
	done, rest, steps := "", path, 0
	for rest != "" {
		name, after, more := strings.Cut(rest, "/")
		rest = after
		switch name {
		case "", ".":
			continue
		case "..":
			done = Parent(done)
			continue
		}
		next := Join(done, name)
		last := !more || strings.Trim(rest, "/") == ""
		e, ok := t.Lookup(next)
		if !ok || e.Type != Symlink || last && !followLast {
			if err := CheckLength(next); err != nil {
				return "", fmt.Errorf("resolve %w", err)
			}
			done = next
			continue
		}
		if steps++; steps > maxSteps {
			return "", fmt.Errorf("resolve %q: %w", path, syscall.ELOOP)
		}
		if strings.HasPrefix(e.Target, "/") {
			done = ""
		}
		if rest == "" {
			rest = e.Target
		} else {
			rest = e.Target + "/" + rest
		}
	}
	return done, nil
}

// Walk calls fn for the entry at root and everything below it, depth first in Compare order. fn may return
// fs.SkipDir for a directory to leave out what is in it (for another entry: the rest of its directory), and
// fs.SkipAll to end the walk. A root that does not exist is an error that wraps fs.ErrNotExist.
func Walk(t Tree, root string, fn func(Entry) error) error {
	e, ok := t.Lookup(root)
	if !ok {
		return fmt.Errorf("walk %q: %w", root, fs.ErrNotExist)
	}
	err := walk(t, e, fn)
	if errors.Is(err, fs.SkipDir) || errors.Is(err, fs.SkipAll) {
		return nil
	}
	return err
}

func walk(t Tree, e Entry, fn func(Entry) error) error {
	if err := fn(e); err != nil {
		if e.Type == Dir && errors.Is(err, fs.SkipDir) {
			return nil
		}
		return err
	}
	if e.Type != Dir {
		return nil
	}
	for _, child := range t.ReadDir(e.Path) {
		if err := walk(t, child, fn); err != nil {
			if errors.Is(err, fs.SkipDir) {
				return nil
			}
			return err
		}
	}
	return nil
}

// Digest returns the Merkle digest of the tree at path: names below path (not its own), types, modes, owners,
// sizes, symlink targets, devices, xattrs and bytes; not modification times, and not which names are hard links of
// each other. Symlinks are not followed. A missing path is an error that wraps fs.ErrNotExist; a file without a
// Digest is an error. Of a View it costs little more than a look at the directories that several layers have.
func Digest(t Tree, path string) (digest.Digest, error) {
	if v, ok := t.(interface {
		digestOf(path string) ([sha256.Size]byte, bool)
	}); ok {
		if sum, ok := v.digestOf(path); ok {
			return digest.NewDigestFromBytes(digest.SHA256, sum[:]), nil
		}
	}
	e, ok := t.Lookup(path)
	if !ok {
		return "", fmt.Errorf("digest %q: %w", path, fs.ErrNotExist)
	}
	sum, err := merkle(t, &e)
	if err != nil {
		return "", fmt.Errorf("digest %q: %w", path, err)
	}
	return digest.NewDigestFromBytes(digest.SHA256, sum[:]), nil
}

// merkle is the definition: the hash of a directory covers its own content and, for each name in it, the name and the
// content, or the hash of a directory. Index.merkle and View.merkle come to the same by shorter ways.
func merkle(t Tree, e *Entry) ([sha256.Size]byte, error) {
	if e.Type == File && e.Digest == "" {
		return [sha256.Size]byte{}, fmt.Errorf("file %q has not been hashed", e.Path)
	}
	var small [512]byte
	buf := appendContent(small[:0], e)
	if e.Type == Dir {
		for _, child := range t.ReadDir(e.Path) {
			buf = appendString(buf, Base(child.Path))
			if child.Type == Dir {
				sum, err := merkle(t, &child)
				if err != nil {
					return sum, err
				}
				buf = append(append(buf, byte(Dir)), sum[:]...)
				continue
			}
			if child.Type == File && child.Digest == "" {
				return [sha256.Size]byte{}, fmt.Errorf("file %q has not been hashed", child.Path)
			}
			buf = appendContent(buf, &child)
		}
	}
	return sha256.Sum256(buf), nil
}

// merkle returns the hash of the directory at position i as the layer alone shows it, without whiteouts. It must not
// be asked of an index with unhashed files.
func (x *Index) merkle(i int) *[sha256.Size]byte {
	x.merkleOnce.Do(func() {
		x.merkles = make([][sha256.Size]byte, x.dirs)
		var buf []byte
		// Backwards, so that what is in a directory comes before it.
		for i, n := range slices.Backward(x.nodes) {
			if n.dir < 0 {
				continue
			}
			buf = append(buf[:0], x.record(i).content()...)
			for j := i + 1; j < int(n.end); j = int(x.nodes[j].end) {
				r := x.record(j)
				name := Base(r.path())
				if d := x.nodes[j].dir; d >= 0 {
					buf = appendString(buf, name)
					buf = append(append(buf, byte(Dir)), x.merkles[d][:]...)
				} else if r.typ() != Whiteout {
					buf = appendString(buf, name)
					buf = append(buf, r.content()...)
				}
			}
			x.merkles[n.dir] = sha256.Sum256(buf)
		}
	})
	return &x.merkles[x.nodes[i].dir]
}
