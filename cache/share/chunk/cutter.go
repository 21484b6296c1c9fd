// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"io"
	"sync"
)

// cutter cuts what is written to it, and hands the chunks on: buffers from chunkBuffers, which whoever takes them gives back.
type cutter struct {
	emit func([]byte) error
	buf  []byte
	from int   // where in buf begins what has not been cut
	all  int64 // bytes taken so far
}

// cutBuffer is how much a cutter holds: several chunks, so that little is moved.
const cutBuffer = 8 * maxCut

var chunkBuffers = sync.Pool{New: func() any { b := make([]byte, 0, maxCut); return &b }}

// newChunk returns a buffer with a copy of b.
func newChunk(b []byte) []byte {
	return append((*chunkBuffers.Get().(*[]byte))[:0], b...)
}

func freeChunk(b []byte) {
	if cap(b) >= maxCut {
		chunkBuffers.Put(&b)
	}
}

func newCutter(emit func([]byte) error) *cutter {
	return &cutter{emit: emit, buf: make([]byte, 0, cutBuffer)}
}

// take cuts n bytes of r, or all when n is negative, and returns how many there were: fewer if r ends before.
func (c *cutter) take(r io.Reader, n int64) (int64, error) {
	var taken int64
	for n < 0 || taken < n {
		if len(c.buf) == cap(c.buf) {
			if err := c.cutFull(); err != nil {
				return taken, err
			}
		}
		space := c.buf[len(c.buf):cap(c.buf)]
		if n >= 0 && int64(len(space)) > n-taken {
			space = space[:n-taken]
		}
		k, err := r.Read(space)
		c.buf = c.buf[:len(c.buf)+k]
		taken += int64(k)
		c.all += int64(k)
		if err == io.EOF {
			break
		} else if err != nil {
			return taken, err
		}
	}
	return taken, nil
}

// cutFull hands on chunks as long as where they end is certain, and makes room.
func (c *cutter) cutFull() error {
	for len(c.buf)-c.from >= maxCut {
		if err := c.one(); err != nil {
			return err
		}
	}
	n := copy(c.buf, c.buf[c.from:])
	c.buf, c.from = c.buf[:n], 0
	return nil
}

// flush hands on what is left: what comes next begins a chunk.
func (c *cutter) flush() error {
	for c.from < len(c.buf) {
		if err := c.one(); err != nil {
			return err
		}
	}
	c.buf, c.from = c.buf[:0], 0
	return nil
}

func (c *cutter) one() error {
	n := cut(c.buf[c.from:])
	b := newChunk(c.buf[c.from : c.from+n])
	c.from += n
	return c.emit(b)
}
