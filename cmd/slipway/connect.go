// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session/grpchijack"
	mobyclient "github.com/moby/moby/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/seed-68981b69/slipway/cmd/slipway/clientgc"
	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// app is what every command shares: the global flags, the streams and the connection to the engine.
type app struct {
	root       string
	host       string
	standalone bool
	debug      bool
	// jobs and maxMemory are for the engine, when this process opens one; 0 is the default.
	jobs      int
	maxMemory memorySize

	cacheDirs cacheDirs // of the build at hand
	// extraCA are PEM files with authorities for steps, for the engine that this process opens.
	extraCA   []string
	tls       tlsFiles
	impatient bool   // a daemon does not wait until its state directory is free
	config    string // the configuration file of an engine that is opened here; "" is one of the usual places

	program string // the name in front of messages

	in  io.Reader
	out io.Writer
	err io.Writer

	mu     sync.Mutex // guards what follows
	dial   dialFunc   // set once an engine has answered
	closes []func() error
}

type dialFunc func(ctx context.Context) (net.Conn, error)

func newApp(in io.Reader, out, err io.Writer) *app {
	return &app{program: "slipway", in: in, out: out, err: err}
}

// maxSocketPath is what fits into a sockaddr_un, with its NUL byte.
const maxSocketPath = 107

// settle fills in the defaults of root and host and checks them.
func (a *app) settle() error {
	if a.root == "" {
		var err error
		if a.root, err = a.configuredRoot(); err != nil {
			return err
		}
	}
	root, err := filepath.Abs(a.root)
	if err != nil {
		return fmt.Errorf("--root %s: %w", a.root, err)
	}
	a.root = root
	if err := a.settleLimits(); err != nil {
		return err
	}
	if a.config != "" {
		if a.config, err = filepath.Abs(a.config); err != nil {
			return fmt.Errorf("--config: %w", err)
		}
	}
	if a.host == "" {
		return nil
	}
	if address, ok := tcpAddress(a.host); ok {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return fmt.Errorf("address %s: want tcp://HOST:PORT", a.host)
		}
		return nil
	}
	_, err = socketPath(a.host)
	return err
}

// configuredRoot is what the configuration file says, or the default. A file that cannot be read is the engine's to complain of.
func (a *app) configuredRoot() (string, error) {
	if conf, err := a.loadConfig(); err == nil && conf.Root != "" {
		return conf.Root, nil
	}
	return defaultRoot()
}

// defaultRoot is where state lives when nothing says otherwise.
func defaultRoot() (string, error) {
	if !ordinaryUser() {
		return "/var/lib/slipway", nil
	}
	data, err := dataHome()
	return filepath.Join(data, "slipway"), err
}

// dataHome is where an ordinary user's programs keep their state.
func dataHome() (string, error) {
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return dir, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no place for state: set --root or $XDG_DATA_HOME: %w", err)
	}
	return filepath.Join(home, ".local", "share"), nil
}

// runtimeDir is where sockets go that are not kept beside their state.
func runtimeDir() string {
	if !ordinaryUser() {
		return "/run/slipway"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "slipway")
	}
	return sharedRuntimeDir()
}

// sharedRuntimeDir is runtimeDir where the system has made none for the user: a place in a directory that others write to, too.
func sharedRuntimeDir() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("slipway-%d", userID()))
}

// defaultSocket is where the engine of root listens.
func defaultSocket(root string) string {
	if standard, err := defaultRoot(); err == nil && root == standard {
		return filepath.Join(runtimeDir(), "slipway.sock")
	}
	inside := filepath.Join(root, "slipway.sock")
	if len(inside) <= maxSocketPath {
		return inside
	}
	sum := sha256.Sum256([]byte(root))
	return filepath.Join(runtimeDir(), hex.EncodeToString(sum[:8])+".sock")
}

// socketPath is the path in a unix:// address.
func socketPath(address string) (string, error) {
	scheme, path, ok := strings.Cut(address, "://")
	switch {
	case !ok && strings.HasPrefix(address, "/"):
		path = address
	case scheme != "unix" || path == "":
		return "", fmt.Errorf("address %q: want unix://PATH or tcp://HOST:PORT", address)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("address %s: a socket path has at most %d bytes", address, maxSocketPath)
	}
	return path, nil
}

// address names the engine of this command line in messages.
func (a *app) address() string {
	if _, ok := tcpAddress(a.host); ok {
		return a.host
	}
	return "unix://" + a.socket()
}

// socket is the path that the engine of this command line listens on; there is none for one that is reached over TCP.
func (a *app) socket() string {
	if a.host != "" {
		path, _ := socketPath(a.host) // settle has checked it
		return path
	}
	return defaultSocket(a.root)
}

// buildkit returns a client of the engine's BuildKit API. It is closed with the app.
func (a *app) buildkit(ctx context.Context) (*bkclient.Client, error) {
	dial, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	var c *bkclient.Client
	c, err = bkclient.New(ctx, a.address(),
		bkclient.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }),
		bkclient.WithSessionDialer(func(ctx context.Context, proto string, meta map[string][]string) (net.Conn, error) {
			conn, err := grpchijack.Dialer(c.ControlClient())(ctx, proto, meta)
			if err != nil {
				return nil, err
			}
			return &sessionConn{Conn: conn}, nil
		}),
		bkclient.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(a.cacheDirs.intercept)))
	if err != nil {
		return nil, err
	}
	a.onClose(c.Close)
	return c, nil
}

// sessionConn is the connection of a build's session, and ends when it is closed. BuildKit's own (v0.34.2, grpchijack) gives
// its reader what was in its buffer behind the last message when it is closed while a message is on its way; to the
// HTTP/2 library that is a protocol error, over which it takes a second. One in forty cached builds ran into it.
type sessionConn struct {
	net.Conn
	closed atomic.Bool
}

// Read implements net.Conn.
func (c *sessionConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.closed.Load() {
		return 0, io.EOF
	}
	return n, err
}

// Close implements net.Conn.
func (c *sessionConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// docker returns a client of the engine's Docker Engine API. It is closed with the app.
func (a *app) docker(ctx context.Context) (*mobyclient.Client, error) {
	dial, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	c, err := mobyclient.New(
		mobyclient.WithHost(a.address()),
		mobyclient.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }),
	)
	if err != nil {
		return nil, err
	}
	a.onClose(c.Close)
	return c, nil
}

func (a *app) onClose(f func() error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closes = append(a.closes, f)
}

// close closes clients, then the engine if it is ours.
func (a *app) close() error {
	a.mu.Lock()
	closes := a.closes
	a.closes, a.dial = nil, nil
	a.mu.Unlock()
	var errs []error
	for i := len(closes) - 1; i >= 0; i-- {
		errs = append(errs, closes[i]())
	}
	return errors.Join(errs...)
}

// connect finds the engine, or starts it, and returns how to reach it.
func (a *app) connect(ctx context.Context) (dialFunc, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dial != nil {
		return a.dial, nil
	}
	if a.standalone && needsNamespace() {
		conn, dial, err := a.startStandalone(ctx)
		if err != nil {
			return nil, err
		}
		a.dial = a.firstThen(conn, dial)
		return a.dial, nil
	}
	if a.standalone {
		options, err := a.engineOptions()
		if err != nil {
			return nil, err
		}
		clientgc.End()
		e, err := engine.Open(ctx, options)
		if err != nil {
			return nil, err
		}
		a.closes = append(a.closes, e.Close)
		a.dial = e.Dial
		return a.dial, nil
	}
	if filepath.Dir(a.socket()) == sharedRuntimeDir() {
		if err := privateDir(sharedRuntimeDir()); err != nil {
			return nil, err
		}
	}
	dial := unixDialer(a.socket())
	tcp, remote := tcpAddress(a.host)
	if remote {
		var err error
		if dial, err = a.tlsDialer(tcp); err != nil {
			return nil, err
		}
	}
	conn, err := dial(ctx)
	if err != nil {
		if remote || !nobodyListens(err) {
			return nil, fmt.Errorf("engine at %s: %w", a.address(), reason(err))
		}
		if a.host != "" {
			return nil, fmt.Errorf("no engine listens at %s: start one with 'slipway daemon --addr unix://%s', or leave out --host", a.socket(), a.socket())
		}
		if conn, err = a.startDaemon(ctx, dial); err != nil {
			return nil, err
		}
	}
	a.dial = a.firstThen(conn, dial)
	return a.dial, nil
}

// firstThen gives the first client the connection that is already open. a.mu is held.
func (a *app) firstThen(conn net.Conn, dial dialFunc) dialFunc {
	first := make(chan net.Conn, 1)
	first <- conn
	a.closes = append(a.closes, func() error {
		select {
		case c := <-first:
			return c.Close()
		default:
			return nil
		}
	})
	return func(ctx context.Context) (net.Conn, error) {
		select {
		case c := <-first:
			return c, nil
		default:
			return dial(ctx)
		}
	}
}

// engineOptions are those of an engine inside this process.
func (a *app) engineOptions() (engine.Options, error) {
	conf, err := a.loadConfig()
	if err != nil {
		return engine.Options{}, err
	}
	options, err := engineOptions(&conf)
	options.Root, options.Debug, options.OwnerEntitled = a.root, a.debug, true
	a.limit(&options)
	return options, err
}

func unixDialer(path string) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

// nobodyListens tells an engine that is not running from one that cannot be reached.
func nobodyListens(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)
}

// reason is the innermost cause of a network error, which already names the address.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// startTimeout bounds how long a new engine may take until it accepts a connection.
const startTimeout = 30 * time.Second

// startDaemon starts `slipway daemon` for this root, detached from the terminal, and returns the first connection to it. A
// lock file beside the socket keeps two commands from starting two.
func (a *app) startDaemon(ctx context.Context, dial dialFunc) (net.Conn, error) {
	socket := a.socket()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	lock, err := lockFile(ctx, socket+".lock")
	if err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	defer lock.Close()
	if conn, err := dial(ctx); err == nil {
		return conn, nil // another command has started it meanwhile
	}

	logDir := filepath.Join(a.root, "log")
	if err := os.MkdirAll(logDir, 0o700); err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	logPath := filepath.Join(logDir, "daemon.log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	defer logFile.Close()
	logStart, err := logFile.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", a.daemonArgs(socket, "5m")...)
	cmd.Args[0] = "slipway"
	cmd.Dir = "/"
	cmd.Env = daemonEnv(os.Environ())
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	startEngine := cmd.Start
	if needsNamespace() {
		if missing := userns.Missing(); missing != "" {
			fmt.Fprintf(a.err, "%s: starting the engine: %s\n", a.program, missing)
		}
		startEngine = func() error { return userns.Start(cmd, false) }
	}
	if err := startEngine(); err != nil {
		return nil, fmt.Errorf("start the engine: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()

	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("the engine did not listen at %s within %s (see %s)", socket, startTimeout, logPath))
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		conn, err := dial(ctx)
		if err == nil {
			return conn, nil
		}
		select {
		case <-exited:
			return nil, fmt.Errorf("the engine did not start: %s", lastLine(logPath, logStart))
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// daemonArgs are those of the engine of this command line.
func (a *app) daemonArgs(socket, idle string) []string {
	args := []string{"daemon", "--root", a.root, "--addr", "unix://" + socket, "--idle-timeout", idle}
	if a.debug {
		args = append(args, "--debug")
	}
	if a.config != "" {
		args = append(args, "--config", a.config)
	}
	return args
}

// daemonEnv is env without what belongs to one command.
func daemonEnv(env []string) []string {
	var out []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case "SLIPWAY_STANDALONE", "SLIPWAY_HOST", "SLIPWAY_ROOT", "SLIPWAY_DEBUG", "SLIPWAY_CONFIG",
			"SLIPWAY_TLSCACERT", "SLIPWAY_TLSCERT", "SLIPWAY_TLSKEY", "SLIPWAY_TLSDIR", "SLIPWAY_TLSSERVERNAME":
			continue
		}
		out = append(out, kv)
	}
	return out
}

// lockFile takes an exclusive lock that ends with the returned file or with the process.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// lastLine is the last line that was written to a log after offset.
func lastLine(path string, offset int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, offset, 64<<10))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	last := strings.TrimPrefix(lines[len(lines)-1], "slipway: ")
	if last == "" {
		return "it ended without a message (see " + path + ")"
	}
	return last
}
