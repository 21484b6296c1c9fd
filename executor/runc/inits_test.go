// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// probe prints what a process can learn about its container.
const probe = `
echo "# mounts"; cat /proc/self/mountinfo
echo "# status"; grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Seccomp_filters|Cap.*|SigIgn|SigBlk|SigCgt|Speculation.*|Umask|Threads|CoreDumping|THP_enabled):' /proc/self/status
echo "# process"; cat /proc/self/cgroup /proc/self/limits /proc/self/oom_score_adj; echo; cat /proc/self/sessionid /proc/self/setgroups; echo
cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range
ls -l /proc/self/ns | grep -v 'net\|user'
echo "# descriptors"; for fd in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do test -e /proc/$$/fd/$fd && stat -L -c "$fd %F %u %g %a %t %T" /proc/$$/fd/$fd; done
echo "# /dev"; find /dev -exec stat -c '%n %F %a %u %g %t %T' {} +
echo "# files"; find / /proc/sys /proc/bus /proc/fs /proc/acpi /proc/scsi /sys/firmware /sys/devices/virtual/powercap /sys/fs/cgroup -maxdepth 1 -exec stat -c '%n %F %a %u %g' {} +
for f in kcore keys timer_list interrupts sysrq-trigger; do stat -c '%n %F %a %t %T' /proc/$f; wc -c </proc/$f; done
echo "# network"; ip addr show lo | grep -o 'LOOPBACK.*mtu'
echo "# writable"; for d in / /dev /dev/shm /proc/sys/kernel /sys /sys/fs/cgroup /sys/fs/cgroup/memory /ro /rro /rro/below /tmpfs; do touch $d/x 2>/dev/null && echo $d && rm $d/x; done
for f in /proc/sys/kernel/panic /proc/sysrq-trigger /proc/timer_list /proc/keys; do test -w $f && echo "$f -w"; (echo 0 >$f) 2>/dev/null && echo $f; done
echo "# rest"; id; pwd; umask; hostname; env | sort; ulimit -a
`

// variable is what two containers never have in common: mount IDs, devices of mounts, namespaces, cgroup names.
var variable = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`(?m)^\d+ \d+ \d+:\d+ `), ""},
	{regexp.MustCompile(`\[\d+\]`), "[N]"},
	{regexp.MustCompile(`master:\d+`), "master:N"},
	{regexp.MustCompile(`slipway-[0-9a-f]+`), "slipway-N"},
	{regexp.MustCompile(`/\d+/runner-`), "/N/runner-"},
	{regexp.MustCompile(`[A-Z][a-z]{2} +\d+ \d\d:\d\d`), "DATE"},
}

func observe(t *testing.T, r *runc.Runc, s executor.Spec) []string {
	t.Helper()
	res := run(t, r, s, "input")
	text := res.stdout
	for _, v := range variable {
		text = v.re.ReplaceAllString(text, v.to)
	}
	// One container's mount lists are compared as sets: the order of independent mounts says nothing.
	var out []string
	for part := range strings.SplitSeq(text, "\n# ") {
		lines := strings.Split(part, "\n")
		if lines[0] == "# mounts" || lines[0] == "/dev" || lines[0] == "files" {
			slices.Sort(lines)
		}
		out = append(out, lines...)
	}
	return append(out, "stderr:", res.stderr)
}

// TestInitsAgree runs the same containers with our own init and with libcontainer's: a process must find no difference
// but the known ones.
func TestInitsAgree(t *testing.T) {
	ours := newExecutor(t, runc.Options{})
	standard := newExecutor(t, runc.Options{StandardInit: true})
	rootfs := runctest.Rootfs(t)
	for _, dir := range []string{"etc", "closed"} {
		if err := os.Mkdir(filepath.Join(rootfs, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(rootfs, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nann:x:7:8::/home/ann:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(rootfs, "closed"), 7, 8); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(rootfs, "closed"), 0o700); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.MkdirAll(filepath.Join(outside, "below"), 0o777); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*executor.Spec)
	}{
		{"step", func(*executor.Spec) {}},
		{"user", func(s *executor.Spec) {
			s.User = executor.User{UID: 7, GID: 8, AdditionalGroups: []uint32{9, 70000}}
			s.Cwd = "/closed"
		}},
		{"no new privileges", func(s *executor.Spec) { s.NoNewPrivileges = true }},
		{"user without privileges", func(s *executor.Spec) { s.NoNewPrivileges = true; s.User.UID = 7; s.CapDrop = []string{"ALL"} }},
		{"capabilities", func(s *executor.Spec) { s.CapAdd = []string{"SYS_PTRACE", "NET_ADMIN"}; s.CapDrop = []string{"MKNOD"} }},
		{"all capabilities", func(s *executor.Spec) { s.CapAdd = []string{"ALL"} }},
		{"read-only", func(s *executor.Spec) { s.ReadonlyRootfs = true }},
		{"host network", func(s *executor.Spec) { s.Network = executor.NetworkHost; s.Hostname = "there" }},
		{"limits", func(s *executor.Spec) {
			s.Ulimits = []executor.Ulimit{{Name: "nofile", Soft: 64, Hard: 128}, {Name: "core", Soft: 0, Hard: 0}}
			s.Resources.MemoryBytes = 64 << 20
			s.Resources.PidsLimit = 50
			s.ShmSize = 1 << 20
		}},
		{"init", func(s *executor.Spec) { s.Init = true }},
		{"environment", func(s *executor.Spec) { s.Env = []string{"A=1", "PATH=/bin", "HOME=", "A=2", "B="}; s.User.UID = 7 }},
		{"mounts", func(s *executor.Spec) {
			s.Mounts = []executor.Mount{
				{Kind: executor.MountBind, Source: outside, Target: "/ro", Readonly: true},
				{Kind: executor.MountBind, Source: outside, Target: "/rro", Readonly: true, Recursive: true},
				{Kind: executor.MountBind, Source: outside, Target: "/made/deep", NoExec: true},
				{Kind: executor.MountTmpfs, Target: "/tmpfs", Readonly: true},
				{Kind: executor.MountTmpfs, Target: "/tmpfs/sub", SizeBytes: 1 << 20, Mode: 0o700, NoExec: true},
				{Kind: executor.MountBind, Source: filepath.Join(outside, "below"), Target: "/tmpfs/sub/bound"},
				{Kind: executor.MountBind, Source: "/etc/passwd", Target: "/tmpfs/file", Readonly: true},
			}
		}},
		{"own shm", func(s *executor.Spec) {
			s.Mounts = []executor.Mount{{Kind: executor.MountTmpfs, Target: "/dev/shm", SizeBytes: 1 << 20}}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := spec(rootfs, probe)
			tc.change(&s)
			want, got := observe(t, standard, s), observe(t, ours, s)
			if len(want) < 50 {
				t.Fatalf("the probe printed little:\n%s", strings.Join(want, "\n"))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("libcontainer's init (-), ours (+):\n%s", diff)
			}
		})
	}
}
