// SPDX-License-Identifier: Apache-2.0

// Package clientgc makes the garbage collector wait in clients. A client lives for milliseconds; by Go's default of 100 percent its
// first collection comes while the packages of its dependencies are being initialised, and takes a tenth of its processor time. It
// is a package of its own, and imports next to nothing, because Go initialises it before most of those.
package clientgc

import (
	"os"
	"runtime/debug"
)

// percent is by how much the heap of a client may grow before it is collected; a heap below 16 MB is not.
const percent = 400

func init() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// End is for processes that become an engine or do its work themselves: Go's default again, unless $GOGC has a say.
func End() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(100)
	}
}
