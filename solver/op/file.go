// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// fileOp runs the actions of a COPY, ADD, WORKDIR or of LLB's File. Nothing is mounted: an action changes a
// layer.Draft, which becomes a layer when its tree is an output or is used more than once.
type fileOp struct {
	deps    *Deps
	actions []*fileAction
	inputs  int
	outputs []int // output index → action
}

// fileAction is one checked action. Trees are numbered as in LLB: the inputs of the op first, then the results of
// the actions; -1 is scratch.
type fileAction struct {
	*pb.FileAction
	base, source int
	users        []int // trees whose /etc/passwd or /etc/group are read
	copy         *pb.FileActionCopy
	selection    *selection // of a copy
	shared       bool       // the result is an output, or used more than once
}

func newFile(d *Deps, v *solver.Vertex, op *pb.FileOp) (solver.Op, error) {
	if err := checkLinux(v.Op.Platform); err != nil {
		return nil, err
	}
	if len(op.GetActions()) == 0 {
		return nil, fmt.Errorf("file operation has no actions")
	}
	f := &fileOp{deps: d, inputs: len(v.Inputs)}
	byOutput := map[int]int{}
	uses := map[int]int{}
	for i, pa := range op.Actions {
		a, err := newFileAction(pa, f.inputs+len(op.Actions))
		if err != nil {
			return nil, fmt.Errorf("file action %d: %w", i, err)
		}
		f.actions = append(f.actions, a)
		for _, t := range a.reads() {
			uses[t]++
		}
		if pa.Output != int64(pb.SkipOutput) {
			if _, dup := byOutput[int(pa.Output)]; dup {
				return nil, fmt.Errorf("file action %d: output %d is there twice", i, pa.Output)
			}
			byOutput[int(pa.Output)] = i
			uses[f.inputs+i] += 2
		}
	}
	if len(byOutput) == 0 {
		return nil, fmt.Errorf("file operation has no outputs")
	}
	for i := range len(byOutput) {
		action, ok := byOutput[i]
		if !ok {
			return nil, fmt.Errorf("file operation lacks output %d of %d", i, len(byOutput))
		}
		f.outputs = append(f.outputs, action)
	}
	for i, a := range f.actions {
		a.shared = uses[f.inputs+i] > 1
		if err := f.checkLoop(f.inputs+i, nil); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func newFileAction(pa *pb.FileAction, trees int) (*fileAction, error) {
	a := &fileAction{FileAction: pa, base: int(pa.Input), source: int(pa.SecondaryInput)}
	var who *pb.ChownOpt
	switch act := pa.Action.(type) {
	case *pb.FileAction_Copy:
		if act.Copy == nil {
			return nil, fmt.Errorf("copy is empty")
		}
		a.copy = act.Copy
		var err error
		if a.selection, err = newSelection(act.Copy); err != nil {
			return nil, err
		}
		if _, err := newCopier(act.Copy, a.selection); err != nil {
			return nil, err
		}
		who = act.Copy.Owner
	case *pb.FileAction_Mkfile:
		who = act.Mkfile.GetOwner()
	case *pb.FileAction_Mkdir:
		who = act.Mkdir.GetOwner()
	case *pb.FileAction_Symlink:
		who = act.Symlink.GetOwner()
	case *pb.FileAction_Rm:
	default:
		return nil, notSupported("file action", fmt.Sprintf("%T", act))
	}
	if a.copy == nil && a.source != int(pb.Empty) {
		return nil, fmt.Errorf("only a copy may have a second input")
	}
	for _, u := range []*pb.UserOpt{who.GetUser(), who.GetGroup()} {
		switch u := u.GetUser().(type) {
		case *pb.UserOpt_ByName:
			if u.ByName == nil || u.ByName.Input < 0 {
				return nil, fmt.Errorf("named user without an input to look it up in")
			}
			a.users = append(a.users, int(u.ByName.Input))
		case *pb.UserOpt_ByID, nil:
		default:
			return nil, notSupported("user", fmt.Sprintf("%T", u))
		}
	}
	for _, t := range append([]int{a.base, a.source}, a.users...) {
		if t < -1 || t >= trees {
			return nil, fmt.Errorf("there is no input %d", t)
		}
	}
	return a, nil
}

// reads returns the trees that the action needs.
func (a *fileAction) reads() []int {
	var out []int
	for _, t := range append([]int{a.base, a.source}, a.users...) {
		if t >= 0 {
			out = append(out, t)
		}
	}
	return out
}

func (f *fileOp) checkLoop(tree int, above []int) error {
	if slices.Contains(above, tree) {
		return fmt.Errorf("file action %d depends on itself", tree-f.inputs)
	}
	if tree < f.inputs {
		return nil
	}
	for _, t := range f.actions[tree-f.inputs].reads() {
		if err := f.checkLoop(t, append(above, tree)); err != nil {
			return err
		}
	}
	return nil
}

// Parts names everything in the actions.
func (f *fileOp) Parts() []record.Part {
	p := parts{{Name: "op", Value: "file"}}
	for i, a := range f.actions {
		pre := fmt.Sprintf("action[%d].", i)
		add := func(name, value string) { p.add(pre+name, value) }
		flag := func(name string, set bool) { p.flag(pre+name, set) }
		text := func(name, value string) { p.nonempty(pre+name, value) }
		stamp := func(t int64) {
			if t != -1 {
				add("timestamp", strconv.FormatInt(t, 10))
			}
		}
		who := func(o *pb.ChownOpt) {
			if o != nil {
				add("owner", userPart(o.User)+":"+userPart(o.Group))
			}
		}
		trees := fmt.Sprintf("input %d", a.Input)
		if a.copy != nil {
			trees += fmt.Sprintf(", from %d", a.SecondaryInput)
		}
		if a.Output != int64(pb.SkipOutput) {
			trees += fmt.Sprintf(", output %d", a.Output)
		}
		switch act := a.Action.(type) {
		case *pb.FileAction_Copy:
			c := act.Copy
			add("copy", trees)
			add("src", c.Src)
			add("dest", c.Dest)
			who(c.Owner)
			if c.ModeStr != "" {
				add("mode", c.ModeStr)
			} else if c.Mode != -1 {
				add("mode", fmt.Sprintf("%#o", c.Mode))
			}
			flag("follow symlink", c.FollowSymlink)
			flag("directory contents", c.DirCopyContents)
			flag("unpack", c.AttemptUnpackDockerCompatibility)
			flag("create destination", c.CreateDestPath)
			flag("wildcard", c.AllowWildcard)
			flag("wildcard may match nothing", c.AllowEmptyWildcard)
			flag("replace existing", c.AlwaysReplaceExistingDestPaths)
			stamp(c.Timestamp)
			p.list(pre+"include", c.IncludePatterns)
			p.list(pre+"exclude", c.ExcludePatterns)
			p.list(pre+"required", c.RequiredPaths)
		case *pb.FileAction_Mkfile:
			m := act.Mkfile
			sum := sha256.Sum256(m.Data)
			add("mkfile", trees)
			add("path", m.Path)
			add("mode", fmt.Sprintf("%#o", m.Mode))
			add("data", fmt.Sprintf("%d bytes, sha256:%s", len(m.Data), hex.EncodeToString(sum[:])))
			who(m.Owner)
			stamp(m.Timestamp)
		case *pb.FileAction_Mkdir:
			m := act.Mkdir
			add("mkdir", trees)
			add("path", m.Path)
			add("mode", fmt.Sprintf("%#o", m.Mode))
			flag("parents", m.MakeParents)
			who(m.Owner)
			stamp(m.Timestamp)
		case *pb.FileAction_Symlink:
			s := act.Symlink
			add("symlink", trees)
			add("path", s.Newpath)
			add("target", s.Oldpath)
			who(s.Owner)
			stamp(s.Timestamp)
		case *pb.FileAction_Rm:
			r := act.Rm
			add("rm", trees)
			text("path", r.Path)
			flag("may be missing", r.AllowNotFound)
			flag("wildcard", r.AllowWildcard)
		}
	}
	return p
}

func userPart(u *pb.UserOpt) string {
	switch u := u.GetUser().(type) {
	case *pb.UserOpt_ByName:
		return fmt.Sprintf("%q of input %d", u.ByName.Name, u.ByName.Input)
	case *pb.UserOpt_ByID:
		return strconv.FormatUint(uint64(u.ByID), 10)
	}
	return ""
}

// InputDigest covers the whole of an input that files are put into, and of one that files are only taken from what
// the copies take: it is the digest of what DescribeInput writes.
func (f *fileOp) InputDigest(ctx context.Context, _ *solver.Env, i int, in snapshot.Snapshot) (digest.Digest, error) {
	if f.changes(i) {
		return f.deps.Snapshots.Content(ctx, in)
	}
	return f.deps.digests.of(f.Parts(), i, in, func() (digest.Digest, error) {
		h := newHash("file input")
		if err := f.see(ctx, i, in, h); err != nil {
			return "", err
		}
		return digest.NewDigest(digest.SHA256, h), nil
	})
}

// Describes implements solver.Describer: for inputs that files are only taken from.
func (f *fileOp) Describes(i int) bool { return !f.changes(i) }

// DescribeInput implements solver.Describer.
func (f *fileOp) DescribeInput(ctx context.Context, i int, in snapshot.Snapshot, to io.Writer) error {
	return f.see(ctx, i, in, to)
}

// changes reports whether files are put into the i-th input.
func (f *fileOp) changes(i int) bool {
	return slices.ContainsFunc(f.actions, func(a *fileAction) bool { return a.base == i })
}

// see writes all that the actions can see of the i-th input, which they only take files from.
func (f *fileOp) see(ctx context.Context, i int, in snapshot.Snapshot, to io.Writer) error {
	view, err := f.deps.Snapshots.View(ctx, in)
	if err != nil {
		return err
	}
	w := &seenWriter{to: to}
	for n, a := range f.actions {
		if a.copy != nil && a.source == i {
			w.action(n)
			if err := a.selection.see(ctx, view, w); err != nil {
				return err
			}
		}
		if slices.Contains(a.users, i) {
			for _, name := range []string{"/etc/passwd", "/etc/group"} {
				p, err := resolve(view, name, true)
				if err != nil {
					return err
				}
				e, _ := view.Lookup(p)
				w.users(name, string(e.Digest))
			}
		}
	}
	return w.flush()
}

// Run computes the outputs and what they need; actions that no output needs are not run.
func (f *fileOp) Run(ctx context.Context, env *solver.Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	r := &fileRun{op: f, env: env, inputs: inputs, done: map[int]fileTree{}, archives: &archives{dir: f.deps.TempDir}}
	defer r.archives.close()
	out := make([]snapshot.Snapshot, len(f.outputs))
	for i, action := range f.outputs {
		t, err := r.tree(ctx, f.inputs+action)
		if err != nil {
			return nil, err
		}
		out[i] = t.snapshot
	}
	return out, nil
}

type fileRun struct {
	op       *fileOp
	env      *solver.Env
	inputs   []snapshot.Snapshot
	done     map[int]fileTree
	archives *archives
}

// fileTree is a tree while the op runs: a snapshot, and a draft on top of it when it is not written yet.
type fileTree struct {
	snapshot snapshot.Snapshot
	draft    *layer.Draft
	files    layer.Files
}

// tree returns the tree with LLB's number n.
func (r *fileRun) tree(ctx context.Context, n int) (fileTree, error) {
	if t, ok := r.done[n]; ok {
		return t, nil
	}
	t, err := r.make(ctx, n)
	if err != nil {
		return fileTree{}, err
	}
	r.done[n] = t
	return t, nil
}

func (r *fileRun) make(ctx context.Context, n int) (fileTree, error) {
	switch {
	case n < 0:
		return r.view(ctx, nil)
	case n < r.op.inputs:
		return r.view(ctx, r.inputs[n])
	}
	a := r.op.actions[n-r.op.inputs]
	t, err := r.tree(ctx, a.base)
	if err != nil {
		return fileTree{}, err
	}
	if t.draft == nil {
		// Else the draft of an earlier action that nothing else looks at goes on.
		t.draft = r.op.deps.Layers.NewDraft(t.files)
		t.files = t.draft
	}
	if err := r.apply(ctx, a, t.draft); err != nil {
		return fileTree{}, r.failure(ctx, n, t, err)
	}
	if !a.shared {
		return t, nil
	}
	s := t.snapshot
	if !t.draft.Empty() {
		id, err := t.draft.Commit(ctx)
		if err != nil {
			return fileTree{}, err
		}
		s = with(s, id)
	}
	return r.view(ctx, s)
}

func (r *fileRun) view(ctx context.Context, s snapshot.Snapshot) (fileTree, error) {
	v, err := r.op.deps.Snapshots.View(ctx, s)
	if err != nil {
		return fileTree{}, err
	}
	return fileTree{snapshot: s, files: v}, nil
}

// apply carries out one action on d.
func (r *fileRun) apply(ctx context.Context, a *fileAction, d *layer.Draft) error {
	now := r.op.deps.now().UnixNano()
	switch act := a.Action.(type) {
	case *pb.FileAction_Copy:
		c, err := newCopier(act.Copy, a.selection)
		if err != nil {
			return err
		}
		src, err := r.tree(ctx, a.source)
		if err != nil {
			return err
		}
		if c.owner, err = r.owner(ctx, act.Copy.Owner); err != nil {
			return err
		}
		c.from, c.to, c.archives = src.files, d, r.archives
		return c.run(ctx)
	case *pb.FileAction_Mkfile:
		o, err := r.owner(ctx, act.Mkfile.Owner)
		if err != nil {
			return err
		}
		return mkfile(d, act.Mkfile, o, now)
	case *pb.FileAction_Mkdir:
		o, err := r.owner(ctx, act.Mkdir.Owner)
		if err != nil {
			return err
		}
		return mkdir(d, act.Mkdir, o, now)
	case *pb.FileAction_Symlink:
		o, err := r.owner(ctx, act.Symlink.Owner)
		if err != nil {
			return err
		}
		return symlink(d, act.Symlink, o, now)
	case *pb.FileAction_Rm:
		return remove(d, act.Rm)
	}
	return notSupported("file action", fmt.Sprintf("%T", a.Action))
}

// owner resolves a chown option, nil when there is none. As in BuildKit a name that nobody has is root; a warning
// says so.
func (r *fileRun) owner(ctx context.Context, opt *pb.ChownOpt) (*owner, error) {
	if opt == nil {
		return nil, nil
	}
	var o owner
	switch u := opt.User.GetUser().(type) {
	case *pb.UserOpt_ByID:
		o = owner{u.ByID, u.ByID}
	case *pb.UserOpt_ByName:
		fields, err := r.account(ctx, u.ByName, "/etc/passwd", 4)
		if err != nil {
			return nil, err
		}
		if fields != nil {
			if o.uid, err = id(fields[2]); err != nil {
				return nil, fmt.Errorf("/etc/passwd: user %q: %w", u.ByName.Name, err)
			}
			if o.gid, err = id(fields[3]); err != nil {
				return nil, fmt.Errorf("/etc/passwd: user %q: %w", u.ByName.Name, err)
			}
		}
	}
	switch g := opt.Group.GetUser().(type) {
	case *pb.UserOpt_ByID:
		o.gid = g.ByID
	case *pb.UserOpt_ByName:
		fields, err := r.account(ctx, g.ByName, "/etc/group", 3)
		if err != nil {
			return nil, err
		}
		if fields != nil {
			if o.gid, err = id(fields[2]); err != nil {
				return nil, fmt.Errorf("/etc/group: group %q: %w", g.ByName.Name, err)
			}
		}
	}
	return &o, nil
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err
}

// maxAccountFile bounds /etc/passwd and /etc/group, which come from an image.
const maxAccountFile = 10 << 20

// account returns the fields of the line for a name in one of the tree's account files, nil when there is none.
func (r *fileRun) account(ctx context.Context, who *pb.NamedUserOpt, file string, fields int) ([]string, error) {
	t, err := r.tree(ctx, int(who.Input))
	if err != nil {
		return nil, err
	}
	data, err := readFile(ctx, t.files, file, maxAccountFile)
	if err != nil && !isNotExist(err) {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if f[0] == who.Name && len(f) >= fields {
			return f, nil
		}
	}
	r.env.Progress.Warn(fmt.Sprintf("there is no %q in %s; root is used", who.Name, file))
	return nil, nil
}

// readFile reads a small regular file of a tree, following symlinks. A missing one is an fs.ErrNotExist.
func readFile(ctx context.Context, t layer.Files, name string, limit int64) ([]byte, error) {
	p, err := resolve(t, name, true)
	if err != nil {
		return nil, err
	}
	e, ok := t.Lookup(p)
	switch {
	case !ok:
		return nil, &NotFoundError{name}
	case e.Type != index.File:
		return nil, fmt.Errorf("%q is not a regular file", name)
	case e.Size > limit:
		return nil, fmt.Errorf("%q is larger than %d bytes", name, limit)
	}
	f, err := t.OpenFile(ctx, p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", name, err)
	}
	return data, nil
}

// newEntry is an entry that an action makes of nothing.
func newEntry(p string, o *owner, stamp, now int64) index.Entry {
	e := index.Entry{Path: p, ModTime: now, Offset: -1}
	if o != nil {
		e.UID, e.GID = o.uid, o.gid
	}
	if t := timestamp(stamp); t != nil {
		e.ModTime = *t
	}
	return e
}

// parentDir checks that what is to be made at p, a resolved path, has a directory to be in.
func parentDir(d *layer.Draft, op, p string) error {
	e, ok := d.Lookup(index.Parent(p))
	switch {
	case !ok:
		return &fs.PathError{Op: op, Path: "/" + p, Err: syscall.ENOENT}
	case e.Type != index.Dir:
		return &fs.PathError{Op: op, Path: "/" + p, Err: syscall.ENOTDIR}
	}
	return nil
}

func mkfile(d *layer.Draft, a *pb.FileActionMkFile, o *owner, now int64) error {
	p, err := resolve(d, a.Path, true)
	if err != nil {
		return err
	}
	if old, ok := d.Lookup(p); ok && old.Type == index.Dir {
		return &fs.PathError{Op: "mkfile", Path: "/" + p, Err: syscall.EISDIR}
	}
	if err := parentDir(d, "mkfile", p); err != nil {
		return err
	}
	e := newEntry(p, o, a.Timestamp, now)
	e.Type = index.File
	e.Mode = uint32(a.Mode) & 0o777
	e.Size = int64(len(a.Data))
	e.Digest = digest.FromBytes(a.Data)
	inherit(d, &e, o != nil)
	d.Put(e, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(a.Data)), nil })
	return nil
}

func mkdir(d *layer.Draft, a *pb.FileActionMkDir, o *owner, now int64) error {
	p, err := resolve(d, a.Path, true)
	if err != nil {
		return err
	}
	e := newEntry(p, o, a.Timestamp, now)
	e.Type = index.Dir
	e.Mode = uint32(a.Mode) & 0o777
	if a.MakeParents {
		return mkdirAll(d, p, e, o != nil)
	}
	if _, ok := d.Lookup(p); ok {
		return nil // whatever it is, as in BuildKit
	}
	if err := parentDir(d, "mkdir", p); err != nil {
		return err
	}
	inherit(d, &e, o != nil)
	d.Put(e, nil)
	return nil
}

func symlink(d *layer.Draft, a *pb.FileActionSymlink, o *owner, now int64) error {
	p, err := resolve(d, a.Newpath, true)
	if err != nil {
		return err
	}
	if a.Oldpath == "" {
		return &fs.PathError{Op: "symlink", Path: "/" + p, Err: syscall.ENOENT}
	}
	if _, ok := d.Lookup(p); ok {
		return &fs.PathError{Op: "symlink", Path: "/" + p, Err: syscall.EEXIST}
	}
	if err := parentDir(d, "symlink", p); err != nil {
		return err
	}
	e := newEntry(p, o, a.Timestamp, now)
	e.Type = index.Symlink
	e.Mode = 0o777
	e.Target = a.Oldpath
	inherit(d, &e, o != nil)
	d.Put(e, nil)
	return nil
}

func remove(d *layer.Draft, a *pb.FileActionRm) error {
	names := []string{a.Path}
	if prefix, pattern := splitWildcards(cleanPath(a.Path)); a.AllowWildcard && pattern != "" {
		base, err := resolve(d, prefix, false)
		if err != nil {
			return err
		}
		if _, ok := d.Lookup(base); !ok {
			return &NotFoundError{a.Path}
		}
		names = globDir(d, base, base, pattern, strings.Count(pattern, "/"), nil)
	}
	for _, name := range names {
		p, err := resolve(d, name, false)
		if err != nil {
			return err
		}
		if p == "" || strings.HasSuffix(path.Join("/", name), "/") {
			return fmt.Errorf("rm %q: the root cannot be removed", name)
		}
		if _, ok := d.Lookup(p); !ok {
			if a.AllowNotFound {
				continue
			}
			return &NotFoundError{name}
		}
		d.Remove(p)
	}
	return nil
}
