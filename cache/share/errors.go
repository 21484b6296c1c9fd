// SPDX-License-Identifier: Apache-2.0

package share

import "errors"

// What is wrong with what should be a cache.
var (
	// ErrNoCache: there is something else under that name.
	ErrNoCache = errors.New("not a cache")
	// ErrBuildKit: BuildKit has made it. Its keys name nothing here.
	ErrBuildKit = errors.New("a cache made by BuildKit, whose keys mean nothing to slipway")
	// ErrCorrupt: the bytes are not those of their digest.
	ErrCorrupt = errors.New("wrong bytes")
)
