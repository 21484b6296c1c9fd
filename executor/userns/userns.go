// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package userns starts this program for an ordinary user: in a user namespace in which the user is root, with a mount and a
// PID namespace of its own, so that it may mount, make namespaces and change owners without having any right on the host.
//
// The helpers newuidmap and newgidmap give the namespace the further IDs that /etc/subuid and /etc/subgid grant the user; they are
// the only programs with more rights than the user's that are ever called. Without them only the user's own ID exists inside
// (State.Note says so).
//
// IDs can be given only from outside and after the namespace is there, and a program loses its capabilities when it is executed
// before. So the program is executed twice: Start starts it in the namespaces, where Enter waits for the IDs and executes it
// again, this time as root; then Enter makes the mounts private and mounts a /proc. When that process ends, for whatever reason,
// the kernel kills all others in its PID namespace, and what they have mounted is gone.
//
// A process that somebody else has put into a user namespace (rootlesskit, an unprivileged container) needs none of that:
// Inside says that it is in one.
package userns

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Inside says whether this process is in a user namespace that does not have all of the host's IDs.
var Inside = sync.OnceValue(func() bool {
	ids, err := readMap("/proc/self/uid_map")
	return err == nil && !(len(ids) == 1 && ids[0] == Range{0, 0, math.MaxUint32})
})

// Range is a row of a uid_map or gid_map: Count IDs from Inside on are those from Outside on in the parent namespace.
type Range struct{ Inside, Outside, Count uint32 }

func readMap(path string) ([]Range, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseMap(string(b))
}

func parseMap(text string) ([]Range, error) {
	var out []Range
	for line := range strings.Lines(text) {
		var r Range
		if _, err := fmt.Sscan(line, &r.Inside, &r.Outside, &r.Count); err != nil {
			return nil, fmt.Errorf("ID map %q: %w", strings.TrimSpace(line), err)
		}
		out = append(out, r)
	}
	return out, nil
}

// Highest returns the highest user and group ID up to which every ID exists in this process's namespace.
var Highest = sync.OnceValues(func() (uid, gid uint32) {
	return highest("/proc/self/uid_map"), highest("/proc/self/gid_map")
})

func highest(path string) uint32 {
	ids, err := readMap(path)
	if err != nil {
		return math.MaxUint32 - 1
	}
	return contiguous(ids)
}

// contiguous returns the last ID before the first that does not exist.
func contiguous(ids []Range) uint32 {
	next := uint64(0)
	for range ids {
		for _, r := range ids {
			if uint64(r.Inside) == next {
				next += uint64(r.Count)
			}
		}
	}
	if next == 0 {
		return 0
	}
	return uint32(min(next-1, math.MaxUint32-1))
}

// Map returns the IDs of this process's namespace, of users and then of groups, as text.
func Map() (string, error) {
	var out []string
	for _, path := range []string{"/proc/self/uid_map", "/proc/self/gid_map"} {
		ids, err := readMap(path)
		if err != nil {
			return "", err
		}
		out = append(out, strings.ReplaceAll(strings.TrimSuffix(mapText(ids), "\n"), "\n", ","))
	}
	return strings.Join(out, ";"), nil
}

// Extends says whether now, a Map, has the IDs of before and more.
func Extends(now, before string) bool {
	n, b := strings.Split(now, ";"), strings.Split(before, ";")
	for i := range b {
		if i >= len(n) || n[i] != b[i] && !strings.HasPrefix(n[i], b[i]+",") {
			return false
		}
	}
	return true
}

// State is what a process that Start has started knows of outside.
type State struct {
	// UID is the user's own, MountNamespace the one that it was started in.
	UID            int
	MountNamespace string
	// Note says what cannot be had and what to install for it; "" when all is there.
	Note string
}

var state *State

// Started returns the state of a process that Start has started, else nil.
func Started() *State { return state }

// Describe says in a line how this process came by its rights: "" for root of the host.
func Describe() string {
	if !Inside() {
		return ""
	}
	uid, _ := Highest()
	ids := "one ID"
	if uid > 0 {
		ids = strconv.FormatUint(uint64(uid)+1, 10) + " IDs"
	}
	switch {
	case state == nil:
		return "user namespace made by others, " + ids
	case state.Note != "":
		return "user namespace, " + ids + " (" + state.Note + ")"
	}
	return "user namespace, " + ids
}

// errEnded is what the process is told by a closed pipe.
var errEnded = errors.New("the process that has started this one is gone")
