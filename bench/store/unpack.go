// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"os"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// unpackGroup takes a compressed layer into the store, as a pull does once the blob is there.
var unpackGroup = group{
	name: "unpack", heavy: true,
	prepare: func(ctx context.Context, b *bench) error {
		_, err := b.tarball()
		return err
	},
	round: func(ctx context.Context, b *bench) error {
		blob := b.path("layer.tar.gz")
		out := b.path("floor-unpack")
		if err := b.floor("unpack", func() error { return inflate(blob, out) }); err != nil {
			return err
		}
		if err := errors.Join(b.moveAway(out), b.syncDisk()); err != nil {
			return err
		}
		err := b.floor("unpack-read", func() error { return inflate(blob, "") })
		if err != nil {
			return err
		}
		b.of("unpack-read").ours = b.of("unpack-read").floor
		store, err := layer.Open(b.path("unpack"), layer.Options{})
		if err != nil {
			return err
		}
		err = b.ours("unpack", func() error {
			f, err := os.Open(blob)
			if err != nil {
				return err
			}
			defer f.Close()
			tar, _, err := compress.NewReader(f)
			if err != nil {
				return err
			}
			defer tar.Close()
			_, err = store.Unpack(ctx, tar, "", nil)
			return err
		})
		return errors.Join(err, store.Close(), b.moveAway(b.path("unpack")))
	},
}

// inflate decompresses a file with the library that we use, hashes what comes out in a second goroutine, which also
// writes it to out, synced, unless that is "".
func inflate(path, out string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	z, _, err := compress.NewReader(f)
	if err != nil {
		return err
	}
	defer z.Close()
	sink := io.Discard
	var to *os.File
	if out != "" {
		if to, err = os.Create(out); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, to.Close()) }()
		sink = to
	}
	full, free := make(chan []byte, 4), make(chan []byte, 8)
	for range cap(free) {
		free <- make([]byte, 256<<10)
	}
	done := make(chan error, 1)
	go func() {
		var h hash.Hash = sha256.New()
		var werr error
		for b := range full {
			h.Write(b)
			if werr == nil {
				_, werr = sink.Write(b)
			}
			free <- b[:cap(b)]
		}
		done <- werr
	}()
	for {
		b := <-free
		n, rerr := io.ReadFull(z, b)
		full <- b[:n]
		if rerr == io.EOF || rerr == io.ErrUnexpectedEOF {
			break
		}
		if rerr != nil {
			err = rerr
			break
		}
	}
	close(full)
	err = errors.Join(err, <-done)
	if err == nil && to != nil {
		err = to.Sync()
	}
	return err
}
