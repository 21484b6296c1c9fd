// SPDX-License-Identifier: Apache-2.0

package history

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/blob"
)

// inputs is one value of InputsBucket: where the list of files is that a digest in a key stands for.
type inputs struct {
	Blob    digest.Digest `json:"blob"` // the list, compressed with zstd
	Bytes   int64         `json:"bytes"`
	Created time.Time     `json:"created"`
}

// Keep implements solver.Inputs.
func (s *Store) Keep(ctx context.Context, d digest.Digest, write func(io.Writer) error) {
	if err := s.keepInputs(ctx, d, write); err != nil && ctx.Err() == nil {
		s.Log.Warn("keep what a step saw of its input", "input", d, "error", err)
	}
}

func (s *Store) keepInputs(ctx context.Context, d digest.Digest, write func(io.Writer) error) error {
	if _, ok, err := s.Records.GetValue(InputsBucket, d.String()); ok || err != nil {
		return err
	}
	w, err := s.Blobs.Writer(ctx)
	if err != nil {
		return err
	}
	defer w.Close()
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	if err := write(z); err != nil {
		return errors.Join(err, z.Close())
	}
	if err := z.Close(); err != nil {
		return err
	}
	in := inputs{Blob: w.Digest(), Bytes: w.Size(), Created: time.Now()}
	if err := w.Commit(in.Bytes, in.Blob); err != nil {
		return err
	}
	value, err := json.Marshal(in)
	if err != nil {
		return err
	}
	s.keep.Lock()
	defer s.keep.Unlock()
	if err := s.Records.PutValue(InputsBucket, d.String(), value); err != nil {
		return err
	}
	return s.trimInputs(d.String())
}

// trimInputs deletes the oldest lists that are too much, but not the one of that key. keep is held.
func (s *Store) trimInputs(newest string) error {
	type list struct {
		key string
		inputs
	}
	var all []list
	total := int64(0)
	err := s.Records.WalkValues(InputsBucket, func(key string, value []byte) error {
		l := list{key: key}
		_ = json.Unmarshal(value, &l.inputs) // what cannot be read is the oldest
		all = append(all, l)
		total += l.Bytes
		return nil
	})
	if err != nil || total <= s.MaxBytes {
		return err
	}
	slices.SortFunc(all, func(a, b list) int { return cmp.Compare(a.Created.UnixNano(), b.Created.UnixNano()) })
	for _, l := range all {
		if total <= s.MaxBytes || l.key == newest {
			break
		}
		if err := s.Records.DeleteValue(InputsBucket, l.key); err != nil {
			return err
		}
		total -= l.Bytes
		stays := slices.ContainsFunc(all, func(o list) bool { return o.key != l.key && o.Blob == l.Blob })
		if l.Blob != "" && !stays {
			if err := s.Blobs.Delete(l.Blob); err != nil && !errors.Is(err, blob.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}

// Inputs opens the list that d stands for. The error wraps blob.ErrNotFound when it is not kept.
func (s *Store) Inputs(d digest.Digest) (io.ReadCloser, error) {
	value, ok, err := s.Records.GetValue(InputsBucket, d.String())
	if err != nil {
		return nil, err
	}
	var in inputs
	if !ok || json.Unmarshal(value, &in) != nil {
		return nil, fmt.Errorf("list of files %s: %w", d, blob.ErrNotFound)
	}
	f, err := s.Blobs.Open(in.Blob)
	if err != nil {
		return nil, err
	}
	z, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &listReader{z, f}, nil
}

type listReader struct {
	*zstd.Decoder
	file io.Closer
}

func (r *listReader) Close() error {
	r.Decoder.Close()
	return r.file.Close()
}
