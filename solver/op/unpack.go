// SPDX-License-Identifier: Apache-2.0

package op

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/ulikunitz/xz"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// archives keeps the bytes of unpacked archives in unnamed files until the layers that need them are written.
type archives struct {
	dir   string
	files []*os.File
}

func (a *archives) create() (*os.File, error) {
	f, err := os.CreateTemp(a.dir, "archive-*")
	if err != nil {
		return nil, fmt.Errorf("keep unpacked files: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	a.files = append(a.files, f)
	return f, nil
}

func (a *archives) close() {
	for _, f := range a.files {
		f.Close()
	}
}

// maxWindow bounds the memory that a compressed archive may ask for: what zstd --ultra and xz -9 need.
const maxWindow = 128 << 20

// decompress returns the bytes behind r, which it recognises by their beginning; a stream it does not know is
// taken as it is.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(6)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	done := func() {}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		z, err := gzip.NewReader(b)
		return z, done, err
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(b), done, nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		z, err := xz.ReaderConfig{DictCap: maxWindow}.NewReader(b)
		return z, done, err
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return b, done, nil
}

// unpackArchive unpacks the match into the destination when it is a tar archive, however compressed; it says false
// when it is anything else.
func (c *copier) unpackArchive(ctx context.Context, m match) (bool, error) {
	p, err := resolve(c.from, m.name, true)
	if err != nil {
		return false, err
	}
	e, ok := c.from.Lookup(p)
	if !ok || e.Type != index.File {
		return false, nil
	}
	f, err := c.from.OpenFile(ctx, p)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, done, err := decompress(f)
	if err != nil {
		return false, nil // looks compressed and is not
	}
	defer done()
	tr := tar.NewReader(r)
	hdr, err := tr.Next()
	if err != nil {
		return false, nil
	}
	dest, err := resolve(c.to, c.dest, true)
	if err != nil {
		return true, err
	}
	dir := index.Entry{Type: index.Dir, Mode: 0o755, ModTime: e.ModTime, Offset: -1}
	if c.owner != nil {
		dir.UID, dir.GID = c.owner.uid, c.owner.gid
	}
	if c.stamp != nil {
		dir.ModTime = *c.stamp
	}
	if err := mkdirAll(c.to, dest, dir, c.owner != nil); err != nil {
		return true, err
	}
	spool, err := c.archives.create()
	if err != nil {
		return true, err
	}
	u := unpacker{copier: c, root: subtree{c.to, dest}, spool: spool, placed: map[string]func() (io.ReadCloser, error){}}
	for ; err == nil; hdr, err = tr.Next() {
		if err := context.Cause(ctx); err != nil {
			return true, err
		}
		if err := u.entry(ctx, hdr, tr); err != nil {
			return true, fmt.Errorf("entry %.256q: %w", hdr.Name, err)
		}
	}
	if err != io.EOF {
		return true, err
	}
	return true, nil
}

// subtree is a directory of a tree as a root of its own: nothing resolves to what is outside.
type subtree struct {
	tree *layer.Draft
	dir  string
}

func (s subtree) abs(p string) string {
	if p == "" || s.dir == "" {
		return s.dir + p
	}
	return s.dir + "/" + p
}

func (s subtree) Lookup(p string) (index.Entry, bool) { return s.tree.Lookup(s.abs(p)) }
func (s subtree) ReadDir(p string) []index.Entry      { return s.tree.ReadDir(s.abs(p)) }

type unpacker struct {
	*copier
	root  subtree
	spool *os.File
	end   int64 // of what is in spool
	// placed are the files that came from this archive, by path in the tree.
	placed map[string]func() (io.ReadCloser, error)
}

func (u *unpacker) place(e index.Entry, open func() (io.ReadCloser, error)) {
	if e.Type == index.File {
		u.placed[e.Path] = open
	} else {
		delete(u.placed, e.Path)
	}
	u.to.Put(e, open)
}

// entry puts one entry of the archive at its place below the root, as tar -x does: parents are followed when they
// are symlinks but never out of the root, what is there is replaced, and directories are merged.
func (u *unpacker) entry(ctx context.Context, hdr *tar.Header, r io.Reader) error {
	name := relative(path.Join("/", hdr.Name))
	if err := index.CheckLength(name); err != nil {
		return err
	}
	modTime := max(hdr.ModTime.UnixNano(), 0)
	dir, err := index.Resolve(u.root, index.Parent(name), true)
	if err != nil {
		return err
	}
	e := index.Entry{
		Mode:    uint32(hdr.Mode) & 0o7777,
		ModTime: modTime,
		Offset:  -1,
	}
	if u.owner != nil {
		e.UID, e.GID = u.owner.uid, u.owner.gid
	} else if hdr.Uid < 0 || hdr.Gid < 0 || hdr.Uid > 1<<32-2 || hdr.Gid > 1<<32-2 {
		return fmt.Errorf("invalid owner %d:%d", hdr.Uid, hdr.Gid)
	} else {
		e.UID, e.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	}
	for k, v := range hdr.PAXRecords {
		if k, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[k] = v
		}
	}
	if name == "" {
		return nil // the root of the archive: the destination stays what it is
	}
	target := index.Join(dir, index.Base(name))
	e.Path = u.root.abs(target)
	if err := index.CheckLength(e.Path); err != nil {
		return err
	}
	var open func() (io.ReadCloser, error)
	switch hdr.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeDir:
		e.Type = index.Dir
	case tar.TypeReg: // the reader turns the old TypeRegA into it
		e.Type = index.File
		if open, err = u.bytes(ctx, &e, r); err != nil {
			return err
		}
	case tar.TypeSymlink:
		e.Type = index.Symlink
		e.Mode = 0o777
		e.Target = hdr.Linkname
	case tar.TypeLink:
		return u.hardLink(ctx, e, hdr, dir)
	case tar.TypeChar, tar.TypeBlock:
		e.Type = index.CharDevice
		if hdr.Typeflag == tar.TypeBlock {
			e.Type = index.BlockDevice
		}
		e.Major, e.Minor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	case tar.TypeFifo:
		e.Type = index.Fifo
	default:
		return fmt.Errorf("type %q is not supported", hdr.Typeflag)
	}
	if err := u.parents(dir, modTime); err != nil {
		return err
	}
	u.place(e, open)
	return nil
}

// parents makes the directories that an archive implies without naming them. They belong to root.
func (u *unpacker) parents(dir string, modTime int64) error {
	return mkdirAll(u.to, u.root.abs(dir), index.Entry{Type: index.Dir, Mode: 0o755, ModTime: modTime, Offset: -1}, true)
}

// bytes keeps a file of the archive and sets its size and digest in e.
func (u *unpacker) bytes(ctx context.Context, e *index.Entry, r io.Reader) (func() (io.ReadCloser, error), error) {
	start := u.end
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(u.spool, h), readerFunc(func(p []byte) (int, error) {
		if err := context.Cause(ctx); err != nil {
			return 0, err
		}
		return r.Read(p)
	}))
	if err != nil {
		return nil, err
	}
	u.end += n
	e.Size = n
	e.Digest = digest.NewDigest(digest.SHA256, h)
	return func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(u.spool, start, n)), nil
	}, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// hardLink makes another name for what the archive, or what was there before, has at the link's target.
func (u *unpacker) hardLink(ctx context.Context, e index.Entry, hdr *tar.Header, dir string) error {
	first, err := index.Resolve(u.root, relative(path.Join("/", hdr.Linkname)), false)
	if err != nil {
		return err
	}
	from := u.root.abs(first)
	old, ok := u.to.Lookup(from)
	switch {
	case !ok:
		return fmt.Errorf("hard link to %.256q: %w", hdr.Linkname, fs.ErrNotExist)
	case old.Type == index.Dir:
		return fmt.Errorf("hard link to %.256q, which is a directory", hdr.Linkname)
	case from == e.Path:
		return nil
	}
	if err := u.parents(dir, e.ModTime); err != nil {
		return err
	}
	// The header of a link describes the file as well: it sets the owner, mode and time of both names.
	link := old
	link.Path = e.Path
	link.UID, link.GID, link.ModTime, link.Offset = e.UID, e.GID, e.ModTime, -1
	if old.Type == index.Symlink {
		u.place(link, nil)
		return nil
	}
	link.Mode = e.Mode
	if old.Type != index.File {
		u.place(link, nil)
		return nil
	}
	if old.HardLink != "" {
		from = old.HardLink
	}
	open, ours := u.placed[from]
	if !ours {
		// A layer's links stay within it: the file that was there before comes along.
		b, err := u.to.OpenFile(ctx, from)
		if err != nil {
			return err
		}
		open, err = u.bytes(ctx, &link, b)
		if err := errors.Join(err, b.Close()); err != nil {
			return err
		}
	}
	again := link
	again.Path = from
	again.HardLink = ""
	u.place(again, open)
	link.HardLink = from
	u.place(link, open)
	return nil
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
