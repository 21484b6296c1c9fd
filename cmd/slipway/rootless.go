// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/userns"
)

// For an ordinary user the engine runs in a user namespace (executor/userns). Commands do not: they are the user's, on the host,
// and what they write is the user's. So the engine is always another process: `slipway daemon` and `buildkitd` start
// themselves there and stay outside to hand on signals, a command that starts an engine starts it there, and --standalone gets one that
// ends with the command.

// ordinaryUser says whether this process is an ordinary user's, or such a user's engine in its namespace, rather than root of
// the machine or of a container.
func ordinaryUser() bool {
	if os.Geteuid() != 0 || userns.Started() != nil {
		return true
	}
	// Who calls himself by another name than root is in the hands of a tool like rootlesskit.
	name := os.Getenv("USER")
	return userns.Inside() && name != "" && name != "root"
}

// userID is the ordinary user's, as the host knows it.
func userID() int {
	if s := userns.Started(); s != nil {
		return s.UID
	}
	return os.Getuid()
}

// needsNamespace says whether an engine cannot run in this process.
func needsNamespace() bool { return os.Geteuid() != 0 }

// daemonInside runs this program again, with the same arguments, in a user namespace, and ends with it.
func (a *app) daemonInside(ctx context.Context) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// The terminal's Ctrl-C is for this process, which hands it on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := userns.Start(cmd, true); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(hangups)
	go func() {
		told := ctx.Done()
		var at time.Time
		for {
			select {
			case <-told:
				_ = cmd.Process.Signal(unix.SIGTERM)
				told, at = nil, time.Now()
				// Whoever asks a second time does not want to wait. Tools that tell a process and its group say it twice at once.
				signal.Notify(hangups, unix.SIGINT, unix.SIGTERM)
			case s := <-hangups:
				if s == unix.SIGINT || s == unix.SIGTERM {
					if time.Since(at) < time.Second {
						continue
					}
					s = unix.SIGKILL
				}
				_ = cmd.Process.Signal(s)
			case <-ended:
				return
			}
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			return fmt.Errorf("the engine was killed: %s", ws.Signal())
		}
		return &exitError{code: exit.ExitCode()} // it has said why
	}
	return err
}

// startStandalone starts an engine for this command alone. It ends with the command, however that ends.
func (a *app) startStandalone(ctx context.Context) (net.Conn, dialFunc, error) {
	const name = "slipway.sock"
	dir, err := os.MkdirTemp("", "slipway-")
	if err == nil && len(filepath.Join(dir, name)) > maxSocketPath {
		err = os.Remove(dir)
		if err == nil {
			dir, err = os.MkdirTemp("/tmp", "slipway-") // nobody else may enter it there either
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("start the engine: %w", err)
	}
	socket := filepath.Join(dir, name)
	args := append(a.daemonArgs(socket, "0"), "--impatient")
	if a.jobs > 0 {
		args = append(args, "--jobs", strconv.Itoa(a.jobs))
	}
	if a.maxMemory > 0 {
		args = append(args, "--max-memory", strconv.FormatInt(int64(a.maxMemory), 10))
	}
	for _, file := range a.extraCA {
		args = append(args, "--extra-ca", file)
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "slipway"
	cmd.Env = daemonEnv(os.Environ())
	cmd.Stderr = a.err
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := userns.Start(cmd, true); err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	a.closes = append(a.closes, func() error {
		_ = cmd.Process.Signal(unix.SIGTERM)
		<-exited
		return os.RemoveAll(dir)
	})
	dial := unixDialer(socket)
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		conn, err := dial(ctx)
		if err == nil {
			return conn, dial, nil
		}
		select {
		case err := <-exited:
			exited <- err
			return nil, nil, &exitError{code: 1} // it has said why
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// privateDir makes a directory of this user's in a place where others can make things too, or checks the one that is there: a
// socket in somebody else's directory would be somebody else's engine.
func privateDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != uint32(os.Geteuid()) || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a directory that belongs to you and is closed to others: remove it, or set $XDG_RUNTIME_DIR or --host", dir)
	}
	return nil
}
