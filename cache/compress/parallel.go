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
	pools   *pools
	window  int // how much of the block before each block knows, in bytes
	workers int // 0: one for each processor
	// read sees the bytes in their order; may be nil.
	read func([]byte)
	// newWorker returns a function that compresses a block, and one that is called after the last; each is used by one goroutine.
	newWorker func() (compress func(out *buffer, in *input, last bool) error, end func(), err error)
}

// block is one piece of the input on its way.
type block struct {
	in   *input // given back as soon as out is complete
	last bool
	out  *buffer // taken when in is about to be compressed
	done chan struct{}
}

// input is the bytes of a block, and the end of the one before.
type input struct {
	b    []byte // all of its size until it is read
	n    int
	dict []byte
}

// pools are the memory of blocks of one size. Input and output come and go on their own: there are fewer of each than blocks.
type pools struct{ in, out sync.Pool }

func newPools(sizeBytes int) *pools {
	return &pools{
		in: sync.Pool{New: func() any { return &input{b: make([]byte, sizeBytes)} }},
		// What cannot be compressed becomes a little longer. Room for it costs nothing until it is used; a buffer that grows does.
		out: sync.Pool{New: func() any { return &buffer{make([]byte, 0, sizeBytes+sizeBytes/64)} }},
	}
}

// spare is what one run has got from a pool and does not use right now. The pool alone would give one processor something new
// while there is some for another.
type spare[T any] struct {
	pool *sync.Pool
	mu   sync.Mutex // guards list
	list []T
}

func (s *spare[T]) get() T {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last := len(s.list) - 1; last >= 0 {
		t := s.list[last]
		s.list = s.list[:last]
		return t
	}
	return s.pool.Get().(T)
}

func (s *spare[T]) put(t T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, t)
}

// end gives everything back.
func (s *spare[T]) end() {
	for _, t := range s.list {
		s.pool.Put(t)
	}
}

// run reads r to its end. There is always a last block, if an empty one.
func (p *pipeline) run(ctx context.Context, w io.Writer, r io.Reader) error {
	workers := p.workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	ins, outs := spare[*input]{pool: &p.pools.in}, spare[*buffer]{pool: &p.pools.out}
	defer ins.end()
	defer outs.end()
	group, ctx := errgroup.WithContext(ctx)
	// In the order of the input; its capacity bounds how many blocks are in memory.
	ordered := make(chan *block, workers)
	work := make(chan *block)
	group.Go(func() error {
		defer close(ordered)
		defer close(work)
		return p.split(ctx, r, &ins, ordered, work)
	})
	for range workers {
		group.Go(func() error {
			compress, end, err := p.newWorker()
			if err != nil {
				return err
			}
			for b := range work {
				b.out = outs.get()
				b.out.b = b.out.b[:0]
				if err := compress(b.out, b.in, b.last); err != nil {
					return err
				}
				ins.put(b.in)
				b.in = nil
				close(b.done)
			}
			end()
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
			outs.put(b.out)
		}
		return nil
	})
	return group.Wait()
}

func (p *pipeline) split(ctx context.Context, r io.Reader, ins *spare[*input], to ...chan *block) error {
	var dict []byte
	for {
		in := ins.get()
		n, err := io.ReadFull(r, in.b)
		last := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !last {
			return err
		}
		in.n = n
		in.dict = append(in.dict[:0], dict...)
		dict = append(dict[:0], in.b[max(0, n-p.window):n]...)
		if p.read != nil {
			p.read(in.b[:n])
		}
		b := &block{in: in, last: last, done: make(chan struct{})}
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
