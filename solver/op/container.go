// SPDX-License-Identifier: Apache-2.0

package op

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/system"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver"
)

// Containers makes containers that are no steps: a frontend's own one, and those that a frontend or a debugger asks for
// (NewContainer of the gateway API). They see what a step with the same mounts would see, and leave nothing.
type Containers struct{ deps *Deps }

// NewContainers returns a Containers. deps.Caches must be set: cache mounts are those of the steps.
func NewContainers(deps Deps) *Containers { return &Containers{deps: &deps} }

const (
	frontendPattern    = "frontend-*"
	frontendDefinition = "frontend.bin"
)

// FrontendDir makes a directory with the definition of a frontend's own image, for its container to read. Its user removes
// it; what a killed process leaves is removed by New.
func (c *Containers) FrontendDir(definition []byte) (string, error) {
	dir, err := os.MkdirTemp(c.deps.tempDir(), frontendPattern)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, frontendDefinition), definition, 0o400); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	return dir, nil
}

// ContainerSpec describes a container before it is known what runs in it.
type ContainerSpec struct {
	// Mounts are as in an ExecOp; one is the root. Input counts in Inputs, Output has no meaning.
	Mounts []*pb.Mount
	Inputs []snapshot.Snapshot
	// Files are files or directories of this host to be mounted beside Mounts, read-only.
	Files      []executor.Mount
	Network    pb.NetMode
	Hostname   string
	ExtraHosts []*pb.HostIP
	Platform   *pb.Platform
	// Failed is the step whose files the root has, to give the container that step's limits; may be nil.
	Failed *cache.FailedStep

	resources    *pb.LinuxResources
	ulimits      []*pb.Ulimit
	cgroupParent string
}

// ContainerProcess describes a process of a container.
type ContainerProcess struct {
	Args []string
	Env  []string
	// SecretEnv are variables that the client's secrets become.
	SecretEnv []*pb.SecretEnv
	// User is a name or number as in a Dockerfile's USER, looked up in the container as it is now.
	User     string
	Cwd      string
	Terminal bool
	Security pb.SecurityMode
}

// Container is a set of mounts and, once the first process was started, the processes that see them. Its methods may be
// called concurrently.
type Container struct {
	spec  ContainerSpec
	step  *step
	root  string
	binds []executor.Mount
	// ctx ends with the container.
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu       sync.Mutex // guards what follows; held while a process starts
	first    executor.Joiner
	security pb.SecurityMode
	released bool
	procs    []executor.Process
	roots    map[int]*os.Root
}

// New mounts what spec says. Release the container, whatever becomes of ctx, which it does not outlive otherwise.
func (c *Containers) New(ctx context.Context, env *solver.Env, spec ContainerSpec) (_ *Container, err error) {
	if spec.Failed != nil {
		if err := spec.limitAs(spec.Failed); err != nil {
			return nil, err
		}
	}
	op := &pb.ExecOp{Meta: &pb.Meta{Cwd: "/"}, Network: spec.Network}
	e := &execOp{deps: c.deps, caches: c.deps.Caches, op: op, platform: spec.Platform, root: -1}
	if err := checkLinux(e.platform); err != nil {
		return nil, err
	}
	switch spec.Network {
	case pb.NetMode_UNSET, pb.NetMode_HOST, pb.NetMode_NONE:
	default:
		return nil, notSupported("network mode", spec.Network.String())
	}
	for i, m := range spec.Mounts {
		m = m.CloneVT()
		if m != nil {
			m.Output = int64(pb.SkipOutput)
		}
		if err := checkMount(m, len(spec.Inputs)); err != nil {
			return nil, fmt.Errorf("mount %d (%s): %w", i, m.GetDest(), err)
		}
		if isRoot(m) {
			if e.root >= 0 {
				return nil, errors.New("container has two root mounts")
			}
			e.root = i
		}
		op.Mounts = append(op.Mounts, m)
	}
	if e.root < 0 {
		return nil, errors.New("container has no root mount")
	}
	s := &step{op: e, env: env, inputs: spec.Inputs}
	if err := s.checkPlatform(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	ctr := &Container{spec: spec, step: s, ctx: ctx, cancel: cancel, roots: map[int]*os.Root{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, ctr.Release())
		}
	}()
	if ctr.root, ctr.binds, err = s.mounts(ctx); err != nil {
		return nil, err
	}
	ctr.binds = append(ctr.binds, spec.Files...)
	return ctr, nil
}

// errReleased says that a container is used after its Release.
var errReleased = errors.New("the container has been released")

// Start starts a process: the first one makes the container, and the others end with it at the latest. A process ends when ctx
// ends, and when the container is released.
func (c *Container) Start(ctx context.Context, p ContainerProcess, stdio executor.IO) (executor.Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return nil, errReleased
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.ctx, func() { cancel(context.Cause(c.ctx)) })
	proc, err := c.start(ctx, p, stdio)
	if err != nil {
		stop()
		cancel(nil)
		return nil, err
	}
	c.procs = append(c.procs, proc)
	return &containerProcess{Process: proc, end: func() { stop(); cancel(nil) }}, nil
}

// containerProcess lets go of its context when it has ended.
type containerProcess struct {
	executor.Process
	end func()
}

func (p *containerProcess) Wait() (executor.Exit, error) {
	defer p.end()
	return p.Process.Wait()
}

// start is Start under the lock.
func (c *Container) start(ctx context.Context, p ContainerProcess, stdio executor.IO) (executor.Process, error) {
	s := c.step
	switch p.Security {
	case pb.SecurityMode_SANDBOX:
	case pb.SecurityMode_INSECURE:
		if err := s.entitled(EntitlementSecurityInsecure); err != nil {
			return nil, err
		}
	default:
		return nil, notSupported("security mode", p.Security.String())
	}
	passwd, err := c.accounts("etc/passwd")
	if err != nil {
		return nil, err
	}
	group, err := c.accounts("etc/group")
	if err != nil {
		return nil, err
	}
	user, home, err := executor.ResolveUser(passwd, group, p.User)
	if err != nil {
		return nil, err
	}
	env, err := c.environ(ctx, p, home)
	if err != nil {
		return nil, err
	}
	cwd := path.Join("/", p.Cwd)
	if c.first != nil {
		if p.Security != c.security {
			return nil, errors.New("not supported: a process with another security mode than the container's first one")
		}
		return c.first.Join(ctx, executor.ProcessSpec{Args: p.Args, Env: env, Cwd: cwd, User: user, Terminal: p.Terminal, Ulimits: ulimits(c.spec.ulimits)}, stdio)
	}
	network, err := s.network()
	if err != nil {
		return nil, err
	}
	spec := executor.Spec{
		ID:             "container-" + randomID(),
		Rootfs:         c.root,
		ReadonlyRootfs: s.op.op.Mounts[s.op.root].Readonly,
		Mounts:         c.binds,
		Args:           p.Args,
		Env:            env,
		Cwd:            cwd,
		User:           user,
		Terminal:       p.Terminal,
		Joinable:       true,
		Hostname:       c.spec.Hostname,
		Network:        network,
		Privileged:     p.Security == pb.SecurityMode_INSECURE,
		Ulimits:        ulimits(c.spec.ulimits),
		Resources:      resources(c.spec.resources),
	}
	if c.spec.Failed != nil {
		spec.CgroupParent = cmp.Or(c.spec.cgroupParent, s.op.deps.DefaultCgroupParent)
	}
	for _, h := range c.spec.ExtraHosts {
		spec.ExtraHosts = append(spec.ExtraHosts, executor.HostEntry{Host: h.Host, IP: h.IP})
	}
	proc, err := s.op.deps.Executor.Start(ctx, spec, stdio)
	if err != nil {
		return nil, err
	}
	joiner, ok := proc.(executor.Joiner)
	if !ok {
		return nil, errors.New("the executor cannot run further processes in a container")
	}
	c.first, c.security = joiner, p.Security
	return proc, nil
}

// environ is p's environment with what every process needs.
func (c *Container) environ(ctx context.Context, p ContainerProcess, home string) ([]string, error) {
	env := append([]string(nil), p.Env...)
	defaults := []string{"PATH=" + system.DefaultPathEnvUnix, "HOME=" + home}
	if p.Terminal {
		defaults = append(defaults, "TERM=xterm")
	}
	for _, def := range defaults {
		name, _, _ := strings.Cut(def, "=")
		has := false
		for _, v := range env {
			has = has || strings.HasPrefix(v, name+"=")
		}
		if !has {
			env = append(env, def)
		}
	}
	for _, se := range p.SecretEnv {
		if se.GetID() == "" || se.GetName() == "" || strings.Contains(se.GetName(), "=") {
			return nil, fmt.Errorf("environment variable %q for secret %q: both need a name", se.GetName(), se.GetID())
		}
		value, ok, err := c.step.secret(ctx, se.ID, se.Optional)
		if err != nil {
			return nil, err
		}
		if ok {
			env = append(env, se.Name+"="+string(value))
		}
	}
	return env, nil
}

// accounts reads a file of the root as it is now; one that is not there is empty.
func (c *Container) accounts(name string) ([]byte, error) {
	root, err := c.rootOf(c.step.op.root)
	if err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxAccountFile+1))
	if err == nil && len(data) > maxAccountFile {
		err = fmt.Errorf("/%s is larger than %d bytes", name, maxAccountFile)
	}
	return data, err
}

// Root gives access to the files of the i-th mount as they are now. Links in it do not lead out of it. It is closed by Release.
func (c *Container) Root(i int) (*os.Root, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return nil, errReleased
	}
	return c.rootOf(i)
}

func (c *Container) rootOf(i int) (*os.Root, error) {
	mounts := c.step.op.op.Mounts
	if i < 0 || i >= len(mounts) {
		return nil, fmt.Errorf("the container has no mount %d, it has %d", i, len(mounts))
	}
	if r := c.roots[i]; r != nil {
		return r, nil
	}
	dir := c.root
	if i != c.step.op.root {
		var ok bool
		if dir, ok = c.step.sources[i]; !ok {
			return nil, fmt.Errorf("mount %d (%s) has no files that can be read: it is a %s mount", i, mounts[i].Dest, strings.ToLower(mounts[i].MountType.String()))
		}
	}
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("mount %d (%s): %w", i, mounts[i].Dest, err)
	}
	c.roots[i] = r
	return r, nil
}

// Release kills what runs in the container and removes everything of it. What was written to its mounts is gone, cache mounts
// excepted. A second call does nothing.
func (c *Container) Release() error {
	c.cancel(errReleased)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return nil
	}
	c.released = true
	for _, p := range c.procs {
		_, _ = p.Wait()
	}
	var errs []error
	for _, r := range c.roots {
		errs = append(errs, r.Close())
	}
	return errors.Join(append(errs, c.step.cleanup())...)
}
