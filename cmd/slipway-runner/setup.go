// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runc/libcontainer/keys"
	"golang.org/x/sys/unix"
)

// This is the first process of a container, between libcontainer's C code, which has made the namespaces, and the user's
// command. libcontainer's own code for this part is made for every kernel and every configuration: it walks each path
// again for each mount and compiles the seccomp filter, which is most of what a short container costs (30 ms of CPU of
// 47). Here the work was planned by the runner; what remains is to carry it out, with the mount calls of Linux 5.2 and
// 5.12, which work on descriptors: a path inside the image is resolved once, in the kernel, bound to the root
// (openat2 with RESOLVE_IN_ROOT), and what is mounted is mounted on what was found.
//
// The order matters for safety, and is libcontainer's: everything that needs privilege first; then the seccomp filter,
// while that still takes CAP_SYS_ADMIN, or as the very last with no_new_privs; then the bounding set, user and
// capabilities; all descriptors closed before execve. The runner is told over libcontainer's socket, in its words.

// setup is the state of the process while it makes the container.
type setup struct {
	plan plan
	sync int // libcontainer's socket; -1 once it is closed
	log  int
	fifo int
	root int // the root file system, mounted on itself
	proc int // the container's /proc, not yet covered by anything
	dev  int // the container's /dev, -1 when the plan has none of ours
}

// runPlan carries out the plan and becomes the user's command. It does not return.
func runPlan() {
	debug.SetGCPercent(-1)
	// Credentials and filters belong to a thread: init functions run on the first one, from their beginning to their end. To lock it
	// here as well would only make Go's runtime start another.
	s := &setup{sync: -1, dev: -1, proc: -1}
	err := s.run()
	if s.sync >= 0 {
		arg, _ := json.Marshal(struct {
			Message string `json:"message"`
		}{err.Error()})
		err = s.tell("procError", arg)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(255)
}

func (s *setup) run() (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	if err := s.open(); err != nil {
		return err
	}
	if err := s.makeDev(); err != nil {
		return fmt.Errorf("make /dev: %w", err)
	}
	if s.plan.SyncEarly {
		// The runner sets limits and writes its state while we mount. The device filter comes with the limits, so from
		// here until they agree no device is made or opened.
		if err := errors.Join(s.tell("procHooks", nil), s.tell("procReady", nil)); err != nil {
			return err
		}
	}
	if err := s.joinKeyring(); err != nil {
		return err
	}
	if s.plan.Loopback {
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("bring up loopback: %w", err)
		}
	}
	if err := s.makeRoot(); err != nil {
		return err
	}
	if err := s.pivot(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(s.plan.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if s.plan.NoNewPrivileges {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("no new privileges: %w", err)
		}
	}
	if err := s.agree(); err != nil {
		return err
	}
	if err := s.reopenNull(); err != nil {
		return err
	}
	if !s.plan.NoNewPrivileges {
		if err := s.loadFilter(); err != nil {
			return err
		}
	}
	if err := s.becomeUser(); err != nil {
		return err
	}
	name, err := exec.LookPath(s.plan.Args[0])
	if err != nil {
		return err
	}
	if s.plan.NoNewPrivileges {
		if err := s.loadFilter(); err != nil {
			return err
		}
	}
	return s.exec(name)
}

// open finds the plan and libcontainer's descriptors.
func (s *setup) open() error {
	fd := func(name string) int {
		n, err := strconv.Atoi(os.Getenv("_LIBCONTAINER_" + name))
		if err != nil {
			return -1
		}
		return n
	}
	s.sync, s.log, s.fifo = fd("SYNCPIPE"), fd("LOGPIPE"), fd("FIFOFD")
	if s.sync < 0 || s.log < 0 || s.fifo < 0 {
		return errors.New("libcontainer's descriptors are missing")
	}
	os.Clearenv()
	var st unix.Stat_t
	if err := unix.Fstat(planFD, &st); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	b := make([]byte, st.Size)
	if n, err := unix.Pread(planFD, b, 0); err != nil || n < len(b) {
		return fmt.Errorf("read plan: %d of %d bytes: %w", n, len(b), err)
	}
	if err := json.Unmarshal(b, &s.plan); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	// Nothing of this may be there after execve, whatever happens in between.
	return unix.CloseRange(planFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
}

// syncMessage is one message on libcontainer's socket.
type syncMessage struct {
	Type  string          `json:"type"`
	Flags int             `json:"flags"`
	Arg   json.RawMessage `json:"arg,omitempty"`
}

func (s *setup) tell(what string, arg json.RawMessage) error {
	b, err := json.Marshal(syncMessage{Type: what, Arg: arg})
	if err != nil {
		return err
	}
	_, err = unix.Write(s.sync, b)
	return err
}

func (s *setup) hear(want string) error {
	var buf [4096]byte
	n, err := unix.Read(s.sync, buf[:])
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return fmt.Errorf("the runner has gone: %w", err)
	}
	var msg syncMessage
	if err := json.Unmarshal(buf[:n], &msg); err != nil {
		return fmt.Errorf("message of the runner: %w", err)
	}
	if msg.Type != want {
		return fmt.Errorf("the runner says %q instead of %q", msg.Type, want)
	}
	return nil
}

// agree waits until the runner has set the limits of the cgroup and of the process.
func (s *setup) agree() error {
	if !s.plan.SyncEarly {
		if err := s.tell("procHooks", nil); err != nil {
			return err
		}
	}
	if err := s.hear("procHooksDone"); err != nil {
		return err
	}
	if !s.plan.SyncEarly {
		if err := s.tell("procReady", nil); err != nil {
			return err
		}
	}
	return s.hear("procRun")
}

// joinKeyring leaves the runner's session keyring. The user of the container may search its own.
func (s *setup) joinKeyring() error {
	id, err := keys.JoinSessionKeyring(s.plan.Keyring)
	if errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("join session keyring: %w", err)
	}
	if err := keys.ModKeyringPerm(id, 0xffffffff, 0x80000); err != nil {
		return fmt.Errorf("session keyring: %w", err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// pivot makes the container's root the root of this process and lets go of the host's.
func (s *setup) pivot() error {
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Fchdir(s.root); err != nil {
		return fmt.Errorf("change to the root file system: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(old); err != nil {
		return err
	}
	// A slave: its unmounting must not reach the host.
	if err := unix.Mount("", ".", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("old root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	unix.Close(old)
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if cwd := s.plan.Cwd; cwd != "" {
		if err := makeDirs(cwd); err != nil {
			return err
		}
	}
	if s.plan.Readonly {
		err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		if err != nil {
			return fmt.Errorf("make the root file system read-only: %w", err)
		}
	}
	unix.Umask(0o022)
	return nil
}

// openDir opens a directory of the container. Links of /proc that lead to what a process has open are not followed: ours may
// lead to places that the container has no other way to (CVE-2024-21626).
func openDir(path string) (int, error) {
	return unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS,
	})
}

// makeDirs makes a directory of the container and those above it, as far as they are missing.
func makeDirs(path string) error {
	dir, err := openDir(path)
	if err == nil {
		return unix.Close(dir)
	}
	if errors.Is(err, unix.ELOOP) {
		return workingDirectoryError(path, err)
	}
	return os.MkdirAll(path, 0o755)
}

// changeDir makes a directory of the container the working directory.
func changeDir(path string) error {
	dir, err := openDir(path)
	if err != nil {
		return workingDirectoryError(path, err)
	}
	defer unix.Close(dir)
	if err := unix.Fchdir(dir); err != nil {
		return workingDirectoryError(path, err)
	}
	return nil
}

// workingDirectoryError has libcontainer's words, which classify looks for.
func workingDirectoryError(path string, err error) error {
	return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", path, err)
}

// reopenNull replaces standard streams that are the host's /dev/null by the container's.
func (s *setup) reopenNull() error {
	if s.dev < 0 {
		return nil
	}
	null := -1
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("standard stream %d: %w", fd, err)
		}
		if !isNull(&st) {
			continue
		}
		if null < 0 {
			var err error
			if null, err = unix.Openat(s.dev, "null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return fmt.Errorf("open /dev/null: %w", err)
			}
			defer unix.Close(null)
		}
		if err := unix.Dup3(null, fd, 0); err != nil {
			return fmt.Errorf("standard stream %d: %w", fd, err)
		}
	}
	return nil
}

func isNull(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// loadFilter puts the seccomp filter on this thread, the only one that survives execve.
func (s *setup) loadFilter() error {
	if len(s.plan.Filter) == 0 {
		return nil
	}
	program := unsafe.Slice((*unix.SockFilter)(unsafe.Pointer(&s.plan.Filter[0])), len(s.plan.Filter)/int(unsafe.Sizeof(unix.SockFilter{})))
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(s.plan.FilterFlags), uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(&prog)
	if errno != 0 {
		return fmt.Errorf("load seccomp filter: %w", errno)
	}
	return nil
}

// becomeUser gives up what the container's process must not have. System calls are made raw: only this thread goes on.
func (s *setup) becomeUser() error {
	cwdDone := false
	if err := changeDir(s.plan.Cwd); err == nil {
		cwdDone = true
	} else if !errors.Is(err, os.ErrPermission) { // the user may be allowed to where we are not
		return err
	}
	if err := s.findHome(); err != nil {
		return err
	}
	caps := s.plan.Caps
	for c := uintptr(0); c < 64; c++ {
		if caps.Bounding&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) { // the kernel has no more of them
				break
			}
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if err := s.setIDs(); err != nil {
		return err
	}
	if !cwdDone {
		if err := changeDir(s.plan.Cwd); err != nil {
			return err
		}
	}
	// What getcwd calls unreachable would be outside of the container.
	var buf [unix.PathMax]byte
	if n, err := unix.Getcwd(buf[:]); err != nil || n == 0 || buf[0] != '/' {
		return errors.New("working directory is outside of the container")
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{}
	for i := range data {
		shift := 32 * i
		data[i].Effective = uint32(caps.Effective >> shift)
		data[i].Permitted = uint32(caps.Permitted >> shift)
		data[i].Inheritable = uint32(caps.Inheritable >> shift)
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}

// findHome sets HOME from the container's accounts when nobody has named one, and PATH for the search of the command.
func (s *setup) findHome() error {
	home := false
	for _, kv := range s.plan.Env {
		name, value, _ := strings.Cut(kv, "=")
		switch name {
		case "HOME":
			home = true
		case "PATH":
			if err := os.Setenv("PATH", value); err != nil {
				return err
			}
		}
	}
	if home {
		return nil
	}
	dir := "/"
	if u, err := user.LookupUid(s.plan.UID); err == nil && u.Home != "" {
		dir = u.Home
	}
	s.plan.Env = append(s.plan.Env, "HOME="+dir)
	return nil
}

// setIDs gives the standard streams to the user and becomes it.
func (s *setup) setIDs() error {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("standard stream %d: %w", fd, err)
		}
		if int(st.Uid) == s.plan.UID || isNull(&st) {
			continue
		}
		if err := unix.Fchown(fd, s.plan.UID, -1); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("standard stream %d: %w", fd, err)
		}
	}
	if s.plan.KeepGroups {
		return s.setUser()
	}
	var groups unsafe.Pointer
	if len(s.plan.Groups) > 0 {
		groups = unsafe.Pointer(&s.plan.Groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(s.plan.Groups)), uintptr(groups), 0); errno != 0 {
		return fmt.Errorf("setgroups: %w", errno)
	}
	return s.setUser()
}

func (s *setup) setUser() error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(s.plan.GID), uintptr(s.plan.GID), uintptr(s.plan.GID)); errno != 0 {
		return fmt.Errorf("setgid: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(s.plan.UID), uintptr(s.plan.UID), uintptr(s.plan.UID)); errno != 0 {
		return fmt.Errorf("setuid: %w", errno)
	}
	return nil
}

// exec tells the runner that the container stands, waits for its word and becomes the command.
func (s *setup) exec(name string) error {
	unix.Close(s.sync)
	s.sync = -1
	unix.Close(s.log)
	fifo, err := unix.Open("/proc/self/fd/"+strconv.Itoa(s.fifo), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open exec fifo: %w", err)
	}
	if _, err := unix.Write(fifo, []byte("0")); err != nil {
		return fmt.Errorf("write exec fifo: %w", err)
	}
	argv, err := syscall.SlicePtrFromStrings(s.plan.Args)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(s.plan.Env)
	if err != nil {
		return err
	}
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if err := closeAllButStreams(); err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])))
		if errno != unix.EINTR {
			return &os.PathError{Op: "exec", Path: name, Err: errno}
		}
	}
}

//go:linkname isPollDescriptor internal/poll.IsPollDescriptor
func isPollDescriptor(fd uintptr) bool

// closeAllButStreams closes everything above the standard streams: nothing of ours may be reachable by a path that execve
// resolves (/proc/self/fd/…). The Go runtime's own two stay, for it ends the process when they are gone; they lead
// nowhere, and execve closes them.
func closeAllButStreams() error {
	const far = 1024 // the runtime's are small numbers
	from := uint(3)
	for fd := from; fd < far; fd++ {
		if !isPollDescriptor(uintptr(fd)) {
			continue
		}
		if fd > from {
			if err := unix.CloseRange(from, fd-1, 0); err != nil {
				return err
			}
		}
		from = fd + 1
	}
	return unix.CloseRange(from, ^uint(0), 0)
}
