// SPDX-License-Identifier: Apache-2.0

// Package record is the action cache: from a key to what the work it names has produced, and why.
package record

// Part is one named part of a key, readable; never a secret.
type Part struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}
