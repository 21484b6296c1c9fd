// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"context"
	"fmt"
	"io"
	"sync"
)

// OpenTar reads a tar, which must have size bytes. Its chunks are verified; the caller verifies the whole.
// Errors about what came from the place wrap ErrCorrupt.
func OpenTar(ctx context.Context, b Blobs, ref Ref, size int64) (io.ReadCloser, error) {
	m, err := load(ctx, b, ref)
	if err != nil {
		return nil, fmt.Errorf("read chunks of a tar: %w", err)
	}
	if m.Kind != kindTar || m.length() != size {
		return nil, fmt.Errorf("read chunks of a tar: %w: manifest %s is not one of a tar of %d bytes", ErrCorrupt, ref.Manifest.Digest, size)
	}
	r, err := newReader(b, m)
	if err != nil {
		return nil, fmt.Errorf("read chunks of a tar: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	t := &tarReader{cancel: cancel, windows: make(chan *tarWindow, windowsAhead-2)}
	t.work.Go(func() {
		defer close(t.windows)
		t.readAhead(ctx, r)
	})
	return t, nil
}

// tarReader gives the windows of a tar in order. At most windowsAhead are in memory.
type tarReader struct {
	cancel  context.CancelCauseFunc
	work    sync.WaitGroup
	windows chan *tarWindow
	rest    []byte // of the window at hand
	err     error
	// canceled is why windows was closed before the end; set before that.
	canceled error
}

// tarWindow is a stretch of a tar: spans of the stream, one after the other, and when done is closed their bytes.
type tarWindow struct {
	spans []span
	done  chan struct{}
	b     []byte
	err   error
}

// readAhead reads the windows of the tar, several at once.
func (t *tarReader) readAhead(ctx context.Context, r *reader) {
	starts := r.m.locate()
	var loads sync.WaitGroup
	defer r.close()
	defer loads.Wait()
	tarWindows(r.m, starts, func(spans []span) bool {
		w := &tarWindow{spans: spans, done: make(chan struct{})}
		select {
		case t.windows <- w:
		case <-ctx.Done():
			return false
		}
		loads.Go(func() {
			defer close(w.done)
			w.b, w.err = r.window(ctx, starts, spans)
		})
		return true
	})
	if ctx.Err() != nil {
		t.canceled = context.Cause(ctx)
	}
}

// tarWindows cuts a tar into windows of windowBytes, whose chunks are no more than about twice that: a poisoned manifest may want another chunk for each byte.
func tarWindows(m *manifest, starts []int64, fn func([]span) bool) {
	var spans []span
	var bytes, chunks int64
	last := [3]int{-1, -1, -1}
	stop := false
	add := func(class int, at, length int64) {
		for length > 0 && !stop {
			n := min(length, windowBytes-bytes)
			s := span{at, n}
			from, to := within(starts, s)
			for i := from; i < to; i++ {
				if i != last[class] {
					chunks += starts[i+1] - starts[i]
					last[class] = i
				}
			}
			spans = append(spans, s)
			bytes, at, length = bytes+n, at+n, length-n
			if bytes >= windowBytes || chunks >= 2*windowBytes || len(spans) >= 1<<16 {
				stop = !fn(spans)
				spans, bytes, chunks = nil, 0, 0
				last = [3]int{-1, -1, -1}
			}
		}
	}
	var other, small, large int64
	for _, p := range m.Tar {
		other += p.Other
	}
	small = other
	large = small + m.SmallBytes
	other = 0
	for _, p := range m.Tar {
		add(0, other, p.Other)
		other += p.Other
		if p.File < m.Small {
			add(1, small, p.File)
			small += p.File
		} else {
			add(2, large, p.File)
			large += p.File
		}
		if stop {
			return
		}
	}
	if len(spans) > 0 {
		fn(spans)
	}
}

// window reads the bytes of spans, one after the other. Chunks that lie over the border of two windows are read for both.
func (r *reader) window(ctx context.Context, starts []int64, spans []span) ([]byte, error) {
	var want []int
	length := int64(0)
	for _, s := range spans {
		length += s.length
		from, to := within(starts, s)
		for _, c := range r.m.Stream[from:to] {
			if n := len(want); n == 0 || want[n-1] != c {
				want = append(want, c)
			}
		}
	}
	have, err := r.load(ctx, want)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, length)
	for _, s := range spans {
		from, to := within(starts, s)
		for i := from; i < to; i++ {
			b := have[r.m.Stream[i]]
			lo := max(0, s.at-starts[i])
			hi := min(int64(len(b)), s.at+s.length-starts[i])
			out = append(out, b[lo:hi]...)
		}
	}
	return out, nil
}

func (t *tarReader) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		if t.err != nil {
			return 0, t.err
		}
		w, ok := <-t.windows
		if !ok {
			if t.err = io.EOF; t.canceled != nil {
				t.err = fmt.Errorf("read chunks of a tar: %w", t.canceled)
			}
			continue
		}
		<-w.done
		t.rest, t.err = w.b, w.err
		if t.err != nil {
			t.err = fmt.Errorf("read chunks of a tar: %w", t.err)
		}
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

// Close ends the reading. It may be called before the end.
func (t *tarReader) Close() error {
	t.cancel(context.Canceled)
	for range t.windows { // nobody waits for a place any more
	}
	t.work.Wait()
	return nil
}
