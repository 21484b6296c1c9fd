// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"fmt"

	"github.com/seed-68981b69/slipway/cache/index"
)

// Whoever makes an image decides what its layers are like, and a few bytes of a compressed tar can describe a tree whose index would need more
// memory than there is. How long and deep paths are is bounded (index.MaxPath), and how much there is besides the contents of files.

// shown is as much of a path as an error shows.
func shown(path string) string {
	if len(path) <= index.MaxPath {
		return path
	}
	return path[:256] + "…"
}

const (
	// maxMetadata is how many bytes of names and attributes one layer may have.
	maxMetadata = 2 << 30
	// entryMemory is about what an entry takes besides.
	entryMemory = 256
)

// budget is how much memory the entries of one layer take, which is bounded. The zero value is ready.
type budget struct{ used int64 }

// take notes an entry with its name, what it links to and its attributes.
func (b *budget) take(name, target string, attributes map[string]string) error {
	b.used += entryMemory + int64(len(name)) + int64(len(target))
	for key, value := range attributes {
		b.used += int64(len(key)) + int64(len(value))
	}
	if b.used > maxMetadata {
		return fmt.Errorf("names and attributes of more than %d bytes", maxMetadata)
	}
	return nil
}
