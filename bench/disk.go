// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// disk is a directory to measure in. With image it is a file system of its own: a fresh ext4 with a journal in a file, read and written
// without the page cache of the file system below (direct I/O), so that every scenario begins on the same disk whatever was deleted before.
type disk struct {
	dir, image string
}

const (
	// diskSpare is what the files of disks leave of the file system they are in, in bytes.
	diskSpare = 4 << 30
	// diskLeast is the least that a disk is made with, in bytes.
	diskLeast = 12 << 30
)

// newDisk makes dir, which must not be there, an empty file system of its own.
func newDisk(ctx context.Context, dir string) (_ *disk, err error) {
	d := &disk{dir: dir, image: dir + ".ext4"}
	size, err := freeBytes(filepath.Dir(dir))
	if err != nil {
		return nil, err
	}
	if size -= diskSpare; size < diskLeast {
		return nil, fmt.Errorf("there is too little room below %s for a disk in a file", filepath.Dir(dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a disk in a file: %w", err), os.Remove(d.image), os.RemoveAll(dir))
		}
	}()
	f, err := os.OpenFile(d.image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close(), os.Mkdir(dir, 0o755)); err != nil {
		return nil, err
	}
	// What mkfs leaves for later would be written by the kernel while something is measured: noinit_itable says never.
	if err := runQuietly(ctx, exec.Command("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", d.image)); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	attach := exec.Command("losetup", "--direct-io=on", "--find", "--show", d.image)
	attach.Stdout = &out
	if err := runQuietly(ctx, attach); err != nil {
		return nil, err
	}
	device := strings.TrimSpace(out.String())
	err = unix.Mount(device, dir, "ext4", 0, "noinit_itable")
	// The device goes when nothing is mounted from it any more: now, or when the disk is closed.
	if detach := runQuietly(ctx, exec.Command("losetup", "--detach", device)); err == nil && detach != nil {
		err = errors.Join(detach, unix.Unmount(dir, 0))
	}
	return d, err
}

// Constants of ext4's ioctl that ends a file system as a power cut does (linux/ext4.h).
const (
	ext4Shutdown   = 0x8004587d
	ext4NoLogFlush = 2
)

// close gives the room back, and leaves nothing of what was in it. Whatever is mounted below is unmounted.
func (d *disk) close() error {
	if d.image == "" {
		return nil
	}
	err := unmountBelow(d.dir)
	// Nobody wants the bytes that are still to be written. Without this ioctl all that is said about them is that it takes longer.
	if top, openErr := os.Open(d.dir); openErr == nil {
		flag := uint32(ext4NoLogFlush)
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, top.Fd(), ext4Shutdown, uintptr(unsafe.Pointer(&flag)))
		err = errors.Join(err, top.Close())
	}
	// A process that was killed a moment ago may be on its way out.
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		unmountErr := unix.Unmount(d.dir, 0)
		if unmountErr == nil {
			break
		}
		if !errors.Is(unmountErr, unix.EBUSY) || time.Now().After(limit) {
			return errors.Join(err, fmt.Errorf("unmount %s, which is left: %w", d.dir, unmountErr))
		}
	}
	return errors.Join(err, os.Remove(d.dir), os.Remove(d.image))
}

// freeBytes is the room in the file system that path is in.
func freeBytes(path string) (int64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("ask for the room in %s: %w", path, err)
	}
	return int64(fs.Bavail) * fs.Bsize, nil
}

// enter makes b.dir the place to measure in: an empty one, or that of the group if the last one was in it, too. What b.dir was before goes.
func (b *bench) enter(ctx context.Context, name, group string) error {
	if group != "" && group == b.group {
		return nil
	}
	if err := b.leave(); err != nil {
		return err
	}
	if group != "" {
		b.group, b.shared, b.leftOut, name = group, map[string]*state{}, map[string]string{}, group
	}
	d, err := b.newPlace(ctx, name)
	if err != nil {
		return err
	}
	b.place, b.dir = d, d.dir
	return nil
}

// firstPlace makes the place of the inputs, which says what there is to measure in.
func (b *bench) firstPlace(ctx context.Context) (*disk, error) {
	const name = "input"
	if b.ownDisk {
		d, err := b.newPlace(ctx, name)
		if err == nil {
			b.work = d.dir
			b.diskSays = "Each scenario has a fresh ext4 with a journal, in a file that is read and written past the page cache of the file system below."
			return d, nil
		}
		fmt.Fprintf(os.Stderr, "bench: scenarios have directories instead of file systems of their own: %v\n", err)
	}
	b.ownDisk = false
	d, err := b.newPlace(ctx, name)
	b.work, b.diskSays = d.dir, "Scenarios have directories of one file system, which is slower or faster by what was deleted in it before."
	return d, err
}

// newPlace is an empty disk below the scratch directory, or without -own-disk an empty directory.
func (b *bench) newPlace(ctx context.Context, name string) (*disk, error) {
	dir := filepath.Join(b.top, name)
	if !b.ownDisk {
		return &disk{dir: dir}, os.Mkdir(dir, 0o755)
	}
	return newDisk(ctx, dir)
}

// leave ends the daemons that a group has, and gives back the room.
func (b *bench) leave() error {
	var errs []error
	for _, o := range b.shared {
		errs = append(errs, o.close())
	}
	b.group, b.shared, b.leftOut = "", nil, nil
	if b.adopts {
		endOrphans()
	}
	if d := b.place; d != nil {
		b.place = nil
		if d.image == "" {
			errs = append(errs, unmountBelow(d.dir), b.moveTo(filepath.Join(b.top, "old"), d.dir))
		} else {
			errs = append(errs, d.close())
		}
	}
	return errors.Join(errs...)
}

// moveAway puts something below b.dir aside until b.dir goes: deletes take time, and on some file systems they slow down what comes after.
func (b *bench) moveAway(path string) error {
	if b.place != nil && b.place.image != "" {
		return b.moveTo(filepath.Join(b.dir, ".old"), path)
	}
	return b.moveTo(filepath.Join(b.top, "old"), path)
}

func (b *bench) moveTo(old, path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := os.MkdirAll(old, 0o700); err != nil {
		return err
	}
	b.moved++
	if err := os.Rename(path, filepath.Join(old, fmt.Sprint(b.moved))); err != nil {
		return err
	}
	free, err := freeBytes(old)
	if err != nil {
		return err
	}
	if free < keepFree { // a slow disk is better than a full one
		return removeAll(old)
	}
	return nil
}

// keepFree is how much of the disk stays free, in bytes: what was moved away is deleted before.
const keepFree = 15 << 30

// removeAll deletes a directory, which must have no mounts in it any more: nothing outside of it may be deleted.
func removeAll(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if bytes.Contains(mounts, []byte(" "+dir+"/")) {
		return fmt.Errorf("%s is left: something in it is still mounted", dir)
	}
	return os.RemoveAll(dir)
}

// state is an open state of a builder, and the directory it is in.
type state struct {
	builds
	dir string
}

// opened is an open state of a builder: the one that an earlier scenario of the same group has left, or a new one. Whoever asked calls end
// when it needs it no more; first says that nothing has been built in it.
func (b *bench) opened(ctx context.Context, bp builder, jobs int) (o *state, end func() error, first bool, err error) {
	if o := b.shared[bp.name()]; o != nil {
		return o, func() error { return nil }, false, nil
	}
	dir := b.stateDir(bp.name())
	opened, err := bp.open(ctx, dir, jobs)
	if err != nil {
		return nil, nil, false, err
	}
	o = &state{opened, dir}
	if b.shared == nil {
		return o, o.close, true, nil
	}
	b.shared[bp.name()] = o
	return o, func() error { return nil }, true, nil
}

// unshare takes a state out of the group's, for one who closes it; nil when there is none.
func (b *bench) unshare(name string) *state {
	o := b.shared[name]
	delete(b.shared, name)
	return o
}
