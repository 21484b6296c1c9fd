// SPDX-License-Identifier: Apache-2.0

package share

import "encoding/json"

// EncodeAsIs is Encode for documents that are not right.
func EncodeAsIs(d *Document) ([]byte, error) {
	raw, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return pack(raw)
}

// Pack compresses.
func Pack(b []byte) ([]byte, error) { return pack(b) }
