// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// hostMarker makes a file that only the host has, in the root directory, and returns its path.
func hostMarker(t *testing.T) string {
	t.Helper()
	f, err := os.CreateTemp("/", "slipway-only-on-the-host-")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	t.Cleanup(func() { os.Remove(f.Name()) })
	return f.Name()
}

// verdict counts what an attack printed.
func verdict(output string) (refused, done []string) {
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "refused "); ok {
			refused = append(refused, rest)
		}
		if rest, ok := strings.CutPrefix(line, "DONE "); ok {
			done = append(done, rest)
		}
	}
	return refused, done
}

// TestEscape tries ways out of a container, with both inits; all must be refused. Each is tried again without what
// protects from it, in a privileged container or on the host, and must then succeed: an attack that never does proves nothing.
func TestEscape(t *testing.T) {
	runctest.Runner(t)
	ours, standard := newExecutor(t, runc.Options{}), newExecutor(t, runc.Options{StandardInit: true})
	marker := hostMarker(t)
	abstract := fmt.Sprintf("@slipway-escape-%d", os.Getpid())
	named := filepath.Join(t.TempDir(), "sock")
	var addrs []string
	for _, l := range []struct{ network, addr string }{{"unix", abstract}, {"unix", named}, {"tcp", "127.0.0.1:0"}} {
		listener, err := net.Listen(l.network, l.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		addrs = append(addrs, listener.Addr().String())
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
	}
	victim := exec.Command("sleep", "1000")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		victim.Process.Kill()
		victim.Wait()
	}()

	rootfs := runctest.Rootfs(t)
	program := runctest.Inside(t, rootfs)
	if err := os.Mkdir(filepath.Join(rootfs, "tmp"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(rootfs, "image-kmsg"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 11))); err != nil {
		t.Fatal(err)
	}
	privileged := func(s *executor.Spec) { s.Privileged = true }
	hostNetwork := func(s *executor.Spec) { s.Network = executor.NetworkHost }
	for _, tc := range []struct {
		name   string
		attack []string
		// without lifts the protection; onHost runs the attack on the host itself instead. One of the two is needed.
		without func(*executor.Spec)
		onHost  bool
		// done is how many tries must succeed then: what this kernel does not have cannot.
		done int
	}{
		{name: "kernel settings", attack: []string{
			"write", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches",
			"/proc/sys/kernel/sysrq", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/sys/fs/file-max",
		}, without: privileged, done: 5},
		{name: "kernel objects", attack: []string{
			"write", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state", "/sys/kernel/profiling", "/sys/kernel/uevent_helper",
		}, without: privileged, done: 1},
		{name: "masked files", attack: []string{"read", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/acpi", "/sys/firmware"}, without: privileged, done: 3},
		{name: "take the masks away", attack: []string{"unmount", "/proc/keys", "/proc/timer_list", "/proc/sys", "/sys/firmware", "/proc"}, without: privileged, done: 1},
		{name: "remount", attack: []string{"remount", "/sys", "/sys/fs/cgroup", "/proc/sys"}, without: privileged, done: 4},
		{name: "system calls", attack: []string{"calls"}, without: privileged, done: 30},
		{name: "namespaces", attack: []string{"unshare"}, without: privileged, done: 14},
		{name: "processes of the host", attack: []string{"process", strconv.Itoa(victim.Process.Pid)}, onHost: true, done: 7},
		{name: "sockets by path", attack: []string{"unix", named, "/run/slipway/slipway.sock", "/run/docker.sock"}, onHost: true, done: 1},
		{name: "abstract sockets", attack: []string{"unix", abstract}, without: hostNetwork, done: 1},
		{name: "loopback", attack: []string{"tcp", addrs[2]}, without: hostNetwork, done: 1},
		{name: "device nodes", attack: []string{"device", "c:1:1", "c:1:11", "b:7:0", "b:254:0", "c:10:229", "c:10:232", "c:4:0"}, without: privileged, done: 4},
		{name: "devices in the image", attack: []string{"open", "/image-kmsg"}, without: privileged, done: 1},
		{name: "chroot", attack: []string{"chroot", marker}, onHost: true, done: 1},
		{name: "open descriptors", attack: []string{"fds", marker}, onHost: true, done: 3},
		{name: "cgroups", attack: []string{"cgroup"}, without: privileged, done: 2},
		{name: "release agent", attack: []string{"release-agent"}, without: privileged, done: 1},
		{name: "file handles", attack: []string{"handle", "/etc/hosts"}, without: privileged, done: 1},
		{name: "own executable", attack: []string{"exe"}, onHost: false, without: nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := spec(rootfs, "")
			s.Args = append([]string{"/bin/inside", "attack"}, tc.attack...)
			for name, r := range map[string]*runc.Runc{"our init": ours, "libcontainer's init": standard} {
				res := run(t, r, s)
				refused, done := verdict(res.stdout)
				if len(refused) == 0 || len(done) > 0 || res.exit.Code != 0 {
					t.Errorf("%s: an attack got through: %q (%d refused, exit %d, %s)", name, done, len(refused), res.exit.Code, res.stderr)
				}
			}
			var out string
			switch {
			case tc.onHost:
				b, err := exec.Command(program, s.Args[1:]...).Output()
				if err != nil {
					t.Fatal(err)
				}
				out = string(b)
			case tc.without != nil:
				tc.without(&s)
				out = run(t, ours, s).stdout
			default:
				return
			}
			if refused, done := verdict(out); len(done) < tc.done {
				t.Errorf("without protection only these succeed: %q; want %d; refused: %q", done, tc.done, refused)
			}
		})
	}
}

// TestEscapeByWorkingDirectory is CVE-2024-21626: a working directory that leads through a descriptor which the runtime has
// left open, to the host.
func TestEscapeByWorkingDirectory(t *testing.T) {
	runctest.Runner(t)
	marker := hostMarker(t)
	for name, standard := range map[string]bool{"our init": false, "libcontainer's init": true} {
		r := newExecutor(t, runc.Options{StandardInit: standard})
		rootfs := runctest.Rootfs(t)
		runctest.Inside(t, rootfs)
		started := 0
		for fd := 3; fd < 14; fd++ {
			for _, form := range []string{"/proc/self/fd/%d", "/link%d"} {
				s := spec(rootfs, "")
				s.Args = []string{"/bin/inside", "attack", "fds", marker}
				s.Cwd = fmt.Sprintf(form, fd)
				if form[1] == 'l' {
					os.Symlink(fmt.Sprintf("/proc/self/fd/%d", fd), filepath.Join(rootfs, s.Cwd))
				}
				res, err := tryRun(t.Context(), r, s)
				if err != nil {
					continue
				}
				started++
				if _, done := verdict(res.stdout); len(done) > 0 || !strings.Contains(res.stdout, "refused") {
					t.Errorf("%s: working directory %s: %q, %s", name, s.Cwd, done, res.stderr)
				}
			}
		}
		if started > 0 {
			t.Errorf("%s: %d containers have a descriptor of ours as working directory", name, started)
		}
	}
}

// TestEscapeByExecutable is CVE-2019-5736 and its relatives: an image that has the runtime run its own executable in the
// container, and writes to it.
func TestEscapeByExecutable(t *testing.T) {
	runctest.Runner(t)
	for name, standard := range map[string]bool{"our init": false, "libcontainer's init": true} {
		t.Run(name, func(t *testing.T) {
			r := newExecutor(t, runc.Options{StandardInit: standard})
			rootfs := runctest.Rootfs(t)
			runctest.Inside(t, rootfs)
			runner := runc.RunnerFile(t, r)
			before, err := os.ReadFile(runner)
			if err != nil {
				t.Fatal(err)
			}
			for file, content := range map[string]string{
				"script": "#!/proc/self/exe\n",
				"init":   "#!/proc/self/exe init\n",
				"reap":   "#!/proc/self/exe reap\n",
			} {
				if err := os.WriteFile(filepath.Join(rootfs, file), []byte(content), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			os.Symlink("/proc/self/exe", filepath.Join(rootfs, "exe"))
			// Another process of the container writes, as soon as it can be, to what runs as these.
			for _, args := range [][]string{{"/script"}, {"/init"}, {"/reap"}, {"/exe"}, {"/exe", "reap", "/bin/inside", "attack", "exe"}} {
				s := spec(rootfs, "")
				s.Args = args
				ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
				res, err := tryRun(ctx, r, s)
				cancel()
				if _, done := verdict(res.stdout); len(done) > 0 {
					t.Errorf("%q: %q", args, done)
				}
				t.Logf("%q: exit %d, %v, %.100q", args, res.exit.Code, err, res.stderr)
			}
			// The small init is the runner's own executable, mounted.
			s := spec(rootfs, "")
			s.Init = true
			s.Args = []string{"/bin/inside", "attack", "exe", "/dev/init"}
			if refused, done := verdict(run(t, r, s).stdout); len(done) > 0 || len(refused) < 6 {
				t.Errorf("small init: %q, %d refused", done, len(refused))
			}
			after, err := os.ReadFile(runner)
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the runner's executable has changed: %v", err)
			}
		})
	}
}

// TestEscapeWhileJoining looks from inside at processes that join the container, before they are the command they will be.
func TestEscapeWhileJoining(t *testing.T) {
	runctest.Runner(t)
	r := newExecutor(t, runc.Options{})
	marker := hostMarker(t)
	rootfs := runctest.Rootfs(t)
	runctest.Inside(t, rootfs)
	s := spec(rootfs, "")
	s.Joinable = true
	s.CapAdd = []string{"SYS_PTRACE"} // as much as a container may have
	s.Args = []string{"/bin/inside", "attack", "watch", marker}
	out := newWaitFor("watching\n")
	p, err := r.Start(t.Context(), s, executor.IO{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t)
	for range 15 {
		joined, err := p.(executor.Joiner).Join(t.Context(), executor.ProcessSpec{Args: []string{"/bin/true"}, Env: s.Env}, executor.IO{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := joined.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(rootfs, "stop-watching"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Code != 0 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if refused, done := verdict(out.String()); len(done) > 0 || len(refused) == 0 {
		t.Errorf("%q; it has looked: %v", done, len(refused) > 0)
	}
}

// TestEscapeBySwap is about races: directories on the way to mount points, the working directory and the generated files are
// swapped for links out of the root while containers start in it.
func TestEscapeBySwap(t *testing.T) {
	runctest.Runner(t)
	for name, standard := range map[string]bool{"our init": false, "libcontainer's init": true} {
		t.Run(name, func(t *testing.T) {
			r := newExecutor(t, runc.Options{StandardInit: standard})
			rootfs, outside, source := runctest.Rootfs(t), t.TempDir(), t.TempDir()
			for _, d := range []string{"a", "etc"} {
				if err := os.MkdirAll(filepath.Join(outside, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(source, "mounted"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(outside, "marker"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			before, mountsBefore := tree(t, outside), mountsBelow(t, outside)

			// Each name is by turns a directory, a link to the host's directory by its path there, and one by many "..".
			stop := make(chan struct{})
			var swapping sync.WaitGroup
			up := strings.Repeat("../", 20)
			for _, name := range []string{"a", "etc", "w"} {
				p := filepath.Join(rootfs, name)
				swapping.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						next := p + ".next"
						os.RemoveAll(next)
						switch i % 6 {
						case 1:
							os.Symlink(filepath.Join(outside, filepath.Base(p)), next)
						case 4:
							os.Symlink(up+strings.TrimPrefix(outside, "/"), next)
						default:
							os.MkdirAll(filepath.Join(next, "a"), 0o755)
						}
						time.Sleep(time.Millisecond) // slower than the walk of a path, faster than the start of a container
						if unix.Renameat2(unix.AT_FDCWD, next, unix.AT_FDCWD, p, unix.RENAME_EXCHANGE) != nil {
							os.Rename(next, p)
						}
					}
				})
			}
			want, started := 8, 0
			if standard {
				want = 1 // it refuses most
			}
			for i := 0; started < want && i < 200; i++ { // some are refused
				s := spec(rootfs, "for d in /a/b /a/c/d; do test -e $d/mounted || echo missing $d; done; test -e "+outside+"/marker && echo OUTSIDE; true")
				s.ID = fmt.Sprintf("swap-%d", i)
				s.Cwd = "/w/x/y"
				s.Mounts = []executor.Mount{
					{Kind: executor.MountBind, Source: source, Target: "/a/b"},
					{Kind: executor.MountBind, Source: source, Target: "/a/c/d", Readonly: true},
					{Kind: executor.MountTmpfs, Target: "/etc/t"},
				}
				res, err := tryRun(t.Context(), r, s)
				if err != nil {
					continue // refused
				}
				started++
				if strings.Contains(res.stdout, "OUTSIDE") {
					t.Errorf("the host's directory is visible: %q", res.stdout)
				}
			}
			close(stop)
			swapping.Wait()
			if started == 0 {
				t.Error("no container started: nothing was tried")
			}
			if d := cmp.Diff(before, tree(t, outside)); d != "" {
				t.Errorf("the host's directory has changed (-before +after):\n%s", d)
			}
			if d := cmp.Diff(mountsBefore, mountsBelow(t, outside)); d != "" {
				t.Errorf("mounts on the host (-before +after):\n%s", d)
			}
		})
	}
}

// mountsBelow lists this process's mounts in and below dir.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir) {
			out = append(out, f[4])
		}
	}
	return out
}

// TestEscapeBySetUserID: a container's user becomes nobody else when it may gain no privileges, and what a container
// makes set-user-ID cannot be reached by other users of the host.
func TestEscapeBySetUserID(t *testing.T) {
	runctest.Runner(t)
	dir := t.TempDir()
	r := newExecutor(t, runc.Options{StateDir: dir})
	rootfs := runctest.Rootfs(t)
	program := runctest.Inside(t, rootfs)
	if err := unix.Chmod(program, 0o4755); err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string]struct{ noNewPrivileges, want bool }{"allowed": {false, true}, "no new privileges": {true, false}} {
		s := spec(rootfs, "")
		s.User.UID, s.NoNewPrivileges = 1000, opts.noNewPrivileges
		s.Args = []string{"/bin/inside", "attack", "setuid", "/bin/inside"}
		refused, done := verdict(run(t, r, s).stdout)
		if len(done)+len(refused) != 1 || (len(done) == 1) != opts.want {
			t.Errorf("%s: done %q, refused %q", name, done, refused)
		}
	}

	// The generated files are the container's to change, mode and all.
	s := spec(rootfs, "cat /bin/busybox >/etc/hosts && chmod 4755 /etc/hosts && echo ready; sleep 1000")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := newWaitFor("ready\n")
	p, err := r.Start(ctx, s, executor.IO{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	out.wait(t)
	files, _ := filepath.Glob("/run/" + runc.EngineName(dir) + "/files/*/hosts")
	if len(files) != 1 {
		t.Fatalf("generated files: %v", files)
	}
	for dir := filepath.Dir(files[0]); ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm()&0o077 == 0 {
			break
		}
		if dir == "/" {
			t.Errorf("every user of this host can execute %s, which a container has made set-user-ID root", files[0])
			break
		}
	}
	cancel()
	p.Wait()
}

// TestEscapeByKey: the keys of the engine's session are not the container's.
func TestEscapeByKey(t *testing.T) {
	runctest.Runner(t)
	name := fmt.Sprintf("slipway-escape-%d", os.Getpid())
	// The session keyring of a process that has not been given one.
	const session = unix.KEY_SPEC_USER_SESSION_KEYRING
	id, err := unix.AddKey("user", name, []byte("secret"), session)
	if err != nil {
		t.Skipf("no keyrings here (%v): SKIPPED", err)
	}
	defer unix.KeyctlInt(unix.KEYCTL_UNLINK, id, session, 0, 0)
	if found, err := unix.KeyctlSearch(session, "user", name, 0); err != nil || found != id {
		t.Fatalf("the host itself does not find its key: %v", err)
	}
	for initName, standard := range map[string]bool{"our init": false, "libcontainer's init": true} {
		r := newExecutor(t, runc.Options{StandardInit: standard})
		rootfs := runctest.Rootfs(t)
		runctest.Inside(t, rootfs)
		s := spec(rootfs, "")
		s.Args = []string{"/bin/inside", "attack", "keys", name}
		if refused, done := verdict(run(t, r, s).stdout); len(done) > 0 || len(refused) != 2 {
			t.Errorf("%s: %q", initName, done)
		}
		s.Privileged = true // no filter and no masks (and libcontainer's init, always): the keyring itself must be another one
		if _, done := verdict(run(t, r, s).stdout); len(done) > 0 && strings.Contains(done[0], "session") {
			t.Errorf("%s, privileged: %q", initName, done)
		}
	}
}
