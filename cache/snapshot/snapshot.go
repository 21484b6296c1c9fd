// SPDX-License-Identifier: Apache-2.0

// Package snapshot mounts stacks of layers. A Snapshot is a value: the names of its layers.
package snapshot

import "github.com/seed-68981b69/slipway/cache/layer"

// Snapshot is a root file system as a value: its layers, lowest first. nil is an empty root ("scratch").
type Snapshot []layer.ID
