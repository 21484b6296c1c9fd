// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/seed-68981b69/slipway/cache/compress"
)

// mixedGroup are the scenarios that have use for what the one before them has built or compressed.
const mixedGroup = "mixed"

const exportAbout = "An OCI archive of an image of mixed content (-mixed-mb: 1 GB), whose build has nothing left to do"

var exportPlain = &scenario{
	name:       "export-plain",
	about:      exportAbout + ", uncompressed.",
	floorAbout: "the archive's bytes copied to another file",
	group:      mixedGroup,
	goal:       6,
	goals:      []goal{withinFloor(1.3), peakMemory},
	prepare:    prepareExport,
	floor:      func(_ context.Context, b *bench) error { return b.copyArchive("uncompressed", nil) },
	contestant: exporting("uncompressed", true),
}

var exportGzip = &scenario{
	name:       "export-gzip",
	about:      exportAbout + ", gzip at the usual level; the layer has changed and is compressed.",
	floorAbout: "the uncompressed archive through our gzip on all processors, into a file",
	group:      mixedGroup,
	goal:       5,
	goals:      []goal{noLarger, peakMemory},
	prepare:    prepareExport,
	round:      func(b *bench, n int) error { return b.changeMixed("gzip", n) },
	floor: func(ctx context.Context, b *bench) error {
		return b.copyArchive("uncompressed", func(w io.Writer, r io.Reader) error { return compress.WriteGzip(ctx, w, r, runtime.GOMAXPROCS(0)) })
	},
	contestant: exporting("gzip", false),
}

var exportZstd = &scenario{
	name:       "export-zstd",
	about:      exportAbout + ", zstd at the usual level; the layer has changed and is compressed.",
	floorAbout: "the uncompressed archive through our zstd on all processors, into a file",
	goal:       2.5,
	goals:      []goal{noLarger, peakMemory},
	prepare:    prepareExport,
	round:      func(b *bench, n int) error { return b.changeMixed("zstd", n) },
	floor: func(ctx context.Context, b *bench) error {
		return b.copyArchive("uncompressed", func(w io.Writer, r io.Reader) error { return compress.WriteZstd(ctx, w, r, runtime.GOMAXPROCS(0)) })
	},
	contestant: exporting("zstd", false),
}

var exportAgain = &scenario{
	name:       "export-again",
	about:      exportAbout + ", gzip, made before: nothing has changed.",
	floorAbout: "the compressed archive's bytes copied to another file",
	group:      mixedGroup,
	goals:      []goal{withinFloor(1.1), peakMemory},
	prepare:    prepareCompressed,
	floor:      func(_ context.Context, b *bench) error { return b.copyArchive("gzip", nil) },
	contestant: exporting("gzip", true),
}

func prepareExport(ctx context.Context, b *bench) error { return b.mixedTree(ctx) }

// prepareCompressed makes the layer the one that it was in the first round of export-gzip, which even those have compressed who were
// measured once.
func prepareCompressed(ctx context.Context, b *bench) error {
	if err := b.mixedTree(ctx); err != nil {
		return err
	}
	return b.changeMixed("gzip", warmUpRound)
}

// archive is where an archive goes.
func (b *bench) archive(who, compression string) string {
	return filepath.Join(b.dir, "export-"+who+"-"+compression+".tar")
}

// exporting makes archives of mixed content. Before each run the build is done; warm says that the archive has been made before as well.
func exporting(compression string, warm bool) func(context.Context, *bench, peer) (*contestant, error) {
	return func(ctx context.Context, bn *bench, p peer) (*contestant, error) {
		bp, ok := p.(archiver)
		if !ok {
			return nil, nil
		}
		o, end, first, err := bn.opened(ctx, bp, 0)
		if err != nil {
			return nil, err
		}
		made := func(compression string) build {
			return build{dir: bn.mixed, output: "type=oci,dest=" + bn.archive(p.name(), compression) + ",compression=" + compression}
		}
		c := &contestant{
			name:    p.name(),
			before:  func(ctx context.Context) error { return runQuietly(ctx, o.build(build{dir: bn.mixed})) },
			run:     func(_ context.Context, c *calls) error { return c.do(o.build(made(compression))) },
			output:  bn.archive(p.name(), compression),
			daemons: o.daemons,
			close:   end,
		}
		if warm {
			err = runQuietly(ctx, o.build(made(compression)))
		}
		if _, ours := p.(*slipway); ours && first && err == nil { // for the floors
			err = runQuietly(ctx, o.build(made("uncompressed")))
		}
		if err != nil {
			return nil, errors.Join(err, end())
		}
		return c, nil
	}
}

// copyArchive copies slipway's archive, as it is or through a compressor, into a file that is moved away. There is no sync: the archive is
// not synced either.
func (b *bench) copyArchive(compression string, through func(io.Writer, io.Reader) error) error {
	in, err := os.Open(b.archive("slipway", compression))
	if err != nil {
		return err
	}
	defer in.Close()
	to := filepath.Join(b.dir, "floor")
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	if through != nil {
		err = through(out, in)
	} else {
		_, err = io.Copy(out, in)
	}
	if err != nil {
		return err
	}
	return b.moveAway(to)
}
