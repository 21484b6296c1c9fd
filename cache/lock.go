// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked is wrapped by the error of Open while another process has the store open; errors.As finds a LockedError.
var ErrLocked = errors.New("the store is in use")

// LockedError says who has a store open.
type LockedError struct {
	Dir string
	// Pid is the process that has it open; 0 when it did not say.
	Pid int
}

func (e *LockedError) Error() string {
	who := "another process"
	if e.Pid != 0 {
		who = fmt.Sprintf("process %d", e.Pid)
	}
	return fmt.Sprintf("%s is in use by %s: wait for it to end, stop it, or choose another directory (--root)", e.Dir, who)
}

// Is makes errors.Is(err, ErrLocked) true.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// lock takes the lock of dir without waiting. The lock goes with the process, however that ends.
func lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		b, _ := io.ReadAll(io.LimitReader(f, 32))
		f.Close()
		pid, _ := strconv.Atoi(strings.TrimSpace(string(b))) // 0 when its owner is just about to write it
		if pid == 1 {
			pid = 0 // the number that its owner has in a PID namespace of its own: an ordinary user's engine
		}
		return nil, &LockedError{Dir: dir, Pid: pid}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// unlock gives the lock back. The file stays: removing it could take away the lock of somebody who has just opened it.
func unlock(f *os.File) error {
	return errors.Join(f.Truncate(0), f.Close())
}
