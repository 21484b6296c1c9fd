// SPDX-License-Identifier: Apache-2.0

//go:build linux

package userns

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
)

// The files that grant users ranges of IDs, and the helpers that hand them out.
const (
	subUIDs   = "/etc/subuid"
	subGIDs   = "/etc/subgid"
	newUIDMap = "newuidmap"
	newGIDMap = "newgidmap"
)

// idPlan says which IDs a namespace gets.
type idPlan struct {
	uids, gids []Range
	// helpers says that newuidmap and newgidmap must write the maps; a single ID is everybody's own to write.
	helpers bool
	note    string
}

// machine is what planIDs has to know about this one.
type machine struct {
	uid, gid       int
	name           string // "" when there is no account
	uids, gids     []user.SubID
	uidMap, gidMap string // where the helpers are; "" when there are none
}

// planIDs decides: all IDs that are granted, or the user's own alone.
func planIDs(m machine) idPlan {
	single := idPlan{uids: []Range{{0, uint32(m.uid), 1}}, gids: []Range{{0, uint32(m.gid), 1}}}
	who := m.name
	if who == "" {
		who = strconv.Itoa(m.uid)
	}
	const consequence = "only root exists in containers: files of other owners and steps of other users cannot be had"
	switch {
	case m.uidMap == "" || m.gidMap == "":
		single.note = consequence + "; install newuidmap and newgidmap (package uidmap, or shadow-utils)"
		return single
	case len(m.uids) == 0 || len(m.gids) == 0:
		file := subUIDs
		if len(m.uids) > 0 {
			file = subGIDs
		}
		single.note = fmt.Sprintf("%s; %s grants %s no IDs: as root, usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", consequence, file, who, who)
		return single
	}
	plan := idPlan{uids: withRanges(single.uids, m.uids), gids: withRanges(single.gids, m.gids), helpers: true}
	if n := min(contiguous(plan.uids), contiguous(plan.gids)); n < 65535 {
		plan.note = fmt.Sprintf("IDs above %d do not exist in containers: %s and %s grant %s fewer than 65536", n, subUIDs, subGIDs, who)
	}
	return plan
}

// maxRanges is how many rows the kernel takes in a map.
const maxRanges = 340

// withRanges gives the IDs after those of ids to granted ranges, one after the other.
func withRanges(ids []Range, granted []user.SubID) []Range {
	next := uint64(ids[len(ids)-1].Inside) + 1
	for _, g := range granted {
		if g.Count <= 0 || g.SubID < 0 || len(ids) == maxRanges || next+uint64(g.Count) > 1<<32-1 || uint64(g.SubID)+uint64(g.Count) > 1<<32-1 {
			continue
		}
		ids = append(ids, Range{uint32(next), uint32(g.SubID), uint32(g.Count)})
		next += uint64(g.Count)
	}
	return ids
}

// thisMachine finds out what the user of this process is granted.
func thisMachine() machine {
	m := machine{uid: os.Geteuid(), gid: os.Getegid()}
	if account, err := user.LookupUid(m.uid); err == nil {
		m.name = account.Name
	}
	ours := func(e user.SubID) bool {
		return e.Name == strconv.Itoa(m.uid) || m.name != "" && e.Name == m.name
	}
	// A file that is not there grants nothing.
	m.uids, _ = user.ParseSubIDFileFilter(subUIDs, ours)
	m.gids, _ = user.ParseSubIDFileFilter(subGIDs, ours)
	m.uidMap, m.gidMap = lookHelper(newUIDMap), lookHelper(newGIDMap)
	return m
}

// lookHelper finds a helper in the system's directories only: what else is in $PATH would not have the right to help.
func lookHelper(name string) string {
	for _, dir := range []string{"/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin"} {
		path := dir + "/" + name
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

// Missing says what an ordinary user cannot have on this machine, and what to install for it; "" when nothing is missing.
func Missing() string { return planIDs(thisMachine()).note }

// write gives the namespace of a process its IDs.
func (p idPlan) write(m machine, pid int) error {
	if p.helpers {
		if err := runHelper(m.uidMap, pid, p.uids); err != nil {
			return err
		}
		return runHelper(m.gidMap, pid, p.gids)
	}
	proc := "/proc/" + strconv.Itoa(pid) + "/"
	// Who may drop groups could get around files that are closed to a group, so the kernel wants that given up first.
	for _, f := range [][2]string{{"setgroups", "deny"}, {"uid_map", mapText(p.uids)}, {"gid_map", mapText(p.gids)}} {
		if err := os.WriteFile(proc+f[0], []byte(f[1]), 0); err != nil {
			return fmt.Errorf("give the user namespace its ID: %w", err)
		}
	}
	return nil
}

func mapText(ids []Range) string {
	var b strings.Builder
	for _, r := range ids {
		fmt.Fprintf(&b, "%d %d %d\n", r.Inside, r.Outside, r.Count)
	}
	return b.String()
}

func runHelper(path string, pid int, ids []Range) error {
	args := []string{strconv.Itoa(pid)}
	args = append(args, strings.Fields(mapText(ids))...)
	var out bytes.Buffer
	cmd := exec.Command(path, args...)
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("give the user namespace its IDs: %s: %w: %s", path, err, strings.TrimSpace(out.String()))
	}
	return nil
}
