// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
)

// keepBuckets are the buckets of the record database whose values name blobs that stay as long as the value does, by what
// to call them. Who owns a bucket bounds it and deletes from it.
var keepBuckets = map[string]string{
	"history":        "build history",
	"history.inputs": "what steps saw of their inputs",
}

// takeKept notes the blobs that keepBuckets name. Like what images need they are no policy's to delete.
func (st *stocktaking) takeKept(context.Context) error {
	for bucket, description := range keepBuckets {
		u := unit{Usage: Usage{ID: bucket, Type: TypeInternal, InUse: true, Description: description}}
		err := st.s.Records.WalkValues(bucket, func(_ string, value []byte) error {
			u.blobs = append(u.blobs, st.find(findDigests(value)...)...)
			return nil
		})
		if err != nil {
			return err
		}
		if len(u.blobs) == 0 {
			continue
		}
		for _, p := range u.blobs {
			st.pieces[p].image = true
		}
		st.images = append(st.images, u)
	}
	return nil
}
