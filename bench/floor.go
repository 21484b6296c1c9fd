// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// floorName is what the table calls the floor.
const floorName = "floor"

// execFloor starts a small static program and waits for its end: no command line can be faster.
func execFloor(context.Context, *bench) error {
	box, err := busybox()
	if err != nil {
		return err
	}
	return exec.Command(box, "true").Run()
}

// cloneFloor does that in namespaces of its own, n times one after the other: no container can be started faster.
func cloneFloor(n int) error {
	box, err := busybox()
	if err != nil {
		return err
	}
	for range n {
		cmd := exec.Command(box, "true")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET,
		}
		if err := cmd.Run(); err != nil {
			return err
		}
	}
	return nil
}

// statAll asks for the state of every file below dir, as whoever wants to know what has changed must, with all processors.
func statAll(dir string) error {
	top, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, e := range top {
		group.Go(func() error {
			return filepath.WalkDir(filepath.Join(dir, e.Name()), func(_ string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				_, err = d.Info()
				return err
			})
		})
	}
	return group.Wait()
}

// copyAll reads every file below dir once, hashes it, and writes the bytes one after the other into one file, which it syncs:
// the least that makes a lasting, content-addressed copy.
func copyAll(dir, to string) error {
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	sum := sha256.New()
	buf := make([]byte, 256<<10)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(out, sum)}, struct{ io.Reader }{in}, buf)
		return err
	})
	if err != nil {
		return err
	}
	return out.Sync()
}
