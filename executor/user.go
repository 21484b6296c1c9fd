// SPDX-License-Identifier: Apache-2.0

package executor

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxID is the largest user or group number that the kernel takes; one more means "leave as it is".
const maxID = 1<<32 - 2

// ResolveUser turns a user as an image or a command line names it ("", "name", "uid", "name:group", "uid:gid" and
// their mixtures) into numbers, and returns the home directory ("/" when nothing tells). passwd and group are the
// contents of the image's /etc/passwd and /etc/group, nil when it has none; lines that do not parse are skipped.
//
// It follows docker: "" is user 0; digits are always numbers, never names; a number needs no line; a user without an
// explicit group gets the groups that list it, and an explicit group is the only one.
func ResolveUser(passwd, group []byte, user string) (User, string, error) {
	name, groupName, explicitGroup := strings.Cut(user, ":")
	if explicitGroup && groupName == "" {
		explicitGroup = false
	}
	if name == "" {
		name = "0"
	}
	resolved := User{}
	home := "/"
	uid, numeric, err := parseID(name)
	if err != nil {
		return User{}, "", fmt.Errorf("user %q: %w", user, err)
	}
	entry, found := findLine(passwd, 6, func(f []string) bool {
		if numeric {
			n, ok, err := parseID(f[2])
			return err == nil && ok && n == uid
		}
		return f[0] == name
	})
	switch {
	case found:
		u, okU, errU := parseID(entry[2])
		g, okG, errG := parseID(entry[3])
		if !okU || !okG || errU != nil || errG != nil {
			return User{}, "", fmt.Errorf("user %q: its line in /etc/passwd has no valid numbers", user)
		}
		resolved.UID, resolved.GID = u, g
		name = entry[0]
		if entry[5] != "" {
			home = entry[5]
		}
	case numeric:
		resolved.UID = uid
	default:
		return User{}, "", fmt.Errorf("user %q: no such user in /etc/passwd of the image", name)
	}

	if explicitGroup {
		gid, numeric, err := parseID(groupName)
		if err != nil {
			return User{}, "", fmt.Errorf("group of user %q: %w", user, err)
		}
		if !numeric {
			entry, found := findLine(group, 3, func(f []string) bool { return f[0] == groupName })
			if !found {
				return User{}, "", fmt.Errorf("group %q: no such group in /etc/group of the image", groupName)
			}
			var ok bool
			if gid, ok, err = parseID(entry[2]); err != nil || !ok {
				return User{}, "", fmt.Errorf("group %q: its line in /etc/group has no valid number", groupName)
			}
		}
		resolved.GID = gid
		return resolved, home, nil
	}
	if found {
		resolved.AdditionalGroups = groupsOf(group, name)
	}
	return resolved, home, nil
}

// groupsOf returns the numbers of the groups whose member list has user, in the file's order.
func groupsOf(group []byte, user string) []uint32 {
	var gids []uint32
	for f := range lines(group, 4) {
		if !slices.Contains(strings.Split(f[3], ","), user) {
			continue
		}
		if gid, ok, err := parseID(f[2]); err == nil && ok && !slices.Contains(gids, gid) {
			gids = append(gids, gid)
		}
	}
	return gids
}

// findLine returns the fields of the first line for which match holds.
func findLine(file []byte, minFields int, match func([]string) bool) ([]string, bool) {
	for f := range lines(file, minFields) {
		if match(f) {
			return f, true
		}
	}
	return nil, false
}

// lines yields the fields of each line that has at least minFields of them.
func lines(file []byte, minFields int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		for line := range strings.Lines(string(file)) {
			line = strings.TrimSpace(line)
			if line == "" || line[0] == '#' {
				continue
			}
			f := strings.Split(line, ":")
			if len(f) >= minFields && !yield(f) {
				return
			}
		}
	}
}

// parseID parses a user or group number. ok is false when s is not made of digits and so is a name.
func parseID(s string) (id uint32, ok bool, err error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > maxID {
		return 0, false, fmt.Errorf("number %s is out of range", s)
	}
	return uint32(n), true, nil
}
