// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/system"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver"
)

// execOp runs one process in a container: a RUN.
type execOp struct {
	deps     *Deps
	caches   *CacheMounts
	op       *pb.ExecOp
	platform *pb.Platform
	res      *pb.LinuxResources
	root     int // index of the root mount
	outputs  int
	devices  []string       // CDI devices by their full names
	missing  []string       // optional ones that are not here, as the step names them
	vertex   *solver.Vertex // nil for a container that is no step
}

// ExitError is a process that ended as it should not have.
type ExitError struct {
	Args []string
	Code int
	// OOMKilled says that the kernel killed something in the container for lack of memory.
	OOMKilled bool
	// Err is why the process could not even be started, nil when it ran.
	Err error
}

// Error has the words that BuildKit's clients look for.
func (e *ExitError) Error() string {
	s := fmt.Sprintf("process %q did not complete successfully: exit code: %d", strings.Join(e.Args, " "), e.Code)
	if e.OOMKilled {
		s += ": out of memory: the kernel killed a process of this step"
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *ExitError) Unwrap() error { return e.Err }

// withoutUnusedIndexes returns op with secret and ssh mounts that name neither input nor output: LLB leaves both 0 there, where
// they mean nothing.
func withoutUnusedIndexes(op *pb.ExecOp) *pb.ExecOp {
	op = op.CloneVT()
	for _, m := range op.GetMounts() {
		switch m.GetMountType() {
		case pb.MountType_SECRET, pb.MountType_SSH:
			m.Input, m.Output = int64(pb.Empty), int64(pb.SkipOutput)
		}
	}
	return op
}

func newExec(d *Deps, caches *CacheMounts, v *solver.Vertex, op *pb.ExecOp) (solver.Op, error) {
	op = withoutUnusedIndexes(op)
	e := &execOp{deps: d, caches: caches, op: op, platform: v.Op.Platform, res: v.Meta.GetLinuxResources(), root: -1, vertex: v}
	if err := checkLinux(e.platform); err != nil {
		return nil, err
	}
	if len(op.GetMeta().GetArgs()) == 0 {
		return nil, fmt.Errorf("exec operation has no arguments")
	}
	var err error
	if e.devices, e.missing, err = findDevices(d.Devices, op.CdiDevices); err != nil {
		return nil, err
	}
	switch op.Network {
	case pb.NetMode_UNSET, pb.NetMode_HOST, pb.NetMode_NONE:
	default:
		return nil, notSupported("network mode", op.Network.String())
	}
	switch op.Security {
	case pb.SecurityMode_SANDBOX, pb.SecurityMode_INSECURE:
	default:
		return nil, notSupported("security mode", op.Security.String())
	}
	for _, s := range op.Secretenv {
		if s.ID == "" || s.Name == "" || strings.Contains(s.Name, "=") {
			return nil, fmt.Errorf("environment variable %q for secret %q: both need a name", s.Name, s.ID)
		}
	}
	for _, u := range op.Meta.Ulimit {
		if u.Soft < -1 || u.Hard < -1 {
			return nil, fmt.Errorf("ulimit %s: invalid limit %d:%d", u.Name, u.Soft, u.Hard)
		}
	}
	outputs := map[int64]bool{}
	for i, m := range op.Mounts {
		if err := checkMount(m, len(v.Inputs)); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.GetDest(), err)
		}
		if isRoot(m) {
			if e.root >= 0 {
				return nil, fmt.Errorf("exec operation has two root mounts")
			}
			e.root = i
		}
		if m.Output != int64(pb.SkipOutput) {
			if outputs[m.Output] {
				return nil, fmt.Errorf("mount %s: output %d is there twice", m.Dest, m.Output)
			}
			outputs[m.Output] = true
		}
	}
	if e.root < 0 {
		return nil, fmt.Errorf("exec operation has no root mount")
	}
	e.outputs = len(outputs)
	for i := range e.outputs {
		if !outputs[int64(i)] {
			return nil, fmt.Errorf("exec operation lacks output %d of %d", i, e.outputs)
		}
	}
	return e, nil
}

func isRoot(m *pb.Mount) bool { return m.Dest == pb.RootMount }

func checkMount(m *pb.Mount, inputs int) error {
	if m == nil {
		return fmt.Errorf("empty")
	}
	if m.Dest == "" {
		return fmt.Errorf("no target")
	}
	if m.Input < -1 || m.Input >= int64(inputs) {
		return fmt.Errorf("there is no input %d", m.Input)
	}
	if m.Output < -1 {
		return fmt.Errorf("invalid output %d", m.Output)
	}
	if m.ResultID != "" {
		return notSupported("result ID", m.ResultID)
	}
	if isRoot(m) && m.MountType != pb.MountType_BIND {
		return fmt.Errorf("the root cannot be a %s mount", strings.ToLower(m.MountType.String()))
	}
	if isRoot(m) && path.Join("/", m.Selector) != "/" {
		return notSupported("root in a subdirectory of its input", m.Selector)
	}
	for _, opt := range []struct {
		set  bool
		of   pb.MountType
		name string
	}{
		{m.CacheOpt != nil, pb.MountType_CACHE, "cache"},
		{m.TmpfsOpt != nil, pb.MountType_TMPFS, "tmpfs"},
		{m.SecretOpt != nil, pb.MountType_SECRET, "secret"},
		{m.SSHOpt != nil, pb.MountType_SSH, "ssh"},
	} {
		if opt.set && m.MountType != opt.of {
			return fmt.Errorf("%s options on a mount of another type", opt.name)
		}
	}
	switch m.MountType {
	case pb.MountType_BIND:
	case pb.MountType_CACHE:
		if m.CacheOpt == nil {
			return fmt.Errorf("no cache options")
		}
		switch m.CacheOpt.Sharing {
		case pb.CacheSharingOpt_SHARED, pb.CacheSharingOpt_PRIVATE, pb.CacheSharingOpt_LOCKED:
		default:
			return notSupported("cache sharing", m.CacheOpt.Sharing.String())
		}
		if m.Output != int64(pb.SkipOutput) && m.Input == int64(pb.Empty) {
			return fmt.Errorf("a cache mount without an input has no output")
		}
	case pb.MountType_TMPFS:
		if m.TmpfsOpt.GetSize() < 0 {
			return fmt.Errorf("negative size")
		}
	case pb.MountType_SECRET:
		if m.SecretOpt.GetID() == "" {
			return fmt.Errorf("no secret ID")
		}
	case pb.MountType_SSH:
		if m.SSHOpt == nil {
			return fmt.Errorf("no ssh options")
		}
	default:
		return notSupported("mount type", m.MountType.String())
	}
	switch m.MountType {
	case pb.MountType_TMPFS, pb.MountType_SECRET, pb.MountType_SSH:
		if m.Output != int64(pb.SkipOutput) {
			return fmt.Errorf("a %s mount has no output", strings.ToLower(m.MountType.String()))
		}
	}
	switch m.ContentCache {
	case pb.MountContentCache_DEFAULT, pb.MountContentCache_OFF:
	case pb.MountContentCache_ON:
		if m.Output != int64(pb.SkipOutput) && !m.Readonly && path.Join("/", m.Selector) != "/" {
			return fmt.Errorf("invalid content cache for a writable subdirectory with an output")
		}
	default:
		return notSupported("content cache", m.ContentCache.String())
	}
	return nil
}

// MemoryLimit implements solver.MemoryUser.
func (e *execOp) MemoryLimit() int64 { return e.res.GetMemory() }

// Parts names everything that may change what the process does. Not in it: the proxy's address, the addresses of
// extra hosts and the limits of the cgroup, which say how the build reaches the same result (BuildKit's keys leave
// them out too).
func (e *execOp) Parts() []record.Part {
	meta := e.op.Meta
	p := parts{{Name: "op", Value: "exec"}}
	p.platform(e.platform)
	p.list("arg", meta.Args)
	for _, v := range meta.Env {
		name, value, _ := strings.Cut(v, "=")
		p.add("env "+name, value)
	}
	p.nonempty("working directory", meta.Cwd)
	p.nonempty("user", meta.User)
	p.nonempty("hostname", meta.Hostname)
	for _, h := range meta.ExtraHosts {
		p.add("extra host", h.Host)
	}
	for _, u := range meta.Ulimit {
		p.add("ulimit "+u.Name, fmt.Sprintf("%d:%d", u.Soft, u.Hard))
	}
	if len(meta.ValidExitCodes) > 0 {
		p.add("valid exit codes", strings.Trim(fmt.Sprint(meta.ValidExitCodes), "[]"))
	}
	if e.op.Network != pb.NetMode_UNSET {
		p.add("network", strings.ToLower(e.op.Network.String()))
	}
	if e.op.Security != pb.SecurityMode_SANDBOX {
		p.add("security", strings.ToLower(e.op.Security.String()))
	}
	for _, m := range e.op.Mounts {
		p.add("mount "+m.Dest, mountPart(m))
	}
	for _, s := range e.op.Secretenv {
		p.add("secret env "+s.Name, optional("secret "+strconv.Quote(s.ID), s.Optional))
	}
	for _, name := range e.devices {
		p.add("device", name)
	}
	return p
}

func optional(s string, is bool) string {
	if is {
		return s + ", optional"
	}
	return s
}

func mountPart(m *pb.Mount) string {
	s := strings.ToLower(m.MountType.String())
	if m.Input != int64(pb.Empty) {
		s += fmt.Sprintf(", input %d", m.Input)
	}
	if m.Selector != "" {
		s += ", from " + strconv.Quote(m.Selector)
	}
	if m.Output != int64(pb.SkipOutput) {
		s += fmt.Sprintf(", output %d", m.Output)
	}
	if m.Readonly {
		s += ", read-only"
	}
	switch m.MountType {
	case pb.MountType_CACHE:
		s += fmt.Sprintf(", id %q, %s", m.CacheOpt.ID, strings.ToLower(m.CacheOpt.Sharing.String()))
	case pb.MountType_TMPFS:
		if n := m.TmpfsOpt.GetSize(); n > 0 {
			s += fmt.Sprintf(", %d bytes", n)
		}
	case pb.MountType_SECRET:
		o := m.SecretOpt
		s = optional(fmt.Sprintf("%s, id %q, %d:%d, mode %#o", s, o.ID, o.Uid, o.Gid, o.Mode), o.Optional)
	case pb.MountType_SSH:
		o := m.SSHOpt
		s = optional(fmt.Sprintf("%s, id %q, %d:%d, mode %#o", s, o.ID, o.Uid, o.Gid, o.Mode), o.Optional)
	}
	return s
}

// InputDigest covers the whole input where it becomes part of an output (a root above all), and otherwise what the
// mounts show of it.
func (e *execOp) InputDigest(ctx context.Context, _ *solver.Env, i int, in snapshot.Snapshot) (digest.Digest, error) {
	selected, whole, _ := e.shown(i)
	if whole {
		return e.deps.Snapshots.Content(ctx, in)
	}
	asked := parts{{Name: "op", Value: "exec"}}
	asked.list("mounted", selected)
	return e.deps.digests.of(asked, 0, in, func() (digest.Digest, error) { return e.digest(ctx, selected, in) })
}

// digest is the digest of the selected paths of an input.
func (e *execOp) digest(ctx context.Context, selected []string, in snapshot.Snapshot) (digest.Digest, error) {
	view, err := e.deps.Snapshots.View(ctx, in)
	if err != nil {
		return "", err
	}
	h := newHash("exec input")
	for _, sel := range selected {
		p, err := resolve(view, sel, true)
		if err != nil {
			return "", err
		}
		d, err := index.Digest(view, p)
		if isNotExist(err) {
			return "", &NotFoundError{sel}
		} else if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s\x00", d)
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// shown says what the process can see of the i-th input: the selected paths, or all of it. root says that it is, or may
// be, the process's root.
func (e *execOp) shown(i int) (selected []string, whole, root bool) {
	for _, m := range e.op.Mounts {
		if m.Input != int64(i) {
			continue
		}
		sel := path.Join("/", m.Selector)
		switch {
		case m.MountType != pb.MountType_BIND && m.MountType != pb.MountType_CACHE:
			continue
		case isRoot(m):
			whole, root = true, true
		case m.Output != int64(pb.SkipOutput), sel == "/", m.MountType == pb.MountType_CACHE,
			m.ContentCache == pb.MountContentCache_OFF:
			whole = true
		}
		selected = append(selected, sel)
	}
	return selected, whole, root
}

// Describes implements solver.Describer: for inputs that are mounted somewhere below the root.
func (e *execOp) Describes(i int) bool {
	_, _, root := e.shown(i)
	return !root
}

// DescribeInput implements solver.Describer.
func (e *execOp) DescribeInput(ctx context.Context, i int, in snapshot.Snapshot, to io.Writer) error {
	selected, whole, _ := e.shown(i)
	if whole {
		selected = []string{"/"}
	}
	view, err := e.deps.Snapshots.View(ctx, in)
	if err != nil {
		return err
	}
	w := &seenWriter{to: to}
	for _, sel := range selected {
		p, err := resolve(view, sel, true)
		if err != nil {
			return err
		}
		w.match(path.Base(sel), "")
		err = index.Walk(view, p, func(entry index.Entry) error {
			rel := strings.TrimPrefix(strings.TrimPrefix(entry.Path, p), "/")
			return w.entry(visit{Entry: entry, rel: rel}, p)
		})
		if err != nil {
			return err
		}
	}
	return w.flush()
}

// Run runs the process and commits the mounts that are outputs.
func (e *execOp) Run(ctx context.Context, env *solver.Env, inputs []snapshot.Snapshot) (_ []snapshot.Snapshot, err error) {
	s := &step{op: e, env: env, inputs: inputs, made: make([]stepOutput, e.outputs)}
	defer func() { err = errors.Join(err, s.cleanup()) }()
	if err := s.checkPlatform(ctx); err != nil {
		return nil, err
	}
	spec, err := s.spec(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.run(ctx, spec); err != nil {
		return nil, s.failure(ctx, err)
	}
	return s.commit(ctx)
}

// step is one run of an execOp.
type step struct {
	op      *execOp
	env     *solver.Env
	inputs  []snapshot.Snapshot
	made    []stepOutput
	undo    []func() error // last first
	secrets string         // directory of the tmpfs with secrets, "" when there is none
	hidden  []hidden       // what its output must not have
	ca      *stepCA        // what it trusts besides the authorities of its root; may be nil
	// sources are the directories on this host behind the bind and cache mounts, by index of the mount.
	sources map[int]string
	// mounted are the snapshots behind the root and the bind mounts, by index of the mount.
	mounted map[int]*snapshot.Mount
}

// stepOutput is what becomes an output: a mount to commit, or a snapshot as it is.
type stepOutput struct {
	mount    *snapshot.Mount
	snapshot snapshot.Snapshot
}

func (s *step) later(fn func() error) { s.undo = append(s.undo, fn) }

func (s *step) cleanup() error {
	var errs []error
	for _, fn := range slices.Backward(s.undo) {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// spec mounts what the process needs and describes it.
func (s *step) spec(ctx context.Context) (executor.Spec, error) {
	op, meta, deps := s.op.op, s.op.op.Meta, s.op.deps
	var none executor.Spec
	network, err := s.network()
	if err != nil {
		return none, err
	}
	if op.Security == pb.SecurityMode_INSECURE {
		if err := s.entitled(EntitlementSecurityInsecure); err != nil {
			return none, err
		}
	}
	rootMount := op.Mounts[s.op.root]
	view, err := deps.Snapshots.View(ctx, s.input(rootMount))
	if err != nil {
		return none, err
	}
	passwd, err := readFile(ctx, view, "/etc/passwd", maxAccountFile)
	if err != nil && !isNotExist(err) {
		return none, err
	}
	group, err := readFile(ctx, view, "/etc/group", maxAccountFile)
	if err != nil && !isNotExist(err) {
		return none, err
	}
	user, home, err := executor.ResolveUser(passwd, group, meta.User)
	if err != nil {
		return none, err
	}
	environ, err := s.environ(ctx, home)
	if err != nil {
		return none, err
	}
	if s.ca, err = s.extraCA(ctx, view); err != nil {
		return none, err
	}
	environ = s.ca.environ(environ)
	spec := executor.Spec{
		ID:              "step-" + randomID(),
		ReadonlyRootfs:  rootMount.Readonly,
		Args:            meta.Args,
		Env:             environ,
		Cwd:             path.Join("/", meta.Cwd),
		User:            user,
		Hostname:        meta.Hostname,
		Network:         network,
		OwnHosts:        true, // what the host calls others is in no key
		Privileged:      op.Security == pb.SecurityMode_INSECURE,
		Devices:         s.op.devices,
		NoNewPrivileges: false, // sudo works in a build step, as it does in BuildKit's
		CgroupParent:    cmp.Or(meta.CgroupParent, deps.DefaultCgroupParent),
		Resources:       resources(s.op.res),
		Ulimits:         ulimits(meta.Ulimit),
	}
	for _, h := range meta.ExtraHosts {
		spec.ExtraHosts = append(spec.ExtraHosts, executor.HostEntry{Host: h.Host, IP: h.IP})
	}
	if spec.Rootfs, spec.Mounts, err = s.mounts(ctx); err != nil {
		return none, err
	}
	return spec, nil
}

func (s *step) input(m *pb.Mount) snapshot.Snapshot {
	if m.Input == int64(pb.Empty) {
		return nil
	}
	return s.inputs[m.Input]
}

func (s *step) entitled(name string) error {
	if allowed := s.op.deps.Allowed; allowed == nil || !allowed(s.env, name) {
		return fmt.Errorf("%s is not allowed: the build must be started with --allow %s and the engine must permit it", name, name)
	}
	return nil
}

func (s *step) network() (executor.NetworkMode, error) {
	switch s.op.op.Network {
	case pb.NetMode_HOST:
		return executor.NetworkHost, s.entitled(EntitlementNetworkHost)
	case pb.NetMode_NONE:
		return executor.NetworkNone, nil
	}
	if d := s.op.deps.DefaultNetwork; d != "" {
		return d, nil
	}
	return executor.NetworkBridge, nil
}

func ulimits(list []*pb.Ulimit) []executor.Ulimit {
	var out []executor.Ulimit
	for _, u := range list {
		out = append(out, executor.Ulimit{Name: u.Name, Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return out
}

func resources(r *pb.LinuxResources) executor.Resources {
	return executor.Resources{
		MemoryBytes:     r.GetMemory(),
		MemorySwapBytes: r.GetMemorySwap(),
		CPUShares:       r.GetCpuShares(),
		CPUPeriod:       r.GetCpuPeriod(),
		CPUQuota:        r.GetCpuQuota(),
		CpusetCpus:      r.GetCpusetCpus(),
		CpusetMems:      r.GetCpusetMems(),
	}
}

// environ is the environment of the process: the op's, the proxy's, secrets, and what every process needs.
func (s *step) environ(ctx context.Context, home string) ([]string, error) {
	meta := s.op.op.Meta
	env := slices.Clone(meta.Env)
	if p := meta.ProxyEnv; p != nil {
		for _, v := range []struct{ name, value string }{
			{"HTTP_PROXY", p.HttpProxy},
			{"HTTPS_PROXY", p.HttpsProxy},
			{"FTP_PROXY", p.FtpProxy},
			{"NO_PROXY", p.NoProxy},
			{"ALL_PROXY", p.AllProxy},
		} {
			if v.value != "" {
				env = append(env, v.name+"="+v.value, strings.ToLower(v.name)+"="+v.value)
			}
		}
	}
	for _, def := range []string{"PATH=" + system.DefaultPathEnvUnix, "HOME=" + home} {
		name, _, _ := strings.Cut(def, "=")
		if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") }) {
			env = append(env, def)
		}
	}
	for _, se := range s.op.op.Secretenv {
		value, _, err := s.secret(ctx, se.ID, se.Optional) // as with BuildKit, the variable of one that is not there is empty
		if err != nil {
			return nil, err
		}
		env = append(env, se.Name+"="+string(value))
	}
	return env, nil
}

// mounts makes the root and everything mounted in it. What it makes is undone by cleanup.
func (s *step) mounts(ctx context.Context) (root string, out []executor.Mount, err error) {
	s.sources, s.mounted = map[int]string{}, map[int]*snapshot.Mount{}
	dirs, err := s.cacheDirs(ctx)
	if err != nil {
		return "", nil, err
	}
	for i, m := range s.op.op.Mounts {
		if i == s.op.root {
			mnt, err := s.rootMount(ctx, m)
			if err != nil {
				return "", nil, err
			}
			root, s.mounted[i] = mnt.Path(), mnt
			continue
		}
		var em executor.Mount
		ok := true
		switch m.MountType {
		case pb.MountType_BIND:
			em, s.mounted[i], err = s.bindMount(ctx, m)
		case pb.MountType_CACHE:
			em, err = s.cacheMount(m, dirs[i])
		case pb.MountType_TMPFS:
			em = executor.Mount{Kind: executor.MountTmpfs, SizeBytes: m.TmpfsOpt.GetSize()}
		case pb.MountType_SECRET:
			em, ok, err = s.secretMount(ctx, m.SecretOpt)
		case pb.MountType_SSH:
			em, ok, err = s.sshMount(ctx, m.SSHOpt)
		}
		if err != nil {
			return "", nil, fmt.Errorf("mount %s: %w", m.Dest, err)
		}
		if !ok {
			continue
		}
		if m.MountType == pb.MountType_BIND || m.MountType == pb.MountType_CACHE {
			s.sources[i] = em.Source
		}
		em.Target = path.Clean(m.Dest)
		if !path.IsAbs(em.Target) {
			em.Target = path.Join("/", s.op.op.Meta.Cwd, em.Target)
		}
		em.Readonly = em.Readonly || m.Readonly
		out = append(out, em)
	}
	if s.ca != nil {
		out = append(out, s.ca.mount())
	}
	// A mount must not hide one that was made below it.
	slices.SortStableFunc(out, func(a, b executor.Mount) int { return strings.Compare(a.Target, b.Target) })
	return root, out, nil
}

func (s *step) mount(ctx context.Context, in snapshot.Snapshot, writable bool) (*snapshot.Mount, error) {
	return s.mountWith(ctx, in, snapshot.MountOptions{Writable: writable})
}

func (s *step) mountWith(ctx context.Context, in snapshot.Snapshot, o snapshot.MountOptions) (*snapshot.Mount, error) {
	mnt, err := s.op.deps.Snapshots.Mount(ctx, in, o)
	if err != nil {
		return nil, err
	}
	s.later(mnt.Release) // does nothing once it is committed
	return mnt, nil
}

// rootMount is writable even when the process sees it read-only, for the mount points.
func (s *step) rootMount(ctx context.Context, m *pb.Mount) (*snapshot.Mount, error) {
	o := snapshot.MountOptions{Writable: true}
	if s.ca != nil && s.ca.above != "" {
		o.Above, o.Finish = s.ca.above, s.ca.takeBack
	}
	mnt, err := s.mountWith(ctx, s.input(m), o)
	if err != nil {
		return nil, err
	}
	s.output(m, mnt)
	return mnt, nil
}

// output notes what becomes the mount's output, if it has one.
func (s *step) output(m *pb.Mount, mnt *snapshot.Mount) {
	switch {
	case m.Output == int64(pb.SkipOutput):
	case m.Readonly || m.MountType == pb.MountType_CACHE:
		s.made[m.Output].snapshot = s.input(m)
	default:
		s.made[m.Output].mount = mnt
	}
}

func (s *step) bindMount(ctx context.Context, m *pb.Mount) (executor.Mount, *snapshot.Mount, error) {
	in := s.input(m)
	// The index says where the selector leads, so no symlink is followed on the host. Nobody else can write to the
	// mount before the container has it.
	view, err := s.op.deps.Snapshots.View(ctx, in)
	if err != nil {
		return executor.Mount{}, nil, err
	}
	p, err := resolve(view, m.Selector, true)
	if err != nil {
		return executor.Mount{}, nil, err
	}
	if _, ok := view.Lookup(p); !ok {
		return executor.Mount{}, nil, &NotFoundError{m.Selector}
	}
	shown := in
	if m.Readonly && m.Output == int64(pb.SkipOutput) {
		if shown, err = s.narrow(ctx, in, view, p); err != nil {
			return executor.Mount{}, nil, err
		}
	}
	mnt, err := s.mount(ctx, shown, !m.Readonly || in == nil)
	if err != nil {
		return executor.Mount{}, nil, err
	}
	s.output(m, mnt)
	return executor.Mount{Kind: executor.MountBind, Source: filepath.Join(mnt.Path(), p)}, mnt, nil
}

// narrow returns a snapshot that shows the same at path as in. It is another one if in is a layer that is only in memory, a
// local context: then what is not mounted need not be written to disk.
func (s *step) narrow(ctx context.Context, in snapshot.Snapshot, view *snapshot.View, path string) (snapshot.Snapshot, error) {
	if len(in) != 1 || path == "" {
		return in, nil
	}
	if info, err := s.op.deps.Layers.Stat(ctx, in[0]); err != nil || info.Form != layer.FormHeld {
		return in, err
	}
	draft := s.op.deps.Layers.NewDraft(nil)
	first := map[string]string{} // the first name below path of a file, by its first name of all
	err := index.Walk(view, path, func(e index.Entry) error {
		from := e.Path
		if name := cmp.Or(e.HardLink, e.Path); e.Type != index.Dir {
			e.HardLink = first[name]
			if e.HardLink == "" {
				first[name] = e.Path
			}
		}
		draft.Put(e, func() (io.ReadCloser, error) { return view.OpenFile(context.WithoutCancel(ctx), from) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	id, err := draft.Commit(ctx)
	if err != nil {
		return nil, err
	}
	return snapshot.Snapshot{id}, nil
}

// shownUsage is how long a process runs at least whose usage is shown: that of others would only be noise.
const shownUsage = time.Second

// usage is what a process has used, for the progress display. What the kernel does not count is left out.
func usage(exit executor.Exit) string {
	parts := []string{"used " + exit.CPUTime.Round(10*time.Millisecond).String() + " of processor time"}
	for _, part := range []struct {
		bytes int64
		what  string
	}{{exit.PeakMemoryBytes, "memory"}, {exit.ReadBytes, "read from disk"}, {exit.WrittenBytes, "written to disk"}} {
		if part.bytes > 0 {
			parts = append(parts, units.HumanSize(float64(part.bytes))+" "+part.what)
		}
	}
	return strings.Join(parts, ", ")
}

// run runs the process to its end.
func (s *step) run(ctx context.Context, spec executor.Spec) error {
	deps := s.op.deps
	for _, name := range s.op.missing {
		s.env.Progress.Warn(fmt.Sprintf("the optional device %q is not here, and left out: no CDI device of that name is registered with the engine", name))
	}
	stdout, flushStdout := s.stream(1)
	stderr, flushStderr := s.stream(2)
	proc, err := deps.Executor.Start(ctx, spec, executor.IO{Stdout: stdout, Stderr: stderr})
	if start, ok := errors.AsType[*executor.StartError](err); ok && ctx.Err() == nil {
		return &ExitError{Args: spec.Args, Code: start.Code, Err: start}
	}
	if err != nil {
		return s.canceled(ctx, fmt.Errorf("start container: %w", err))
	}
	exit, err := proc.Wait()
	flushStdout()
	flushStderr()
	if start, ok := errors.AsType[*executor.StartError](err); ok && ctx.Err() == nil {
		return &ExitError{Args: spec.Args, Code: start.Code, Err: start}
	}
	if err != nil {
		return s.canceled(ctx, fmt.Errorf("run container: %w", err))
	}
	s.env.ReportPeakMemory(exit.PeakMemoryBytes)
	s.env.ReportUsage(exit.CPUTime, exit.ReadBytes, exit.WrittenBytes)
	if exit.Ended.Sub(exit.Started) >= shownUsage {
		s.env.Progress.Status(usage(exit), 0, 0, true)
	}
	valid := []int32{0}
	if len(s.op.op.Meta.ValidExitCodes) > 0 {
		valid = s.op.op.Meta.ValidExitCodes
	}
	if err := s.canceled(ctx, nil); err != nil {
		return err // whatever its exit code: it was killed
	}
	if !slices.Contains(valid, int32(exit.Code)) {
		failed := &ExitError{Args: spec.Args, Code: exit.Code, OOMKilled: exit.OOMKilled}
		if exit.Code == 126 || exit.Code == 127 {
			failed.Err = s.foreignProgram(ctx, spec)
		}
		return failed
	}
	return nil
}

// canceled prefers the reason for which the context ended.
func (s *step) canceled(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// commit makes the outputs. After an error what was not committed is discarded by cleanup.
func (s *step) commit(ctx context.Context) (out []snapshot.Snapshot, err error) {
	out = make([]snapshot.Snapshot, len(s.made))
	for i := range s.made {
		o := s.made[i]
		if o.mount == nil {
			out[i] = o.snapshot
			continue
		}
		if out[i], err = o.mount.Commit(ctx); err != nil {
			return nil, fmt.Errorf("commit output %d: %w", i, err)
		}
	}
	return out, nil
}

type logWriter struct {
	progress solver.Progress
	stream   int
}

func (w logWriter) Write(p []byte) (int, error) {
	w.progress.Log(w.stream, bytes.Clone(p))
	return len(p), nil
}

func randomID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
