// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// tree lists what is in dir: path, type and mode, owner, time of modification of directories.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d", strings.TrimPrefix(p, dir), st.Mode, st.Uid, st.Gid)
		if d.IsDir() {
			line += " " + time.Unix(st.Mtim.Unix()).UTC().Format(time.RFC3339Nano)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMounts(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	src := t.TempDir()
	os.WriteFile(filepath.Join(src, "file"), []byte("content\n"), 0o644)
	os.Mkdir(filepath.Join(src, "sub"), 0o755)
	for _, tc := range []struct {
		name   string
		mounts []executor.Mount
		script string
		want   string
	}{
		{
			"bind directory",
			[]executor.Mount{{Kind: executor.MountBind, Source: src, Target: "/a/b"}},
			"cat /a/b/file; echo new >/a/b/new && cat /a/b/new", "content\nnew\n",
		},
		{
			"bind file read-only",
			[]executor.Mount{{Kind: executor.MountBind, Source: filepath.Join(src, "file"), Target: "/x/y/file", Readonly: true}},
			"cat /x/y/file; echo no >/x/y/file || echo refused", "content\nrefused\n",
		},
		{
			"bind read-only recursive",
			[]executor.Mount{{Kind: executor.MountBind, Source: src, Target: "/a", Readonly: true, Recursive: true}},
			"cat /a/file; touch /a/no || echo refused; touch /a/sub/no || echo refused", "content\nrefused\nrefused\n",
		},
		{
			"noexec",
			[]executor.Mount{{Kind: executor.MountTmpfs, Target: "/t", NoExec: true}},
			"cp /bin/busybox /t/true; /t/true || echo refused", "refused\n",
		},
		{
			"tmpfs",
			[]executor.Mount{{Kind: executor.MountTmpfs, Target: "/t", SizeBytes: 1 << 20, Mode: 0o700}},
			"stat -c %a /t; dd if=/dev/zero of=/t/f bs=1M count=2 2>/dev/null || echo full", "700\nfull\n",
		},
		{
			"tmpfs over an existing directory",
			[]executor.Mount{{Kind: executor.MountTmpfs, Target: "/old"}},
			"ls /old; stat -c %a /old", "1777\n",
		},
		{
			"order",
			[]executor.Mount{
				{Kind: executor.MountTmpfs, Target: "/t"},
				{Kind: executor.MountBind, Source: filepath.Join(src, "file"), Target: "/t/deep/file"},
			},
			"cat /t/deep/file", "content\n",
		},
		{
			"through a symlink",
			[]executor.Mount{{Kind: executor.MountBind, Source: src, Target: "/link/in"}},
			"cat /link/in/file /real/in/file", "content\ncontent\n",
		},
		{
			"symlinks cannot leave",
			[]executor.Mount{{Kind: executor.MountBind, Source: src, Target: "/out/in"}},
			"cat /out/in/file; ls -d /outside", "content\n/outside\n",
		},
		{
			"over a generated file",
			[]executor.Mount{{Kind: executor.MountBind, Source: filepath.Join(src, "file"), Target: "/etc/hosts"}},
			"cat /etc/hosts", "content\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rootfs := runctest.Rootfs(t)
			for _, d := range []string{"real", "old"} {
				if err := os.Mkdir(filepath.Join(rootfs, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			os.WriteFile(filepath.Join(rootfs, "old/file"), nil, 0o644)
			os.Symlink("/real", filepath.Join(rootfs, "link"))
			os.Symlink("../../../../outside", filepath.Join(rootfs, "out"))
			os.Symlink("busybox", filepath.Join(rootfs, "bin/cp"))
			before := tree(t, rootfs)
			s := spec(rootfs, tc.script)
			s.Mounts = tc.mounts
			res := run(t, r, s)
			if res.stdout != tc.want {
				t.Errorf("stdout %q, want %q; stderr %q", res.stdout, tc.want, res.stderr)
			}
			if d := cmp.Diff(before, tree(t, rootfs)); d != "" {
				t.Errorf("the root file system changed (-before +after):\n%s", d)
			}
		})
	}
	for _, tc := range []struct {
		mount executor.Mount
		want  string
	}{
		{executor.Mount{Kind: executor.MountBind, Source: "/no/such/path", Target: "/a"}, "mount /a: source: stat /no/such/path: no such file"},
		{executor.Mount{Kind: executor.MountBind, Source: src, Target: "/bin/busybox"}, "mount /bin/busybox: the source is a directory, but the image has a file there"},
		{executor.Mount{Kind: executor.MountBind, Source: src, Target: "/"}, `mount target "/"`},
		{executor.Mount{Kind: executor.MountBind, Source: src, Target: "/bin/busybox/x"}, "mount /bin/busybox/x"},
		{executor.Mount{Kind: "nfs", Target: "/a"}, `mount of kind "nfs" is not supported yet`},
	} {
		s := spec(runctest.Rootfs(t), "true")
		s.Mounts = []executor.Mount{tc.mount}
		before := tree(t, s.Rootfs)
		if _, err := tryRun(t.Context(), r, s); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want one with %q", err, tc.want)
		}
		if d := cmp.Diff(before, tree(t, s.Rootfs)); d != "" {
			t.Errorf("a failed start changed the root file system (-before +after):\n%s", d)
		}
	}
}

// What a step leaves behind is what it wrote: the upper directory of an overlay has nothing else.
func TestOverlayUpper(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	for _, tc := range []struct {
		name   string
		lower  func(dir string)
		script string
		cwd    string
		want   []string // names in the upper directory
	}{
		{name: "nothing", script: "true", want: []string{"/", "/etc"}}, // /etc was there: it is copied up, unchanged
		{name: "complete image", script: "true", lower: func(dir string) {
			for _, d := range []string{"proc", "sys", "dev"} {
				os.Mkdir(filepath.Join(dir, d), 0o755)
			}
			for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
				os.WriteFile(filepath.Join(dir, "etc", f), []byte("image's own\n"), 0o644)
			}
			os.MkdirAll(filepath.Join(dir, "a/b"), 0o755)
		}, want: []string{"/"}},
		{name: "resolv.conf is a dangling symlink", script: "cat /etc/resolv.conf; test -e /run/resolve/conf", lower: func(dir string) {
			os.Symlink("../run/resolve/conf", filepath.Join(dir, "etc/resolv.conf"))
		}, want: []string{"/", "/etc"}},
		{
			name: "files beside mount points", script: "echo x >/etc/own; echo x >/a/own; mkdir /new; rm /bin/true; echo lost >/etc/hosts",
			want: []string{"/", "/a", "/a/own", "/bin", "/bin/true", "/etc", "/etc/own", "/new"},
		},
		{name: "changed parent", script: "chmod 700 /a", want: []string{"/", "/a", "/etc"}},
		{name: "cwd stays", script: "true", cwd: "/w/d", want: []string{"/", "/etc", "/w", "/w/d"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			lower, upper, work, merged := dir+"/lower", dir+"/upper", dir+"/work", dir+"/merged"
			for _, d := range []string{lower, lower + "/etc", upper, work, merged} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			runctest.PopulateRootfs(t, lower)
			if tc.lower != nil {
				tc.lower(lower)
			}
			old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
			os.Chtimes(lower+"/etc", old, old)
			opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", lower, upper, work)
			if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
				t.Skipf("no overlay here (%v): SKIPPED", err)
			}
			mounted := true
			defer func() {
				if mounted {
					unix.Unmount(merged, unix.MNT_DETACH)
				}
			}()
			s := spec(merged, tc.script)
			s.Network = executor.NetworkHost
			s.Cwd = tc.cwd
			s.Mounts = []executor.Mount{{Kind: executor.MountTmpfs, Target: "/a/b"}}
			if res := run(t, r, s); res.exit.Code != 0 {
				t.Errorf("exit %d, stderr %q", res.exit.Code, res.stderr)
			}
			if err := unix.Unmount(merged, 0); err != nil {
				t.Errorf("the root file system is still in use: %v", err)
			} else {
				mounted = false
			}
			var got []string
			for _, line := range tree(t, upper) {
				name, _, _ := strings.Cut(line, " ")
				if name == "" {
					name = "/"
				}
				got = append(got, name)
				if name == "/etc" && !slices.Contains(tc.want, "/etc/own") && !strings.HasSuffix(line, old.Format(time.RFC3339Nano)) {
					t.Errorf("/etc has a new time of modification: %s", line)
				}
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("upper directory (-want +got):\n%s", d)
			}
		})
	}
}

func TestGeneratedFiles(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	rootfs := runctest.Rootfs(t)
	s := spec(rootfs, "hostname; cat /etc/hostname /etc/hosts; cat /etc/resolv.conf | wc -c; ip link | grep -c eth0")
	s.Hostname = "box"
	s.ExtraHosts = []executor.HostEntry{{Host: "db", IP: "10.1.2.3"}, {Host: "six", IP: "2001:db8::1"}}
	res := run(t, r, s)
	for _, want := range []string{"box\nbox\n127.0.0.1\tlocalhost\n", "\n10.1.2.3\tdb\n2001:db8::1\tsix\n127.0.0.1\tbox\n0\n0\n"} {
		if !strings.Contains(res.stdout, want) {
			t.Errorf("stdout %q does not contain %q; stderr %q", res.stdout, want, res.stderr)
		}
	}

	s = spec(rootfs, "cat /etc/hosts /etc/resolv.conf")
	s.Network = executor.NetworkHost
	res = run(t, r, s)
	hosts, _ := os.ReadFile("/etc/hosts")
	resolv, _ := os.ReadFile("/etc/resolv.conf")
	if res.stdout != string(hosts)+string(resolv) {
		t.Errorf("host network: got %q, want the host's files", res.stdout)
	}
	s = spec(rootfs, "cat /etc/hosts")
	s.Network, s.OwnHosts, s.Hostname = executor.NetworkHost, true, "box"
	if res = run(t, r, s); !strings.HasPrefix(res.stdout, "127.0.0.1\tlocalhost\n") || !strings.HasSuffix(res.stdout, "\n127.0.0.1\tbox\n") {
		t.Errorf("host network, own hosts: %q", res.stdout)
	}
	for _, bad := range []executor.HostEntry{{Host: "x", IP: "nonsense"}, {Host: "a b", IP: "1.2.3.4"}, {Host: "x", IP: "host-gateway"}} {
		s := spec(rootfs, "true")
		s.ExtraHosts = []executor.HostEntry{bad}
		if _, err := tryRun(t.Context(), r, s); err == nil || !strings.Contains(err.Error(), "extra host") {
			t.Errorf("extra host %v: error %v", bad, err)
		}
	}
}

func TestIsolation(t *testing.T) {
	r := newExecutor(t, runc.Options{})
	rootfs := runctest.Rootfs(t)
	for _, tc := range []struct {
		name, script, want string
		change             func(*executor.Spec)
	}{
		{"process 1", "echo $$; ls -d /proc/[0-9]* | wc -l", "1\n", nil},
		{"sysctl", "echo 1 >/proc/sys/kernel/panic || echo refused", "refused\n", nil},
		{"sysrq", "echo h >/proc/sysrq-trigger || echo refused", "refused\n", nil},
		{"mount", "mount -t tmpfs none /bin || echo refused", "refused\n", nil},
		{"masked", "cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l", "0\n0\n", nil},
		{"read-only /sys", "mkdir /sys/fs/cgroup/memory/x /sys/fs/cgroup/unified/x || echo refused; mkdir /sys/kernel/x || echo refused", "refused\nrefused\n", nil},
		{"block device", "mknod /disk b 254 0 && cat /disk >/dev/null || echo refused", "refused\n", nil},
		{"read-only root", "touch /x || echo refused; touch /dev/shm/x && echo ok", "refused\nok\n", func(s *executor.Spec) { s.ReadonlyRootfs = true }},
		{"capabilities", "grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status", "NoNewPrivs:\t0\nSeccomp:\t2\n", nil},
		{"default capabilities", "grep CapEff /proc/self/status", "CapEff:\t00000000a80425fb\n", nil},
		{"user has none", "grep CapEff /proc/self/status", "CapEff:\t0000000000000000\n", func(s *executor.Spec) { s.User.UID = 7 }},
		{"dropped", "chown 5 /bin || echo refused", "refused\n", func(s *executor.Spec) { s.CapDrop = []string{"chown"} }},
		{"no new privileges", "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n", func(s *executor.Spec) { s.NoNewPrivileges = true }},
		{"privileged", "mkdir -p /m; mount -t tmpfs none /m && echo mounted; grep Seccomp: /proc/self/status; test -e /dev/kmsg && echo kmsg", "mounted\nSeccomp:\t0\nkmsg\n", func(s *executor.Spec) { s.Privileged = true }},
		{"devices", "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; test -L /dev/fd && test -d /dev/shm && test -e /dev/ptmx && echo ok", "ok\n", nil},
		{"shm size", "stat -f -c '%b %S' /dev/shm", "", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := spec(rootfs, tc.script)
			if tc.change != nil {
				tc.change(&s)
			}
			res := run(t, r, s)
			if !strings.Contains(res.stdout, tc.want) {
				t.Errorf("stdout %q, want %q in it; stderr %q", res.stdout, tc.want, res.stderr)
			}
		})
	}
}
