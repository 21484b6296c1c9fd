// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"
)

// row is one line of the table. Its goal comes from issue 3.
type row struct {
	key   string
	what  string
	goal  string
	floor string // the floor's work
	met   func(ours, floor time.Duration) bool
}

func times(factor float64) (string, func(ours, floor time.Duration) bool) {
	return fmt.Sprintf("%g × floor", factor), func(ours, floor time.Duration) bool { return float64(ours) <= factor*float64(floor) }
}

func within(limit time.Duration) (string, func(ours, floor time.Duration) bool) {
	return show(limit), func(ours, _ time.Duration) bool { return ours <= limit }
}

func newRow(key, what, floor string, goal string, met func(ours, floor time.Duration) bool) row {
	return row{key: key, what: what, goal: goal, floor: floor, met: met}
}

// rows in the order of the table.
var rows = makeRows()

func makeRows() []row {
	goal := func(key, what, floor string) func(string, func(ours, floor time.Duration) bool) row {
		return func(text string, met func(ours, floor time.Duration) bool) row {
			return newRow(key, what, floor, text, met)
		}
	}
	rs := []row{
		goal("copy", "COPY of 50,000 files / 500 MB, cold: empty store, walk, hash, solve, record",
			"read every file (known names, 2 goroutines), SHA-256 each once, write one file of that size, fsync")(times(2)),
		goal("copy-layer", "of which writing the layer: Draft.Commit of the same files, digests known",
			"the same")("", nil),
		goal("unpack", "gzip layer of 50,000 files / 500 MB: verified, indexed, mountable",
			"decompress; SHA-256 and write one file in a second goroutine; fsync")(times(1.3)),
		goal("unpack-read", "of which decompressing and SHA-256 alone",
			"the same")("", nil),
		goal("index-load", "index: load 200,000 entries", "read the file, SHA-256")(within(50 * time.Millisecond)),
		goal("index-lookup", "index: 1,000 lookups in a 30-layer stack of 200,000 entries, just loaded",
			"1,000 binary searches in one sorted list of the paths")(within(5 * time.Millisecond)),
		goal("index-merkle", "index: Merkle digest of the whole 30-layer stack of 200,000 entries, just loaded",
			"SHA-256 of the encoded indexes")(within(200 * time.Millisecond)),
		goal("index-merkle-one", "index: Merkle digest of the root of one layer of 200,000 entries, just loaded",
			"SHA-256 of the encoded index")(within(200 * time.Millisecond)),
		goal("mount", "mount a 30-layer snapshot with an upper, layers mounted",
			"the same overlay by bare system calls, upper and work made")(within(2 * time.Millisecond)),
		goal("unmount", "unmount seen by the caller", "umount2(MNT_DETACH)")("0 (< 0.1 ms)",
			func(ours, _ time.Duration) bool { return ours < 100*time.Microsecond }),
	}
	for _, n := range commitSizes {
		rs = append(rs, goal(fmt.Sprint("commit-", n), fmt.Sprintf("commit of an upper directory with %d files", n),
			"walk, read and SHA-256 of every file, rename of the directory")(within(time.Millisecond)),
			goal(fmt.Sprintf("commit-%d-indexed", n), "and until its index is there, for which a record waits, but no mount", "the same")("", nil))
	}
	return append(rs,
		goal("context", "unchanged context of 50,000 files, from walk to content digest (engine has seen it before)",
			"walk: openat, getdents, fstatat of every entry, 1 goroutine")(times(1.5)),
		goal("record-get", "record lookup (of 5,000)", "map lookup and JSON decoding of the same record")(within(50*time.Microsecond)),
		goal("record-batch", "batch of 100 records, synced", "write the same bytes to one file, fsync")(within(5*time.Millisecond)),
		goal("prune", "prune of 5,000 records and 1,000 layers (50 GB apparent)",
			"unlink as many files of the same sizes, and their directories")(within(time.Second)),
	)
}

var groups = []group{copyGroup, unpackGroup, indexGroup, mountGroup, commitGroup, contextGroup, recordGroup, pruneGroup}
