// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
	"github.com/seed-68981b69/slipway/solver"
)

// execEnv runs real containers on a busybox.
type execEnv struct {
	*Deps
	t      *testing.T
	newOp  func(*solver.Vertex) (solver.Op, error)
	root   snapshot.Snapshot
	mounts solver.MountSource
}

func newExecEnv(t *testing.T) *execEnv {
	runctest.Runner(t)
	d := newDeps(t)
	r, err := runc.New(runc.Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close executor: %v", err)
		}
		left, err := os.ReadDir(d.TempDir)
		if err != nil || len(left) > 0 {
			t.Errorf("left in the temporary directory: %v, %v", left, err)
		}
	})
	d.Executor = r
	d.DefaultNetwork = executor.NetworkNone
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static (apt install busybox-static): SKIPPED")
	}
	nodes := parseTree(t, "/bin", "/etc", "/etc/hosts =", "/etc/hostname =", "/etc/resolv.conf =", "/etc/passwd =root:x:0:0::/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n",
		"/etc/group =dialout:x:20:ann\n", "/tmp 1777")
	nodes = append(nodes, node{Entry: index.Entry{
		Path: "bin/busybox", Type: index.File, Mode: 0o755, Size: int64(len(busybox)), Digest: digest.FromBytes(busybox), Offset: -1,
	}, content: string(busybox)})
	for _, a := range runctest.Applets {
		nodes = append(nodes, parseTree(t, "/bin/"+a+" -> busybox")...)
	}
	return &execEnv{Deps: d, t: t, newOp: New(*d), root: commitTree(t, d, nil, nodes)}
}

// shell is a RUN of a script, with the root as input and output 0.
func shell(script string, mounts ...*pb.Mount) *pb.ExecOp {
	return &pb.ExecOp{
		Meta:   &pb.Meta{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: append([]*pb.Mount{{Dest: "/", Input: 0, Output: 0}}, mounts...),
	}
}

func (e *execEnv) run(ctx context.Context, o *pb.ExecOp, session solver.Session, inputs ...snapshot.Snapshot) ([]snapshot.Snapshot, string, error) {
	e.t.Helper()
	inputs = append([]snapshot.Snapshot{e.root}, inputs...)
	op, err := e.newOp(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: o}}, len(inputs)))
	if err != nil {
		e.t.Fatal(err)
	}
	env, rec := newEnv(e.t)
	env.Mounts = e.mounts
	if session != nil {
		env.Session = session
	}
	for i, in := range inputs {
		if _, err := op.InputDigest(ctx, env, i, in); err != nil && ctx.Err() == nil {
			e.t.Errorf("digest of input %d: %v", i, err)
		}
	}
	out, err := op.Run(ctx, env, inputs)
	return out, rec.String(), err
}

// must is run that has to succeed; it returns what changed in the root and the output.
func (e *execEnv) must(o *pb.ExecOp, session solver.Session, inputs ...snapshot.Snapshot) (changed []string, log string) {
	e.t.Helper()
	out, log, err := e.run(e.t.Context(), o, session, inputs...)
	if err != nil {
		e.t.Fatalf("%v\n%s", err, log)
	}
	for _, line := range without(showSnapshot(e.t, e.Deps, out[0]), showSnapshot(e.t, e.Deps, e.root)) {
		fields := strings.Fields(line)
		name := fields[0]
		if _, content, ok := strings.Cut(line, " ="); ok {
			name += " =" + content
		}
		changed = append(changed, name)
	}
	return changed, log
}

func TestExec(t *testing.T) {
	e := newExecEnv(t)
	data := tree(t, e.Deps, "/sub", "/sub/f =data", "/link -> sub", "/other =o", "/out -> /../../..")
	bind := func(dest, selector string, ro bool, output int64) *pb.Mount {
		return &pb.Mount{Dest: dest, Input: 1, Selector: selector, Readonly: ro, Output: output}
	}
	secret := func(dest string, o *pb.SecretOpt) *pb.Mount {
		return &pb.Mount{Dest: dest, Input: -1, Output: -1, MountType: pb.MountType_SECRET, SecretOpt: o}
	}
	withSecret := &client{secrets: map[string]string{"token": "s3cret"}}

	t.Run("writes become a layer", func(t *testing.T) {
		changed, log := e.must(shell("echo hi; echo err >&2; echo x > /new; cat /proc/self/cgroup >/dev/null"), nil)
		diffLines(t, changed, []string{"/new =x\n"})
		if !strings.Contains(log, "hi\n") || !strings.Contains(log, "err\n") {
			t.Errorf("log %q", log)
		}
	})
	t.Run("nothing written", func(t *testing.T) {
		out, _, err := e.run(t.Context(), shell("true"), nil)
		if err != nil || !slices.Equal(out[0], e.root) {
			t.Errorf("got %v, %v", out, err)
		}
	})
	t.Run("environment", func(t *testing.T) {
		o := shell("env; echo $TOKEN | rev; id -u; id -G; pwd; hostname; cat /etc/hosts")
		o.Meta.Env = []string{"A=1"}
		o.Meta.User = "ann"
		o.Meta.Cwd = "/tmp"
		o.Meta.Hostname = "box"
		o.Meta.ExtraHosts = []*pb.HostIP{{Host: "db", IP: "10.1.2.3"}}
		o.Meta.ProxyEnv = &pb.ProxyEnv{HttpProxy: "http://p"}
		o.Secretenv = []*pb.SecretEnv{{ID: "token", Name: "TOKEN"}, {ID: "none", Name: "NONE", Optional: true}}
		_, log := e.must(o, withSecret)
		for _, want := range []string{
			"A=1\n", "HOME=/home/ann\n", "PATH=/usr/local/sbin:", "http_proxy=http://p\n",
			"TOKEN=[secret token]\n", "\nterc3s\n", "\n1000\n1001 20\n/tmp\nbox\n", "10.1.2.3\tdb",
		} {
			if !strings.Contains(log, want) {
				t.Errorf("no %q in:\n%s", want, log)
			}
		}
		if !strings.Contains(log, "NONE=\n") {
			t.Errorf("the variable of a secret that is not there is not empty:\n%s", log)
		}
	})
	t.Run("read-only bind", func(t *testing.T) {
		changed, log := e.must(shell("cat /m/deep/f; touch /m/deep/x || echo refused", bind("/m/deep", "/link", true, -1)), nil, data)
		if !strings.Contains(log, "data") || !strings.Contains(log, "touch: /m/deep/x: Read-only file system\n") || !strings.Contains(log, "refused\n") {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil) // the mount point has vanished
	})
	t.Run("file bind", func(t *testing.T) {
		changed, log := e.must(shell("cat /etc/motd", bind("/etc/motd", "/sub/f", true, -1)), nil, data)
		if log != "data" {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
	})
	t.Run("bind of a part of a context", func(t *testing.T) {
		draft := e.Layers.NewDraft(nil)
		for _, n := range parseTree(t, "/big =not wanted", "/a =linked", "/sub 0711 5:6", "/sub/f =data", "/sub/one == /a", "/sub/two == /a", "/sub/link -> f") {
			draft.Put(n.Entry, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(n.content)), nil })
		}
		context, err := draft.Hold(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, log := e.must(shell("ls /m; cat /m/link /m/two; stat -c %h /m/one; stat -c '%a %u %g' /m", bind("/m", "/sub", true, -1)), nil, snapshot.Snapshot{context})
		if want := "f\nlink\none\ntwo\ndatalinked2\n711 5 6\n"; log != want {
			t.Errorf("log %q, want %q", log, want)
		}
		if info, err := e.Layers.Stat(t.Context(), context); err != nil || info.Form != layer.FormHeld {
			t.Errorf("the context was written to disk: %+v, %v", info, err)
		}
	})
	t.Run("selector never leaves the input", func(t *testing.T) {
		_, log := e.must(shell("ls /m", bind("/m", "/out", true, -1)), nil, data)
		if log != "link\nother\nout\nsub\n" {
			t.Errorf("log %q", log)
		}
	})
	t.Run("writable bind is discarded", func(t *testing.T) {
		changed, log := e.must(shell("echo new > /m/sub/f; cat /m/sub/f", bind("/m", "", false, -1)), nil, data)
		if log != "new\n" {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
		diffLines(t, showSnapshot(t, e.Deps, data)[3:4], []string{"/sub 0755 0:0"})
	})
	t.Run("writable bind with output", func(t *testing.T) {
		out, _, err := e.run(t.Context(), shell("echo new > /m/f; rm /m/g 2>/dev/null; true", bind("/m", "/sub", false, 1)), nil, data)
		if err != nil {
			t.Fatal(err)
		}
		got := showSnapshot(t, e.Deps, out[1])
		if !slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, "/sub/f ") && strings.HasSuffix(l, "=new\n") }) ||
			!slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, "/other ") }) {
			t.Errorf("got %q", got)
		}
		if !slices.Equal(out[0], e.root) {
			t.Error("the root has changed")
		}
	})
	t.Run("bind of what is missing", func(t *testing.T) {
		op, err := e.newOp(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: shell("true", bind("/m", "/nope", true, -1))}}, 2))
		if err != nil {
			t.Fatal(err)
		}
		env, _ := newEnv(t)
		_, err = op.Run(t.Context(), env, []snapshot.Snapshot{e.root, data})
		if err == nil || !strings.Contains(err.Error(), `mount /m: "/nope": not found`) {
			t.Errorf("run: %v", err)
		}
		if _, err := op.InputDigest(t.Context(), env, 1, data); err == nil || !strings.Contains(err.Error(), `"/nope": not found`) {
			t.Errorf("digest: %v", err)
		}
	})
	t.Run("tmpfs", func(t *testing.T) {
		changed, log := e.must(shell("mount | grep ' /scratch '; dd if=/dev/zero of=/scratch/x bs=1k count=2k 2>&1 | grep -o 'No space'",
			&pb.Mount{Dest: "/scratch", Input: -1, Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: 1 << 20}}), nil)
		if !strings.Contains(log, "size=1024k") || !strings.Contains(log, "No space") {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
	})
	t.Run("secret", func(t *testing.T) {
		changed, log := e.must(shell("tr st ST </run/secrets/token; stat -c ' %a %u:%g' /run/secrets/token; echo x >/run/secrets/token || true; ls /opt 2>&1; true",
			secret("/run/secrets/token", &pb.SecretOpt{ID: "token", Mode: 0o440, Uid: 5, Gid: 6}),
			secret("/opt", &pb.SecretOpt{ID: "none", Optional: true})), withSecret)
		// The two streams arrive in any order.
		if !strings.Contains(log, "S3creT") || !strings.Contains(log, " 440 5:6\n") || !strings.Contains(log, "Read-only file system") || !strings.Contains(log, "No such file") {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
	})
	t.Run("missing secret", func(t *testing.T) {
		_, _, err := e.run(t.Context(), shell("true", secret("/s", &pb.SecretOpt{ID: "db"})), withSecret)
		if err == nil || !strings.Contains(err.Error(), "secret db: not found") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("exit code", func(t *testing.T) {
		_, _, err := e.run(t.Context(), shell("exit 3"), nil)
		exit, ok := errors.AsType[*ExitError](err)
		if !ok || exit.Code != 3 || err.Error() != `process "/bin/sh -c exit 3" did not complete successfully: exit code: 3` {
			t.Errorf("got %v", err)
		}
		o := shell("exit 3")
		o.Meta.ValidExitCodes = []int32{0, 3}
		e.must(o, nil)
	})
	t.Run("no such command", func(t *testing.T) {
		o := shell("")
		o.Meta.Args = []string{"/no/such"}
		_, _, err := e.run(t.Context(), o, nil)
		if exit, ok := errors.AsType[*ExitError](err); !ok || exit.Code != 127 || exit.Err == nil {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no such user", func(t *testing.T) {
		o := shell("true")
		o.Meta.User = "zed"
		if _, _, err := e.run(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), "no such user") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("entitlements", func(t *testing.T) {
		o := shell("true")
		o.Network = pb.NetMode_HOST
		if _, _, err := e.run(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), "network.host is not allowed") {
			t.Errorf("got %v", err)
		}
		o.Network, o.Security = pb.NetMode_UNSET, pb.SecurityMode_INSECURE
		if _, _, err := e.run(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), "security.insecure is not allowed") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("read-only root", func(t *testing.T) {
		o := shell("touch /x || echo refused; cat /m/f", bind("/m", "/sub", true, -1))
		o.Mounts[0].Readonly = true
		changed, log := e.must(o, nil, data)
		// Two streams: their order is not promised.
		if !strings.Contains(log, "refused\n") || !strings.Contains(log, "data") {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("the user pressed Ctrl-C")
		time.AfterFunc(300*time.Millisecond, func() { cancel(why) })
		if _, _, err := e.run(ctx, shell("sleep 60"), nil); !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("ssh agent", func(t *testing.T) {
		sock := filepath.Join(t.TempDir(), "agent")
		l, err := net.Listen("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "agent says hi\n")
				c.Close()
			}
		})
		defer wg.Wait()
		defer l.Close()
		ssh := &pb.Mount{Dest: "/run/agent", Input: -1, Output: -1, MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "default", Mode: 0o600, Uid: 1000}}
		o := shell("stat -c '%a %u %F' /run/agent", ssh)
		changed, log := e.must(o, &client{agent: sock})
		if log != "600 1000 socket\n" {
			t.Errorf("log %q", log)
		}
		diffLines(t, changed, nil)
		if _, _, err := e.run(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), `ssh agent "default": not found`) {
			t.Errorf("got %v", err)
		}
	})
}

func TestSocketProxy(t *testing.T) {
	dir := t.TempDir()
	up, err := net.Listen("unix", filepath.Join(dir, "up"))
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	go func() {
		for {
			c, err := up.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	l, err := net.Listen("unix", filepath.Join(dir, "down"))
	if err != nil {
		t.Fatal(err)
	}
	p := &socketProxy{listener: l, to: filepath.Join(dir, "up"), conns: map[net.Conn]bool{}}
	p.wg.Go(p.serve)
	c, err := net.Dial("unix", filepath.Join(dir, "down"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "echo")
	c.(*net.UnixConn).CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "echo" {
		t.Errorf("got %q, %v", got, err)
	}
	idle, err := net.Dial("unix", filepath.Join(dir, "down"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if err := p.close(); err != nil {
		t.Error(err)
	}
}

func cacheMount(id string, sharing pb.CacheSharingOpt) *pb.Mount {
	return &pb.Mount{Dest: "/cache", Input: -1, Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: id, Sharing: sharing}}
}

func TestCacheMount(t *testing.T) {
	e := newExecEnv(t)
	t.Run("is kept", func(t *testing.T) {
		changed, _ := e.must(shell("echo 1 >> /cache/n", cacheMount("kept", pb.CacheSharingOpt_SHARED)), nil)
		diffLines(t, changed, nil)
		_, log := e.must(shell("cat /cache/n; stat -c '%a %u' /cache", cacheMount("kept", pb.CacheSharingOpt_LOCKED)), nil)
		if log != "1\n755 0\n" {
			t.Errorf("log %q", log)
		}
		_, log = e.must(shell("ls /cache", cacheMount("another", pb.CacheSharingOpt_SHARED)), nil)
		if log != "" {
			t.Errorf("log %q", log)
		}
		// A new process of the engine finds it.
		e.newOp = New(*e.Deps)
		_, log = e.must(shell("cat /cache/n", cacheMount("kept", pb.CacheSharingOpt_PRIVATE)), nil)
		if log != "1\n" {
			t.Errorf("log %q", log)
		}
	})
	t.Run("first content, owner and selector", func(t *testing.T) {
		from := tree(t, e.Deps, "/cache 0770 3:4", "/cache/seed =s", "/cache/l -> seed", "/cache/hard == /cache/seed", "/ignored =i")
		m := cacheMount("seeded", pb.CacheSharingOpt_LOCKED)
		m.Input, m.Selector = 1, "/cache"
		_, log := e.must(shell("stat -c '%a %u:%g' /cache; ls /cache; cat /cache/l; echo more >> /cache/seed", m), nil, from)
		if log != "770 3:4\nhard\nl\nseed\ns" {
			t.Errorf("log %q", log)
		}
		_, log = e.must(shell("cat /cache/hard", m), nil, from)
		if log != "smore\n" {
			t.Errorf("log %q", log)
		}
		_, log = e.must(shell("ls /cache", cacheMount("seeded", pb.CacheSharingOpt_LOCKED)), nil)
		if log != "" {
			t.Errorf("another beginning is another cache: %q", log)
		}
	})
	t.Run("locked waits", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				out, log, err := e.run(t.Context(), shell("mkdir /cache/busy && sleep 0.2 && rm -r /cache/busy", cacheMount("lock", pb.CacheSharingOpt_LOCKED)), nil)
				if err != nil {
					t.Errorf("%v: %v\n%s", out, err, log)
				}
			})
		}
		wg.Wait()
	})
}

func TestCacheMountSharing(t *testing.T) {
	const shared, private, locked = pb.CacheSharingOpt_SHARED, pb.CacheSharingOpt_PRIVATE, pb.CacheSharingOpt_LOCKED
	c := &CacheMounts{}
	get := func(s pb.CacheSharingOpt) (int, func()) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		n, release, err := c.acquire(ctx, "k", s, nil)
		if err != nil {
			t.Fatal(err)
		}
		return n, release
	}
	a, releaseA := get(shared)
	b, releaseB := get(shared)
	p, releaseP := get(private)
	if a != 0 || b != 0 || p != 1 {
		t.Errorf("shared %d and %d, private %d", a, b, p)
	}
	waiting := make(chan struct{})
	got := make(chan int)
	go func() {
		n, release, err := c.acquire(context.Background(), "k", locked, func() { close(waiting) })
		if err == nil {
			release()
		}
		got <- n
	}()
	<-waiting
	releaseA()
	select {
	case n := <-got:
		t.Errorf("locked got copy %d, which is shared still", n)
	default:
	}
	releaseB()
	if n := <-got; n != 0 {
		t.Errorf("locked got copy %d", n)
	}
	q, releaseQ := get(private)
	r, releaseR := get(shared)
	if q != 0 || r != 2 {
		t.Errorf("private %d, shared %d", q, r)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("enough")
	cancel(why)
	if _, _, err := c.acquire(ctx, "k", locked, nil); err != why {
		t.Errorf("got %v", err)
	}
	releaseP()
	releaseQ()
	releaseR()
}

// TestExecInputDigest: a read-only bind counts with what it shows, everything else as a whole.
func TestExecInputDigest(t *testing.T) {
	d := newDeps(t)
	env, _ := newEnv(t)
	before := tree(t, d, "/sub", "/sub/f =1", "/other =o")
	outside := tree(t, d, "/sub", "/sub/f =1", "/other =changed")
	inside := tree(t, d, "/sub", "/sub/f =2", "/other =o")
	for _, c := range []struct {
		name    string
		mount   *pb.Mount
		outside bool
	}{
		{"read-only", &pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Readonly: true, Output: -1}, false},
		{"discarded", &pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Output: -1}, false},
		{"with output", &pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Output: 1}, true},
		{"whole", &pb.Mount{Dest: "/m", Input: 1, Readonly: true, Output: -1}, true},
		{"no content cache", &pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Readonly: true, Output: -1, ContentCache: pb.MountContentCache_OFF}, true},
		{"cache", &pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "x"}}, true},
	} {
		op, err := New(*d)(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: shell("true", c.mount)}}, 2))
		if err != nil {
			t.Fatal(err)
		}
		var ds []digest.Digest
		for _, s := range []snapshot.Snapshot{before, outside, inside} {
			dg, err := op.InputDigest(t.Context(), env, 1, s)
			if err != nil {
				t.Fatal(err)
			}
			ds = append(ds, dg)
		}
		if (ds[0] != ds[1]) != c.outside || ds[0] == ds[2] {
			t.Errorf("%s: changed outside: %v, want %v; inside: %v", c.name, ds[0] != ds[1], c.outside, ds[0] != ds[2])
		}
	}
}

// TestExecParts: what identifies a step is in the parts, what does not and what is secret is not.
func TestExecParts(t *testing.T) {
	d := newDeps(t)
	key := func(edit func(*pb.ExecOp)) string {
		o := shell("true",
			&pb.Mount{Dest: "/m", Input: 1, Selector: "/sub", Output: -1},
			cacheMount("id", pb.CacheSharingOpt_SHARED),
			&pb.Mount{Dest: "/s", Input: -1, Output: -1, MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s"}},
			&pb.Mount{Dest: "/t", Input: -1, Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{}},
			&pb.Mount{Dest: "/a", Input: -1, Output: -1, MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "a"}})
		o.Meta.ExtraHosts = []*pb.HostIP{{Host: "h", IP: "1.2.3.4"}}
		o.Secretenv = []*pb.SecretEnv{{ID: "e", Name: "E"}}
		edit(o)
		op, err := New(*d)(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: o}}, 2))
		if err != nil {
			t.Fatal(err)
		}
		return partsKey(op)
	}
	plain := key(func(*pb.ExecOp) {})
	seen := map[string]int{plain: -1}
	for i, edit := range []func(*pb.ExecOp){
		func(o *pb.ExecOp) { o.Meta.Args[2] = "false" },
		func(o *pb.ExecOp) { o.Meta.Args = append(o.Meta.Args, "x") },
		func(o *pb.ExecOp) { o.Meta.Env = append(o.Meta.Env, "A=") },
		func(o *pb.ExecOp) { o.Meta.Cwd = "/x" },
		func(o *pb.ExecOp) { o.Meta.User = "1" },
		func(o *pb.ExecOp) { o.Meta.Hostname = "h" },
		func(o *pb.ExecOp) { o.Meta.ExtraHosts[0].Host = "i" },
		func(o *pb.ExecOp) { o.Meta.Ulimit = []*pb.Ulimit{{Name: "nofile", Soft: 1, Hard: 2}} },
		func(o *pb.ExecOp) { o.Meta.ValidExitCodes = []int32{1} },
		func(o *pb.ExecOp) { o.Network = pb.NetMode_NONE },
		func(o *pb.ExecOp) { o.Security = pb.SecurityMode_INSECURE },
		func(o *pb.ExecOp) { o.Mounts[0].Readonly = true },
		func(o *pb.ExecOp) { o.Mounts[1].Readonly = true },
		func(o *pb.ExecOp) { o.Mounts[1].Selector = "/" },
		func(o *pb.ExecOp) { o.Mounts[1].Dest = "/n" },
		func(o *pb.ExecOp) { o.Mounts[1].Output = 1 },
		func(o *pb.ExecOp) { o.Mounts[2].CacheOpt.ID = "other" },
		func(o *pb.ExecOp) { o.Mounts[2].CacheOpt.Sharing = pb.CacheSharingOpt_LOCKED },
		func(o *pb.ExecOp) { o.Mounts[3].SecretOpt.ID = "other" },
		func(o *pb.ExecOp) { o.Mounts[3].SecretOpt.Mode = 0o400 },
		func(o *pb.ExecOp) { o.Mounts[3].SecretOpt.Uid = 1 },
		func(o *pb.ExecOp) { o.Mounts[3].SecretOpt.Optional = true },
		func(o *pb.ExecOp) { o.Mounts[4].TmpfsOpt.Size = 1 },
		func(o *pb.ExecOp) { o.Mounts[5].SSHOpt.Gid = 1 },
		func(o *pb.ExecOp) { o.Secretenv[0].ID = "f" },
		func(o *pb.ExecOp) { o.Secretenv[0].Name = "F" },
	} {
		k := key(edit)
		if j, dup := seen[k]; dup {
			t.Errorf("edits %d and %d have the same parts", j, i)
		}
		seen[k] = i
	}
	for i, edit := range []func(*pb.ExecOp){
		func(o *pb.ExecOp) { o.Meta.ProxyEnv = &pb.ProxyEnv{HttpProxy: "http://x"} },
		func(o *pb.ExecOp) { o.Meta.ExtraHosts[0].IP = "4.3.2.1" },
		func(o *pb.ExecOp) { o.Meta.CgroupParent = "x" },
	} {
		if key(edit) != plain {
			t.Errorf("edit %d changes the parts", i)
		}
	}
}

func TestExecRefused(t *testing.T) {
	d := newDeps(t)
	for _, c := range []struct {
		edit func(*pb.ExecOp)
		err  string
	}{
		{func(o *pb.ExecOp) { o.Meta = nil }, "no arguments"},
		{func(o *pb.ExecOp) { o.Mounts = nil }, "no root mount"},
		{func(o *pb.ExecOp) { o.Mounts = append(o.Mounts, o.Mounts[0]) }, "two root mounts"},
		{func(o *pb.ExecOp) { o.Mounts[0].Input = 3 }, "there is no input 3"},
		{func(o *pb.ExecOp) { o.Mounts[0].Output = 1 }, "lacks output 0"},
		{func(o *pb.ExecOp) { o.Mounts[0].Selector = "/x" }, "not supported yet: /x"},
		{func(o *pb.ExecOp) { o.Mounts[0].ResultID = "r" }, "not supported yet: r"},
		{func(o *pb.ExecOp) { o.CdiDevices = []*pb.CDIDevice{{Name: "v.com/gpu=0"}} }, `required device "v.com/gpu=0" is not here`},
		{func(o *pb.ExecOp) { o.Network = 9 }, "not supported yet: 9"},
		{func(o *pb.ExecOp) { o.Security = 9 }, "not supported yet: 9"},
		{func(o *pb.ExecOp) {
			o.Mounts = append(o.Mounts, &pb.Mount{Dest: "/x", Input: -1, Output: -1, MountType: 9})
		}, "not supported yet: 9"},
		{func(o *pb.ExecOp) {
			o.Mounts = append(o.Mounts, &pb.Mount{Dest: "/x", Input: -1, Output: 1, MountType: pb.MountType_TMPFS})
		}, "no output"},
		{func(o *pb.ExecOp) {
			o.Mounts = append(o.Mounts, &pb.Mount{Dest: "/x", Input: -1, Output: -1, MountType: pb.MountType_CACHE})
		}, "no cache options"},
	} {
		o := shell("true")
		c.edit(o)
		if _, err := New(*d)(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: o}}, 1)); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("got error %v, want %q", err, c.err)
		}
	}
}

// TestStale: what a killed engine left is removed by the next.
func TestStale(t *testing.T) {
	d := newDeps(t)
	e := &execOp{deps: d}
	if err := os.MkdirAll(d.TempDir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := &step{op: e}
	if err := s.secretDir(); err != nil {
		t.Skipf("needs root to mount: SKIPPED (%v)", err)
	}
	if err := os.WriteFile(filepath.Join(s.secrets, "x"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewContainers(*d).FrontendDir([]byte("definition")); err != nil {
		t.Fatal(err)
	}
	New(*d)
	if left, _ := os.ReadDir(d.TempDir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(s.secrets)) {
		t.Errorf("still mounted: %v", err)
	}
}
