// SPDX-License-Identifier: Apache-2.0

package chunk

import "math/bits"

// How a stream is cut: FastCDC (Xia et al., USENIX ATC 2016) with normalised chunking. A gear hash of the last 64 bytes is asked at each
// place; before the average length a harder question than after it, so that most chunks come close to the average. A chunk is never
// shorter than minChunk, unless what is cut ends, nor longer than maxCut. Where the cuts are depends on the content since the last one only; what was
// inserted or removed moves one or two of them. The sizes were chosen by measuring: docs/cache-format.md.
//
// A reader need not know any of this. A writer that cuts in other places finds nothing of what was there before.
const (
	minChunk = 16 << 10
	avgChunk = 64 << 10
	maxCut   = 256 << 10
	// normal is by how many bits the two questions differ from the one that would give the average length.
	normal = 2
	// smallFile is the length from which on a file is cut for itself.
	smallFile = minChunk
)

var (
	avgBits  = bits.Len(avgChunk) - 1
	maskHard = highBits(avgBits + normal)
	maskEasy = highBits(avgBits - normal)
)

// highBits are the n highest bits: those into which most of the last 64 bytes have gone.
func highBits(n int) uint64 { return ^uint64(0) << (64 - n) }

// gear gives each byte a random number: SplitMix64 from 0.
var gear = func() (g [256]uint64) {
	var state uint64
	for i := range g {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		g[i] = z ^ z>>31
	}
	return g
}()

// cut returns how many bytes of b, which is not empty, make the first chunk. All of b is one unless there are maxCut bytes or a
// cut in it; so b must have maxCut bytes or end where the stream does.
func cut(b []byte) int { return cutAt(b, minChunk, avgChunk, maxCut, maskHard, maskEasy) }

func cutAt(b []byte, least, avg, most int, hard, easy uint64) int {
	n := min(len(b), most)
	if n <= least {
		return n
	}
	var h uint64
	i := least
	for ; i < min(n, avg); i++ {
		h = h<<1 + gear[b[i]]
		if h&hard == 0 {
			return i + 1
		}
	}
	for ; i < n; i++ {
		h = h<<1 + gear[b[i]]
		if h&easy == 0 {
			return i + 1
		}
	}
	return n
}
