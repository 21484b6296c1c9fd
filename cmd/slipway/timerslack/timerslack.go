// SPDX-License-Identifier: Apache-2.0

// Package timerslack lets the monitor of Go's runtime sleep longer. It is a thread that looks every 20 µs whether another is stuck in
// a system call, as long as anything runs; with the 50 µs by which the kernel may be late it used a tenth of a client's processor time
// and a quarter of an engine's that starts containers. It is a package of its own, and imports next to nothing, because Go initialises
// it before most others.
package timerslack

import "os"

// nanoseconds is how late the kernel may wake a thread that sleeps: what a timer here is for can wait so long.
const nanoseconds = "500000"

// The monitor runs already, and later threads inherit from the one that starts them, so all that there are get it. An ordinary user
// without a user namespace may not change other threads: nothing is lost then but the gain.
func init() {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range threads {
		if os.WriteFile("/proc/"+t.Name()+"/timerslack_ns", []byte(nanoseconds), 0) != nil {
			return
		}
	}
}
