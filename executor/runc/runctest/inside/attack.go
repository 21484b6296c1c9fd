// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attacks are ways out of a container, by name. Their arguments say what there is to be reached on the host.
var attacks = map[string]func(args []string){
	"write":         writeFiles,
	"read":          readFiles,
	"calls":         calls,
	"unshare":       unshare,
	"unmount":       unmount,
	"remount":       remount,
	"process":       process,
	"unix":          connectUnix,
	"tcp":           connectTCP,
	"device":        device,
	"open":          openDevice,
	"chroot":        breakChroot,
	"fds":           useFDs,
	"exe":           overwriteExe,
	"watch":         watch,
	"setuid":        setuid,
	"release-agent": releaseAgent,
	"cgroup":        leaveCgroup,
	"handle":        openByHandle,
	"keys":          searchKeys,
	"advertise":     advertise,
	"nothing":       func([]string) {},
}

// report prints what came of one try. An error means that it was refused.
func report(err error, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	if err != nil {
		fmt.Printf("refused %s: %v\n", what, err)
		return
	}
	fmt.Printf("DONE %s\n", what)
}

// writeFiles opens files for writing, without writing.
func writeFiles(paths []string) {
	for _, p := range paths {
		fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		report(err, "open %s for writing", p)
		if err == nil {
			unix.Close(fd)
		}
	}
}

// readFiles looks for content in files and for entries in directories.
func readFiles(paths []string) {
	for _, p := range paths {
		f, err := os.Open(p)
		if err == nil {
			if st, statErr := f.Stat(); statErr == nil && st.IsDir() {
				_, err = f.Readdirnames(1) // an empty one is at its end
			} else {
				_, err = f.Read(make([]byte, 1))
			}
			f.Close()
		}
		report(err, "read %s", p)
	}
}

// calls makes system calls with arguments that do no harm and that the kernel looks at only once it has let the call through:
// any error other than EPERM and ENOSYS says that it has.
func calls([]string) {
	nosuch, _ := unix.BytePtrFromString("/no/such/path")
	ptr := uintptr(unsafe.Pointer(nosuch))
	for _, c := range []struct {
		name string
		nr   uintptr
		args [6]uintptr
	}{
		{"bpf", unix.SYS_BPF, [6]uintptr{}},
		{"userfaultfd", unix.SYS_USERFAULTFD, [6]uintptr{unix.O_CLOEXEC}},
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, [6]uintptr{}},
		{"io_uring_enter", unix.SYS_IO_URING_ENTER, [6]uintptr{^uintptr(0)}},
		{"io_uring_register", unix.SYS_IO_URING_REGISTER, [6]uintptr{^uintptr(0)}},
		{"kexec_load", unix.SYS_KEXEC_LOAD, [6]uintptr{0, 0, 0, 0xffff}},
		{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD, [6]uintptr{^uintptr(0), ^uintptr(0), 0, 0, 0xffff}},
		{"init_module", unix.SYS_INIT_MODULE, [6]uintptr{}},
		{"finit_module", unix.SYS_FINIT_MODULE, [6]uintptr{^uintptr(0)}},
		{"delete_module", unix.SYS_DELETE_MODULE, [6]uintptr{ptr}},
		{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, [6]uintptr{}},
		{"add_key", unix.SYS_ADD_KEY, [6]uintptr{}},
		{"request_key", unix.SYS_REQUEST_KEY, [6]uintptr{}},
		{"keyctl", unix.SYS_KEYCTL, [6]uintptr{unix.KEYCTL_GET_KEYRING_ID, uintptr(0xfffffffd)}},
		{"mount", unix.SYS_MOUNT, [6]uintptr{0, ptr, 0, unix.MS_BIND}},
		{"umount2", unix.SYS_UMOUNT2, [6]uintptr{ptr}},
		{"pivot_root", unix.SYS_PIVOT_ROOT, [6]uintptr{ptr, ptr}},
		{"fsopen", unix.SYS_FSOPEN, [6]uintptr{ptr}},
		{"fsconfig", unix.SYS_FSCONFIG, [6]uintptr{^uintptr(0)}},
		{"fsmount", unix.SYS_FSMOUNT, [6]uintptr{^uintptr(0)}},
		{"fspick", unix.SYS_FSPICK, [6]uintptr{^uintptr(0), ptr}},
		{"open_tree", unix.SYS_OPEN_TREE, [6]uintptr{^uintptr(0), ptr, unix.OPEN_TREE_CLONE}},
		{"move_mount", unix.SYS_MOVE_MOUNT, [6]uintptr{^uintptr(0), ptr, ^uintptr(0), ptr}},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR, [6]uintptr{^uintptr(0), ptr}},
		{"setns", unix.SYS_SETNS, [6]uintptr{^uintptr(0)}},
		{"clone3", unix.SYS_CLONE3, [6]uintptr{}},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, [6]uintptr{^uintptr(0)}},
		{"reboot", unix.SYS_REBOOT, [6]uintptr{}},
		{"swapon", unix.SYS_SWAPON, [6]uintptr{ptr}},
		{"swapoff", unix.SYS_SWAPOFF, [6]uintptr{ptr}},
		{"acct", unix.SYS_ACCT, [6]uintptr{ptr}},
		{"clock_settime", unix.SYS_CLOCK_SETTIME, [6]uintptr{0, 0}},
		{"settimeofday", unix.SYS_SETTIMEOFDAY, [6]uintptr{1, 0}},
		{"syslog", unix.SYS_SYSLOG, [6]uintptr{10}},
		{"quotactl", unix.SYS_QUOTACTL, [6]uintptr{^uintptr(0), ptr}},
		{"fanotify_init", unix.SYS_FANOTIFY_INIT, [6]uintptr{0xffff0000}},
		{"sethostname", unix.SYS_SETHOSTNAME, [6]uintptr{0, ^uintptr(0)}},
		{"setdomainname", unix.SYS_SETDOMAINNAME, [6]uintptr{0, ^uintptr(0)}},
		{"move_pages", unix.SYS_MOVE_PAGES, [6]uintptr{0, 0, 0, 0, 0, 0xffff}},
		{"vsock", unix.SYS_SOCKET, [6]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM}},
	} {
		r, _, errno := unix.RawSyscall6(c.nr, c.args[0], c.args[1], c.args[2], c.args[3], c.args[4], c.args[5])
		switch errno {
		case unix.EPERM, unix.ENOSYS:
			report(errno, "call %s", c.name)
		case 0:
			report(nil, "call %s: %#x", c.name, r)
			if c.name == "userfaultfd" || c.name == "vsock" {
				unix.Close(int(r))
			}
		default:
			report(nil, "call %s: %v", c.name, errno)
		}
	}
	runtime.KeepAlive(nosuch)
}

// namespaceFlags are the namespaces that one could make to have more power in.
var namespaceFlags = []struct {
	name string
	flag uintptr
}{
	{"user", unix.CLONE_NEWUSER},
	{"mount", unix.CLONE_NEWNS},
	{"pid", unix.CLONE_NEWPID},
	{"network", unix.CLONE_NEWNET},
	{"ipc", unix.CLONE_NEWIPC},
	{"uts", unix.CLONE_NEWUTS},
	{"cgroup", unix.CLONE_NEWCGROUP},
	{"user and mount", unix.CLONE_NEWUSER | unix.CLONE_NEWNS},
}

// unshare makes namespaces for this process and for children.
func unshare([]string) {
	for _, ns := range namespaceFlags {
		if ns.flag&unix.CLONE_NEWUSER == 0 { // a process with threads cannot
			done := make(chan error)
			go func() {
				runtime.LockOSThread() // the thread ends with the goroutine
				done <- unix.Unshare(int(ns.flag))
			}()
			report(<-done, "unshare %s", ns.name)
		}
		cmd := exec.Command("/proc/self/exe", "attack", "nothing")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: ns.flag}
		err := cmd.Start()
		report(err, "clone with a new %s namespace", ns.name)
		if err == nil {
			_ = cmd.Wait()
		}
	}
}

// unmount takes away what covers files.
func unmount(paths []string) {
	for _, p := range paths {
		report(unix.Unmount(p, unix.MNT_DETACH), "unmount %s", p)
	}
}

// remount makes mounts writable, in the old way and in the new one.
func remount(paths []string) {
	for _, p := range paths {
		report(unix.Mount("", p, "", unix.MS_REMOUNT|unix.MS_BIND, ""), "remount %s", p)
		report(unix.MountSetattr(unix.AT_FDCWD, p, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}), "mount_setattr %s", p)
	}
}

// process does what one does to another process, to one of the host.
func process(args []string) {
	pid, _ := strconv.Atoi(args[0])
	report(unix.Kill(pid, 0), "signal process %d", pid)
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
	report(asError(errno), "ptrace process %d", pid)
	fd, err := unix.PidfdOpen(pid, 0)
	report(err, "pidfd_open %d", pid)
	if err == nil {
		unix.Close(fd)
	}
	buf := make([]byte, 8)
	_, err = unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &buf[0], Len: 8}}, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}, 0)
	if errors.Is(err, unix.EFAULT) { // it was looked for in the other's memory
		err = nil
	}
	report(err, "read memory of process %d", pid)
	for _, name := range []string{"mem", "environ", "root/etc", "ns/mnt"} {
		p := fmt.Sprintf("/proc/%d/%s", pid, name)
		f, err := os.Open(p)
		report(err, "open %s", p)
		if err == nil {
			f.Close()
		}
	}
}

func asError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// connectUnix connects to sockets of the host: a name that begins with @ is an abstract one.
func connectUnix(names []string) {
	for _, name := range names {
		c, err := net.DialTimeout("unix", name, 5*time.Second)
		report(err, "connect to socket %s", name)
		if err == nil {
			c.Close()
		}
	}
}

func connectTCP(addrs []string) {
	for _, a := range addrs {
		c, err := net.DialTimeout("tcp", a, 3*time.Second)
		report(err, "connect to %s", a)
		if err == nil {
			c.Close()
		}
	}
}

// device makes device nodes and opens them. Arguments are TYPE:MAJOR:MINOR.
func device(args []string) {
	for _, a := range args {
		f := strings.Split(a, ":")
		mode := uint32(unix.S_IFCHR | 0o600)
		if f[0] == "b" {
			mode = unix.S_IFBLK | 0o600
		}
		major, _ := strconv.Atoi(f[1])
		minor, _ := strconv.Atoi(f[2])
		for _, dir := range []string{"/", "/dev", "/dev/shm", "/tmp"} {
			p := filepath.Join(dir, "node-"+strings.ReplaceAll(a, ":", "-"))
			if err := unix.Mknod(p, mode, int(unix.Mkdev(uint32(major), uint32(minor)))); err != nil {
				report(err, "make %s", p)
				continue
			}
			openDevice([]string{p})
			os.Remove(p)
		}
	}
}

func openDevice(paths []string) {
	for _, p := range paths {
		for _, how := range []int{unix.O_RDONLY, unix.O_WRONLY} {
			fd, err := unix.Open(p, how|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) { // allowed, but there is none
				err = nil
			}
			report(err, "open device %s (%d)", p, how)
			if err == nil {
				unix.Close(fd)
			}
		}
	}
}

// breakChroot is the classic way out of a chroot. The argument is a file that only the host has.
func breakChroot(args []string) {
	dir, err := os.MkdirTemp("/", "jail")
	if err == nil {
		defer os.RemoveAll(dir)
		err = unix.Chroot(dir)
	}
	if err != nil {
		report(err, "chroot")
		return
	}
	for range 64 {
		_ = unix.Chdir("..")
	}
	_ = unix.Chroot(".")
	_, err = os.Stat(args[0])
	report(err, "see %s after a double chroot", args[0])
	_, err = os.Stat("/.." + args[0])
	report(err, "see /..%s", args[0])
}

// useFDs looks at all descriptors of this process and of process 1, and at its working directory: a directory that leads to
// a file that only the host has, args[0], is a way out.
func useFDs(args []string) {
	for _, of := range []string{"self", "1"} {
		entries, err := os.ReadDir("/proc/" + of + "/fd")
		if err != nil {
			report(err, "list descriptors of %s", of)
			continue
		}
		for _, e := range entries {
			n, _ := strconv.Atoi(e.Name())
			link, _ := os.Readlink("/proc/" + of + "/fd/" + e.Name())
			if n > 2 && link != "" && !strings.HasPrefix(link, "anon_inode:") && !strings.HasPrefix(link, "/proc/") && !strings.HasPrefix(link, "/sys/fs/cgroup") {
				report(nil, "descriptor %d of %s: %s", n, of, link)
			}
			lookThrough(fmt.Sprintf("/proc/%s/fd/%d", of, n), args[0])
		}
		lookThrough("/proc/"+of+"/cwd", args[0])
		lookThrough("/proc/"+of+"/root", args[0])
	}
	lookThrough(".", args[0])
}

// lookThrough tries to see the host's file from a directory.
func lookThrough(dir, file string) {
	for _, up := range []string{"", "../../../../../../../../../../.."} {
		p := dir + "/" + up + file
		_, err := os.Stat(p)
		report(err, "see %s", p)
	}
}

// overwriteExe opens executables for writing: of process 1 and of the file that args name.
func overwriteExe(args []string) {
	for _, p := range append([]string{"/proc/1/exe"}, args...) {
		read, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			report(err, "open %s", p)
			continue
		}
		for _, how := range []int{unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC} {
			fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", read), how|unix.O_CLOEXEC, 0)
			report(err, "open %s for writing (%#x)", p, how)
			if err == nil {
				unix.Close(fd)
			}
		}
		unix.Close(read)
	}
}

// watch looks at all other processes of the container for a while, for something of the host that they have open while they
// start: args[0] is a file that only the host has. It says "watching" once and what it found.
func watch(args []string) {
	self := strconv.Itoa(os.Getpid())
	fmt.Println("watching")
	seen := map[string]bool{}
	looked := 0
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if _, err := os.Stat("/stop-watching"); err == nil {
			break
		}
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			if n := e.Name(); n[0] < '0' || n[0] > '9' || n == self || n == "1" {
				continue
			}
			dir := "/proc/" + e.Name()
			names := []string{"exe", "cwd", "root"}
			fds, _ := os.ReadDir(dir + "/fd")
			for _, fd := range fds {
				names = append(names, "fd/"+fd.Name())
			}
			for _, name := range names {
				p := dir + "/" + name
				looked++
				if name == "exe" {
					if fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
						unix.Close(fd)
						report(nil, "open the executable of a starting process for writing")
					}
					continue
				}
				for _, up := range []string{"/", "/../../../../../../../.."} {
					if _, err := os.Stat(p + up + args[0]); err == nil && !seen[name] {
						seen[name] = true
						report(nil, "see the host through %s", name)
					}
				}
			}
		}
	}
	if looked > 0 {
		fmt.Println("refused everything else")
	}
}

// setuid asks for more through a set-user-ID program: this one, which prints its effective user.
func setuid(args []string) {
	if len(args) == 1 && args[0] == "id" {
		if os.Geteuid() == 0 {
			report(nil, "become root by set-user-ID")
		} else {
			report(unix.EPERM, "become root by set-user-ID")
		}
		return
	}
	cmd := exec.Command(args[0], "attack", "setuid", "id")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		report(err, "run %s", args[0])
	}
}

// releaseAgent is the escape by the program that cgroup v1 starts on the host when a cgroup becomes empty: it needs a
// hierarchy that can be written to. Nothing is written.
func releaseAgent([]string) {
	dir, err := os.MkdirTemp("/", "cgroup")
	if err != nil {
		report(err, "make a directory")
		return
	}
	defer os.Remove(dir)
	for _, data := range []string{"memory", "cpu", "freezer", "pids"} {
		err := unix.Mount("cgroup", dir, "cgroup", 0, data)
		report(err, "mount cgroup %s", data)
		if err == nil {
			fd, err := unix.Open(dir+"/cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
			report(err, "open cgroup.procs of %s for writing", data)
			if err == nil {
				unix.Close(fd)
			}
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	found, _ := filepath.Glob("/sys/fs/cgroup/*/release_agent")
	for _, p := range append(found, "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/memory/release_agent") {
		fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		report(err, "open %s for writing", p)
		if err == nil {
			unix.Close(fd)
		}
	}
}

// leaveCgroup makes cgroups beside its own and opens the files that move processes and lift limits.
func leaveCgroup([]string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for _, procs := range append(dirs, "/sys/fs/cgroup/cgroup.procs") {
		var fs unix.Statfs_t
		dir := filepath.Dir(procs)
		if unix.Statfs(dir, &fs) != nil || fs.Type != unix.CGROUP_SUPER_MAGIC && fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue // not a hierarchy
		}
		fd, err := unix.Open(procs, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		report(err, "open %s for writing", procs)
		if err == nil {
			unix.Close(fd)
		}
		child := dir + "/slipway-attack"
		err = os.Mkdir(child, 0o755)
		report(err, "make %s", child)
		if err == nil {
			os.Remove(child)
		}
	}
	for _, p := range []string{"memory/memory.limit_in_bytes", "pids/pids.max", "devices/devices.allow", "memory.max", "pids.max"} {
		fd, err := unix.Open("/sys/fs/cgroup/"+p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		report(err, "open %s for writing", p)
		if err == nil {
			unix.Close(fd)
		}
	}
}

// openByHandle opens the root of the file system that args[0] is in by its number, past all mounts.
func openByHandle(args []string) {
	mount, err := unix.Open(args[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		report(err, "open %s", args[0])
		return
	}
	// Inode 2 is the root of ext4.
	handle := unix.NewFileHandle(1, []byte{2, 0, 0, 0, 0, 0, 0, 0})
	fd, err := unix.OpenByHandleAt(mount, handle, unix.O_RDONLY)
	if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) { // allowed, but another file system
		err = nil
	}
	report(err, "open the root of the file system of %s by its number", args[0])
	if err == nil {
		unix.Close(fd)
	}
}

// searchKeys looks for a key of the host by its description.
func searchKeys(args []string) {
	_, err := unix.KeyctlSearch(unix.KEY_SPEC_SESSION_KEYRING, "user", args[0], 0)
	report(err, "find key %s in the session keyring", args[0])
	f, err := os.Open("/proc/keys")
	if err == nil {
		var b []byte
		b, err = io.ReadAll(f)
		f.Close()
		if err == nil && !bytes.Contains(b, []byte(args[0])) {
			err = errors.New("not in it")
		}
	}
	report(err, "find key %s in /proc/keys", args[0])
}

// advertise sends a router advertisement to everybody on the network, with the prefix 2001:db8:bad::/64 for addresses and a lifetime
// of the router of 0. Who believes it is for the test to find out.
func advertise([]string) {
	eth, err := net.InterfaceByName("eth0")
	if err != nil {
		report(err, "find eth0")
		return
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		report(err, "open a packet socket")
		return
	}
	defer unix.Close(fd)
	source, all := net.ParseIP("fe80::bad"), net.ParseIP("ff02::1")
	message := []byte{134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	message = append(message, 3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0)
	message = append(message, net.ParseIP("2001:db8:bad::")...)
	pseudo := append(append(append([]byte{}, source...), all...), 0, 0, 0, byte(len(message)), 0, 0, 0, 58)
	var sum uint32
	for i, b := range append(pseudo, message...) {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	message[2], message[3] = byte(^sum>>8), byte(^sum)
	frame := append([]byte{0x33, 0x33, 0, 0, 0, 1}, eth.HardwareAddr...)
	frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(message)), 58, 255)
	frame = append(append(append(frame, source...), all...), message...)
	err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth.Index})
	report(err, "send a router advertisement")
}
