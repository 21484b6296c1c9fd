// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// The content of the export and push scenarios is one tar, so that a build has one file to look at: an eighth of it cannot be compressed, and the rest
// are the first files of /usr/lib and of Go's own source, as far as it goes.
const mixedName = "mixed.tar"

// mixedTree makes a directory with the tar and a Dockerfile that unpacks it, once.
func (b *bench) mixedTree(ctx context.Context) error {
	if b.mixed != "" {
		return nil
	}
	dir := filepath.Join(b.work, "mixed")
	if err := b.writeInput(dir, map[string]string{
		"busybox": "", ".dockerignore": "Dockerfile\n.dockerignore\n", "Dockerfile": mixedFile("mixed"),
	}); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, mixedName))
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	total := b.mixedMB << 20
	noise := total / 8
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "noise", Mode: 0o644, Size: noise, ModTime: inputTime}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if _, err := io.CopyN(w, b.random("noise"), noise); err != nil {
		return err
	}
	goroot, ok := firstLine(ctx, "go", "env", "GOROOT")
	if !ok {
		return errors.New("go is not on PATH, whose source is part of the input")
	}
	left := total - noise
	for _, part := range []struct {
		from string
		most int64
	}{{filepath.Join(goroot, "src"), left / 8}, {"/usr/lib", left}} {
		n, err := addFiles(w, part.from, min(part.most, left))
		if err != nil {
			return err
		}
		left -= n
	}
	if left > total/4 {
		return fmt.Errorf("there are %d MB too few in /usr/lib and Go's source for %d MB of mixed content: use a smaller -mixed-mb", left>>20, b.mixedMB)
	}
	if err := w.Close(); err != nil {
		return err
	}
	b.mixed = dir
	return nil
}

// mixedFile is a Dockerfile that unpacks the tar into a directory.
func mixedFile(dir string) string {
	return "FROM scratch AS data\nADD " + mixedName + " /" + dir + "/\nCOPY busybox /bin/busybox\n" +
		"FROM data AS late\nRUN [\"/bin/busybox\", \"sleep\", \"" + fmt.Sprint(int(lateStep/time.Second)) + "\"]\nFROM data\n"
}

// addFiles adds regular files, in the order of their names, until there are most bytes.
func addFiles(w *tar.Writer, from string, most int64) (n int64, err error) {
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || n >= most {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() > most-n {
			return err
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path[1:], Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: inputTime})
		if err != nil {
			return err
		}
		n += info.Size()
		_, err = io.CopyN(w, in, info.Size())
		return err
	})
	return n, err
}

// changeMixed makes the layer another one, that of a round of a series: its files are in another directory. The context stays as it is, so that
// nobody has to transfer or hash it again.
func (b *bench) changeMixed(series string, n int) error {
	return os.WriteFile(filepath.Join(b.mixed, "Dockerfile"), []byte(mixedFile(fmt.Sprint(series, n+1))), 0o644)
}
