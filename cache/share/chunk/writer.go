// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"context"
	"errors"
	"io"
	"time"
)

// Writer puts trees and tars to one place. Its methods may be called concurrently.
type Writer struct {
	blobs Blobs
}

// NewWriter returns a Writer to b. It knows of no chunks that are there: see Know.
func NewWriter(b Blobs) *Writer { return &Writer{blobs: b} }

// Know tells the Writer of what earlier exports have put to the place: chunks that they have are not sent again. Refs
// whose blobs are gone or cannot be read are of no use, which is no error; the error is that of a place that does not answer.
func (w *Writer) Know(ctx context.Context, refs ...Ref) error {
	return errors.New("chunked caches are not supported yet")
}

// TreeOptions say what of a directory is exported.
type TreeOptions struct {
	// MaxSize is how many bytes of files are exported at most; 0 is no limit. What was used least recently is left out: the later
	// of a file's access and modification times counts. Linux keeps access times to the day (relatime), if it does at all.
	MaxSize int64
	// Since, which may be nil, is asked when everything was read: a file changed at or after the time it returns is left out (ok is false if
	// nobody can have written since the beginning).
	Since func() (t time.Time, ok bool)
}

// AddTree exports the content of a directory. What changes while it is read is left out. dir itself must not be a symlink.
func (w *Writer) AddTree(ctx context.Context, dir string, opts TreeOptions) (Ref, Stats, error) {
	return Ref{}, Stats{}, errors.New("chunked caches are not supported yet")
}

// Range is where the bytes of one file are in a tar.
type Range struct{ Offset, Length int64 }

// AddTar exports a tar of size bytes. files are the places of its files' contents, in order, without overlap (the Offset and Size of the files of
// the layer's index): they are cut and found again apart from the headers around them, which change when nothing else does.
func (w *Writer) AddTar(ctx context.Context, r io.Reader, size int64, files []Range) (Ref, Stats, error) {
	return Ref{}, Stats{}, errors.New("chunked caches are not supported yet")
}
