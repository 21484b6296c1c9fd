// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"log/slog"
)

// syncer makes the store durable in the background, off the path of builds. Requests that come while it is at work are
// one more turn.
type syncer struct {
	wanted chan struct{}
	cancel context.CancelFunc
	ended  chan struct{}
}

func newSyncer(sync func(context.Context) error, log *slog.Logger) *syncer {
	ctx, cancel := context.WithCancel(context.Background())
	s := &syncer{wanted: make(chan struct{}, 1), cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		for {
			select {
			case <-s.wanted:
			case <-ctx.Done():
				// What was asked for last is still done: it is what makes the next boot fast.
				select {
				case <-s.wanted:
					if err := sync(context.WithoutCancel(ctx)); err != nil {
						log.Warn("make the store durable", "error", err)
					}
				default:
				}
				return
			}
			if err := sync(ctx); err != nil && ctx.Err() == nil {
				log.Warn("make the store durable", "error", err)
			}
		}
	}()
	return s
}

// request asks for a sync soon.
func (s *syncer) request() {
	select {
	case s.wanted <- struct{}{}:
	default:
	}
}

// close waits for the last sync.
func (s *syncer) close() {
	s.cancel()
	<-s.ended
}
