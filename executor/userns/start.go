// SPDX-License-Identifier: Apache-2.0

//go:build linux

package userns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The names that the program is executed by, the first and the second time. The arguments are the number of the pipe, and those
// that it is meant to have, with its name.
const (
	waitingName  = "slipway-userns-waiting"
	enteringName = "slipway-userns-entering"
)

// start is what the process is told, as JSON on the pipe, when it has its IDs. When it is Tied, the pipe then stays open until
// who has started it ends.
type start struct {
	State
	Tied bool
}

// Start starts cmd, which must be this program (/proc/self/exe), in new namespaces. Tied ends it, by SIGTERM, when the calling
// process has ended. Main must call Enter. The caller waits for cmd.
func Start(cmd *exec.Cmd, tied bool) error {
	if err := startIn(cmd, tied); err != nil {
		return fmt.Errorf("start the engine in a user namespace: %w", err)
	}
	return nil
}

func startIn(cmd *exec.Cmd, tied bool) error {
	origin, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	m := thisMachine()
	plan := planIDs(m)
	passSystemdSockets(cmd)
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	what, err := json.Marshal(start{
		State: State{UID: m.uid, MountNamespace: origin, Note: plan.note}, Tied: tied,
	})
	if err != nil {
		write.Close()
		return err
	}
	cmd.Args = append([]string{waitingName, strconv.Itoa(3 + len(cmd.ExtraFiles))}, cmd.Args...)
	cmd.ExtraFiles = append(cmd.ExtraFiles, read)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID
	if err := cmd.Start(); err != nil {
		write.Close()
		return refused(err)
	}
	if err = plan.write(m, cmd.Process.Pid); err == nil {
		_, err = write.Write(append(what, '\n'))
	}
	if err != nil {
		write.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return err
	}
	if tied {
		// Closed by the kernel when this process ends. An *os.File would be closed by its finalizer.
		if _, err := unix.FcntlInt(write.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return err
		}
	}
	return write.Close()
}

// passSystemdSockets hands on the sockets that systemd has given to this process.
func passSystemdSockets(cmd *exec.Cmd) {
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n <= 0 || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || len(cmd.ExtraFiles) > 0 {
		return
	}
	for fd := range n {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(3+fd), "systemd"))
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "LISTEN_PID=1") // what it is in its PID namespace
}

// refused explains an error of a kernel that makes no user namespace for this user.
func refused(err error) error {
	for _, s := range []struct{ path, value, remedy string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
	} {
		if b, readErr := os.ReadFile(s.path); readErr == nil && strings.TrimSpace(string(b)) == s.value {
			return fmt.Errorf("the system allows ordinary users none: as root, %s: %w", s.remedy, err)
		}
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the system refuses it (in a container, its seccomp profile may): %w", err)
	}
	return err
}

// Enter does the rest of what Start has begun, when this process is one that Start has started: after it, os.Args is what
// it was meant to be. It must be the first thing that the program does. An error is the end of the program.
func Enter() error {
	if len(os.Args) < 3 {
		return nil
	}
	switch os.Args[0] {
	case waitingName:
		return wait()
	case enteringName:
		if err := enter(); err != nil {
			return fmt.Errorf("set up the user namespace: %w", err)
		}
	}
	return nil
}

// wait waits for the IDs and executes the program again, as root.
func wait() error {
	pipe, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return err
	}
	fds := []unix.PollFd{{Fd: int32(pipe), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err == nil {
			break
		} else if err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
	if fds[0].Revents&unix.POLLIN == 0 {
		return errEnded
	}
	args := append([]string{enteringName}, os.Args[1:]...)
	return os.NewSyscallError("execve", unix.Exec("/proc/self/exe", args, os.Environ()))
}

// readStart reads what the process is told, and returns the pipe too.
func readStart() (start, *os.File, error) {
	var s start
	fd, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return s, nil, err
	}
	unix.CloseOnExec(fd)
	pipe := os.NewFile(uintptr(fd), "starter")
	err = json.NewDecoder(pipe).Decode(&s)
	return s, pipe, err
}

// enter makes the mounts private, so that nothing of ours appears outside while what is mounted outside appears here, and
// mounts a /proc for the PID namespace.
func enter() error {
	if !Inside() {
		return errors.New("this is the host's: the name is for this program's own use")
	}
	s, pipe, err := readStart()
	if err != nil {
		return err
	}
	if os.Getuid() != 0 || os.Getgid() != 0 {
		return fmt.Errorf("user and group are %d:%d there, not 0:0", os.Getuid(), os.Getgid())
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		if b, readErr := os.ReadFile("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"); readErr == nil && strings.TrimSpace(string(b)) == "1" {
			return fmt.Errorf("AppArmor takes its rights away: give the program a profile that allows userns, or, as root, sysctl kernel.apparmor_restrict_unprivileged_userns=0: %w", err)
		}
		return fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("mount /proc: parts of it are hidden here, as in a container, whose maker must leave it open (docker run --security-opt systempaths=unconfined): %w", err)
		}
		return fmt.Errorf("mount /proc: %w", err)
	}
	if s.Tied {
		go endWith(pipe)
	} else {
		pipe.Close()
	}
	state = &s.State
	os.Args = os.Args[2:]
	return nil
}

// endWith ends this process when the other end of f is closed.
func endWith(f *os.File) {
	_, _ = io.Copy(io.Discard, f)
	_ = unix.Kill(os.Getpid(), unix.SIGTERM)
}
