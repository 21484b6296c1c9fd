// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// newNetwork returns a network that is closed at the end of the test, after the executors made later.
func newNetwork(t *testing.T) *network.Network {
	t.Helper()
	runctest.Runner(t)
	n, err := network.New(network.Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close network: %v", err)
		}
		if left := networkTraces(t, n.Bridge()); len(left) > 0 {
			t.Errorf("left on the host: %v", left)
		}
	})
	return n
}

// networkTraces lists what there is on the host of the network whose bridge has that name.
func networkTraces(t *testing.T, bridge string) []string {
	t.Helper()
	id := strings.TrimPrefix(bridge, "slw")
	var traces []string
	var links []netlink.Link
	for range 100 { // until nobody changed the list while it was read
		var err error
		if links, err = netlink.LinkList(); err == nil {
			break
		} else if !errors.Is(err, netlink.ErrDumpInterrupted) {
			t.Fatal(err)
		}
	}
	for _, l := range links {
		if l.Attrs().Name == bridge || strings.HasPrefix(l.Attrs().Name, "slv"+id[:6]) {
			traces = append(traces, "link "+l.Attrs().Name)
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tab := range tables {
		if strings.HasSuffix(tab.Name, id) {
			traces = append(traces, "table "+tab.Name)
		}
	}
	return traces
}

func TestBridge(t *testing.T) {
	n := newNetwork(t)
	r := newExecutor(t, runc.Options{Network: n})
	rootfs := runctest.Rootfs(t)

	listener, err := net.Listen("tcp", net.JoinHostPort(n.Gateway().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { io.WriteString(w, "from the host\n") }))

	s := spec(rootfs, fmt.Sprintf("wget -q -O - http://%s/ http://host:%d/; cat /etc/hosts /etc/resolv.conf; ip addr", listener.Addr(), listener.Addr().(*net.TCPAddr).Port))
	s.Network, s.Hostname = executor.NetworkBridge, "box"
	s.ExtraHosts = []executor.HostEntry{{Host: "host", IP: "host-gateway"}}
	res := run(t, r, s)
	if strings.Count(res.stdout, "from the host\n") != 2 {
		t.Errorf("container cannot reach the host: %q, %q", res.stdout, res.stderr)
	}
	for _, want := range []string{"\tbox\n", "nameserver ", n.Gateway().String() + "\thost\n"} {
		if !strings.Contains(res.stdout, want) {
			t.Errorf("%q is not in %q", want, res.stdout)
		}
	}

	t.Run("user listens on a low port, published twice", func(t *testing.T) {
		os.WriteFile(filepath.Join(rootfs, "index.html"), []byte("<h1>page</h1>\n"), 0o644)
		s := spec(rootfs, "")
		s.Args = []string{"httpd", "-f", "-p", "80", "-h", "/"}
		s.User.UID = 1000
		s.Network = executor.NetworkBridge
		s.Ports = []executor.Port{{HostIP: "127.0.0.1", ContainerPort: 80}, {ContainerPort: 80, Protocol: "tcp"}}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		p, err := r.Start(ctx, s, executor.IO{})
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Ports()) != 2 || p.Ports()[0].HostPort == 0 || p.Ports()[1].HostPort == 0 {
			t.Fatalf("ports %+v", p.Ports())
		}
		for _, host := range []string{
			net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Ports()[0].HostPort))),
			net.JoinHostPort("localhost", strconv.Itoa(int(p.Ports()[1].HostPort))),
			net.JoinHostPort(n.Gateway().String(), strconv.Itoa(int(p.Ports()[1].HostPort))),
			net.JoinHostPort(p.IP(), "80"),
		} {
			if body := getUntilReady(t, "http://"+host+"/index.html"); body != "<h1>page</h1>\n" {
				t.Errorf("%s: %q", host, body)
			}
		}
		// The same port again is refused by name.
		s2 := spec(rootfs, "true")
		s2.ID, s2.Network = "t2", executor.NetworkBridge
		s2.Ports = []executor.Port{{HostIP: "127.0.0.1", HostPort: p.Ports()[0].HostPort, ContainerPort: 80}}
		want := fmt.Sprintf("publish port 127.0.0.1:%d/tcp: the port is already in use", p.Ports()[0].HostPort)
		if _, err := tryRun(t.Context(), r, s2); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
		cancel()
		if exit, err := p.Wait(); err != nil || exit.Code != 137 {
			t.Errorf("exit %+v, error %v", exit, err)
		}
		if c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Ports()[0].HostPort))), time.Second); err == nil {
			c.Close()
			t.Error("the port is still open after the end")
		}
	})
	t.Run("ports need the bridge", func(t *testing.T) {
		s := spec(rootfs, "true")
		s.Ports = []executor.Port{{ContainerPort: 80}}
		if _, err := tryRun(t.Context(), r, s); err == nil || !strings.Contains(err.Error(), "ports can only be published with the bridge network") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("no bridge", func(t *testing.T) {
		r := newExecutor(t, runc.Options{NetworkError: errors.New("no NAT in this kernel")})
		s := spec(rootfs, "true")
		s.Network = executor.NetworkBridge
		want := "the bridge network is not available: no NAT in this kernel; use the host network"
		if _, err := tryRun(t.Context(), r, s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	})
	t.Run("host network", func(t *testing.T) {
		s := spec(rootfs, "wget -q -O - http://"+listener.Addr().String()+"/; hostname")
		s.Network = executor.NetworkHost
		name, _ := os.Hostname()
		if res := run(t, r, s); res.stdout != "from the host\n"+name+"\n" {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
	})
	t.Run("no network", func(t *testing.T) {
		res := run(t, r, spec(rootfs, "wget -q -O - http://"+listener.Addr().String()+"/ || echo unreachable; nc -l -p 1 -e true & sleep 0.1; nc 127.0.0.1 1 </dev/null && echo loopback"))
		if !strings.Contains(res.stdout, "unreachable\n") || !strings.Contains(res.stdout, "loopback") {
			t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
		}
	})
}

// getUntilReady fetches a page from a server that may not listen yet.
func getUntilReady(t *testing.T, url string) string {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	var lastErr error
	for range 100 {
		resp, err := client.Get(url)
		if err == nil {
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err == nil {
				return string(b)
			}
			lastErr = err
		} else {
			lastErr = err
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%s: %v", url, lastErr)
	return ""
}

// traces lists what exists on the host of the executor whose state directory is dir.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	name := runc.EngineName(dir)
	var out []string
	if _, err := os.Lstat(filepath.Join("/run", name)); err == nil {
		out = append(out, "/run/"+name)
	}
	cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if _, err := os.Stat("/sys/fs/cgroup/" + name); err == nil { // cgroup v2 alone
		cgroups = append(cgroups, "/sys/fs/cgroup/"+name)
	}
	deeper, _ := filepath.Glob("/sys/fs/cgroup/*/*/*/" + name)
	out = append(out, append(cgroups, deeper...)...)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) || strings.Contains(line, name) {
			out = append(out, "mount "+line)
		}
	}
	return out
}

func TestNothingIsLeft(t *testing.T) {
	runctest.Runner(t)
	dir := t.TempDir()
	r, err := runc.New(runc.Options{StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	rootfs := runctest.Rootfs(t)
	s := spec(rootfs, "true")
	s.CgroupParent = "../../a/b"
	run(t, r, s)
	p, err := r.Start(t.Context(), spec(rootfs, "sleep 1000"), executor.IO{})
	if err != nil {
		t.Fatal(err)
	}
	if len(traces(t, dir)) == 0 {
		t.Error("a running container has no traces: the test looks in the wrong places")
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Code != 137 {
		t.Errorf("Close ended the container with %+v, %v", exit, err)
	}
	if left := traces(t, dir); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
	if _, err := r.Start(t.Context(), s, executor.IO{}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("Start after Close: %v", err)
	}
}

func TestRunnerDies(t *testing.T) {
	dir := t.TempDir()
	r := newExecutor(t, runc.Options{StateDir: dir})
	rootfs := runctest.Rootfs(t)
	p, err := r.Start(t.Context(), spec(rootfs, "sleep 1000"), executor.IO{})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(runc.RunnerPID(r), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(); err == nil || !strings.Contains(err.Error(), "slipway-runner ended: signal: killed") {
		t.Errorf("Wait: error %v", err)
	}
	if res := run(t, r, spec(rootfs, "echo again")); res.stdout != "again\n" {
		t.Errorf("after another runner was started: %+v", res)
	}
}

// engineEnv makes this test binary an engine that runs one container until it is killed: see TestMain.
const engineEnv = "SLIPWAY_TEST_ENGINE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(engineEnv); dir != "" {
		if err := engine(dir, os.Getenv("SLIPWAY_TEST_ROOTFS")); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	if os.Getenv(cgroup2Env) != "" {
		if err := cgroup2Only(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	code := m.Run()
	runctest.RemoveInside()
	os.Exit(code)
}

func engine(dir, rootfs string) error {
	n, err := network.New(network.Options{Root: dir})
	if err != nil {
		return err
	}
	r, err := runc.New(runc.Options{StateDir: dir, Network: n})
	if err != nil {
		return err
	}
	s := spec(rootfs, "setsid sleep 4242 & trap '' TERM; echo ready; while true; do sleep 1; done")
	s.Network = executor.NetworkBridge
	ready := newWaitFor("ready\n")
	if _, err := r.Start(context.Background(), s, executor.IO{Stdout: ready}); err != nil {
		return err
	}
	<-ready.seen
	fmt.Println("runner", runc.RunnerPID(r), "bridge", n.Bridge())
	select {}
}

func TestEngineDies(t *testing.T) {
	runctest.Runner(t)
	for _, killRunner := range []bool{false, true} {
		t.Run(fmt.Sprintf("runner too %v", killRunner), func(t *testing.T) {
			dir, rootfs := t.TempDir(), runctest.Rootfs(t)
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), engineEnv+"="+dir, "SLIPWAY_TEST_ROOTFS="+rootfs)
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line, _ := bufio.NewReader(out).ReadString('\n')
			var runner int
			var bridge string
			if _, err := fmt.Sscanf(line, "runner %d bridge %s", &runner, &bridge); err != nil {
				cmd.Process.Kill()
				t.Fatalf("engine said %q", line)
			}
			pids := containerPids(t, dir)
			if len(pids) < 2 {
				t.Errorf("found only processes %v in the container", pids)
			}
			if killRunner {
				unix.Kill(runner, unix.SIGSTOP) // so that it cannot react to the engine's end
			}
			cmd.Process.Kill()
			cmd.Wait()
			if killRunner {
				unix.Kill(runner, unix.SIGKILL)
			}
			waitGone(t, runner)
			if !killRunner {
				for _, pid := range pids {
					waitGone(t, pid)
				}
			}

			// The next engine of this state directory removes what is left.
			n, err := network.New(network.Options{Root: dir})
			if err != nil {
				t.Fatal(err)
			}
			r, err := runc.New(runc.Options{StateDir: dir, Network: n})
			if err != nil {
				t.Fatal(err)
			}
			for _, pid := range pids {
				waitGone(t, pid)
			}
			s := spec(rootfs, "true")
			s.Network = executor.NetworkBridge
			run(t, r, s)
			if err := errors.Join(r.Close(), n.Close()); err != nil {
				t.Error(err)
			}
			if left := append(traces(t, dir), networkTraces(t, bridge)...); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

// containerPids returns the processes in containers of the executor with that state directory.
func containerPids(t *testing.T, dir string) []int {
	t.Helper()
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte("/"+runc.EngineName(dir)+"/")) {
			pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

func waitGone(t *testing.T, pid int) {
	t.Helper()
	for range 500 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %d is still there", pid)
}
