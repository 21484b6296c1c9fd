// SPDX-License-Identifier: Apache-2.0

//go:build linux

package userns

import (
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/user"
)

func TestPlanIDs(t *testing.T) {
	granted := []user.SubID{{Name: "ann", SubID: 100000, Count: 65536}}
	full := machine{uid: 1000, gid: 1001, name: "ann", uids: granted, gids: granted, uidMap: "/usr/bin/newuidmap", gidMap: "/usr/bin/newgidmap"}
	with := func(change func(*machine)) machine {
		m := full
		change(&m)
		return m
	}
	for _, tc := range []struct {
		name    string
		m       machine
		uids    []Range
		helpers bool
		note    string // a part of it; "" wants none
	}{
		{"everything", full, []Range{{0, 1000, 1}, {1, 100000, 65536}}, true, ""},
		{"no helpers", with(func(m *machine) { m.gidMap = "" }), []Range{{0, 1000, 1}}, false, "install newuidmap and newgidmap"},
		{"no user IDs", with(func(m *machine) { m.uids = nil }), []Range{{0, 1000, 1}}, false, "/etc/subuid grants ann no IDs: as root, usermod --add-subuids"},
		{"no group IDs", with(func(m *machine) { m.gids = nil }), []Range{{0, 1000, 1}}, false, "/etc/subgid grants ann no IDs"},
		{"no account", with(func(m *machine) { m.name, m.uids = "", nil }), []Range{{0, 1000, 1}}, false, "/etc/subuid grants 1000 no IDs"},
		{"few IDs", with(func(m *machine) { m.uids = []user.SubID{{SubID: 5000, Count: 100}} }), []Range{{0, 1000, 1}, {1, 5000, 100}}, true, "IDs above 100 do not exist"},
		{
			"two ranges, and some that are none", with(func(m *machine) {
				m.uids = []user.SubID{{SubID: 5000, Count: 100}, {SubID: -1, Count: 5}, {SubID: 1 << 32, Count: 1}, {SubID: 9, Count: 0}, {SubID: 200000, Count: 70000}}
			}),
			[]Range{{0, 1000, 1}, {1, 5000, 100}, {101, 200000, 70000}},
			true, "",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			plan := planIDs(tc.m)
			if !slices.Equal(plan.uids, tc.uids) || plan.helpers != tc.helpers {
				t.Errorf("uids %v helpers %v, want %v %v", plan.uids, plan.helpers, tc.uids, tc.helpers)
			}
			if !strings.Contains(plan.note, tc.note) || tc.note == "" && plan.note != "" {
				t.Errorf("note %q, want %q", plan.note, tc.note)
			}
			if plan.gids[0] != (Range{0, 1001, 1}) {
				t.Errorf("group 0 is %v", plan.gids[0])
			}
		})
	}
}

func TestContiguous(t *testing.T) {
	for text, want := range map[string]uint32{
		"0 0 4294967295":                4294967294,
		"0 1000 1":                      0,
		"0 1000 1\n1 100000 65536":      65536,
		"1 100000 65536\n0 1000 1":      65536,
		"0 1000 1\n5 100000 10":         0,
		"0 1000 10\n10 7 5\n100 200 50": 14,
		"":                              0,
	} {
		ids, err := parseMap(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := contiguous(ids); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if _, err := parseMap("0 x 1"); err == nil {
		t.Error("a map with letters was taken")
	}
}

func TestExtends(t *testing.T) {
	const one, more = "0 1000 1;0 1000 1", "0 1000 1,1 100000 65536;0 1000 1,1 100000 65536"
	for _, tc := range []struct {
		now, before string
		want        bool
	}{
		{more, one, true},
		{more, more, true},
		{one, more, false},
		{"0 1000 1,1 200000 65536;0 1000 1,1 200000 65536", more, false},
		{"0 1000 10;0 1000 1", one, false},
		{"0 1000 1", one, false},
	} {
		if got := Extends(tc.now, tc.before); got != tc.want {
			t.Errorf("%q after %q: %v", tc.now, tc.before, got)
		}
	}
}
