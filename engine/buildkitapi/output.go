// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"errors"
	"fmt"
	"io"

	containerd "github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc/codes"

	"github.com/seed-68981b69/slipway/exporter"
)

// exportStore is the name under which clients offer the store for an image layout. There is one in BuildKit's protocol.
const exportStore = "export"

// clientOutput is the client's end of one export, over BuildKit's session protocol.
type clientOutput struct {
	session *clientSession
	// id is the export's place in the request.
	id int
	// path is the client's file on this host, "" when it is reached through the session only.
	path string
}

var _ exporter.Output = clientOutput{}

func (o clientOutput) caller(ctx context.Context) (session.Caller, error) {
	c, err := o.session.caller(ctx, o.session.id)
	if err != nil {
		return nil, fmt.Errorf("output %d of the client: %w", o.id, err)
	}
	return c, nil
}

// File implements exporter.Output.
func (o clientOutput) File(ctx context.Context, facts map[string]string) (io.WriteCloser, error) {
	if o.path != "" {
		f, err := openOutputFile(o.path)
		if err != nil {
			return nil, fmt.Errorf("output %d of the client: %w", o.id, err)
		}
		return f, nil
	}
	c, err := o.caller(ctx)
	if err != nil {
		return nil, err
	}
	w, err := filesync.CopyFileWriter(ctx, facts, o.id, c)
	if err != nil {
		return nil, o.explain(err)
	}
	return clientFile{w, o}, nil
}

// Dir implements exporter.Output.
func (o clientOutput) Dir(ctx context.Context, files fsutil.FS, mirror bool, progress func(int64, bool)) error {
	c, err := o.caller(ctx)
	if err != nil {
		return err
	}
	var opts []filesync.CopyToCallerOpt
	if mirror {
		// By this clients know that one transfer brings everything, so that they can delete the rest.
		opts = append(opts, filesync.WithExporterMultiPlatformTransfer())
	}
	return o.explain(filesync.CopyToCaller(ctx, files, o.id, c, func(n int, done bool) { progress(int64(n), done) }, opts...))
}

// Blobs implements exporter.Output.
func (o clientOutput) Blobs(ctx context.Context) (containerd.Ingester, error) {
	c, err := o.caller(ctx)
	if err != nil {
		return nil, err
	}
	return sessioncontent.NewCallerStore(c, exportStore), nil
}

func (o clientOutput) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case grpcerrors.Code(err) == codes.AlreadyExists:
		return fmt.Errorf("%w: %v", exporter.ErrExists, err)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("the client has ended the transfer: %w", err)
	}
	return fmt.Errorf("send to the client: %w", err)
}

// clientFile is a file of the client that is being written.
type clientFile struct {
	io.WriteCloser
	output clientOutput
}

func (f clientFile) Write(p []byte) (int, error) {
	n, err := f.WriteCloser.Write(p)
	return n, f.output.explain(err)
}

func (f clientFile) Close() error { return f.output.explain(f.WriteCloser.Close()) }
