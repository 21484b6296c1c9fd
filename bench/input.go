// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// inputTime is the modification time of all input: long ago, so that nobody has to doubt it.
var inputTime = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// random is a source of bytes and numbers that a seed and a name determine.
func (b *bench) random(name string) *rand.ChaCha8 {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], b.seed)
	copy(key[8:], name)
	return rand.NewChaCha8(key)
}

// writeInput writes files; a name that ends in "busybox" gets that program.
func (b *bench) writeInput(dir string, files map[string]string) error {
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if filepath.Base(name) == "busybox" {
			box, err := busybox()
			if err != nil {
				return err
			}
			if err := copyFile(box, path, 0o755); err != nil {
				return err
			}
		} else if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		if err := os.Chtimes(path, inputTime, inputTime); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string, mode fs.FileMode) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

// The tree of the context scenarios.
const (
	bigFiles = 50_000
	bigDirs  = 500
	bigBytes = 10_000 // of a file, on average
)

// bigTree is a directory "tree" with 50,000 files, 500 MB, in a directory of its own. It is made once and stays the same.
func (b *bench) bigTree() (string, error) {
	if b.big != "" {
		return b.big, nil
	}
	dir := filepath.Join(b.work, "big")
	r := b.random("tree")
	sizes := rand.New(r)
	buf := make([]byte, 2*bigBytes)
	for d := range bigDirs {
		sub := filepath.Join(dir, "tree", fmt.Sprintf("d%03d", d))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return "", err
		}
		for f := range bigFiles / bigDirs {
			n := sizes.IntN(2*bigBytes + 1)
			_, _ = r.Read(buf[:n])
			path := filepath.Join(sub, fmt.Sprintf("f%03d", f))
			if err := os.WriteFile(path, buf[:n], 0o644); err != nil {
				return "", err
			}
			if err := os.Chtimes(path, inputTime, inputTime); err != nil {
				return "", err
			}
		}
	}
	b.big = dir
	return dir, nil
}

// randomFiles writes n files of size bytes that cannot be compressed.
func (b *bench) randomFiles(dir string, n, size int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	r := b.random("files")
	buf := make([]byte, size)
	for i := range n {
		_, _ = r.Read(buf)
		path := filepath.Join(dir, fmt.Sprintf("f%04d", i))
		if err := os.WriteFile(path, buf, 0o644); err != nil {
			return err
		}
		if err := os.Chtimes(path, inputTime, inputTime); err != nil {
			return err
		}
	}
	return nil
}

// changeOne gives one file of the big tree other bytes, of the same length.
func (b *bench) changeOne(n int) error {
	path := filepath.Join(b.big, "tree", fmt.Sprintf("d%03d", (n+1)%bigDirs), "f007")
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	buf := make([]byte, info.Size())
	_, _ = b.random(fmt.Sprint("change ", n)).Read(buf)
	return os.WriteFile(path, buf, 0o644)
}

// unmountBelow unmounts what a program has left mounted below a directory of ours.
func unmountBelow(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		errs = append(errs, unix.Unmount(p, 0))
	}
	return errors.Join(errs...)
}
