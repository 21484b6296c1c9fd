// SPDX-License-Identifier: Apache-2.0

package compress

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
)

const (
	// zstdLevel is zstd's and BuildKit's default.
	zstdLevel = 3
	// zstdBlock is how much goes into one frame. Frames know nothing of each other, which costs up to 3 % of the size (up to 7 % at
	// 4 MB). It is also the window, and 8 MB is what every decoder must be able to have. Like gzipBlock it decides the bytes.
	zstdBlock = 8 << 20
	// zstdWorkers bounds the memory: a worker needs about three blocks (one in, one out, and the encoder's copy) and its tables.
	zstdWorkers = 6
)

var zstdBlocks = newPools(zstdBlock)

// zstdEncoders has encoders by their level: each is ten megabytes.
var zstdEncoders [int(zstd.SpeedBestCompression) + 1]sync.Pool

// WriteZstd writes the bytes of r to w as zstd frames, with up to workers goroutines (0: one for each processor, at most
// 6). The output depends on nothing but the input and the release of this program.
func WriteZstd(ctx context.Context, w io.Writer, r io.Reader, workers int) error {
	return writeZstd(ctx, w, r, zstdLevel, workers)
}

func writeZstd(ctx context.Context, w io.Writer, r io.Reader, level, workers int) error {
	if workers <= 0 {
		workers = min(runtime.GOMAXPROCS(0), zstdWorkers)
	}
	speed := zstd.EncoderLevelFromZstd(level)
	encoders := &zstdEncoders[speed]
	p := pipeline{
		pools: zstdBlocks, workers: workers,
		newWorker: func() (func(*buffer, *input, bool) error, func(), error) {
			z, ok := encoders.Get().(*zstd.Encoder)
			if !ok {
				var err error
				// No frame is longer than the window, so that a larger one would only be memory.
				z, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true),
					zstd.WithEncoderLevel(speed), zstd.WithWindowSize(zstdBlock), zstd.WithLowerEncoderMem(true))
				if err != nil {
					return nil, nil, fmt.Errorf("zstd: %w", err)
				}
			}
			return func(out *buffer, in *input, _ bool) error {
				out.b = z.EncodeAll(in.b[:in.n], out.b)
				return nil
			}, func() { encoders.Put(z) }, nil
		},
	}
	return p.run(ctx, w, r)
}

// Levels are the lowest and highest level of a kind of compression, and the default one.
func Levels(k Kind) (lowest, highest, usual int) {
	switch k {
	case Gzip:
		return 0, 9, gzipLevel
	case Zstd:
		return 0, 22, zstdLevel
	}
	return 0, 0, 0
}

// Write writes the bytes of r to w compressed by k at a level within Levels, with all processors; None copies them. The
// bytes do not depend on the machine.
func Write(ctx context.Context, w io.Writer, r io.Reader, k Kind, level int) error {
	lowest, highest, _ := Levels(k)
	if level < lowest || level > highest {
		return fmt.Errorf("compress: level %d of %s: want %d to %d", level, k, lowest, highest)
	}
	switch k {
	case None:
		_, err := io.Copy(w, r)
		return err
	case Gzip:
		return writeGzip(ctx, w, r, level, 0)
	case Zstd:
		return writeZstd(ctx, w, r, level, 0)
	}
	return fmt.Errorf("compress: unknown kind %q", k)
}
