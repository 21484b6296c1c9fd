// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Stored is a blob that a store of this machine verified when it took it in. What Push is given of this kind is sent without being
// looked at, over plain http by the kernel (sendfile): the registry compares it with its digest anyway (OCI distribution spec, "Pushing
// blobs"). Only when the registry says that it is not that digest's is the file read.
type Stored interface {
	io.ReadCloser
	// File is where the blob is, from the first byte to the last, and stands at the first.
	File() *os.File
	// Check reads all of the blob, wherever File stands and even when it is closed. A damaged one is an error, and the store has put it
	// aside then.
	Check(ctx context.Context) error
}

// body is the body of the request that sends a blob from the byte at on.
func body(rc io.ReadCloser, desc ocispec.Descriptor, at int64, progress func(int64)) (io.ReadCloser, error) {
	if s, ok := rc.(Stored); ok {
		f := s.File()
		if _, err := f.Seek(at, io.SeekStart); err != nil {
			return nil, err
		}
		return watch(f, desc.Size, progress), nil
	}
	// What is there already is read as well: the digest is that of all bytes.
	up := &upload{rc: rc, desc: desc, hash: desc.Digest.Algorithm().Hash(), progress: func(int64) {}}
	if _, err := io.CopyN(io.Discard, struct{ io.Reader }{up}, at); err != nil {
		return nil, err
	}
	up.progress = progress
	return up, nil
}

// watched is a file that is being sent. That it is an *os.File, with all that this can do, is what lets net/http leave the sending to the kernel;
// how far that has come is seen from the file's offset.
type watched struct {
	*os.File
	once    sync.Once
	err     error
	stop    chan struct{}
	stopped chan struct{}
}

const (
	// lookEvery is how often it is looked how far a file has been sent.
	lookEvery = 100 * time.Millisecond
	// watchedBytes is from what size on that is worth it.
	watchedBytes = 1 << 20
)

func watch(f *os.File, size int64, progress func(int64)) *watched {
	w := &watched{File: f, stop: make(chan struct{}), stopped: make(chan struct{})}
	if size < watchedBytes {
		close(w.stopped)
		return w
	}
	go func() {
		defer close(w.stopped)
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case <-w.stop:
				return
			case <-tick.C:
				if at, err := f.Seek(0, io.SeekCurrent); err == nil {
					progress(at)
				}
			}
		}
	}()
	return w
}

func (w *watched) Close() error {
	w.once.Do(func() {
		close(w.stop)
		<-w.stopped
		w.err = w.File.Close()
	})
	return w.err
}

// upload is the body of a blob's PUT when nobody vouches for the bytes. It does not deliver the end of bytes that are not those of desc, so that
// the registry never sees a complete upload of them.
type upload struct {
	rc       io.ReadCloser
	desc     ocispec.Descriptor
	hash     hash.Hash
	sent     int64
	progress func(int64)
}

func (b *upload) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	b.hash.Write(p[:n])
	b.sent += int64(n)
	if b.sent > b.desc.Size || err == io.EOF && b.sent < b.desc.Size {
		return 0, b.changed("it does not have %d bytes", b.desc.Size)
	}
	if b.sent == b.desc.Size && n > 0 {
		if got := digest.NewDigest(b.desc.Digest.Algorithm(), b.hash); got != b.desc.Digest {
			return 0, b.changed("its digest is %s", got)
		}
	}
	if n > 0 {
		b.progress(b.sent)
	}
	return n, err
}

func (b *upload) changed(format string, args ...any) error {
	return &Error{Err: ErrCorrupt, Message: fmt.Sprintf("blob %s in the local store is damaged: %s", b.desc.Digest, fmt.Sprintf(format, args...))}
}

func (b *upload) Close() error { return b.rc.Close() }

// garbled is an upload of which the registry says that the bytes are not those of the digest, and they were when they left.
type garbled struct {
	desc  ocispec.Descriptor
	cause error
}

func (g *garbled) Error() string { return fmt.Sprintf("blob %s: %v", g.desc.Digest, g.cause) }

func (g *garbled) Unwrap() error { return g.cause }

// blame finds out whose fault it is when the registry refuses the bytes of a blob: err is its answer, rc what has been sent.
func (u *uploader) blame(err error, rc io.ReadCloser, desc ocispec.Descriptor) error {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) || status.StatusCode < 400 || status.StatusCode >= 500 {
		return err
	}
	wrong := refusesBytes(status)
	// Not every registry says in its own words what it does not like.
	if s, ok := rc.(Stored); ok && (wrong || status.StatusCode == http.StatusBadRequest) {
		if bad := s.Check(u.ctx); bad != nil {
			return &Error{
				Err: ErrCorrupt, Host: reference.Domain(u.named), Cause: bad,
				Message: fmt.Sprintf("push %s: blob %s in the local store is damaged (%s): push again, which makes it anew where it can be; "+
					"if that does not help, \"slipway cache fsck --repair\" removes what is damaged, and the image has to be built or pulled again",
					u.named, desc.Digest, oneLine(bad.Error())),
			}
		}
	}
	if wrong {
		return &garbled{desc, err}
	}
	return err
}

// refusesBytes says whether an upload is refused because its bytes are not those of its digest.
func refusesBytes(status remoteerrors.ErrUnexpectedStatus) bool {
	var doc struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	_ = json.Unmarshal(status.Body, &doc)
	for _, e := range doc.Errors {
		if e.Code == "DIGEST_INVALID" || e.Code == "SIZE_INVALID" {
			return true
		}
	}
	return false
}
