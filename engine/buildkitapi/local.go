// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The frontend attributes by which a client on the same host saves the transfer of its directories. They count only
// when the kernel says that the client is the engine's own user, and HostID that its paths are ours; otherwise the
// directory is transferred through the session as for any other client.
const (
	// LocalDirAttr + NAME is the absolute path of the local source NAME.
	LocalDirAttr = "slipway.localdir:"
	// OutputFileAttr + N is the absolute path of a file that the client has made for its N-th output, for the engine to write
	// what it would have sent through the session. A client looks whether that has happened: the file is not empty.
	OutputFileAttr = "slipway.output:"
	// HostAttr is the client's HostID.
	HostAttr = "slipway.host"
)

// takeLocalDirs removes the attributes from attrs and returns the directories that the engine may read itself.
func takeLocalDirs(attrs map[string]string, sameUser bool) (map[string]string, error) {
	trusted := sameUser && ourHost(attrs)
	delete(attrs, HostAttr)
	dirs := map[string]string{}
	for attr, dir := range attrs {
		name, ok := strings.CutPrefix(attr, LocalDirAttr)
		if !ok {
			continue
		}
		delete(attrs, attr)
		if name == "" || !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%s%s=%s: want an absolute path", LocalDirAttr, name, dir)
		}
		if !trusted {
			continue
		}
		if info, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("local source %q: %w", name, err)
		} else if !info.IsDir() {
			return nil, fmt.Errorf("local source %q: %s is not a directory", name, dir)
		}
		dirs[name] = filepath.Clean(dir)
	}
	return dirs, nil
}

// ourHost says whether a client's paths are ours.
func ourHost(attrs map[string]string) bool {
	ours, err := HostID()
	return err == nil && attrs[HostAttr] == ours
}

// takeOutputFiles removes the attributes from attrs and returns the files that the engine may write itself, by output.
func takeOutputFiles(attrs map[string]string, sameUser bool) (map[int]string, error) {
	trusted := sameUser && ourHost(attrs)
	files := map[int]string{}
	for attr, path := range attrs {
		number, ok := strings.CutPrefix(attr, OutputFileAttr)
		if !ok {
			continue
		}
		delete(attrs, attr)
		n, err := strconv.Atoi(number)
		if err != nil || n < 0 || !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%s%s=%s: want the number of an output and an absolute path", OutputFileAttr, number, path)
		}
		if trusted {
			files[n] = filepath.Clean(path)
		}
	}
	return files, nil
}

// openOutputFile opens a client's file for writing. It must be there, a plain file, and our own user's.
func openOutputFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); !info.Mode().IsRegular() || !ok || st.Uid != uint32(os.Geteuid()) {
			err = fmt.Errorf("%s is no plain file of the engine's user", path)
		}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// sweepTransfers removes what builds of an engine that was killed have left.
func sweepTransfers(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
