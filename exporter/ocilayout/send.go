// SPDX-License-Identifier: Apache-2.0

package ocilayout

import (
	"context"
	"fmt"
	"io"
	"slices"

	containerd "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/exporter"
)

// send copies the blobs into the client's layout: first those that name no others, then the manifests, then the index. The
// client adds the image to its index.json when it has the response.
func (l *layout) send(ctx context.Context, opts exporter.Options) error {
	to, err := opts.Output.Blobs(ctx)
	if err != nil {
		return err
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	rank := 0
	for _, b := range l.blobs {
		if r := l.rank(b.desc); r != rank { // they are in this order
			if err := group.Wait(); err != nil {
				return err
			}
			rank = r
			group, gctx = errgroup.WithContext(ctx)
			group.SetLimit(parallel)
		}
		group.Go(func() error {
			if err := ingest(gctx, to, b, opts); err != nil {
				return fmt.Errorf("blob %s: %w", b.desc.Digest, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// rank is 0 for what names no other blob, 1 for manifests, 2 for the index.
func (l *layout) rank(desc ocispec.Descriptor) int {
	for _, m := range slices.Concat(l.Manifests, l.Attestations) {
		if m.Desc.Digest == desc.Digest {
			return 1
		}
	}
	if desc.Digest == l.Target.Digest {
		return 2
	}
	return 0
}

// ingest copies one blob, unless it is there.
func ingest(ctx context.Context, to containerd.Ingester, b content, opts exporter.Options) error {
	desc := b.desc
	desc.Annotations = nil
	w, err := containerd.OpenWriter(ctx, to, containerd.WithRef("slipway-"+desc.Digest.String()), containerd.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	// What is left of an earlier attempt is written again: nobody has verified it.
	if err := w.Truncate(0); err != nil {
		return err
	}
	r, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	report := opts.Bytes("sending "+desc.Digest.String(), desc.Size)
	buf := make([]byte, exporter.StreamBuffer)
	n, err := io.CopyBuffer(reporting{w, report, new(int64)}, struct{ io.Reader }{r}, buf)
	if err != nil {
		return err
	}
	if err := w.Commit(ctx, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	report(n, true)
	return nil
}

type reporting struct {
	w      io.Writer
	report func(int64, bool)
	n      *int64
}

func (r reporting) Write(p []byte) (int, error) {
	n, err := r.w.Write(p)
	*r.n += int64(n)
	r.report(*r.n, false)
	return n, err
}
