// SPDX-License-Identifier: Apache-2.0

// Package tar exports results as files in one tar, which is streamed to the client. Its bytes depend on the files only:
// paths in order, times in whole seconds, the smallest header that holds everything.
package tar

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/image"
	"github.com/seed-68981b69/slipway/exporter/local"
)

// New returns the factory for the type "tar".
func New(view local.View) exporter.Factory {
	return func(given map[string]string) (exporter.Exporter, error) {
		e := &tarExporter{view: view}
		for _, key := range slices.Sorted(maps.Keys(given)) {
			ok, err := e.opts.Set(key, given[key])
			if err != nil {
				return nil, fmt.Errorf("attribute %s=%s: %w", key, given[key], err)
			}
			if !ok {
				return nil, image.NotSupported(key, given[key])
			}
		}
		return e, nil
	}
}

type tarExporter struct {
	view local.View
	opts local.Options
}

func (e *tarExporter) Name() string { return "exporting to client tarball" }

// Export implements exporter.Exporter.
func (e *tarExporter) Export(ctx context.Context, r exporter.Result, opts exporter.Options) (map[string]string, error) {
	if opts.Output == nil {
		return nil, errors.New("export tar: the client has no file for it")
	}
	tree, err := local.NewTree(ctx, r, e.view, e.opts)
	if err != nil {
		return nil, fmt.Errorf("export tar: %w", err)
	}
	err = exporter.Stream(ctx, opts, nil, func(w io.Writer) error { return write(ctx, w, tree) })
	if err != nil {
		return nil, fmt.Errorf("export tar: %w", err)
	}
	return nil, nil
}

func write(ctx context.Context, w io.Writer, files fsutil.FS) error {
	buffered := bufio.NewWriterSize(w, exporter.StreamBuffer)
	tw := tar.NewWriter(buffered)
	buf := make([]byte, 256<<10)
	err := files.Walk(ctx, "", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*types.Stat)
		if !ok {
			return fmt.Errorf("%s: no stat", path)
		}
		h, err := header(st)
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		if h.Size == 0 {
			return nil
		}
		f, err := files.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		// Not by way of ReadFrom, which the tar writer has, and which has no buffer to offer.
		if _, err := io.CopyBuffer(struct{ io.Writer }{tw}, struct{ io.Reader }{f}, buf); err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

// header returns the tar header of a file.
func header(st *types.Stat) (*tar.Header, error) {
	mode := os.FileMode(st.Mode)
	h := &tar.Header{
		Name:    st.Path,
		Mode:    int64(mode.Perm()),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: time.Unix(floorSeconds(st.ModTime), 0),
	}
	for _, bit := range []struct {
		mode os.FileMode
		unix int64
	}{{os.ModeSetuid, 0o4000}, {os.ModeSetgid, 0o2000}, {os.ModeSticky, 0o1000}} {
		if mode&bit.mode != 0 {
			h.Mode |= bit.unix
		}
	}
	switch typ := mode.Type(); {
	case typ == os.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case typ == os.ModeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, st.Linkname
	case st.Linkname != "":
		h.Typeflag, h.Linkname = tar.TypeLink, st.Linkname
		return h, nil // its xattrs are those of the file
	case typ == 0:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case typ == os.ModeDevice|os.ModeCharDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, st.Devmajor, st.Devminor
	case typ == os.ModeDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, st.Devmajor, st.Devminor
	case typ == os.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	default:
		return nil, fmt.Errorf("%q: a tar cannot hold a file of type %s", st.Path, typ)
	}
	for name, value := range st.Xattrs {
		if strings.Contains(name, "=") {
			return nil, fmt.Errorf("%q: a tar cannot hold an xattr named %q", st.Path, name)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = string(value)
	}
	return h, nil
}

// floorSeconds are the whole seconds of a time in nanoseconds, which may be before 1970.
func floorSeconds(ns int64) int64 {
	s := ns / 1e9
	if ns%1e9 < 0 {
		s--
	}
	return s
}
