// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"testing"
	"time"
)

// TestTryLockNeverWaits: not even for somebody who takes the lock in the same moment.
func TestTryLockNeverWaits(t *testing.T) {
	var locks idLocks
	for range 20_000 {
		begin, end, released := make(chan struct{}), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(released)
			<-begin
			unlock := locks.lock("t1")
			<-end
			unlock()
		}()
		tried := make(chan struct{})
		go func() {
			defer close(tried)
			<-begin
			if unlock, ok := locks.tryLock("t1"); ok {
				unlock()
			}
		}()
		close(begin)
		select {
		case <-tried:
		case <-time.After(5 * time.Second):
			close(end)
			t.Fatal("tryLock waits")
		}
		close(end)
		<-released
	}
	if len(locks.byID) > 0 {
		t.Errorf("left: %v", locks.byID)
	}
}
