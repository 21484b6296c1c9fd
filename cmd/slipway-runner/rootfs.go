// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// makeRoot mounts everything in the root file system. Afterwards s.root is what the process pivots to.
func (s *setup) makeRoot() error {
	// What is mounted on the host from now on reaches the container's mounts, and nothing the other way.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount propagation: %w", err)
	}
	if err := unix.Mount(s.plan.Rootfs, s.plan.Rootfs, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	var err error
	if s.root, err = unix.Open(s.plan.Rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open root file system: %w", err)
	}
	var later []int
	for i := range s.plan.Mounts {
		m := &s.plan.Mounts[i]
		fd, err := s.mount(m)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
		if m.ReadonlyLater {
			later = append(later, fd)
		}
	}
	for _, fd := range later {
		if err := setAttr(fd, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}, false); err != nil {
			return fmt.Errorf("make a tmpfs read-only: %w", err)
		}
	}
	if err := s.sysctls(); err != nil {
		return err
	}
	for _, p := range s.plan.ReadonlyPaths {
		if err := s.makeReadonly(p); err != nil {
			return fmt.Errorf("make %s read-only: %w", p, err)
		}
	}
	return s.mask()
}

// mount makes one mount and returns its descriptor.
func (s *setup) mount(m *planMount) (int, error) {
	at, err := s.target(m)
	if err != nil {
		return -1, err
	}
	defer unix.Close(at)
	var fd int
	switch {
	case isDev(m):
		fd = s.dev
	case m.Bind:
		fd, err = bind(m)
	case m.FS == "cgroup" && len(m.Hierarchies) > 0:
		fd, err = newFS("tmpfs", "tmpfs", [][2]string{{"mode", "755"}}, m.Attr&^unix.MOUNT_ATTR_RDONLY)
	case m.FS == "cgroup":
		fd, err = newFS("cgroup2", "cgroup", nil, m.Attr)
	default:
		fd, err = newFS(m.FS, m.Source, m.Params, m.Attr)
	}
	if err != nil {
		return -1, err
	}
	if err := attach(fd, at); err != nil {
		return -1, err
	}
	switch {
	case m.FS == "proc" && m.Target == "/proc":
		s.proc = fd
	case len(m.Hierarchies) > 0:
		return fd, mountHierarchies(fd, m)
	}
	return fd, nil
}

// newFS makes a file system that is not mounted anywhere yet.
func newFS(name, source string, params [][2]string, attr uint64) (int, error) {
	fs, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", source); err != nil {
		return -1, fmt.Errorf("%s: source: %w", name, err)
	}
	for _, p := range params {
		if p[1] == "" {
			err = unix.FsconfigSetFlag(fs, p[0])
		} else {
			err = unix.FsconfigSetString(fs, p[0], p[1])
		}
		if err != nil {
			return -1, fmt.Errorf("%s: option %s=%s: %w", name, p[0], p[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(attr))
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	return fd, nil
}

// bind makes a mount of what is at a path of the host, not mounted anywhere yet.
func bind(m *planMount) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if m.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, flags)
	if err != nil {
		return -1, fmt.Errorf("source %s: %w", m.Source, err)
	}
	attr := unix.MountAttr{}
	if m.Private {
		attr.Propagation = unix.MS_PRIVATE
	}
	if m.ReadonlyAll {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if attr != (unix.MountAttr{}) {
		if err := setAttr(fd, &attr, true); err != nil {
			return -1, err
		}
	}
	if m.Attr != 0 {
		return fd, setAttr(fd, &unix.MountAttr{Attr_set: m.Attr}, false)
	}
	return fd, nil
}

func setAttr(fd int, attr *unix.MountAttr, recursive bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(fd, "", flags, attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// attach mounts fd on at.
func attach(fd, at int) error {
	if err := unix.MoveMount(fd, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// target opens the place of a mount in the container, making it when it is missing: below an earlier mount, that is,
// for the engine has made what belongs in the root file system. Kernel file systems are mounted on directories of
// exactly that name, never through a link, and nothing is mounted inside /proc.
func (s *setup) target(m *planMount) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	switch m.FS {
	case "proc", "sysfs":
		how.Flags |= unix.O_DIRECTORY | unix.O_NOFOLLOW
		how.Resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	fd, err := unix.Openat2(s.root, m.Target, &how)
	if errors.Is(err, unix.ENOENT) {
		fd, err = s.makeTarget(m, how)
	}
	if err != nil {
		return -1, fmt.Errorf("mount point: %w", err)
	}
	if m.FS != "proc" {
		if err := outsideProc(fd); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// outsideProc refuses a mount point in a proc file system: programs believe what they read there.
func outsideProc(fd int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if st.Type == unix.PROC_SUPER_MAGIC {
		return errors.New("cannot be mounted because it is inside /proc")
	}
	return nil
}

// makeTarget makes the missing components of a mount point.
func (s *setup) makeTarget(m *planMount, how unix.OpenHow) (int, error) {
	wantFile := false
	if m.Bind {
		var st unix.Stat_t
		if err := unix.Stat(m.Source, &st); err != nil {
			return -1, fmt.Errorf("source %s: %w", m.Source, err)
		}
		wantFile = st.Mode&unix.S_IFMT != unix.S_IFDIR
	}
	dirHow := how
	dirHow.Flags = unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY
	parts := strings.Split(strings.Trim(path.Clean(m.Target), "/"), "/")
	dir, err := unix.Openat2(s.root, "/", &dirHow)
	for i, name := range parts {
		if err != nil {
			return -1, err
		}
		if i == len(parts)-1 && wantFile {
			var f int
			f, err = unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
			if err == nil {
				unix.Close(f)
			}
		} else {
			err = unix.Mkdirat(dir, name, 0o755)
		}
		unix.Close(dir)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, err
		}
		// From the root again, so that links are followed inside it.
		next := dirHow
		if i == len(parts)-1 {
			next = how
		}
		dir, err = unix.Openat2(s.root, "/"+strings.Join(parts[:i+1], "/"), &next)
	}
	return dir, err
}

// devices are the nodes of every container's /dev, as the runtime spec has them.
var devices = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

// devLinks are the links of every container's /dev.
var devLinks = [][2]string{
	{"/proc/self/fd", "fd"},
	{"/proc/self/fd/0", "stdin"},
	{"/proc/self/fd/1", "stdout"},
	{"/proc/self/fd/2", "stderr"},
	{"/proc/kcore", "core"},
	{"pts/ptmx", "ptmx"},
}

// isDev says whether m is the container's own /dev.
func isDev(m *planMount) bool { return m.FS == "tmpfs" && m.Source == "tmpfs" && m.Target == "/dev" }

// makeDev makes the file system for /dev, not mounted yet.
func (s *setup) makeDev() error {
	i := slices.IndexFunc(s.plan.Mounts, func(m planMount) bool { return isDev(&m) })
	if i < 0 {
		return nil
	}
	m := &s.plan.Mounts[i]
	dev, err := newFS(m.FS, m.Source, m.Params, m.Attr)
	if err != nil {
		return err
	}
	s.dev = dev
	umask := unix.Umask(0)
	defer unix.Umask(umask)
	for _, d := range devices {
		if s.plan.BindDevices {
			break
		}
		if err := unix.Mknodat(dev, d.name, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make device %s: %w", d.name, err)
		}
	}
	for _, l := range devLinks {
		if l[1] == "core" && unix.Access(l[0], unix.F_OK) != nil { // a kernel without it
			continue
		}
		if err := unix.Symlinkat(l[0], dev, l[1]); err != nil {
			return fmt.Errorf("make link %s: %w", l[1], err)
		}
	}
	return nil
}

// mountHierarchies mounts the hierarchies of cgroup v1, as the container's cgroup namespace shows them.
func mountHierarchies(dir int, m *planMount) error {
	if err := unix.Fchdir(dir); err != nil {
		return err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if m.Attr&unix.MOUNT_ATTR_RDONLY != 0 {
		flags |= unix.MS_RDONLY
	}
	for _, h := range m.Hierarchies {
		if err := unix.Mkdirat(dir, h.Name, 0o755); err != nil {
			return fmt.Errorf("hierarchy %s: %w", h.Name, err)
		}
		source := "cgroup"
		if h.Name == "systemd" {
			source = h.Name
		}
		if err := unix.Mount(source, h.Name, "cgroup", flags, h.Data); err != nil {
			return fmt.Errorf("hierarchy %s: %w", h.Name, err)
		}
		for one := range strings.SplitSeq(h.Name, ",") {
			if one == h.Name {
				break
			}
			if err := unix.Symlinkat(h.Name, dir, one); err != nil {
				return fmt.Errorf("hierarchy %s: %w", one, err)
			}
		}
	}
	return unix.Chdir("/")
}

// openProc returns the container's /proc, and refuses to do without.
func (s *setup) openProc() (int, error) {
	if s.proc < 0 {
		return -1, errors.New("the container has no /proc")
	}
	return s.proc, nil
}

// sysctls are written to the container's own proc before it is covered.
func (s *setup) sysctls() error {
	for _, kv := range s.plan.Sysctls {
		proc, err := s.openProc()
		if err != nil {
			return err
		}
		fd, err := unix.Openat2(proc, "sys/"+kv[0], &unix.OpenHow{
			Flags: unix.O_WRONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", kv[0], err)
		}
		_, err = unix.Write(fd, []byte(kv[1]))
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", kv[0], err)
		}
	}
	return nil
}

// inside opens a path of the container, -1 when there is nothing.
func (s *setup) inside(p string) (int, error) {
	fd, err := unix.Openat2(s.root, p, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) {
		return -1, nil
	}
	return fd, err
}

// makeReadonly covers a path with itself, read-only.
func (s *setup) makeReadonly(p string) error {
	at, err := s.inside(p)
	if err != nil || at < 0 {
		return err
	}
	defer unix.Close(at)
	fd, err := unix.OpenTree(at, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := setAttr(fd, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}, false); err != nil {
		return err
	}
	return attach(fd, at)
}

// mask covers files with /dev/null and directories with an empty, read-only file system, the same for all.
func (s *setup) mask() error {
	empty := -1
	for _, p := range s.plan.Masked {
		if err := s.maskPath(p, &empty); err != nil {
			return fmt.Errorf("mask %s: %w", p, err)
		}
	}
	if empty >= 0 {
		unix.Close(empty)
	}
	return nil
}

func (s *setup) maskPath(p string, empty *int) error {
	at, err := s.inside(p)
	if err != nil || at < 0 {
		return err
	}
	defer unix.Close(at)
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if s.dev < 0 {
			return errors.New("the container has no /dev")
		}
		fd, err := unix.OpenTree(s.dev, "null", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return fmt.Errorf("/dev/null: %w", err)
		}
		defer unix.Close(fd)
		return attach(fd, at)
	}
	if *empty < 0 {
		params := [][2]string{{"nr_blocks", "1"}, {"nr_inodes", "1"}, {"ro", ""}}
		if *empty, err = newFS("tmpfs", "tmpfs", params, unix.MOUNT_ATTR_RDONLY); err != nil {
			return err
		}
		return attach(*empty, at)
	}
	fd, err := unix.OpenTree(*empty, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return attach(fd, at)
}
