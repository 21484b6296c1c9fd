// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// testUserEnv is set in the tests that TestScriptUser runs as an ordinary user: to withIDs or to singleID.
const (
	testUserEnv = "SLIPWAY_TEST_USER"
	withIDs     = "with-ids"
	singleID    = "single-id"
)

// runsAsTestUser says whether this process is one of those.
func runsAsTestUser() bool { return os.Getenv(testUserEnv) != "" }

// TestScriptUser runs the scripts of TestScript again as an ordinary user with granted IDs, whom it makes and removes, and
// rootless_single as one without. The scripts that make no sense there say so: [user] skip. One of them alone: -run TestScriptUser/NAME.
func TestScriptUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT ROOT: making a user needs it: SKIPPED")
	}
	for _, program := range []string{"useradd", "userdel", "usermod", "newuidmap"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%v (apt install passwd uidmap): SKIPPED", err)
		}
	}
	if err := runctest.EnsureRunner(); err != nil {
		t.Fatalf("build slipway-runner: %v", err)
	}
	dir, program := userDir(t)
	u := makeUser(t)
	for _, d := range []string{"home", "tmp", "bin"} {
		if err := os.Chown(filepath.Join(dir, d), int(u.uid), int(u.gid)); err != nil {
			t.Fatal(err)
		}
	}
	runner := userRunner(t, dir)
	_, script, one := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	if !one || script != "rootless_single" {
		pattern := "^TestScript$"
		if one {
			pattern += "/" + script
		}
		u.runScripts(t, dir, program, runner, withIDs, pattern)
	}
	if !one || script == "rootless_single" {
		for _, flag := range []string{"--del-subuids", "--del-subgids"} {
			accounts(t, "usermod", flag, "0-4294967294", u.name)
		}
		u.runScripts(t, dir, program, runner, singleID, "^TestScript$/^rootless_single$")
	}
}

// runScripts runs the tests of pattern as the user, and looks for what they have left.
func (u testUser) runScripts(t *testing.T, dir, program, runner, kind, pattern string) {
	limit := 10 * time.Minute
	if deadline, ok := t.Deadline(); ok {
		limit = min(limit, time.Until(deadline)-20*time.Second)
	}
	cmd := exec.Command(program, "-test.run", pattern, "-test.v", "-test.timeout", limit.String())
	cmd.Dir = filepath.Join(dir, "cmd", "slipway")
	cmd.Env = []string{
		testUserEnv + "=" + kind, "PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Join(dir, "home"), "TMPDIR=" + filepath.Join(dir, "tmp"),
		"SLIPWAY_RUNNER=" + runner,
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.uid, Gid: u.gid}}
	var all bytes.Buffer
	cmd.Stdout, cmd.Stderr = &all, &all
	cmd.WaitDelay = 5 * time.Second // for what keeps the output open
	err := cmd.Run()
	out := all.Bytes()
	left := processesOfUser(u.uid)
	for _, p := range left {
		_ = unix.Kill(p.pid, unix.SIGKILL)
		t.Errorf("left behind: process %d: %s", p.pid, p.command)
	}
	if mounts, readErr := os.ReadFile("/proc/self/mountinfo"); readErr == nil && bytes.Contains(mounts, []byte(" "+dir+"/")) {
		t.Errorf("left behind: mounts below %s:\n%s", dir, mounts)
	}
	count := func(what string) int {
		return len(regexp.MustCompile(`(?m)^ +--- `+what+`: TestScript/`).FindAll(out, -1))
	}
	passed := count("PASS")
	t.Logf("as a user %s: %d scripts passed, %d skipped, %d failed", kind, passed, count("SKIP"), count("FAIL"))
	if err != nil || passed == 0 {
		t.Errorf("%v\n%s", err, out)
	} else if testing.Verbose() {
		t.Logf("%s", out)
	}
}

// userDir makes a directory that any user can read, with this program, the scripts and what they need, laid out as in the source tree.
func userDir(t *testing.T) (dir, program string) {
	dir, err := os.MkdirTemp("", "slwu") // short: sockets have names below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Chmod(dir, 0o755))
	for _, d := range []string{"home", "tmp", "bin", "cmd/slipway"} {
		check(os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, d := range []string{"script", "bases"} {
		check(os.CopyFS(filepath.Join(dir, "testdata", d), os.DirFS(filepath.Join("..", "..", "testdata", d))))
	}
	self, err := os.Executable()
	check(err)
	program = filepath.Join(dir, "bin", "slipway.test")
	copyProgram(t, self, program)
	return dir, program
}

// userRunner copies the runner that tests use to where the user can execute it; "" when it is embedded.
func userRunner(t *testing.T, dir string) string {
	from := os.Getenv("SLIPWAY_RUNNER")
	if from == "" {
		return ""
	}
	to := filepath.Join(dir, "runner", "slipway-runner")
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	copyProgram(t, from, to)
	return to
}

func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// testUserPrefix begins the names of the users that tests make; the number of their process follows.
const testUserPrefix = "slipway-test-"

type testUser struct {
	name     string
	uid, gid uint32
}

// makeUser makes a user with IDs of his own to give away, until the test ends.
func makeUser(t *testing.T) testUser {
	t.Helper()
	removeOldUsers(t)
	name := testUserPrefix + strconv.Itoa(os.Getpid())
	accounts(t, "useradd", "-M", "-d", "/nonexistent", "-s", "/usr/sbin/nologin", name)
	t.Cleanup(func() { accounts(t, "userdel", name) })
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	granted, err := os.ReadFile("/etc/subuid")
	if err != nil || !bytes.Contains(granted, []byte(name+":")) {
		t.Skipf("useradd grants no IDs in /etc/subuid here (SUB_UID_COUNT in /etc/login.defs): SKIPPED")
	}
	id := func(text string) uint32 {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	return testUser{name, id(u.Uid), id(u.Gid)}
}

// accounts runs a program that changes /etc/passwd, of which the system lets one run at a time.
func accounts(t *testing.T, program string, args ...string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		out, err := exec.Command(program, args...).CombinedOutput()
		if err == nil {
			return
		}
		if !bytes.Contains(out, []byte("cannot lock")) || time.Now().After(deadline) {
			t.Fatalf("%s %q: %v\n%s", program, args, err, out)
		}
		time.Sleep(50 * time.Millisecond) // there is nothing to wait for but the lock's going
	}
}

// removeOldUsers removes those of tests that were killed.
func removeOldUsers(t *testing.T) {
	b, err := os.ReadFile("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		name, _, _ := strings.Cut(line, ":")
		pid, ours := strings.CutPrefix(name, testUserPrefix)
		if _, err := os.Stat("/proc/" + pid); ours && errors.Is(err, os.ErrNotExist) {
			accounts(t, "userdel", name)
		}
	}
}

type userProcess struct {
	pid     int
	command string
}

// processesOfUser lists what runs as a user, after a moment for what is just ending.
func processesOfUser(uid uint32) []userProcess {
	deadline := time.Now().Add(3 * time.Second)
	for {
		var found []userProcess
		dirs, _ := filepath.Glob("/proc/[0-9]*")
		for _, dir := range dirs {
			var st unix.Stat_t
			command, err := os.ReadFile(filepath.Join(dir, "cmdline"))
			if err != nil || len(command) == 0 || unix.Stat(dir, &st) != nil || st.Uid != uid {
				continue // a zombie has no command line
			}
			pid, _ := strconv.Atoi(filepath.Base(dir))
			found = append(found, userProcess{pid, fmt.Sprintf("%q", command)})
		}
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
		time.Sleep(20 * time.Millisecond)
	}
}
