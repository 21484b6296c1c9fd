// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// cgroup2Env makes this test binary run its tests as on a host with cgroup v2 alone: see TestMain.
const cgroup2Env = "SLIPWAY_TEST_CGROUP2"

// cgroup2Only covers /sys/fs/cgroup with cgroup v2 in this process's mount namespace, its own.
func cgroup2Only() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount /sys/fs/cgroup: %w", err)
	}
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount cgroup v2: %w", err)
	}
	return nil
}

// TestCgroup2Only runs other tests where a mount namespace shows cgroup v2 alone. The hierarchy may have no controllers there (v1 has
// them on this host): what is tested is that containers run, are what they should be, and are found and killed by their cgroups.
func TestCgroup2Only(t *testing.T) {
	runctest.Runner(t)
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type == unix.CGROUP2_SUPER_MAGIC {
		t.Skip("this host has cgroup v2 alone (or no cgroups): all tests run so. SKIPPED")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.v", "-test.run", "^(TestNothingIsLeft|TestRunnerDies|TestEngineDies|TestIsolation|TestEscape|TestConformance)$/^(|runner.*|process_1|cgroups|release_agent|step.*|privileged.*)$")
	cmd.Env = append(os.Environ(), cgroup2Env+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "error: mount cgroup v2") {
		t.Skipf("no cgroup v2 here: SKIPPED\n%s", out)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, name := range []string{"TestNothingIsLeft", "TestEngineDies/runner_too_true", "TestIsolation/process_1", "TestEscape/cgroups", "TestConformance/step,_our_init"} {
		if !strings.Contains(string(out), "--- PASS: "+name+" ") {
			t.Errorf("%s has not run", name)
		}
	}
}

// TestCgroupDirs is about the directories of other kinds of hosts.
func TestCgroupDirs(t *testing.T) {
	for _, tc := range []struct {
		name    string
		unified bool
		text    string
		want    []string
	}{
		{"v2, a service", true, "0::/system.slice/slipway.service\n", []string{"/c/system.slice"}},
		{"v2, at the root", true, "0::/\n", []string{"/c"}},
		{"v2 mounted over v1", true, "3:memory:/a\n0::/b/c\n", []string{"/c/b"}},
		{"v1", false, "3:cpu,cpuacct:/a\n2:memory:/a/b\n1:name=systemd:/\n", []string{"/c/cpu,cpuacct/a", "/c/memory/a/b", "/c/systemd"}},
		{"hybrid", false, "2:pids:/a\n1:name=systemd:/b\n0::/b\n", []string{"/c/pids/a", "/c/systemd/b", "/c/unified/b"}},
		{"a colon in the name", false, "2:pids:/a:b\n", []string{"/c/pids/a:b"}},
		{"nonsense", false, "x\n", nil},
	} {
		if d := cmp.Diff(tc.want, runc.CgroupDirs("/c", tc.unified, tc.text)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, d)
		}
	}
}
