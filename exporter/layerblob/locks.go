// SPDX-License-Identifier: Apache-2.0

package layerblob

import (
	"context"
	"sync"
)

// Locks is a lock for each key: one at a time does what several want. The zero value is ready.
type Locks struct {
	mu   sync.Mutex // guards held
	held map[string]chan struct{}
}

// Acquire waits for the lock of key, or for the end of ctx.
func (l *Locks) Acquire(ctx context.Context, key string) (release func(), err error) {
	for {
		l.mu.Lock()
		if l.held == nil {
			l.held = map[string]chan struct{}{}
		}
		busy, ok := l.held[key]
		if !ok {
			done := make(chan struct{})
			l.held[key] = done
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, key)
				l.mu.Unlock()
				close(done)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
