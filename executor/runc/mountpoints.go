// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A mount needs a place to be mounted on, and images often lack it (/etc/hosts, /proc, the target of a cache mount).
// What is created for that reason must not stay in the layer, so it is made here before the start, remembered, and
// removed after the end if it is still as it was made. Time stamps of directories that were there before are put
// back to what the step left. Paths are walked with descriptors, one component at a time, symlinks resolved inside
// the root: nothing in the image can lead out of it.

// maxSymlinks is how many symlinks one path may have, as in the kernel's RESOLVE_IN_ROOT walk of libpathrs.
const maxSymlinks = 255

// mountPoints are the paths that were created in one root file system. Containers that run in it at the same time
// share them: to remove a path that another has mounted something on would take that mount away.
type mountPoints struct {
	root *os.File
	refs int // containers; guarded by roots.mu

	mu   sync.Mutex // guards made, and the file system against our own changes
	made []madePath
}

// roots are the root file systems in use, by path.
type roots struct {
	mu   sync.Mutex // guards open
	open map[string]*mountPoints
}

// acquire opens the root file system at dir, or joins those who have it open.
func (r *roots) acquire(dir string) (*mountPoints, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.open[dir]
	if m == nil {
		var err error
		if m, err = openRoot(dir); err != nil {
			return nil, err
		}
		if r.open == nil {
			r.open = map[string]*mountPoints{}
		}
		r.open[dir] = m
	}
	m.refs++
	return m, nil
}

// release cleans up after the last container in the root file system at dir.
func (r *roots) release(dir string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.open[dir]
	if m.refs--; m.refs == 0 {
		delete(r.open, dir)
		m.cleanUp()
	}
}

// madePath is a path that we created: name in the directory parent, which is kept open.
type madePath struct {
	parent *os.File
	name   string
	stat   unix.Stat_t
}

// openRoot opens the root file system at dir.
func openRoot(dir string) (*mountPoints, error) {
	f, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", &os.PathError{Op: "open", Path: dir, Err: err})
	}
	return &mountPoints{root: f}, nil
}

func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// prepare creates the targets of mounts that do not exist, except those that lie below an earlier mount: they are
// created in there, if at all, not in the root file system.
func (m *mountPoints) prepare(mounts []specs.Mount) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, mnt := range mounts {
		if slices.ContainsFunc(mounts[:i], func(earlier specs.Mount) bool { return isBelow(mnt.Destination, earlier.Destination) }) {
			continue
		}
		wantDir := true
		if mnt.Type == "bind" {
			var st unix.Stat_t
			if err := unix.Stat(mnt.Source, &st); err != nil {
				return fmt.Errorf("mount %s: source: %w", mnt.Destination, &os.PathError{Op: "stat", Path: mnt.Source, Err: err})
			}
			wantDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		}
		if err := m.ensure(mnt.Destination, wantDir); err != nil {
			return fmt.Errorf("mount %s: %w", mnt.Destination, err)
		}
	}
	return nil
}

// isBelow says whether p is dir or below it, by name.
func isBelow(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// ensure makes target exist as a directory or as something else.
func (m *mountPoints) ensure(target string, wantDir bool) error {
	return m.walk(target, func(parent *os.File, name string, last bool) error {
		var before unix.Stat_t
		if err := unix.Fstatat(int(parent.Fd()), ".", &before, 0); err != nil {
			return err
		}
		if last && !wantDir {
			fd, err := unix.Openat(int(parent.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return fmt.Errorf("create mount point: %w", err)
			}
			unix.Close(fd)
		} else if err := unix.Mkdirat(int(parent.Fd()), name, 0o755); err != nil {
			return fmt.Errorf("create mount point: %w", err)
		}
		restoreMtime(parent, &before)
		kept, err := openDir(int(parent.Fd()), ".")
		if err != nil {
			return err
		}
		m.made = append(m.made, madePath{parent: kept, name: name})
		return unix.Fstatat(int(parent.Fd()), name, &m.made[len(m.made)-1].stat, unix.AT_SYMLINK_NOFOLLOW)
	}, func(isDir bool) error {
		if isDir && !wantDir {
			return errors.New("the source is a file, but the image has a directory there")
		}
		if !isDir && wantDir {
			return errors.New("the source is a directory, but the image has a file there")
		}
		return nil
	})
}

// ensureCwd makes the working directory and the directories above it as far as they are missing, owned by uid and
// gid. They stay.
func (m *mountPoints) ensureCwd(cwd string, uid, gid uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.walk(cwd, func(parent *os.File, name string, last bool) error {
		if err := unix.Mkdirat(int(parent.Fd()), name, 0o755); err != nil {
			return err
		}
		if err := unix.Fchmodat(int(parent.Fd()), name, 0o755, 0); err != nil { // whatever our umask is
			return err
		}
		return unix.Fchownat(int(parent.Fd()), name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW)
	}, func(isDir bool) error {
		if !isDir {
			return unix.ENOTDIR
		}
		return nil
	})
}

// walk follows target component by component inside the root. create makes a missing component; exists is told the
// kind of the last one when it is there.
func (m *mountPoints) walk(target string, create func(parent *os.File, name string, last bool) error, exists func(isDir bool) error) error {
	todo := components(target)
	stack := []*os.File{m.root}
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close() // now, not when it is collected: an open directory keeps the file system mounted
		}
	}()
	links := 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		current := stack[len(stack)-1]
		if name == ".." {
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		last := len(todo) == 0
		var st unix.Stat_t
		err := unix.Fstatat(int(current.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			if err := create(current, name, last); err != nil {
				return err
			}
			if last {
				return nil
			}
			st.Mode = unix.S_IFDIR
		} else if err != nil {
			return &os.PathError{Op: "stat", Path: name, Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if links++; links > maxSymlinks {
				return unix.ELOOP
			}
			to, err := readlinkAt(current, name)
			if err != nil {
				return err
			}
			if path.IsAbs(to) {
				stack = stack[:1]
			}
			todo = append(components(to), todo...)
		case unix.S_IFDIR:
			dir, err := openDir(int(current.Fd()), name)
			if err != nil {
				return &os.PathError{Op: "open", Path: name, Err: err}
			}
			opened = append(opened, dir)
			stack = append(stack, dir)
		default:
			if !last {
				return &os.PathError{Op: "open", Path: name, Err: unix.ENOTDIR}
			}
			return exists(false)
		}
	}
	return exists(true)
}

func components(p string) []string {
	return slices.DeleteFunc(strings.Split(p, "/"), func(c string) bool { return c == "" || c == "." })
}

func readlinkAt(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(buf[:n]), nil
}

// cleanUp removes what prepare made, last first: files that are still empty, directories that are, and nothing whose
// owner or mode the container changed, for that is the container's work. It closes everything.
func (m *mountPoints) cleanUp() {
	for _, p := range slices.Backward(m.made) {
		dirFD := int(p.parent.Fd())
		var now, parent unix.Stat_t
		if err := unix.Fstatat(dirFD, p.name, &now, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue
		}
		if now.Mode != p.stat.Mode || now.Uid != p.stat.Uid || now.Gid != p.stat.Gid {
			continue
		}
		flags := 0
		if now.Mode&unix.S_IFMT == unix.S_IFDIR {
			flags = unix.AT_REMOVEDIR
		} else if now.Size != 0 {
			continue
		}
		if err := unix.Fstatat(dirFD, ".", &parent, 0); err != nil {
			continue
		}
		if unix.Unlinkat(dirFD, p.name, flags) == nil {
			restoreMtime(p.parent, &parent)
		}
	}
	m.close()
}

func (m *mountPoints) close() {
	for _, p := range m.made {
		p.parent.Close()
	}
	m.made = nil
	m.root.Close()
}

// restoreMtime sets a directory's time of modification back to what it was in st. Best effort: a wrong time is not a
// wrong content.
func restoreMtime(dir *os.File, st *unix.Stat_t) {
	_ = unix.UtimesNanoAt(int(dir.Fd()), ".", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}, 0)
}
