// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The frontend attributes by which a client on the same host saves the transfer of its directories. They count only
// when the kernel says that the client is the engine's own user, and HostID that its paths are ours; otherwise the
// directory is transferred through the session as for any other client.
const (
	// LocalDirAttr + NAME is the absolute path of the local source NAME.
	LocalDirAttr = "slipway.localdir:"
	// HostAttr is the client's HostID.
	HostAttr = "slipway.host"
)

// takeLocalDirs removes the attributes from attrs and returns the directories that the engine may read itself.
func takeLocalDirs(attrs map[string]string, sameUser bool) (map[string]string, error) {
	host := attrs[HostAttr]
	delete(attrs, HostAttr)
	ours, err := HostID()
	trusted := sameUser && err == nil && host == ours
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
