// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// reap is process 1 of a container that was asked for with an init: it starts the command, hands signals on to it,
// reaps whatever becomes its child, and returns the command's exit code.
func reap(args []string) int {
	runtime.GOMAXPROCS(1)
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "slipway-runner reap: no command")
		return 125
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)

	path, err := exec.LookPath(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return startCode(err)
	}
	attr := &syscall.SysProcAttr{Setpgid: true}
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		attr = &syscall.SysProcAttr{Foreground: true, Ctty: 0} // its own group, in front of the terminal
	}
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2},
		Sys:   attr,
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "exec %s: %v\n", path, err)
		return startCode(err)
	}
	for sig := range signals {
		switch s := sig.(syscall.Signal); s {
		case unix.SIGCHLD:
			if code, done := reapChildren(pid); done {
				return code
			}
		case unix.SIGURG: // the Go runtime preempts itself with it
		case unix.SIGTTIN, unix.SIGTTOU: // ours alone: we are in the background of the terminal
		default:
			_ = unix.Kill(pid, s)
		}
	}
	return 255
}

// reapChildren waits for every child that has ended and says how main did if it was among them.
func reapChildren(main int) (code int, done bool) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return code, done
		}
		if pid == main && (ws.Exited() || ws.Signaled()) {
			done = true
			if ws.Signaled() {
				code = 128 + int(ws.Signal())
			} else {
				code = ws.ExitStatus()
			}
		}
	}
}

func startCode(err error) int {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return 127
	}
	return 126
}
