// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"
	"syscall"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	fstypes "github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// container is a container of a frontend.
type container struct {
	*shared
	mounts []gwclient.Mount
	ctr    *op.Container
}

var _ gwclient.Container = (*container)(nil)

// NewContainer solves the references that are mounted and mounts them. The container ends with ctx at the latest; Release it.
func (c *Client) NewContainer(ctx context.Context, req gwclient.NewContainerRequest) (gwclient.Container, error) {
	return c.newContainer(ctx, ctx, req, make([]*pb.TmpfsOpt, len(req.Mounts)))
}

// newContainer makes a container that lives as long as life; ctx bounds what happens before it is there. tmpfs has the options of each of req's
// mounts for which gwclient.Mount has no field.
func (c *Client) newContainer(ctx, life context.Context, req gwclient.NewContainerRequest, tmpfs []*pb.TmpfsOpt) (_ *container, err error) {
	if c.Containers == nil {
		return nil, errors.New("containers started by a frontend are not available here")
	}
	if req.NetMode == pb.NetMode_HOST && !c.allowed.networkHost {
		return nil, errNetworkHost
	}
	if f := req.Constraints.GetFilter(); len(f) > 0 {
		return nil, fmt.Errorf("not supported: worker constraint %s", strings.Join(f, ","))
	}
	spec := op.ContainerSpec{Network: req.NetMode, Hostname: req.Hostname, ExtraHosts: req.ExtraHosts, Platform: req.Platform}
	for i, m := range req.Mounts {
		pm := &pb.Mount{
			Dest: m.Dest, Selector: m.Selector, Readonly: m.Readonly, MountType: m.MountType, Input: int64(pb.Empty),
			CacheOpt: m.CacheOpt, SecretOpt: m.SecretOpt, SSHOpt: m.SSHOpt, TmpfsOpt: tmpfs[i],
		}
		if m.ResultID != "" && m.Ref != nil {
			return nil, fmt.Errorf("mount %s: a reference or the result of a failed step, not both", m.Dest)
		}
		switch {
		case m.ResultID != "":
			snap, err := c.result(ctx, m.ResultID)
			if err != nil {
				return nil, fmt.Errorf("mount %s: %w", m.Dest, err)
			}
			pm.Input = int64(len(spec.Inputs))
			spec.Inputs = append(spec.Inputs, snap)
			if m.Dest == pb.RootMount {
				spec.Failed = c.failedStep(m.ResultID)
			}
		case m.Ref != nil:
			snap, err := Snapshot(ctx, m.Ref)
			if err != nil {
				return nil, err
			}
			pm.Input = int64(len(spec.Inputs))
			spec.Inputs = append(spec.Inputs, snap)
		}
		spec.Mounts = append(spec.Mounts, pm)
	}
	ctr, err := c.startContainer(ctx, life, spec)
	if err != nil {
		return nil, fmt.Errorf("new container: %w", err)
	}
	return &container{shared: c.shared, mounts: req.Mounts, ctr: ctr}, nil
}

// failedStep is what the store keeps of the step that a name in an error's details belongs to, nil when there is none.
func (s *shared) failedStep(resultID string) *cache.FailedStep {
	id, ok := cache.FailedStepOf(resultID)
	if !ok || s.FailedStep == nil {
		return nil
	}
	f, err := s.FailedStep(id)
	if err != nil {
		return nil
	}
	return f
}

// startContainer is Containers.New, ended early when ctx ends before the container is there.
func (s *shared) startContainer(ctx, life context.Context, spec op.ContainerSpec) (*op.Container, error) {
	life, cancel := context.WithCancelCause(life)
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	ctr, err := s.Containers.New(life, s.env(), spec)
	if !stop() && err == nil { // it ended meanwhile
		err = errors.Join(context.Cause(ctx), ctr.Release())
	}
	if err != nil {
		cancel(err)
		return nil, err
	}
	return ctr, nil
}

// env is for what is no vertex of the build.
func (s *shared) env() *solver.Env {
	return &solver.Env{Session: s.Session, Pull: s.Pull, BuildID: s.BuildID, Progress: noProgress{}}
}

// noProgress shows nothing.
type noProgress struct{}

func (noProgress) Log(int, []byte)                   {}
func (noProgress) Status(string, int64, int64, bool) {}
func (noProgress) Warn(string)                       {}

// Start starts a process. A command that cannot be run is an error of the process's Wait: it has exit code 126 or 127.
func (c *container) Start(ctx context.Context, req gwclient.StartRequest) (gwclient.ContainerProcess, error) {
	if req.SecurityMode == pb.SecurityMode_INSECURE && !c.allowed.securityInsecure {
		return nil, errSecurityInsecure
	}
	stdio := executor.IO{}
	if req.Stdin != nil {
		stdio.Stdin = req.Stdin
	}
	if req.Stdout != nil {
		stdio.Stdout = req.Stdout
	}
	if req.Stderr != nil {
		stdio.Stderr = req.Stderr
	}
	proc, err := c.ctr.Start(ctx, op.ContainerProcess{
		Args: req.Args, Env: req.Env, SecretEnv: req.SecretEnv, User: req.User, Cwd: req.Cwd,
		Terminal: req.Tty, Security: req.SecurityMode,
	}, stdio)
	if start, ok := errors.AsType[*executor.StartError](err); ok {
		return &containerProcess{failed: &gwpb.ExitError{
			ExitCode: uint32(start.Code), Err: fmt.Errorf("exec %q: %w", strings.Join(req.Args, " "), start),
		}}, nil
	}
	if err != nil {
		return nil, err
	}
	return &containerProcess{ctx: ctx, args: req.Args, proc: proc}, nil
}

// Release ends the container and everything in it.
func (c *container) Release(context.Context) error { return c.ctr.Release() }

// containerProcess is a process of a container.
type containerProcess struct {
	ctx    context.Context
	args   []string
	proc   executor.Process
	failed error // instead of proc
}

// Wait returns a gwpb.ExitError for an exit code other than 0.
func (p *containerProcess) Wait() error {
	if p.failed != nil {
		return p.failed
	}
	exit, err := p.proc.Wait()
	switch {
	case err != nil:
		return err
	case exit.Code == 0:
		return nil
	case p.ctx.Err() != nil:
		return p.exitError(exit.Code, context.Cause(p.ctx))
	}
	return p.exitError(exit.Code, &op.ExitError{Args: p.args, Code: exit.Code, OOMKilled: exit.OOMKilled})
}

func (p *containerProcess) exitError(code int, err error) error {
	return &gwpb.ExitError{ExitCode: uint32(code), Err: err}
}

// Resize sets the size of the process's terminal; a process that has ended has none.
func (p *containerProcess) Resize(_ context.Context, size gwclient.WinSize) error {
	if p.failed != nil {
		return nil
	}
	if size.Rows > math.MaxUint16 || size.Cols > math.MaxUint16 {
		return fmt.Errorf("terminal of %d rows and %d columns: too large", size.Rows, size.Cols)
	}
	return unlessEnded(p.proc.Resize(uint16(size.Rows), uint16(size.Cols)))
}

// Signal sends a signal; a process that has ended takes none.
func (p *containerProcess) Signal(_ context.Context, sig syscall.Signal) error {
	if p.failed != nil {
		return nil
	}
	return unlessEnded(p.proc.Signal(sig))
}

func unlessEnded(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// inside turns a path of the container into one of its os.Root.
func inside(name string) (string, error) {
	clean := path.Clean(name)
	switch {
	case clean == "/":
		return ".", nil
	case !strings.HasPrefix(clean, "/"):
		return "", fmt.Errorf("path %q is not absolute", name)
	}
	return clean[1:], nil
}

// named gives errors the path that was asked for.
func named(err error, name string) error {
	if pathError, ok := errors.AsType[*fs.PathError](err); ok {
		return &fs.PathError{Op: pathError.Op, Path: name, Err: pathError.Err}
	}
	return err
}

// open opens a file of a mount as it is now. Nothing but regular files and directories is opened.
func (c *container) open(mount int, name string) (*os.File, os.FileInfo, error) {
	root, err := c.ctr.Root(mount)
	if err != nil {
		return nil, nil, err
	}
	p, err := inside(name)
	if err != nil {
		return nil, nil, err
	}
	// O_NONBLOCK: a pipe would keep us waiting. A device that minds being opened can only be there in an insecure container.
	f, err := root.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, named(err, name)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() && !st.IsDir() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, nil, named(err, name)
	}
	return f, st, nil
}

// ReadFile reads a regular file as it is now, or a range of it, at most 16 MiB.
func (c *container) ReadFile(_ context.Context, req gwclient.ReadContainerRequest) ([]byte, error) {
	f, st, err := c.open(req.MountIndex, req.Filename)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st.IsDir() {
		return nil, &fs.PathError{Op: "read", Path: req.Filename, Err: syscall.EISDIR}
	}
	offset, length := int64(0), int64(maxRead+1)
	limited := true // by us
	if r := req.Range; r != nil {
		if r.Offset < 0 || r.Length < 0 {
			return nil, fmt.Errorf("read %s: invalid range", req.Filename)
		}
		offset = int64(r.Offset)
		if int64(r.Length) <= length {
			length, limited = int64(r.Length), false
		}
	}
	data, err := io.ReadAll(io.NewSectionReader(f, offset, length))
	if err != nil {
		return nil, named(err, req.Filename)
	}
	if limited && len(data) > maxRead {
		return nil, fmt.Errorf("read %s: larger than %d bytes", req.Filename, maxRead)
	}
	return data, nil
}

// StatFile describes what a path leads to now; a link that leads out of the mount is described itself.
func (c *container) StatFile(_ context.Context, req gwclient.StatContainerRequest) (*fstypes.Stat, error) {
	root, err := c.ctr.Root(req.MountIndex)
	if err != nil {
		return nil, err
	}
	p, err := inside(req.Path)
	if err != nil {
		return nil, err
	}
	info, err := root.Stat(p)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		if link, lerr := root.Lstat(p); lerr == nil {
			info, err = link, nil
		}
	}
	if err != nil {
		return nil, named(err, req.Path)
	}
	return hostStat(root, p, info, path.Base(path.Join("/", req.Path)))
}

// ReadDir lists a directory as it is now, in the order of names.
func (c *container) ReadDir(_ context.Context, req gwclient.ReadDirContainerRequest) ([]*fstypes.Stat, error) {
	root, err := c.ctr.Root(req.MountIndex)
	if err != nil {
		return nil, err
	}
	p, err := inside(req.Path)
	if err != nil {
		return nil, err
	}
	entries, err := fs.ReadDir(root.FS(), p)
	if err != nil {
		return nil, named(err, req.Path)
	}
	var match *patternmatcher.PatternMatcher
	if req.IncludePattern != "" {
		if match, err = patternmatcher.New([]string{req.IncludePattern}); err != nil {
			return nil, fmt.Errorf("pattern %q: %w", req.IncludePattern, err)
		}
	}
	var out []*fstypes.Stat
	for _, e := range entries {
		if match != nil {
			ok, err := match.MatchesOrParentMatches(e.Name())
			if err != nil {
				return nil, fmt.Errorf("pattern %q: %w", req.IncludePattern, err)
			}
			if !ok {
				continue
			}
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, named(err, req.Path)
		}
		st, err := hostStat(root, path.Join(p, e.Name()), info, e.Name())
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

// hostStat describes a file of a mount.
func hostStat(root *os.Root, p string, info os.FileInfo, name string) (*fstypes.Stat, error) {
	s := &fstypes.Stat{Path: name, Mode: uint32(info.Mode() &^ os.ModeSocket), ModTime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.Uid, s.Gid = st.Uid, st.Gid
		if info.Mode()&os.ModeDevice != 0 {
			s.Devmajor, s.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		}
	}
	if !info.IsDir() {
		s.Size = info.Size()
	}
	if info.Mode()&os.ModeSymlink != 0 {
		target, err := root.Readlink(p)
		if err != nil {
			return nil, err
		}
		s.Linkname = target
	}
	return s, nil
}
