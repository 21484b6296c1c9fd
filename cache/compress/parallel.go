// SPDX-License-Identifier: Apache-2.0

package compress

import (
	"context"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
)

// pipeline compresses blocks of a stream in parallel and writes them in their order. The size of the blocks is the
// pool's, so that the bytes do not depend on how many workers there are.
type pipeline struct {
	pool    *sync.Pool
	window  int // how much of the block before each block knows, in bytes
	workers int // 0: one for each processor
	// read sees the bytes in their order; may be nil.
	read func([]byte)
	// newWorker returns a function that fills out from in[:n]; each is used by one goroutine.
	newWorker func() (func(*block) error, error)
}

// block is one piece of the input on its way.
type block struct {
	in   []byte
	n    int
	last bool
	dict []byte
	out  buffer
	done chan struct{} // closed when out is complete
}

func newBlockPool(sizeBytes int) *sync.Pool {
	// What cannot be compressed becomes a little longer. Room for it costs nothing until it is used; a buffer that grows does.
	return &sync.Pool{New: func() any {
		return &block{in: make([]byte, sizeBytes), out: buffer{make([]byte, 0, sizeBytes+sizeBytes/64)}}
	}}
}

// run reads r to its end. There is always a last block, if an empty one.
func (p *pipeline) run(ctx context.Context, w io.Writer, r io.Reader) error {
	workers := p.workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	group, ctx := errgroup.WithContext(ctx)
	// In the order of the input; its capacity bounds how many blocks are in memory.
	ordered := make(chan *block, workers)
	work := make(chan *block)
	group.Go(func() error {
		defer close(ordered)
		defer close(work)
		return p.split(ctx, r, ordered, work)
	})
	for range workers {
		group.Go(func() error {
			compress, err := p.newWorker()
			if err != nil {
				return err
			}
			for b := range work {
				b.out.b = b.out.b[:0]
				if err := compress(b); err != nil {
					return err
				}
				close(b.done)
			}
			return nil
		})
	}
	group.Go(func() error {
		for b := range ordered {
			select {
			case <-b.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if _, err := w.Write(b.out.b); err != nil {
				return err
			}
			p.pool.Put(b)
		}
		return nil
	})
	return group.Wait()
}

func (p *pipeline) split(ctx context.Context, r io.Reader, to ...chan *block) error {
	var dict []byte
	for {
		b := p.pool.Get().(*block)
		b.done = make(chan struct{})
		n, err := io.ReadFull(r, b.in)
		b.n, b.last = n, err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !b.last {
			return err
		}
		b.dict = append(b.dict[:0], dict...)
		dict = append(dict[:0], b.in[max(0, n-p.window):n]...)
		if p.read != nil {
			p.read(b.in[:n])
		}
		last := b.last // b belongs to others now
		for _, c := range to {
			select {
			case c <- b:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if last {
			return nil
		}
	}
}

type buffer struct{ b []byte }

func (b *buffer) Write(p []byte) (int, error) {
	b.b = append(b.b, p...)
	return len(p), nil
}
