// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"errors"
	"fmt"
	"net/url"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// failure turns the error of a process into one with the files that it has left, which the store keeps for a while. No record
// names them, so they are nobody's result.
func (s *step) failure(ctx context.Context, err error) error {
	var exit *ExitError
	if !errors.As(err, &exit) || ctx.Err() != nil {
		return err // nothing has run, or somebody has stopped it
	}
	op := s.op.op
	failed := &solver.FilesError{
		Err: err, Action: -1, Unread: -1,
		Inputs: make([]snapshot.Snapshot, len(op.Mounts)), Mounts: make([]snapshot.Snapshot, len(op.Mounts)),
	}
	for i, m := range op.Mounts {
		mnt := s.mounted[i]
		if mnt == nil {
			if m.MountType == pb.MountType_CACHE { // what is in it is still where it was; it is found by its first files
				failed.Inputs[i], failed.Mounts[i] = s.input(m), s.input(m)
			}
			continue
		}
		failed.Inputs[i] = mnt.Snapshot() // of a context only what is mounted, not all of it
		failed.Mounts[i] = failed.Inputs[i]
		if m.Readonly && i != s.op.root {
			continue
		}
		left, cerr := mnt.Commit(ctx)
		if ctx.Err() != nil {
			return err // nobody waits for it any more
		}
		if cerr != nil {
			s.env.Progress.Warn(fmt.Sprintf("what the command has left in %s could not be kept: %v", m.Dest, cerr))
			continue
		}
		failed.Mounts[i] = left
	}
	if s.op.deps.KeepFailed == nil || s.op.vertex == nil {
		return failed
	}
	data, merr := s.op.withoutPasswords().MarshalVT()
	limits, lerr := s.op.res.MarshalVT() // none of none
	merr = errors.Join(merr, lerr)
	kept := &cache.FailedStep{Name: s.op.vertex.Name, Op: data, Limits: limits, Inputs: failed.Inputs, Mounts: failed.Mounts}
	if merr == nil {
		merr = s.op.deps.KeepFailed(ctx, kept)
	}
	if merr != nil && ctx.Err() == nil {
		s.env.Progress.Warn(fmt.Sprintf("what the command has left is not kept: %v", merr))
	}
	if merr != nil {
		return failed
	}
	failed.InputIDs, failed.MountIDs = kept.InputIDs(), kept.MountIDs()
	return failed
}

// limitAs gives a container the limits of a step that has failed: resource limits, cgroup, and the sizes of file systems in memory that it
// has at the same places and of which nothing is said.
func (spec *ContainerSpec) limitAs(f *cache.FailedStep) error {
	var step pb.Op
	if err := step.UnmarshalVT(f.Op); err != nil {
		return fmt.Errorf("read failed step %s: %w", f.ID, err)
	}
	var limits pb.LinuxResources
	if err := limits.UnmarshalVT(f.Limits); err != nil {
		return fmt.Errorf("read the limits of failed step %s: %w", f.ID, err)
	}
	exec := step.GetExec()
	spec.resources, spec.ulimits, spec.cgroupParent = &limits, exec.GetMeta().GetUlimit(), exec.GetMeta().GetCgroupParent()
	for _, m := range spec.Mounts {
		if m.MountType != pb.MountType_TMPFS || m.TmpfsOpt != nil {
			continue
		}
		for _, its := range exec.GetMounts() {
			if its.MountType == pb.MountType_TMPFS && its.Dest == m.Dest {
				m.TmpfsOpt = its.TmpfsOpt
			}
		}
	}
	return nil
}

// withoutPasswords is the op without what the client would not like to be written down: the proxies' user names and passwords.
func (e *execOp) withoutPasswords() *pb.Op {
	op := e.vertex.Op.CloneVT()
	if p := op.GetExec().GetMeta().GetProxyEnv(); p != nil {
		for _, field := range []*string{&p.HttpProxy, &p.HttpsProxy, &p.FtpProxy, &p.AllProxy} {
			if u, err := url.Parse(*field); err != nil {
				*field = ""
			} else if u.User != nil {
				u.User = nil
				*field = u.String()
			}
		}
	}
	return op
}

// failure adds to an action's error the files that it was to change, with what it and earlier actions have done, those that
// it was to take from, and those of the other actions that are there.
func (r *fileRun) failure(ctx context.Context, n int, t fileTree, err error) error {
	var inner *solver.FilesError
	if errors.As(err, &inner) || ctx.Err() != nil {
		return err // of an action that this one needs
	}
	action := n - r.op.inputs
	failed := &solver.FilesError{
		Err: err, Action: action, Unread: -1,
		Inputs: r.inputs, Mounts: make([]snapshot.Snapshot, len(r.op.actions)),
	}
	for i, a := range r.op.actions {
		if done, ok := r.done[r.op.inputs+i]; ok && (r.op.actions[action].source == r.op.inputs+i || a.shared) {
			failed.Mounts[i] = committed(ctx, done)
		}
	}
	failed.Mounts[action] = committed(ctx, t)
	return failed
}

// committed is t as a snapshot, without its draft when that cannot be written.
func committed(ctx context.Context, t fileTree) snapshot.Snapshot {
	if t.draft == nil || t.draft.Empty() {
		return t.snapshot
	}
	id, err := t.draft.Commit(ctx)
	if err != nil {
		return t.snapshot
	}
	return with(t.snapshot, id)
}
