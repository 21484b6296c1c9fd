// SPDX-License-Identifier: Apache-2.0

package executor

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const testPasswd = `root:x:0:0:root:/root:/bin/sh
# a comment
broken line
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin

app:x:1000:1001::/home/app:/bin/sh
nohome:x:1002:1002::
1234:x:77:77::/seven:/bin/sh
bad:x:abc:1::/:/bin/sh
`

const testGroup = `root:x:0:
daemon:x:1:app
app:x:1001:
video:x:44:app,root
audio:x:29:root , app
video:x:44:app
wheel:x:10
`

func TestResolveUser(t *testing.T) {
	for _, tc := range []struct {
		user    string
		want    User
		home    string
		wantErr string
	}{
		{user: "", want: User{AdditionalGroups: []uint32{44}}, home: "/root"},
		{user: "root", want: User{AdditionalGroups: []uint32{44}}, home: "/root"},
		{user: "app", want: User{UID: 1000, GID: 1001, AdditionalGroups: []uint32{1, 44}}, home: "/home/app"},
		{user: "1000", want: User{UID: 1000, GID: 1001, AdditionalGroups: []uint32{1, 44}}, home: "/home/app"},
		{user: "app:wheel", want: User{UID: 1000, GID: 10}, home: "/home/app"},
		{user: "app:", want: User{UID: 1000, GID: 1001, AdditionalGroups: []uint32{1, 44}}, home: "/home/app"},
		{user: "app:55", want: User{UID: 1000, GID: 55}, home: "/home/app"},
		{user: ":video", want: User{UID: 0, GID: 44}, home: "/root"},
		{user: "4000", want: User{UID: 4000}, home: "/"},
		{user: "4000:5000", want: User{UID: 4000, GID: 5000}, home: "/"},
		{user: "1234", want: User{UID: 1234}, home: "/"}, // digits are a number even when a name looks like it
		{user: "nohome", want: User{UID: 1002, GID: 1002}, home: "/"},
		{user: "nobody", wantErr: `user "nobody": no such user`},
		{user: "app:nogroup", wantErr: `group "nogroup": no such group`},
		{user: "bad", wantErr: "no valid numbers"},
		{user: "4294967295", wantErr: "out of range"},
		{user: "1:99999999999999999999", wantErr: "out of range"},
	} {
		t.Run(tc.user, func(t *testing.T) {
			got, home, err := ResolveUser([]byte(testPasswd), []byte(testGroup), tc.user)
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tc.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" || home != tc.home {
				t.Errorf("user (-want +got):\n%s\nhome %q, want %q", d, home, tc.home)
			}
		})
	}
}

func TestResolveUserWithoutFiles(t *testing.T) {
	for user, wantErr := range map[string]bool{"": false, "0": false, "12:13": false, "root": true, "12:wheel": true} {
		got, home, err := ResolveUser(nil, nil, user)
		if (err != nil) != wantErr {
			t.Errorf("ResolveUser(%q) = %v, %q, %v; want an error: %v", user, got, home, err, wantErr)
		}
	}
}

func FuzzResolveUser(f *testing.F) {
	f.Add([]byte(testPasswd), []byte(testGroup), "app:video")
	f.Add([]byte("::::::"), []byte(":::"), ":")
	f.Fuzz(func(t *testing.T, passwd, group []byte, user string) {
		u, home, err := ResolveUser(passwd, group, user)
		if err != nil {
			return
		}
		if home == "" || u.UID > maxID || u.GID > maxID {
			t.Errorf("ResolveUser(%q) = %+v, %q", user, u, home)
		}
	})
}
