// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/executor"
)

// maxUserFile bounds /etc/passwd and /etc/group of an image.
const maxUserFile = 16 << 20

// resolveUser turns the user of a config and the groups of --group-add into numbers by the image's own files, and
// returns the home directory.
func resolveUser(ctx context.Context, files layer.Files, user string, groups []string) (executor.User, string, error) {
	passwd, err := readFile(ctx, files, "etc/passwd")
	if err != nil {
		return executor.User{}, "", err
	}
	group, err := readFile(ctx, files, "etc/group")
	if err != nil {
		return executor.User{}, "", err
	}
	u, home, err := executor.ResolveUser(passwd, group, user)
	if err != nil {
		return u, "", &Error{400, err.Error()}
	}
	for _, g := range groups {
		// A group alone is resolved as the explicit group of root.
		other, _, err := executor.ResolveUser(passwd, group, "0:"+g)
		if err != nil {
			return u, "", invalid("unable to find group %s: %v", g, err)
		}
		if !slices.Contains(u.AdditionalGroups, other.GID) {
			u.AdditionalGroups = append(u.AdditionalGroups, other.GID)
		}
	}
	return u, home, nil
}

// readFile reads a file of an image, nil when there is none. Symlinks are followed inside the image.
func readFile(ctx context.Context, files layer.Files, path string) ([]byte, error) {
	resolved, err := index.Resolve(files, path, true)
	if err != nil {
		return nil, err
	}
	e, ok := files.Lookup(resolved)
	if !ok || e.Type != index.File {
		return nil, nil
	}
	if e.Size > maxUserFile {
		return nil, fmt.Errorf("/%s of the image has %d bytes, more than %d", path, e.Size, maxUserFile)
	}
	f, err := files.OpenFile(ctx, resolved)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read /%s of the image: %w", path, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if err != nil {
		return nil, fmt.Errorf("read /%s of the image: %w", path, err)
	}
	return data, nil
}
