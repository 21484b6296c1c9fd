// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/cache/share/s3/s3test"
	"github.com/seed-68981b69/slipway/engine/buildkitapi/buildctltest"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// TestMain makes the test binary be the program when it is called by that name, which scripts do. Engines that
// commands start in the background are then this binary too.
func TestMain(m *testing.M) {
	if err := userns.Enter(); err != nil { // Main does it, but the name that counts comes after it
		fmt.Fprintf(os.Stderr, "slipway: %v\n", err)
		os.Exit(1)
	}
	if name := filepath.Base(os.Args[0]); name != "slipway" && name != buildkitdName {
		flag.Parse()
		limit := true
		flag.Visit(func(f *flag.Flag) { limit = limit && f.Name != "test.parallel" })
		if limit {
			_ = flag.Set("test.parallel", "2") // every script has an engine and containers of its own
		}
	}
	program := func() { os.Exit(Main()) }
	testscript.Main(m, map[string]func(){"slipway": program, buildkitdName: program})
}

// TestScript runs testdata/script/*.txtar: one promise of the program each, kept with real containers, networks and
// registries. Besides the commands of testscript there are:
//
//	base NAME...               makes base images (testdata/bases) in the script's store; busybox is quick
//	stage-ran N [PATTERN...]   the last build ran N steps of the Dockerfile (FROM does not count), among them these
//	stage-cached N [PATTERN…]  the last build took N steps from the cache, among them these
//	[!] image-has IMAGE PATH…  the image has these files
//	exit-code N PROGRAM…       like exec, with this exit code
//	one-line-error [PATTERN]   the last command wrote nothing to standard error but one line "slipway: …"
//	registry [tls] [auth|token] [files] serves an empty registry and sets $REGISTRY to its host:port (user sailor, password ahoy); with files what it has
//	                           is in files below $REGISTRY_DIR
//	s3                         serves an empty bucket caches and sets $S3 to the server's URL, $S3_DIR to where the objects are as files, and the credentials
//	http-serve DIR [AUTH]      serves files and sets $HTTP to host:port; with AUTH only to who sends it as Authorization
//	[!] http-get URL           prints a page; waits for the server unless it must fail
//	port NAME                  sets $NAME to a free port
//	await FILE...              waits until the files exist
//	pty INPUT PROGRAM…         runs a program on a terminal of 30 rows and 100 columns and types the file INPUT;
//	                           a line "<TEXT" of it waits until TEXT was shown, and "@ROWSxCOLUMNS" changes the terminal's size
//	daemon-pid NAME            sets $NAME to the process ID of the engine
//	daemon-kill                kill -9 of the engine
//	tmpfs DIR SIZE             mounts a small file system until the script ends
//	as-nobody PROGRAM…         like exec, as user and group 65534; exit status 1 or 2 is wanted with !
//	certs DIR                  makes DIR/{ca,cert,key}.pem for clients, DIR/server/… for a server on loopback, and DIR/other/… of another authority
//	no-mounts DIR              nothing is mounted below DIR
//	await-mount DIR            waits until something is mounted below DIR
//	[!] buildctl [ARG...]      BuildKit's own client, which is built when it is needed first, against the script's engine, which is
//	                           started when none runs; without arguments it makes things ready, and "exec buildctl … &" works from there on
//	[!] buildx [ARG...]        the same with docker buildx, against a builder "sw" of the driver "remote"; as "docker buildx", too, and as what
//	                           "docker build" is. It takes minutes to build where Go's cache has nothing of it; where it cannot be had the script is skipped
//	real-buildkitd             starts a real BuildKit on an empty state and sets $BUILDKITD to its address; skipped where buildx would be, and without runc
//
// Conditions: [engine] (containers can be run: as root, or as the user of TestScriptUser), [user] (as that user), [single-id] (who has no IDs to give away), [root], [overlay] (overlayfs
// and namespaces may be used), [ipv6] (the host has it), [routed] (the host has a way out), [skopeo] and [busybox] (installed). The store is
// $SLIPWAY_ROOT. When a script ends its engine is stopped; what the engine leaves behind (a mount, a process, an interface, a table, a
// cgroup, a file) fails the test.
func TestScript(t *testing.T) {
	if runsAsTestUser() {
		t.Log("as an ordinary user")
	} else if os.Geteuid() != 0 {
		t.Log("NOT ROOT: scripts that need containers will be SKIPPED")
	} else if err := runctest.EnsureRunner(); err != nil {
		t.Fatalf("build slipway-runner: %v", err)
	}
	bases, err := filepath.Abs("../../testdata/bases/bases.sh")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "../../testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: false,
		Setup: func(env *testscript.Env) error {
			return setUpScript(t, env, bases)
		},
		Condition: scriptCondition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"base":           scriptBase,
			"stage-ran":      scriptStages("ran"),
			"stage-cached":   scriptStages("cached"),
			"image-has":      scriptImageHas,
			"exit-code":      scriptExitCode,
			"one-line-error": scriptOneLineError,
			"registry":       scriptRegistry,
			"s3":             scriptS3,
			"http-serve":     scriptServe,
			"http-get":       scriptGet,
			"port":           scriptPort,
			"await":          scriptAwait,
			"pty":            scriptPTY,
			"daemon-pid":     scriptDaemonPID,
			"daemon-kill":    scriptDaemonKill,
			"tmpfs":          scriptTmpfs,
			"as-nobody":      scriptAsNobody,
			"buildctl":       scriptBuildctl,
			"buildx":         scriptBuildx,
			"real-buildkitd": scriptBuildkitd,
			"certs":          scriptCerts,
			"no-mounts":      scriptNoMounts,
			"await-mount":    scriptAwaitMount,
		},
	})
}

// scriptTB is where the script's testing.TB is kept.
type scriptTB struct{}

func setUpScript(_ *testing.T, env *testscript.Env, bases string) error {
	tb, ok := env.T().(testing.TB)
	if !ok {
		return errors.New("testscript has no testing.TB")
	}
	env.Values[scriptTB{}] = tb
	root := filepath.Join(env.WorkDir, "root")
	home := filepath.Join(env.WorkDir, ".home")
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	for name, value := range map[string]string{
		"SLIPWAY_ROOT": root, "DOCKER_CONFIG": filepath.Join(home, ".docker"), "HOME": home,
		"BUILDKIT_PROGRESS": "plain", "NO_COLOR": "1", "BASES": bases, "SLIPWAY": "slipway", "TERM": "dumb",
	} {
		env.Setenv(name, value)
	}
	for _, name := range []string{"SLIPWAY_RUNNER", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env.Setenv(name, value)
		}
	}
	env.Defer(func() {
		for _, dir := range append(rootsBelow(env.WorkDir), root) {
			stopAndCheck(tb, dir)
		}
	})
	return nil
}

// rootsBelow lists the state directories that a script has made besides its first one, whose engines a failed script leaves running.
func rootsBelow(dir string) []string {
	locks, _ := filepath.Glob(filepath.Join(dir, "*", "lock"))
	var roots []string
	for _, lock := range locks {
		if root := filepath.Dir(lock); filepath.Base(root) != "root" {
			roots = append(roots, root)
		}
	}
	return roots
}

// stopAndCheck stops the engine of root and fails the test when something of it is left.
func stopAndCheck(tb testing.TB, root string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	a := &app{root: root}
	if _, err := a.daemonPID(ctx); err == nil {
		if err := a.daemonStop(ctx); err != nil {
			tb.Errorf("stop the engine: %v", err)
		}
	}
	log, err := os.ReadFile(filepath.Join(root, "log", "daemon.log"))
	if err == nil && len(log) > 0 && (tb.Failed() || testing.Verbose()) {
		tb.Logf("the engine's log:\n%s", log)
	}
	if bytes.Contains(log, []byte("panic:")) || bytes.Contains(log, []byte("goroutine ")) {
		tb.Errorf("the engine has panicked:\n%s", log)
	}
	for _, l := range leftovers(tb, root) {
		tb.Errorf("left behind: %s", l)
	}
}

func scriptCondition(cond string) (bool, error) {
	switch cond {
	case "root":
		return os.Geteuid() == 0, nil
	case "engine":
		return os.Geteuid() == 0 || runsAsTestUser(), nil
	case "user":
		return runsAsTestUser(), nil
	case "single-id":
		return os.Getenv(testUserEnv) == singleID, nil
	case "overlay":
		data, err := os.ReadFile("/proc/filesystems")
		return err == nil && os.Geteuid() == 0 && bytes.Contains(data, []byte("\toverlay\n")), nil
	case "routed":
		c, err := net.Dial("udp4", "192.0.2.1:9") // which sends nothing
		if err == nil {
			c.Close()
		}
		return err == nil, nil
	case "ipv6":
		l, err := net.Listen("tcp6", "[::1]:0")
		if err == nil {
			l.Close()
		}
		return err == nil, nil
	case "skopeo", "busybox":
		_, err := exec.LookPath(cond)
		return err == nil, nil
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

func scriptBase(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: base NAME...")
	}
	if os.Geteuid() != 0 && !runsAsTestUser() {
		ts.Value(scriptTB{}).(testing.TB).Skip("making base images needs root: SKIPPED")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		ts.Value(scriptTB{}).(testing.TB).Skip("needs busybox-static (apt install busybox-static): SKIPPED")
	}
	ts.Check(ts.Exec("sh", append([]string{ts.Getenv("BASES"), ts.Getenv("SLIPWAY_ROOT"), ts.MkAbs(ts.Getenv("WORK") + "/.bases")}, args...)...))
}

// buildStep is a step of the Dockerfile in a build's plain progress.
type buildStep struct {
	name, state string // state: ran, cached, failed or unfinished
}

var (
	stepName  = regexp.MustCompile(`^#(\d+) \[(?:[^\]]* )?\d+/\d+\] (.*)$`)
	stepState = regexp.MustCompile(`^#(\d+) (CACHED|DONE|ERROR|CANCELED)\b`)
)

// buildSteps reads plain progress. FROM is no step: nothing runs for it.
func buildSteps(output string) []buildStep {
	var ids []string
	steps := map[string]*buildStep{}
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\n")
		if m := stepName.FindStringSubmatch(line); m != nil && steps[m[1]] == nil && !strings.HasPrefix(m[2], "FROM ") {
			ids = append(ids, m[1])
			steps[m[1]] = &buildStep{name: m[2], state: "unfinished"}
		}
		if m := stepState.FindStringSubmatch(line); m != nil && steps[m[1]] != nil {
			steps[m[1]].state = map[string]string{"CACHED": "cached", "DONE": "ran", "ERROR": "failed", "CANCELED": "failed"}[m[2]]
		}
	}
	var out []buildStep
	for _, id := range ids {
		out = append(out, *steps[id])
	}
	return out
}

func TestBuildSteps(t *testing.T) {
	got := buildSteps("#4 [internal] load build context\n#4 DONE 0.0s\n#5 [b 1/3] FROM x\n#5 DONE 0.0s\n#6 [b 2/3] COPY f /f\n#6 CACHED\n\n" +
		"#7 [b 3/3] RUN x\n#7 0.1 CACHED\n#7 [b 3/3] RUN x\n#7 DONE 0.1s\n#8 [linux/amd64 a 2/2] RUN [ 1/2 ] y\n#8 ERROR: no\n#9 [2/2] ADD z /\n")
	want := []buildStep{{"COPY f /f", "cached"}, {"RUN x", "ran"}, {"RUN [ 1/2 ] y", "failed"}, {"ADD z /", "unfinished"}}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func scriptStages(state string) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) == 0 {
			ts.Fatalf("usage: stage-%s N [PATTERN...]", state)
		}
		want, err := strconv.Atoi(args[0])
		ts.Check(err)
		steps := buildSteps(ts.ReadFile("stderr"))
		var found []string
		for _, s := range steps {
			if s.state == state {
				found = append(found, s.name)
			}
		}
		if len(found) != want {
			ts.Fatalf("%d steps %s, want %d: %q", len(found), state, want, steps)
		}
		for _, pattern := range args[1:] {
			re, err := regexp.Compile(pattern)
			ts.Check(err)
			if !slices.ContainsFunc(found, re.MatchString) {
				ts.Fatalf("no step like %q %s: %q", pattern, state, steps)
			}
		}
	}
}

// scriptImageHas copies the files out of the image by a build, which works for images without a shell too.
func scriptImageHas(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] image-has IMAGE PATH...")
	}
	for _, path := range args[1:] {
		dir, err := os.MkdirTemp(ts.Getenv("WORK"), ".image-has-")
		ts.Check(err)
		dockerfile := fmt.Sprintf("FROM %s AS image\nFROM scratch\nCOPY --from=image [%q, \"/\"]\n", args[0], path)
		ts.Check(os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644))
		err = ts.Exec("slipway", "build", "-o", "type=cacheonly", dir)
		output := ts.ReadFile("stderr")
		switch {
		case err == nil && neg:
			ts.Fatalf("%s has %s", args[0], path)
		case err != nil && !strings.Contains(output, "not found"):
			ts.Fatalf("look into %s: %v", args[0], err)
		case err != nil && !neg:
			ts.Fatalf("%s does not have %s", args[0], path)
		}
	}
}

func scriptExitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exit-code N PROGRAM [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func scriptOneLineError(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 1 {
		ts.Fatalf("usage: one-line-error [PATTERN]")
	}
	text := ts.ReadFile("stderr")
	line, rest, ok := strings.Cut(text, "\n")
	if !ok || rest != "" || !strings.HasPrefix(line, "slipway: ") {
		ts.Fatalf("want one line \"slipway: …\", got:\n%s", text)
	}
	for _, ugly := range []string{"rpc error", "goroutine ", ".go:", "desc ="} {
		if strings.Contains(line, ugly) {
			ts.Fatalf("%q does not belong into a message: %s", ugly, line)
		}
	}
	if len(args) == 1 {
		re, err := regexp.Compile(args[0])
		ts.Check(err)
		if !re.MatchString(line) {
			ts.Fatalf("%s\ndoes not match %s", line, args[0])
		}
	}
}

func scriptRegistry(ts *testscript.TestScript, neg bool, args []string) {
	var opts registrytest.Options
	for _, arg := range args {
		switch arg {
		case "tls":
			opts.TLS = true
		case "auth", "token":
			opts.User, opts.Password, opts.Token = "sailor", "ahoy", arg == "token"
		case "files":
			opts.Dir = ts.MkAbs("registry-files")
			ts.Setenv("REGISTRY_DIR", opts.Dir)
		default:
			neg = true
		}
	}
	if neg {
		ts.Fatalf("usage: registry [tls] [auth|token] [files]")
	}
	server := registrytest.Start(ts.Value(scriptTB{}).(testing.TB), opts)
	ts.Setenv("REGISTRY", server.Host)
	if opts.TLS {
		ts.Check(os.WriteFile(filepath.Join(ts.Getenv("WORK"), "registry-ca.crt"), server.CA, 0o644))
	}
}

func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: http-serve DIR [AUTHORIZATION]")
	}
	files := http.FileServer(http.Dir(ts.MkAbs(args[0])))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(args) == 2 && r.Header.Get("Authorization") != args[1] {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		files.ServeHTTP(w, r)
	}))
	ts.Defer(server.Close)
	ts.Setenv("HTTP", strings.TrimPrefix(server.URL, "http://"))
}

// scriptPatience bounds waiting for something that another process does.
const scriptPatience = 20 * time.Second

func scriptGet(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] http-get URL")
	}
	client := &http.Client{Timeout: scriptPatience, Transport: &http.Transport{DisableKeepAlives: true}}
	deadline := time.Now().Add(scriptPatience)
	for {
		response, err := client.Get(args[0])
		if neg {
			if err == nil {
				response.Body.Close()
				ts.Fatalf("%s: %s", args[0], response.Status)
			}
			return
		}
		if err == nil {
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			ts.Check(err)
			if response.StatusCode != http.StatusOK {
				ts.Fatalf("%s: %s\n%s", args[0], response.Status, body)
			}
			_, err = ts.Stdout().Write(body)
			ts.Check(err)
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v", err)
		}
		time.Sleep(20 * time.Millisecond) // until a server in a container listens
	}
}

func scriptPort(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: port NAME")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	_, port, err := net.SplitHostPort(l.Addr().String())
	ts.Check(err)
	ts.Check(l.Close())
	ts.Setenv(args[0], port)
}

func scriptAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage: await FILE...")
	}
	deadline := time.Now().Add(scriptPatience)
	for _, file := range args {
		for {
			if _, err := os.Stat(ts.MkAbs(file)); err == nil {
				break
			}
			if time.Now().After(deadline) {
				ts.Fatalf("%s does not appear", file)
			}
			time.Sleep(10 * time.Millisecond) // until a process in a container has written it
		}
	}
}

// scriptPTY runs a program whose three streams are one terminal.
func scriptPTY(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] pty INPUT PROGRAM [ARG...]")
	}
	input := ts.ReadFile(args[0])
	control, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	ts.Check(err)
	defer control.Close()
	number, err := unix.IoctlGetInt(int(control.Fd()), unix.TIOCGPTN)
	ts.Check(err)
	ts.Check(unix.IoctlSetPointerInt(int(control.Fd()), unix.TIOCSPTLCK, 0))
	terminal, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|syscall.O_NOCTTY, 0)
	ts.Check(err)
	ts.Check(unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 30, Col: 100}))

	cmd := scriptCommand(ts, args[1:])
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	ts.Check(cmd.Start())
	terminal.Close()
	timer := time.AfterFunc(3*scriptPatience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	// What the program shows is read all the time; typing goes on when the text that a line "<TEXT" waits for was shown.
	var mu sync.Mutex
	var shown []byte
	arrived := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, 4096)
		for {
			n, err := control.Read(buffer) // EIO when nobody has the terminal open any more
			mu.Lock()
			shown = append(shown, buffer[:n]...)
			mu.Unlock()
			select {
			case arrived <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	from := 0
	waitFor := func(text string) {
		for {
			mu.Lock()
			i := bytes.Index(shown[from:], []byte(text))
			if i >= 0 {
				from += i + len(text)
			}
			mu.Unlock()
			if i >= 0 {
				return
			}
			select {
			case <-arrived:
			case <-ended:
				return
			}
		}
	}
	for line := range strings.Lines(input) {
		if text, ok := strings.CutPrefix(line, "<"); ok {
			waitFor(strings.TrimSuffix(text, "\n"))
			continue
		}
		var rows, cols uint16
		if n, _ := fmt.Sscanf(line, "@%dx%d", &rows, &cols); n == 2 {
			ts.Check(unix.IoctlSetWinsize(int(control.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}))
			continue
		}
		_, err := io.WriteString(control, line)
		ts.Check(err)
	}
	<-ended
	_, err = ts.Stdout().Write(shown)
	ts.Check(err)
	checkOutcome(ts, neg, cmd.Wait())
}

// scriptCommand is a program in the script's directory and environment.
func scriptCommand(ts *testscript.TestScript, args []string) *exec.Cmd {
	program := args[0]
	if !strings.Contains(program, "/") {
		for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
			if info, err := os.Stat(filepath.Join(dir, program)); err == nil && info.Mode()&0o111 != 0 && !info.IsDir() {
				program = filepath.Join(dir, program)
				break
			}
		}
	}
	cmd := exec.Command(program, args[1:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = os.Environ()
	for _, name := range []string{
		"SLIPWAY_ROOT", "SLIPWAY_HOST", "SLIPWAY_RUNNER", "SLIPWAY_STANDALONE", "DOCKER_CONFIG", "HOME", "PATH", "TMPDIR",
		"BUILDKIT_PROGRESS", "NO_COLOR", "TERM", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "BUILDX_BUILDER", "BUILDX_EXPERIMENTAL",
	} {
		if value := ts.Getenv(name); value != "" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	return cmd
}

func checkOutcome(ts *testscript.TestScript, neg bool, err error) {
	switch {
	case err == nil && neg:
		ts.Fatalf("unexpected success")
	case err != nil && !neg:
		ts.Fatalf("%v", err)
	case err != nil:
		ts.Logf("[%v]", err)
	}
}

func scriptDaemonPID(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemon-pid NAME")
	}
	pid, err := (&app{root: ts.Getenv("SLIPWAY_ROOT")}).daemonPID(context.Background())
	ts.Check(err)
	ts.Setenv(args[0], strconv.Itoa(pid))
}

func scriptDaemonKill(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: daemon-kill")
	}
	pid, err := (&app{root: ts.Getenv("SLIPWAY_ROOT")}).daemonPID(context.Background())
	ts.Check(err)
	fd, err := unix.PidfdOpen(pid, 0)
	ts.Check(err)
	defer unix.Close(fd)
	ts.Check(unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0))
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(scriptPatience.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
		ts.Fatalf("wait for the engine to be dead: %v", err)
	}
}

// scriptBuildctl runs BuildKit's client with $BUILDKIT_HOST, which it sets to the script's own engine when nothing else has.
func scriptBuildctl(ts *testscript.TestScript, neg bool, args []string) {
	program, err := buildctltest.Buildctl()
	ts.Check(err)
	if path := ts.Getenv("PATH"); !strings.Contains(path, filepath.Dir(program)) {
		ts.Setenv("PATH", path+string(os.PathListSeparator)+filepath.Dir(program))
	}
	if ts.Getenv("BUILDKIT_HOST") == "" {
		a := &app{root: ts.Getenv("SLIPWAY_ROOT")}
		ts.Setenv("BUILDKIT_HOST", "unix://"+a.socket())
		if _, err := a.daemonPID(context.Background()); err != nil {
			ts.Check(ts.Exec("slipway", "ps")) // any client starts the engine
		}
	}
	if len(args) > 0 {
		checkOutcome(ts, neg, ts.Exec("buildctl", args...))
	}
}

// scriptBuildx runs docker buildx with the script's own engine as its builder and as the docker to load images into.
func scriptBuildx(ts *testscript.TestScript, neg bool, args []string) {
	program, err := buildctltest.Buildx()
	if err != nil {
		ts.Value(scriptTB{}).(testing.TB).Skipf("docker buildx cannot be had: SKIPPED: %v", err)
	}
	if path := ts.Getenv("PATH"); !strings.Contains(path, filepath.Dir(program)) {
		ts.Setenv("PATH", path+string(os.PathListSeparator)+filepath.Dir(program))
		plugins := filepath.Join(ts.Getenv("DOCKER_CONFIG"), "cli-plugins")
		ts.Check(os.MkdirAll(plugins, 0o700))
		ts.Check(os.Symlink(program, filepath.Join(plugins, filepath.Base(program))))
		a := &app{root: ts.Getenv("SLIPWAY_ROOT")}
		if _, err := a.daemonPID(context.Background()); err != nil {
			ts.Check(ts.Exec("slipway", "ps")) // any client starts the engine
		}
		ts.Setenv("DOCKER_HOST", "unix://"+a.socket())
		ts.Check(ts.Exec("docker-buildx", "create", "--name", "sw", "--driver", "remote", "unix://"+a.socket()))
		ts.Setenv("BUILDX_BUILDER", "sw")
	}
	if len(args) > 0 {
		checkOutcome(ts, neg, ts.Exec("docker-buildx", args...))
	}
}

// scriptBuildkitd starts BuildKit's own daemon, whose caches ours are compared with. It is ended with the script.
func scriptBuildkitd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: real-buildkitd")
	}
	tb := ts.Value(scriptTB{}).(testing.TB)
	if os.Getenv("SLIPWAY_TEST_BUILDX") == "0" {
		tb.Skip("$SLIPWAY_TEST_BUILDX is 0: no buildkitd: SKIPPED")
	}
	program, err := buildctltest.Buildkitd()
	if err == nil {
		_, err = exec.LookPath("runc")
	}
	if err != nil {
		tb.Skipf("buildkitd cannot be had: SKIPPED: %v", err)
	}
	dir := ts.MkAbs("buildkitd")
	ts.Check(os.MkdirAll(dir, 0o700))
	address := "unix://" + filepath.Join(dir, "s")
	cmd := exec.Command(program, "--addr", address, "--root", filepath.Join(dir, "state"), "--config", "/dev/null", "--otel-socket-path", filepath.Join(dir, "otel"),
		"--containerd-worker=false", "--oci-worker=true", "--oci-worker-binary", "runc", "--oci-worker-net", "host")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + ts.Getenv("HOME")}
	log, err := os.Create(filepath.Join(dir, "log"))
	ts.Check(err)
	cmd.Stdout, cmd.Stderr = log, log
	ts.Check(cmd.Start())
	ts.Defer(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
		_ = log.Close()
	})
	ts.Setenv("BUILDKITD", address)
	for deadline := time.Now().Add(scriptPatience); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(dir, "s"))
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			said, _ := os.ReadFile(log.Name())
			ts.Fatalf("buildkitd does not answer: %v\n%s", err, said)
		}
	}
}

func scriptTmpfs(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: tmpfs DIR SIZE")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+args[1]))
	tb := ts.Value(scriptTB{}).(testing.TB)
	ts.Defer(func() {
		stopAndCheck(tb, dir)
		if err := unix.Unmount(dir, 0); err != nil {
			tb.Errorf("unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

func scriptAsNobody(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: [!] as-nobody PROGRAM [ARG...]")
	}
	cmd := scriptCommand(ts, args)
	// The directories of testscript are for their owner only.
	for _, dir := range []string{filepath.Dir(cmd.Path), ts.Getenv("WORK")} {
		for ; dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
			if info, err := os.Stat(dir); err == nil && info.Mode()&0o001 == 0 {
				ts.Check(os.Chmod(dir, info.Mode()|0o011))
			}
		}
	}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = ts.Stdout(), io.MultiWriter(&stderr, ts.Stderr())
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	checkOutcome(ts, neg, cmd.Run())
}

func scriptS3(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: s3")
	}
	s, err := s3test.Start(ts.MkAbs("s3"))
	if err != nil {
		ts.Value(scriptTB{}).(testing.TB).Skipf("NO S3 SERVER: SKIPPED: %v", err)
	}
	ts.Defer(s.Stop)
	ts.Setenv("S3", s.Endpoint)
	ts.Setenv("S3_DIR", s.Dir)
	ts.Setenv("AWS_ACCESS_KEY_ID", s.AccessKey)
	ts.Setenv("AWS_SECRET_ACCESS_KEY", s.SecretKey)
}
