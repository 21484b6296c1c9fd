// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// TestFilterAgrees asks the kernel for the seccomp filter of a running container, the one that our runner compiled and the
// one of libcontainer and libseccomp, and compares what they answer to every syscall with every argument that the profile
// looks at.
func TestFilterAgrees(t *testing.T) {
	rootfs := runctest.Rootfs(t)
	for _, tc := range []struct {
		name   string
		change func(*executor.Spec)
	}{
		{"default", func(*executor.Spec) {}},
		{"no new privileges", func(s *executor.Spec) { s.NoNewPrivileges = true }},
		{"capabilities", func(s *executor.Spec) { s.CapAdd = []string{"SYS_ADMIN", "SYS_PTRACE"} }},
		{"all capabilities", func(s *executor.Spec) { s.CapAdd = []string{"ALL"} }},
		{"docker's conditions", func(s *executor.Spec) { s.SeccompProfile, s.CapAdd = ownProfile, []string{"SYS_TIME"} }},
		{"a default that allows", func(s *executor.Spec) { s.SeccompProfile = allowingProfile }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := spec(rootfs, "cat")
			tc.change(&s)
			want, got := filterOf(t, s, true), filterOf(t, s, false)
			t.Logf("%d instructions of libseccomp, %d of ours", len(want), len(got))
			compareFilters(t, want, got)
		})
	}
}

// ownProfile refuses everything that a shell does not need, with every kind of condition; allowingProfile names what it refuses.
const (
	ownProfile = `{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
		"archMap": [{"architecture": "SCMP_ARCH_X86_64"}, {"architecture": "SCMP_ARCH_AARCH64"}],
		"syscalls": [
			{"names": ["read", "write", "close", "execve", "exit_group", "exit", "brk", "mmap", "munmap", "mprotect", "arch_prctl", "set_tid_address",
				"set_robust_list", "rseq", "futex", "fcntl", "getrandom", "prlimit64", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "uname", "readlinkat",
				"readlink", "openat", "open", "newfstatat", "fstat", "lseek", "sendfile", "pread64", "ioctl", "getuid", "geteuid", "getgid", "getegid",
				"setgid", "setuid", "setgroups", "capset", "capget", "prctl", "chdir", "fchdir", "getcwd", "dup3", "epoll_ctl", "epoll_pwait", "nanosleep", "sched_yield",
				"getpid", "gettid", "tgkill", "madvise", "sigaltstack", "clone", "clone3", "statfs", "fstatfs", "faccessat2", "fchown", "unshare", "setsid", "no_such_call",
				"close_range", "getdents64", "stat", "lstat", "access", "faccessat", "keyctl", "umask", "restart_syscall", "waitid", "pipe2", "pidfd_open", "sched_getaffinity", "statx", "openat2", "fsopen", "fsconfig", "fsmount", "sched_setaffinity", "getppid", "setresuid", "setresgid", "epoll_create1", "eventfd2", "setpgid", "poll", "ppoll", "writev", "dup", "dup2", "linkat", "wait4", "vfork", "fork", "execveat", "getxattr", "fgetxattr", "readv"],
				"action": "SCMP_ACT_ALLOW"},
			{"name": "personality", "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
			{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 64, "valueTwo": 64, "op": "SCMP_CMP_MASKED_EQ"}]},
			{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
			{"names": ["clock_settime"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_TIME"]}},
			{"names": ["settimeofday"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_BOOT"]}},
			{"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_BOOT"]}},
			{"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
			{"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "200.0"}},
			{"names": ["umount2"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}}
		]}`
	allowingProfile = `{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
		"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}, {"names": ["swapon"], "action": "SCMP_ACT_KILL_PROCESS"}]}`
)

func compareFilters(t *testing.T, want, got []unix.SockFilter) {
	t.Helper()
	nrs := []uint32{0x3fffffff, 0x40000000, 0x40000001, 0x40000200, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff}
	for nr := range uint32(1024) {
		nrs = append(nrs, nr)
	}
	archs := []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64, unix.AUDIT_ARCH_ARM, 0}
	args := []uint64{1 << 32, 1<<32 | 1, 1 << 63, ^uint64(0), 0xffffffff, 0xfffffffe}
	for v := range uint64(64) {
		args = append(args, v, v<<32|v, 1<<v, 1<<v-1, 1<<v|0x20000)
	}
	for _, program := range [][]unix.SockFilter{want, got} { // and whatever they compare with, and its neighbours
		for _, ins := range program {
			if ins.Code&7 == unix.BPF_JMP && ins.K > 0 {
				args = append(args, uint64(ins.K), uint64(ins.K)-1, uint64(ins.K)+1, uint64(ins.K)<<32)
			}
		}
	}
	differences := 0
	for _, arch := range archs {
		for _, nr := range nrs {
			for _, arg := range args {
				var data [64]byte
				binary.NativeEndian.PutUint32(data[0:], nr)
				binary.NativeEndian.PutUint32(data[4:], arch)
				for i := range 6 {
					binary.NativeEndian.PutUint64(data[16+8*i:], arg)
				}
				w, wLooked := runFilter(t, want, data[:])
				g, gLooked := runFilter(t, got, data[:])
				if w != g {
					t.Errorf("arch %#x syscall %d argument %#x: libseccomp's filter says %#x, ours %#x", arch, nr, arg, w, g)
					if differences++; differences > 20 {
						t.FailNow()
					}
				}
				if !wLooked && !gLooked {
					break // whatever the arguments
				}
			}
		}
	}
}

// runFilter runs a BPF program as the kernel does and says whether it looked at an argument.
func runFilter(t *testing.T, program []unix.SockFilter, data []byte) (result uint32, looked bool) {
	t.Helper()
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		ins := program[pc]
		skip := func(yes bool) {
			if yes {
				pc += int(ins.Jt)
			} else {
				pc += int(ins.Jf)
			}
		}
		switch ins.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.NativeEndian.Uint32(data[ins.K:])
			looked = looked || ins.K >= 16
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= ins.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(ins.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			skip(a == ins.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			skip(a > ins.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			skip(a >= ins.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			skip(a&ins.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return ins.K, looked
		default:
			t.Fatalf("instruction %#x at %d", ins.Code, pc)
		}
	}
	t.Fatal("the filter has no end")
	return 0, false
}

// filterOf starts a container of s and returns the filter of its first process.
func filterOf(t *testing.T, s executor.Spec, standard bool) []unix.SockFilter {
	t.Helper()
	runDir := t.TempDir()
	r := newExecutor(t, runc.Options{StandardInit: standard, RunDir: runDir})
	stdin, input, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	p, err := r.Start(ctx, s, executor.IO{Stdin: stdin})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	defer func() {
		defer cancel()
		input.Close()
		if exit, err := p.Wait(); err != nil || exit.Code != 0 {
			t.Errorf("container: %+v, %v", exit, err)
		}
	}()
	var state struct {
		PID int `json:"init_process_pid"`
	}
	b, err := os.ReadFile(filepath.Join(runDir, "containers", s.ID, "state.json"))
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil {
		t.Fatal(err)
	}
	awaitExec(t, state.PID, "cat")
	return seccompFilter(t, state.PID)
}

// awaitExec returns when a process runs a command: to trace one of several threads while another makes the exec would stop both.
func awaitExec(t *testing.T, pid int, command string) {
	t.Helper()
	comm := fmt.Sprintf("/proc/%d/comm", pid)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		name, err := os.ReadFile(comm)
		switch {
		case err != nil:
			t.Fatal(err)
		case strings.TrimSpace(string(name)) == command:
			return
		case time.Now().After(end):
			t.Fatalf("process %d is %q, not %q", pid, name, command)
		}
	}
}

func seccompFilter(t *testing.T, pid int) []unix.SockFilter {
	t.Helper()
	const ptraceSeccompGetFilter = 0x420c
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Seized and not attached to: that would leave a SIGSTOP behind.
	if err := unix.PtraceSeize(pid); err != nil {
		t.Fatal(err)
	}
	defer unix.PtraceDetach(pid)
	if err := unix.PtraceInterrupt(pid); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	get := func(index int, into *unix.SockFilter) (int, syscall.Errno) {
		n, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceSeccompGetFilter, uintptr(pid), uintptr(index), uintptr(unsafe.Pointer(into)), 0, 0)
		return int(n), errno
	}
	n, errno := get(0, nil)
	if errors.Is(errno, unix.EINVAL) || errors.Is(errno, unix.EACCES) || errors.Is(errno, unix.EIO) {
		t.Skipf("this kernel does not tell filters (%v): SKIPPED", errno)
	}
	if errno != 0 {
		t.Fatal(errno)
	}
	program := make([]unix.SockFilter, n)
	if _, errno := get(0, &program[0]); errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := get(1, nil); errno != unix.ENOENT {
		t.Errorf("the container has more than one filter (%v)", errno)
	}
	return program
}

// TestOwnSeccomp runs commands under profiles of their own, also under ones that let nothing run.
func TestOwnSeccomp(t *testing.T) {
	rootfs := runctest.Rootfs(t)
	for _, tc := range []struct {
		name, profile, want string
		change              func(*executor.Spec)
		refused             string // what the error of the start has, "" when it starts
	}{
		{name: "a call refused", profile: allowingProfile, want: "before refused:"},
		{name: "also when privileged", profile: allowingProfile, want: "before refused:", change: func(s *executor.Spec) { s.Privileged = true }},
		{name: "another default", profile: `{"defaultAction":"SCMP_ACT_ALLOW"}`, want: "before made"},
		{name: "no profile", profile: `{}`, want: "before made"},
		{name: "killed", profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_KILL_PROCESS"}]}`, want: "before refused: Bad system call"},
		{name: "no execve", profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["execve"],"action":"SCMP_ACT_ERRNO"}]}`, refused: "?"},
		{name: "killed by execve", profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["execve"],"action":"SCMP_ACT_KILL_PROCESS"}]}`, refused: "?"},
		{name: "nothing at all", profile: `{"defaultAction":"SCMP_ACT_KILL_PROCESS"}`, refused: "?"},
		{name: "nothing but errors", profile: `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[]}`, refused: "?"},
		{name: "not JSON", profile: `{`, refused: "seccomp profile: not a profile"},
		{name: "null", profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[null]}`, refused: "null"},
		{name: "an agent", profile: `{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}`, refused: "listenerPath"},
		{name: "notify", profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}`, refused: "SCMP_ACT_NOTIFY"},
		{name: "unknown action", profile: `{"defaultAction":"SCMP_ACT_WHAT"}`, refused: "SCMP_ACT_WHAT"},
		{name: "unknown operator", profile: `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"WHAT"}]}]}`, refused: "WHAT"},
		{name: "unknown architecture", profile: `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["VAX"]}`, refused: "VAX"},
		{name: "architectures twice", profile: `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86_64"}]}`, refused: "both"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newExecutor(t, runc.Options{})
			s := spec(rootfs, "printf 'before '; (mkdir /made 2>/err && echo made) || if test -s /err; then echo refused: $(cat /err); else echo died; fi; rm -rf /made")
			s.SeccompProfile = tc.profile
			if tc.change != nil {
				tc.change(&s)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			var out, errs strings.Builder
			p, err := r.Start(ctx, s, executor.IO{Stdout: &out, Stderr: &errs})
			if err == nil {
				var exit executor.Exit
				exit, err = p.Wait()
				if tc.refused == "" && (err != nil || !strings.HasPrefix(out.String(), tc.want)) {
					t.Fatalf("%+v, %v, %q %q, want %q", exit, err, &out, &errs, tc.want)
				}
				if tc.refused != "" && err == nil && exit.Code == 0 {
					t.Fatalf("it ran: %q", &out)
				}
				t.Logf("%+v %s", exit, &errs)
			} else if tc.refused == "" {
				t.Fatal(err)
			}
			if ctx.Err() != nil {
				t.Fatal("it hung")
			}
			if tc.refused != "" && tc.refused != "?" && (err == nil || !strings.Contains(err.Error(), tc.refused)) {
				t.Fatalf("%v, want %q", err, tc.refused)
			}
			t.Log(err, out.String())
		})
	}
}
