// SPDX-License-Identifier: Apache-2.0

// Package layer keeps immutable file trees, each a difference to what lies below it, as a tar with a mountable
// index or as a directory.
package layer

// ID names a layer in this store. It is opaque and safe as a file name.
type ID string
