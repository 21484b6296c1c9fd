// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// ErrNoOverlay is a system on which this process cannot mount overlays.
var ErrNoOverlay = errors.New("overlay mounts are not available here")

// maxLowers is the kernel's OVL_MAX_STACK.
const maxLowers = 500

// overlay is one overlay mount to be made.
type overlay struct {
	lowers      []string // highest first; at least one, and two without an upper
	upper, work string   // "" for a read-only mount
}

// options are the flags and settings of every mount, given to make the result the same whatever the kernel's
// defaults are: an upper directory must be a layer that stands for itself, readable without overlay's own xattrs.
func (o overlay) options() []string {
	opts := []string{"index=off", "metacopy=off", "redirect_dir=off", "xino=off"}
	if layer.UserXattrs() {
		opts = []string{"userxattr", "index=off", "metacopy=off", "redirect_dir=nofollow", "xino=off"}
	}
	if o.upper != "" {
		// No fsync reaches the disk: what a step writes is either committed and synced with everything else (record.Store.Sync) or
		// thrown away.
		opts = append(opts, "volatile")
	}
	return opts
}

// mount mounts o at target.
func (o overlay) mount(target string) error {
	err := o.mountNew(target)
	if errors.Is(err, errNoLowerPlus) {
		err = o.mountClassic(target)
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: %w (they need root, of a user namespace since Linux 5.11, and the kernel's overlay file system)", ErrNoOverlay, err)
	}
	if errors.Is(err, unix.EINVAL) && o.upper != "" && onOverlay(o.upper) {
		return fmt.Errorf("%w: %s is itself on an overlay file system; choose a directory on a disk (--root): %w", ErrNoOverlay, o.upper, err)
	}
	return err
}

// errNoLowerPlus is a kernel before 6.8, which takes lower directories only in one string.
var errNoLowerPlus = errors.New(`overlay has no option "lowerdir+"`)

// mountNew uses the mount API of Linux 5.2, which takes one directory a call: names may be long and their number is
// overlay's own limit (500).
func (o overlay) mountNew(target string) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return errNoLowerPlus
	}
	if err != nil {
		return os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(fsfd)
	var names shortNames
	defer names.close()
	set := func(key, path string) error {
		name, err := names.of(path)
		if err != nil {
			return err
		}
		if err := unix.FsconfigSetString(fsfd, key, name); err != nil {
			return fmt.Errorf("overlay: set %s=%s: %w%s", key, path, err, kernelMessages(fsfd))
		}
		return nil
	}
	if err := unix.FsconfigSetString(fsfd, "source", "slipway"); err != nil {
		return os.NewSyscallError("fsconfig source", err)
	}
	for i, dir := range o.lowers {
		if err := set("lowerdir+", dir); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return errNoLowerPlus
			}
			return err
		}
	}
	var attr int
	if o.upper == "" {
		attr = unix.MOUNT_ATTR_RDONLY
	} else {
		if err := set("upperdir", o.upper); err != nil {
			return err
		}
		if err := set("workdir", o.work); err != nil {
			return err
		}
	}
	for _, opt := range o.options() {
		key, value, isString := strings.Cut(opt, "=")
		if isString {
			err = unix.FsconfigSetString(fsfd, key, value)
		} else {
			err = unix.FsconfigSetFlag(fsfd, key)
		}
		if err != nil {
			return fmt.Errorf("overlay: set %s: %w%s", opt, err, kernelMessages(fsfd))
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("overlay of %d layers: %w%s", len(o.lowers), err, kernelMessages(fsfd))
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return os.NewSyscallError("fsmount overlay", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount overlay", Path: target, Err: err}
	}
	return nil
}

// mountClassic uses mount(2). All options together must fit into a page, so every directory goes by the number of a
// descriptor.
func (o overlay) mountClassic(target string) error {
	names := shortNames{always: true}
	defer names.close()
	var lowers []string
	for _, dir := range o.lowers {
		name, err := names.of(dir)
		if err != nil {
			return err
		}
		lowers = append(lowers, name)
	}
	opts := append(o.options(), "lowerdir="+strings.Join(lowers, ":"))
	flags := uintptr(unix.MS_RDONLY)
	if o.upper != "" {
		flags = 0
		upper, err := names.of(o.upper)
		if err != nil {
			return err
		}
		work, err := names.of(o.work)
		if err != nil {
			return err
		}
		opts = append(opts, "upperdir="+upper, "workdir="+work)
	}
	data := strings.Join(opts, ",")
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("overlay of %d layers: too many for this kernel (Linux 6.8 and later take 500)", len(o.lowers))
	}
	if err := unix.Mount("slipway", target, "overlay", flags, data); err != nil {
		return fmt.Errorf("overlay of %d layers: %w", len(o.lowers), err)
	}
	return nil
}

// shortNames gives directories names that the kernel takes as they are: fsconfig refuses strings of 256 bytes,
// and overlay gives colons, commas and backslashes a meaning in some options. The names hold until close.
type shortNames struct {
	always bool
	fds    []int
}

func (n *shortNames) of(path string) (string, error) {
	if !n.always && len(path) < 256 && !strings.ContainsAny(path, `\:,`) {
		return path, nil
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	n.fds = append(n.fds, fd)
	return fmt.Sprintf("/proc/self/fd/%d", fd), nil
}

func (n *shortNames) close() {
	for _, fd := range n.fds {
		unix.Close(fd)
	}
}

// kernelMessages returns what the kernel has to say about a file system that it refuses, as " (…)".
func kernelMessages(fsfd int) string {
	var all []string
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(fsfd, buf)
		if err != nil || n <= 2 {
			break
		}
		all = append(all, strings.TrimSpace(string(buf[2:n]))) // "e overlay: …"
	}
	if len(all) == 0 {
		return ""
	}
	return " (" + strings.Join(all, "; ") + ")"
}

func onOverlay(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC
}
