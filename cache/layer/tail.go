// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
)

// Follower gets a layer's tar while it is written. The reader ends with io.EOF when all of it is there, and with what has gone
// wrong otherwise; until then it waits for more. It never slows the writing down: what it has not read yet comes from the file, that is, as
// a rule, from the page cache.
type Follower func(ctx context.Context, tar io.Reader) error

// PackWith is Pack, with the tar given to follow while it is written. It returns when follow has. followed says that follow has been
// called: a layer that had a tar already is not read. After an error of follow alone the layer is packed nevertheless.
func (s *Store) PackWith(ctx context.Context, id ID, follow Follower) (_ Info, followed bool, err error) {
	f := &following{follow: follow}
	info, err := s.Pack(context.WithValue(ctx, followingKey{}, f), id)
	if f.tail == nil {
		return info, false, err
	}
	<-f.done
	if err == nil && f.err != nil {
		err = fmt.Errorf("read layer %s while it is packed: %w", id, f.err)
	}
	return info, true, err
}

type followingKey struct{}

// following is a Follower and what has become of it.
type following struct {
	follow Follower
	tail   *tail // set when it was started
	done   chan struct{}
	err    error // after done
}

// startFollowing begins to give the file at path, which is being written, to who wants to follow. nil when nobody does.
func startFollowing(ctx context.Context, path string) *tail {
	f, _ := ctx.Value(followingKey{}).(*following)
	if f == nil || f.tail != nil {
		return nil
	}
	file, err := os.Open(path)
	t := &tail{file: file, end: err}
	t.more.L = &t.mu
	f.tail, f.done = t, make(chan struct{})
	go func() {
		defer close(f.done)
		stop := context.AfterFunc(ctx, func() { t.finish(context.Cause(ctx)) })
		defer stop()
		f.err = f.follow(ctx, t)
		if file != nil {
			_ = file.Close()
		}
	}()
	return t
}

// tail reads a file that is being written.
type tail struct {
	file *os.File
	pos  int64 // of the reader

	mu      sync.Mutex
	more    sync.Cond // on mu
	written int64     // guarded by mu
	// end is why there will be no more: io.EOF, or an error. Guarded by mu.
	end error
}

// wrote says that the file has n bytes more. A nil tail has no reader.
func (t *tail) wrote(n int) {
	if t == nil {
		return
	}
	t.mu.Lock()
	t.written += int64(n)
	t.mu.Unlock()
	t.more.Signal()
}

// finish says that there will be no more: nil that all is there. Only the first call counts.
func (t *tail) finish(err error) {
	if t == nil {
		return
	}
	if err == nil {
		err = io.EOF
	}
	t.mu.Lock()
	if t.end == nil {
		t.end = err
	}
	t.mu.Unlock()
	t.more.Broadcast()
}

// Read implements io.Reader.
func (t *tail) Read(p []byte) (int, error) {
	t.mu.Lock()
	for t.end == nil && t.written == t.pos {
		t.more.Wait()
	}
	there, end := t.written-t.pos, t.end
	t.mu.Unlock()
	if end != nil && (end != io.EOF || there == 0) {
		return 0, end
	}
	n, err := t.file.ReadAt(p[:min(int64(len(p)), there)], t.pos)
	t.pos += int64(n)
	if err == io.EOF && n > 0 {
		err = nil
	} else if err == io.EOF {
		err = io.ErrUnexpectedEOF // it is shorter than what was written to it
	}
	return n, err
}
