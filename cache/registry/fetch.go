// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// download reads one blob, verifies it, and goes on after a broken connection where it stopped.
type download struct {
	ctx   context.Context
	r     *Registry
	named reference.Named
	desc  ocispec.Descriptor
	rc    io.ReadCloser
	hash  hash.Hash // nil if what is read is not all of it
	read  int64
	idle  int // failures in a row without a byte in between
	err   error

	start  int64         // where reading began
	waited time.Duration // for bytes, in Read
	judged bool          // it has been decided whether to go on by ranges
	ranged bool          // it goes on so, and holds one of the slots for that
}

// openBy opens the blob at the position of d.
func (d *download) openBy(resolver remotes.Resolver) (io.ReadCloser, error) {
	fetcher, err := resolver.Fetcher(d.ctx, d.named.String())
	if err != nil {
		return nil, d.r.explain(d.ctx, "pull", d.named, err)
	}
	rc, err := fetcher.Fetch(d.ctx, d.desc)
	if err != nil {
		return nil, d.r.explain(d.ctx, "pull", d.named, err)
	}
	if d.read == 0 {
		return rc, nil
	}
	seeker, ok := rc.(io.Seeker)
	if !ok {
		rc.Close()
		return nil, fmt.Errorf("fetch %s from %s: it can only be read from its beginning", d.desc.Digest, d.named)
	}
	if _, err := seeker.Seek(d.read, io.SeekStart); err != nil {
		rc.Close()
		return nil, d.r.explain(d.ctx, "pull", d.named, err)
	}
	return rc, nil
}

// judge decides, after the first part, whether the rest comes by several ranges at once.
func (d *download) judge() {
	part := d.r.opts.RangeSize
	if d.judged || d.read-d.start < part {
		return
	}
	d.judged = true
	if d.r.ranges == nil || d.desc.Size-d.read < (largeBlob-1)*part || float64(d.read-d.start) > slowRate*d.waited.Seconds() {
		return
	}
	select {
	case ranged <- struct{}{}:
	default:
		return
	}
	rc, err := d.openBy(d.r.ranges)
	if err != nil {
		<-ranged
		return // the connection that there is is good enough
	}
	_ = d.rc.Close()
	d.rc, d.ranged = rc, true
}

func (d *download) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.next(p)
	if err != nil {
		d.err = err
	}
	return n, err
}

func (d *download) next(p []byte) (int, error) {
	for {
		d.judge()
		began := time.Now()
		n, err := d.rc.Read(p)
		d.waited += time.Since(began)
		if n > 0 {
			d.idle = 0
			if d.hash != nil {
				d.hash.Write(p[:n])
			}
			d.read += int64(n)
			if d.read > d.desc.Size {
				return 0, d.corrupt("more than the %d bytes of its descriptor came", d.desc.Size)
			}
			if err == nil || d.read < d.desc.Size {
				return n, nil // an error, if there was one, comes again
			}
		}
		switch {
		case err == nil:
			return n, nil
		case d.read == d.desc.Size && (err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF)):
			if d.hash == nil {
				return n, io.EOF
			}
			if got := digest.NewDigest(d.desc.Digest.Algorithm(), d.hash); got != d.desc.Digest {
				return 0, d.corrupt("the bytes that came have digest %s", got)
			}
			return n, io.EOF
		case d.ctx.Err() != nil:
			return 0, context.Cause(d.ctx)
		}
		if err := d.resume(err); err != nil {
			return 0, err
		}
	}
}

// resume asks for the rest after cause broke the transfer; a body that ends early is broken too.
func (d *download) resume(cause error) error {
	d.idle++
	seeker, ok := d.rc.(io.Seeker)
	var tried *passing // the request itself has been made again as often as it may
	if !ok || d.idle >= d.r.opts.Tries || !broken(cause) || errors.As(cause, &tried) {
		if cause == io.EOF {
			cause = fmt.Errorf("the transfer ended after %d of %d bytes", d.read, d.desc.Size)
		}
		return d.r.explain(d.ctx, "pull", d.named, fmt.Errorf("%s: %w", d.desc.Digest, cause))
	}
	if err := d.r.opts.Wait(d.ctx, pause(d.idle, 0)); err != nil {
		return err
	}
	// Moving the position drops the connection, so that the next Read asks again, from where we are.
	if _, err := seeker.Seek(d.desc.Size, io.SeekStart); err != nil {
		return err
	}
	_, err := seeker.Seek(d.read, io.SeekStart)
	return err
}

func (d *download) corrupt(format string, args ...any) error {
	return &Error{
		Err: ErrCorrupt, Host: reference.Domain(d.named),
		Message: fmt.Sprintf("%s sent wrong bytes for %s of %s (%s): try again, and if it stays, push the image again",
			reference.Domain(d.named), d.desc.Digest, d.named, fmt.Sprintf(format, args...)),
	}
}

func (d *download) Close() error {
	if d.err == nil {
		d.err = errors.New("read of a closed download")
	}
	err := d.rc.Close()
	if d.ranged {
		d.ranged = false
		<-ranged
	}
	return err
}
