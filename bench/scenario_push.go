// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// lateStep is how long the last step of the pipelined push takes.
const lateStep = 10 * time.Second

var push1GB = &scenario{
	name:       "push-1GB",
	about:      "A push of an image of mixed content (-mixed-mb: 1 GB), built and compressed (gzip) before, to an empty registry on loopback.",
	floorAbout: "the compressed layer's bytes sent to such a registry in one plain HTTP upload",
	group:      mixedGroup,
	goals:      []goal{withinFloor(1.3), peakMemory},
	prepare:    prepareCompressed,
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) { return pushing(ctx, b, p, "", "") },
	floor:      func(ctx context.Context, b *bench) error { return b.upload(ctx) },
}

var pushPipelined = &scenario{
	name:     "push-pipelined",
	about:    "A build with push to an empty registry: its layer of mixed content (-mixed-mb: 1 GB) is there, not compressed yet, and its last step sleeps for ten seconds.",
	ideal:    lateStep.Seconds(),
	patience: 30 * time.Second,
	goals:    []goal{aboveIdeal(1), peakMemory},
	prepare:  prepareExport,
	round:    func(b *bench, n int) error { return b.changeMixed("push", n) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		return pushing(ctx, b, p, "data", "late")
	},
}

// pushing makes a peer ready that pushes target, to a registry of its own for each run. With prefix that target has been built before, for
// the cache only; without it the image has been pushed before, elsewhere.
func pushing(ctx context.Context, b *bench, p peer, prefix, target string) (*contestant, error) {
	bp, ok := p.(archiver)
	if !ok {
		return nil, nil
	}
	o, done, _, err := b.opened(ctx, bp, 0)
	if err != nil {
		return nil, err
	}
	var to *plainRegistry
	var dir string
	start := func() (err error) {
		b.states++
		dir = filepath.Join(b.dir, fmt.Sprint("registry-", b.states))
		to, err = startRegistry(dir)
		return err
	}
	end := func() error {
		if to == nil {
			return nil
		}
		err := to.close()
		to = nil
		return errors.Join(err, b.moveAway(dir))
	}
	push := func() build {
		return build{dir: b.mixed, target: target, output: "type=image,name=" + to.host + "/bench,push=true,registry.insecure=true"}
	}
	c := &contestant{
		name: p.name(),
		before: func(ctx context.Context) error {
			if err := runQuietly(ctx, o.build(build{dir: b.mixed, target: prefix})); err != nil {
				return err
			}
			return start()
		},
		run:     func(_ context.Context, c *calls) error { return c.do(o.build(push())) },
		after:   func(context.Context) error { return end() },
		daemons: o.daemons,
		close:   func() error { return errors.Join(end(), done()) },
	}
	if prefix == "" {
		err = start()
		if err == nil {
			err = errors.Join(runQuietly(ctx, o.build(push())), end())
		}
		if _, ours := p.(*slipway); ours && err == nil { // for the floor
			err = runQuietly(ctx, o.build(build{dir: b.mixed, output: "type=oci,dest=" + b.archive("slipway", "gzip")}))
		}
	}
	if err != nil {
		return nil, errors.Join(err, done())
	}
	return c, nil
}

// upload sends the largest blob of slipway's archive to a registry.
func (b *bench) upload(ctx context.Context) (err error) {
	b.states++
	dir := filepath.Join(b.dir, fmt.Sprint("registry-", b.states))
	to, err := startRegistry(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.close(), b.moveAway(dir)) }()
	blob, d, size, err := largestBlob(b.archive("slipway", "gzip"))
	if err != nil {
		return err
	}
	defer blob.Close()
	base, err := url.Parse("http://" + to.host + "/v2/bench/blobs/uploads/")
	if err != nil {
		return err
	}
	resp, err := http.Post(base.String(), "", nil)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	where, err := base.Parse(resp.Header.Get("Location"))
	if err != nil {
		return err
	}
	q := where.Query()
	q.Set("digest", d.String())
	where.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, where.String(), io.NopCloser(io.LimitReader(blob, size)))
	if err != nil {
		return err
	}
	req.ContentLength = size
	if resp, err = http.DefaultClient.Do(req); err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("upload: %s", resp.Status)
	}
	return nil
}

// largestBlob opens an archive at its largest blob.
func largestBlob(archive string) (f *os.File, d digest.Digest, size int64, err error) {
	if f, err = os.Open(archive); err != nil {
		return nil, "", 0, err
	}
	var at int64
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, "", 0, errors.Join(err, f.Close())
		}
		if encoded, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok && h.Size > size {
			if at, err = f.Seek(0, io.SeekCurrent); err != nil {
				return nil, "", 0, errors.Join(err, f.Close())
			}
			d, size = digest.NewDigestFromEncoded(digest.SHA256, encoded), h.Size
		}
	}
	_, err = f.Seek(at, io.SeekStart)
	return f, d, size, err
}
