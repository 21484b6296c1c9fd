// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"sync"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// uploads are the blobs that are being sent now. Who wants to send one to the same host waits for it to be there, and has it mounted from that
// repository: an image and the cache of its build are often pushed at the same time.
type uploads struct {
	mu  sync.Mutex // guards now
	now map[uploading]*sending
}

// uploading names a blob on its way to a host.
type uploading struct {
	host   string // with scheme and path
	digest digest.Digest
}

// sending is one upload.
type sending struct {
	repository string
	ended      chan struct{}
	ok         bool // good once ended is closed
}

// enter waits until nobody else sends the blob to that host. If somebody has just done so, it returns the repository; otherwise the caller
// is the one who sends, and calls end.
func (us *uploads) enter(ctx context.Context, host string, blob digest.Digest, repository string) (from string, end func(ok bool), err error) {
	key := uploading{host, blob}
	for {
		us.mu.Lock()
		other := us.now[key]
		if other == nil {
			mine := &sending{repository: repository, ended: make(chan struct{})}
			us.now[key] = mine
			us.mu.Unlock()
			return "", func(ok bool) {
				us.mu.Lock()
				delete(us.now, key)
				us.mu.Unlock()
				mine.ok = ok
				close(mine.ended)
			}, nil
		}
		us.mu.Unlock()
		select {
		case <-other.ended:
			if other.ok {
				return other.repository, nil, nil
			}
		case <-ctx.Done():
			return "", nil, context.Cause(ctx)
		}
	}
}

// mountable returns desc with one more repository of the host that has it, the first to be asked.
func mountable(desc ocispec.Descriptor, named reference.Named, repository string) ocispec.Descriptor {
	name := SourceAnnotation + reference.Domain(named)
	annotations := map[string]string{name: repository}
	for k, v := range desc.Annotations {
		if k == name {
			v = repository + "," + v
		}
		annotations[k] = v
	}
	desc.Annotations = annotations
	return desc
}
