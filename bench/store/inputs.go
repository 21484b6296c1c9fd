// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/gzip"
)

// The tree that COPY, unpack and context use: 500 directories of 100 files.
const (
	treeDirs        = 500
	treeFilesPerDir = 100
	treeBytes       = 500_000_000
)

// inputFile is one file of the tree.
type inputFile struct {
	path string // relative, slash-separated
	size int
	seed uint64 // of its content
}

// treeFiles says what is in the tree, in the order of its directories.
func treeFiles(seed uint64) []inputFile {
	r := rand.New(rand.NewPCG(seed, 1))
	const mean = treeBytes / (treeDirs * treeFilesPerDir)
	files := make([]inputFile, 0, treeDirs*treeFilesPerDir)
	for d := range treeDirs {
		for f := range treeFilesPerDir {
			files = append(files, inputFile{
				path: fmt.Sprintf("package-%02d/module-%02d/source_%03d.txt", d/25, d%25, f),
				size: 1 + r.IntN(2*mean),
				seed: r.Uint64(),
			})
		}
	}
	return files
}

// text fills files with something that compresses about as well as source code does.
type text struct{ words []byte }

func newText(seed uint64) *text {
	r := rand.New(rand.NewPCG(seed, 2))
	t := &text{words: make([]byte, 64<<10)}
	for i := range t.words {
		t.words[i] = "etaoinshrdlucmfw ypvbgkjqxz\n(){}=;_0123456789"[min(r.IntN(45), r.IntN(45))]
	}
	return t
}

func (t *text) fill(buf []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 3))
	for len(buf) > 0 {
		at := r.IntN(len(t.words) - 64)
		n := copy(buf, t.words[at:at+8+r.IntN(40)])
		buf = buf[n:]
	}
}

// inputTime is the modification time of every input, in the past, so that no rule about fresh files applies.
var inputTime = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

// tree makes the tree once and returns its path.
func (b *bench) tree() (string, error) {
	root := b.path("tree")
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	words := newText(b.seed)
	buf := make([]byte, 4*treeBytes/(treeDirs*treeFilesPerDir))
	last := ""
	for _, f := range treeFiles(b.seed) {
		full := filepath.Join(root, f.path)
		if dir := filepath.Dir(full); dir != last {
			last = dir
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return "", err
			}
		}
		words.fill(buf[:f.size], f.seed)
		if err := os.WriteFile(full, buf[:f.size], 0o644); err != nil {
			return "", err
		}
		if err := os.Chtimes(full, inputTime, inputTime); err != nil {
			return "", err
		}
	}
	return root, b.syncDisk()
}

// tarball makes the tree as a gzip-compressed tar once, as a registry would serve it, and returns its path.
func (b *bench) tarball() (path string, err error) {
	path = b.path("layer.tar.gz")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z, err := gzip.NewWriterLevel(f, gzip.DefaultCompression)
	if err != nil {
		return "", err
	}
	if err := b.writeTar(z); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}
	return path, f.Sync()
}

func (b *bench) writeTar(w io.Writer) error {
	tw := tar.NewWriter(w)
	words := newText(b.seed)
	buf := make([]byte, 4*treeBytes/(treeDirs*treeFilesPerDir))
	last := ""
	for _, f := range treeFiles(b.seed) {
		if dir := filepath.Dir(f.path); dir != last {
			last = dir
			h := &tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: inputTime}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
		}
		words.fill(buf[:f.size], f.seed)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.path, Mode: 0o644, Size: int64(f.size), ModTime: inputTime}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := tw.Write(buf[:f.size]); err != nil {
			return err
		}
	}
	return tw.Close()
}
