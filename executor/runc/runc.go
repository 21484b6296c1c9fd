// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package runc runs containers with libcontainer. A Spec becomes an OCI runtime spec (a pure function), which a
// small process of its own, the runner (cmd/slipway-runner), gives to libcontainer; the runner is started with the
// first container and serves all of them. Containers end with the engine: when it goes, however it goes, the runner
// kills and removes them, and what a killed runner leaves is removed by the engine or by the next one.
//
// What a container leaves in its root file system is exactly what its processes wrote there: mount points that had
// to be made are removed again, and the generated /etc/hosts, /etc/hostname and /etc/resolv.conf are mounts.
package runc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// Options say how to make an executor.
type Options struct {
	// StateDir is where the runner's binary is kept. It also names the engine: run-time state, cgroups and names on
	// the host are made from it, so one process at a time may use it. It is created.
	StateDir string
	// Network serves NetworkBridge. Nil means that there is none, for the reason in NetworkError.
	Network      Network
	NetworkError error
	// DNS says how containers on the host's network resolve names; nil is the host's way.
	DNS *network.DNS
	// Devices finds what Spec.Devices names; nil when there are none.
	Devices Devices
	// RunDir is where run-time state goes; "" means a directory in /run made from StateDir.
	RunDir string
	// StandardInit has all containers made by libcontainer's own init, which takes four times as long. It is there to
	// find out whether a difference comes from ours.
	StandardInit bool
	// Log gets what goes wrong in the background; nil means slog.Default.
	Log *slog.Logger
}

// Devices adds CDI devices of the host to what a container gets: a *cdi.Devices.
type Devices interface {
	Inject(spec *specs.Spec, names []string) error
}

// Network gives containers a network of their own: a *network.Network, or a *network.User for an ordinary user.
type Network interface {
	// Acquire returns a namespace for one container, and Release takes it back.
	Acquire(ctx context.Context) (*network.Namespace, error)
	Release(ns *network.Namespace, reusable bool)
	// Host is the address by which a container reaches the host, not valid when there is none.
	Host() netip.Addr
	// ResolvConf is what containers have as /etc/resolv.conf.
	ResolvConf() ([]byte, error)
	// Publish makes ports of the host lead to the container with that address.
	Publish(ip netip.Addr, ports []executor.Port) (*network.Published, error)
}

// Runc is an executor.Executor.
type Runc struct {
	opts   Options
	log    *slog.Logger
	runDir string
	host   host // what is the same for all containers
	roots  roots

	mu     sync.Mutex // guards runner and closed
	runner *runner
	closed bool
	wg     sync.WaitGroup // containers
}

var _ executor.Executor = (*Runc)(nil)

// New makes an executor and removes what an earlier process that used the same StateDir left. Close it after use;
// the Network stays the caller's.
func New(opts Options) (*Runc, error) {
	stateDir, err := filepath.Abs(opts.StateDir)
	if err != nil {
		return nil, err
	}
	opts.StateDir = stateDir
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("executor: %w", err)
	}
	name := engineName(stateDir)
	r := &Runc{opts: opts, log: opts.Log, runDir: opts.RunDir}
	if r.log == nil {
		r.log = slog.Default()
	}
	if r.runDir == "" {
		r.runDir = filepath.Join("/run", name)
	}
	r.host.CgroupParent = name
	r.host.Seccomp = nativeSeccomp
	r.host.UserNamespace = thisNamespace(name)
	if _, err := os.Lstat("/proc/self/ns/cgroup"); err == nil {
		r.host.CgroupNamespace = true
	}
	if r.host.Capabilities, err = heldCapabilities(); err != nil {
		return nil, fmt.Errorf("executor: %w", err)
	}
	if err := r.sweep(); err != nil {
		return nil, fmt.Errorf("executor: remove what an earlier run left: %w", err)
	}
	for _, dir := range []string{r.containersDir(), r.filesDir()} {
		// For nobody else: what a container writes into its own files, and makes set-user-ID, other users must not reach.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("executor: %w", err)
		}
	}
	return r, nil
}

// engineName is the name of everything on the host that belongs to the executor with that state directory.
func engineName(stateDir string) string {
	sum := sha256.Sum256([]byte(stateDir))
	return wire.CgroupPrefix + hex.EncodeToString(sum[:4])
}

func (r *Runc) containersDir() string { return filepath.Join(r.runDir, "containers") }
func (r *Runc) filesDir() string      { return filepath.Join(r.runDir, "files") }

// sweep kills and removes containers that have no runner any more.
func (r *Runc) sweep() error {
	entries, err := os.ReadDir(r.containersDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var errs error
	for _, e := range entries {
		errs = errors.Join(errs, sweepContainer(filepath.Join(r.containersDir(), e.Name()), r.NoLimits() == ""))
	}
	return errors.Join(errs, sweepCgroups(r.host.CgroupParent), os.RemoveAll(r.runDir))
}

// Close kills all containers, waits until nothing of them is left, and ends the runner.
func (r *Runc) Close() error {
	r.mu.Lock()
	r.closed = true
	run := r.runner
	r.runner = nil
	r.mu.Unlock()
	var err error
	if run != nil {
		err = run.stop()
	}
	r.wg.Wait()
	return errors.Join(err, r.sweep())
}

// getRunner returns the runner, started if there is none.
func (r *Runc) getRunner() (*runner, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errors.New("executor is closed")
	}
	if r.runner != nil {
		select {
		case <-r.runner.done:
			r.log.Warn("starting another runner", "err", r.runner.err)
		default:
			return r.runner, nil
		}
	}
	path, err := runnerPath(r.opts.StateDir)
	if err != nil {
		return nil, err
	}
	run, err := startRunner(path, r.log)
	if err != nil {
		return nil, err
	}
	r.runner = run
	return run, nil
}

// Start starts a container; see executor.Executor.
func (r *Runc) Start(ctx context.Context, s executor.Spec, stdio executor.IO) (executor.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	run, err := r.getRunner()
	if err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	p := &process{r: r, run: run, id: s.ID, done: make(chan struct{})}
	if err := p.start(ctx, s, stdio); err != nil {
		p.release()
		var startErr *executor.StartError
		if errors.As(err, &startErr) {
			return nil, startErr
		}
		return nil, fmt.Errorf("start container %s: %w", s.ID, err)
	}
	return p, nil
}

// start sets up everything around a container and starts it. On an error the caller releases what was set up.
func (p *process) start(ctx context.Context, s executor.Spec, stdio executor.IO) error {
	r := p.r
	if err := check(s); err != nil {
		return err
	}
	rootfs, err := filepath.EvalSymlinks(s.Rootfs)
	if err != nil {
		return fmt.Errorf("root file system: %w", err)
	}
	s.Rootfs = rootfs
	if s.Hostname == "" {
		s.Hostname = defaultHostname(s)
	}
	if s.Joinable {
		p.joinable = &s
	}
	h := r.host
	h.Runner = p.run.path
	if s.Privileged {
		if h.Devices, err = hostDevices(); err != nil {
			return err
		}
	}
	if err := p.connect(ctx, s, &h); err != nil {
		return err
	}
	if h.Files, err = p.generate(s); err != nil {
		return err
	}
	spec, err := runtimeSpec(s, h)
	if err != nil {
		return err
	}
	if len(s.Devices) > 0 {
		if r.opts.Devices == nil {
			return fmt.Errorf("CDI devices %s: there are none on this engine", strings.Join(s.Devices, ", "))
		}
		if err := r.opts.Devices.Inject(spec, s.Devices); err != nil {
			return err
		}
	}
	if p.points, err = r.roots.acquire(rootfs); err != nil {
		return err
	}
	p.rootfs = rootfs
	if err := p.prepareRoot(spec); err != nil {
		return err
	}
	return p.launch(ctx, spec, stdio)
}

func defaultHostname(s executor.Spec) string {
	if s.Network == executor.NetworkHost {
		if name, err := os.Hostname(); err == nil {
			return name
		}
	}
	return s.ID[:min(len(s.ID), 12)]
}

// connect gives the container its network namespace and its ports.
func (p *process) connect(ctx context.Context, s executor.Spec, h *host) error {
	if s.Network != executor.NetworkBridge {
		return nil
	}
	n := p.r.opts.Network
	if n == nil {
		reason := p.r.opts.NetworkError
		if reason == nil {
			reason = errors.New("it was not set up")
		}
		return fmt.Errorf("the bridge network is not available: %w; use the host network", reason)
	}
	ns, err := n.Acquire(ctx)
	if err != nil {
		return err
	}
	p.ns = ns
	// Whoever may configure the network may leave it in any state.
	p.nsReusable = !s.Privileged && !canConfigureNetwork(s.CapAdd)
	h.NetworkNamespace = ns.Path()
	if len(s.Ports) > 0 {
		if p.published, err = n.Publish(ns.IP(), s.Ports); err != nil {
			return err
		}
	}
	return nil
}

func canConfigureNetwork(capAdd []string) bool {
	return slices.ContainsFunc(capAdd, func(c string) bool {
		c = strings.TrimPrefix(strings.ToUpper(c), "CAP_")
		return c == "ALL" || c == "NET_ADMIN" || c == "SYS_ADMIN"
	})
}

// generate writes the container's own versions of the files in /etc that say who it is and where names come from.
func (p *process) generate(s executor.Spec) ([]generatedFile, error) {
	var ip, ip6, gateway netip.Addr
	var hostHosts, resolvConf []byte
	var err error
	switch s.Network {
	case executor.NetworkBridge:
		ip, ip6, gateway = p.ns.IP(), p.ns.IP6(), p.r.opts.Network.Host()
		if resolvConf, err = p.r.opts.Network.ResolvConf(); err != nil {
			return nil, err
		}
	case executor.NetworkHost:
		gateway = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if hostHosts, err = os.ReadFile("/etc/hosts"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if resolvConf, err = os.ReadFile("/etc/resolv.conf"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		resolvConf = p.r.opts.DNS.Apply(resolvConf)
	case executor.NetworkNone:
		resolvConf = []byte{}
	}
	resolvConf = (&network.DNS{Nameservers: s.Nameservers, SearchDomains: s.DNSSearch, Options: s.DNSOptions}).Apply(resolvConf)
	hosts, err := hostsFile(s, s.Hostname, ip, ip6, gateway, hostHosts)
	if err != nil {
		return nil, err
	}
	p.filesDir = filepath.Join(p.r.filesDir(), s.ID)
	files, err := writeFiles(p.filesDir, s.Hostname, hosts, resolvConf)
	if err != nil {
		return nil, fmt.Errorf("generate files: %w", err)
	}
	return files, nil
}

// prepareRoot makes the working directory and the mount points.
func (p *process) prepareRoot(spec *specs.Spec) error {
	cwd := spec.Process.Cwd
	if !slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return isBelow(cwd, m.Destination) }) {
		if err := p.points.ensureCwd(cwd, spec.Process.User.UID, spec.Process.User.GID); err != nil {
			return &executor.StartError{Code: 126, Err: fmt.Errorf("working directory %q: %w", cwd, err)}
		}
	}
	return p.points.prepare(spec.Mounts)
}

// launch hands the container to the runner and waits until its process runs.
func (p *process) launch(ctx context.Context, spec *specs.Spec, stdio executor.IO) error {
	b, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode runtime spec: %w", err)
	}
	specFile, err := wire.MemFile("spec", b)
	if err != nil {
		return err
	}
	defer specFile.Close()
	if p.io, err = newStdio(spec.Process.Terminal, stdio); err != nil {
		return err
	}
	defer p.io.closeTheirs()

	p.r.mu.Lock()
	if p.r.closed {
		p.r.mu.Unlock()
		return errors.New("executor is closed")
	}
	p.r.wg.Add(1)
	p.r.mu.Unlock()
	events, err := p.run.start(wire.Request{
		Op: wire.OpStart, ID: p.id, StateDir: p.r.containersDir(), Terminal: spec.Process.Terminal,
		StandardInit: p.r.opts.StandardInit || p.joinable != nil,
	}, append([]*os.File{specFile}, p.io.theirs...)...)
	if err != nil {
		p.r.wg.Done()
		return err
	}
	stopWatching := context.AfterFunc(ctx, func() { _ = p.run.tell(wire.Request{Op: wire.OpKill, ID: p.id}) })
	p.io.closeTheirs()

	ev, ok := <-events
	if !ok || ev.Kind != wire.Started {
		stopWatching()
		defer p.r.wg.Done()
		if !ok {
			p.sweep()
			return p.run.err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return startError(ev)
	}
	return p.follow(events, stopWatching)
}

// follow connects a process that has started, and waits for its end in the background.
func (p *process) follow(events <-chan wire.Event, stopWatching func() bool) error {
	p.exit.Started = time.Now()
	if err := p.io.begin(); err != nil {
		// It runs but cannot be connected: end it as if it had never run.
		_ = p.run.tell(wire.Request{Op: wire.OpKill, ID: p.id})
		<-events
		stopWatching()
		p.r.wg.Done()
		return err
	}
	go func() {
		defer p.r.wg.Done()
		ev, ok := <-events
		stopWatching()
		p.finish(ev, ok)
	}()
	return nil
}

func startError(ev wire.Event) error {
	err := errors.New(ev.Message)
	switch ev.Class {
	case wire.NotFound:
		return &executor.StartError{Code: 127, Err: err}
	case wire.NotExecutable:
		return &executor.StartError{Code: 126, Err: err}
	}
	return err
}
