// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	confs "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// volumes keeps volumes as directories, DIR/NAME/_data. Named ones last; an anonymous one (its name is an ID) goes with the
// container that it was made for. Methods may be called concurrently.
type volumes struct {
	dir string
	mu  sync.Mutex // one volume is made at a time
}

// anonymousMark is a file in the directory of a volume that nobody named: what is found marked at the start was left by an
// engine that died.
const anonymousMark = "anonymous"

func openVolumes(dir string) (*volumes, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("open the volumes: %w", err)
	}
	v := &volumes{dir: dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open the volumes: %w", err)
	}
	for _, e := range entries {
		if _, err := os.Lstat(filepath.Join(dir, e.Name(), anonymousMark)); err == nil {
			if err := v.remove(e.Name()); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

// data is where the content of a volume is.
func (v *volumes) data(name string) string { return filepath.Join(v.dir, name, "_data") }

// ensure makes the volume unless it is there. A new one starts as a copy of the directory from, if that exists; from is resolved
// by the caller. It returns the content's directory.
func (v *volumes) ensure(name string, anonymous bool, from string) (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	data := v.data(name)
	if _, err := os.Lstat(data); err == nil {
		if from == "" {
			return data, nil
		}
		// Docker fills an empty volume at each use, not only a new one.
		if entries, err := os.ReadDir(data); err != nil || len(entries) > 0 {
			return data, err
		}
		return data, v.fillUsed(data, from)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("volume %s: %w", name, err)
	}
	// Made aside and renamed, so that a crash leaves no half-filled volume under its name.
	tmp, err := os.MkdirTemp(v.dir, ".new-")
	if err != nil {
		return "", fmt.Errorf("make volume %s: %w", name, err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o711); err != nil {
		return "", fmt.Errorf("make volume %s: %w", name, err)
	}
	inner := filepath.Join(tmp, "_data")
	if err := os.Mkdir(inner, 0o755); err != nil {
		return "", fmt.Errorf("make volume %s: %w", name, err)
	}
	if anonymous {
		if err := os.WriteFile(filepath.Join(tmp, anonymousMark), nil, 0o600); err != nil {
			return "", fmt.Errorf("make volume %s: %w", name, err)
		}
	}
	if from != "" {
		if err := fill(inner, from); err != nil {
			return "", fmt.Errorf("make volume %s: %w", name, err)
		}
	}
	if err := os.Rename(tmp, filepath.Join(v.dir, name)); err != nil {
		return "", fmt.Errorf("make volume %s: %w", name, err)
	}
	return data, nil
}

// fillUsed is fill for a volume that containers may be using: it is copied aside, and what is done goes in by names. Whoever writes to the volume
// meanwhile could otherwise lead the copy elsewhere, by a symlink where a directory of it is due. What is there already stays.
func (v *volumes) fillUsed(data, from string) error {
	tmp, err := os.MkdirTemp(v.dir, ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	inner := filepath.Join(tmp, "_data")
	if err := os.Mkdir(inner, 0o755); err != nil {
		return err
	}
	if err := fill(inner, from); err != nil {
		return err
	}
	// The directory itself is mounted in the containers and cannot be replaced.
	to, err := unix.Open(data, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: data, Err: err}
	}
	defer unix.Close(to)
	entries, err := os.ReadDir(inner)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := filepath.Join(inner, e.Name())
		err := unix.Renameat2(unix.AT_FDCWD, name, to, e.Name(), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			err = os.RemoveAll(name)
		}
		if err != nil {
			return fmt.Errorf("move %s into the volume: %w", e.Name(), err)
		}
	}
	return confs.CopyDir(data, inner) // what it is itself: nothing is in it any more
}

// fill copies the directory from to dir with owners, modes, times, links and attributes.
func fill(dir, from string) error {
	info, err := os.Lstat(from)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	return confs.CopyDir(dir, from)
}

// remove deletes a volume with its content.
func (v *volumes) remove(name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	// The name goes first, so that a crash leaves something that is plainly rubbish.
	dir := filepath.Join(v.dir, name)
	gone := filepath.Join(v.dir, ".gone-"+name)
	if err := os.Rename(dir, gone); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	return nil
}
