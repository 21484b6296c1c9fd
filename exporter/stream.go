// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"errors"
	"io"
)

// StreamBuffer is in what pieces streams to the client are best written, in bytes: each is a message of its own, and gRPC
// refuses those of more than 4 MiB.
const StreamBuffer = 1 << 20

// Stream opens the client's file, lets write fill it, and closes it. When write fails the stream is broken off, so that a client can
// see that what it has is not whole. A client that has the file already is no error.
func Stream(ctx context.Context, opts Options, facts map[string]string, write func(io.Writer) error) error {
	// Ending the context of a stream is what breaks it off.
	streamCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := stream(streamCtx, cancel, opts, facts, write)
	if errors.Is(err, ErrExists) {
		return nil
	}
	return err
}

func stream(ctx context.Context, cancel context.CancelCauseFunc, opts Options, facts map[string]string, write func(io.Writer) error) error {
	w, err := opts.Output.File(ctx, facts)
	if err != nil {
		return err
	}
	report := opts.Bytes("sending tarball", 0)
	counted := &counter{ctx: ctx, w: w, report: report}
	if err := write(counted); err != nil {
		cancel(err)
		_ = w.Close()
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	report(counted.n, true)
	return nil
}

// counter reports how much has been written.
type counter struct {
	ctx    context.Context // of the stream, for ReadFrom
	w      io.Writer
	n      int64
	report func(int64, bool)
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.report(c.n, false)
	return n, err
}

// ReadFrom has a file copied by the kernel if the stream is a file of this host.
func (c *counter) ReadFrom(r io.Reader) (total int64, err error) {
	to, ok := c.w.(io.ReaderFrom)
	if !ok {
		return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{r}, make([]byte, StreamBuffer))
	}
	const piece = 32 << 20
	for {
		if c.ctx.Err() != nil {
			return total, context.Cause(c.ctx)
		}
		n, err := to.ReadFrom(io.LimitReader(r, piece))
		total += n
		c.n += n
		c.report(c.n, false)
		if err != nil || n < piece {
			return total, err
		}
	}
}
