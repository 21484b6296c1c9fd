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
	"sync/atomic"
	"syscall"

	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	fstypes "github.com/tonistiigi/fsutil/types"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// maxRead bounds what one ReadFile may load into memory: a gRPC message of the gateway protocol.
const maxRead = 16 << 20

// Reference is the result of a definition, solved when it is first needed. It may be used concurrently.
type Reference struct {
	*shared
	definition *pb.Definition
	edge       solver.Edge
	by         *Client
	evaluated  atomic.Bool
}

var _ gwclient.Reference = (*Reference)(nil)

// Snapshot solves the reference. Errors carry the place in the Dockerfile as BuildKit's errdefs.Source.
func (r *Reference) Snapshot(ctx context.Context) (snapshot.Snapshot, error) {
	s, err := r.Build.Result(ctx, r.edge)
	if err != nil {
		return nil, r.wrapError(err)
	}
	r.evaluated.Store(true)
	return s, nil
}

// Snapshot solves a reference that came from a Client; a nil reference is scratch.
func Snapshot(ctx context.Context, ref gwclient.Reference) (snapshot.Snapshot, error) {
	switch r := ref.(type) {
	case nil:
		return nil, nil
	case *Reference:
		if r == nil {
			return nil, nil
		}
		return r.Snapshot(ctx)
	}
	return nil, fmt.Errorf("reference of a foreign type %T", ref)
}

// Evaluate solves the reference.
func (r *Reference) Evaluate(ctx context.Context) error {
	_, err := r.Snapshot(ctx)
	return err
}

// ToState returns the reference as LLB.
func (r *Reference) ToState() (llb.State, error) {
	op, err := llb.NewDefinitionOp(r.definition)
	if err != nil {
		return llb.State{}, err
	}
	return llb.NewState(op), nil
}

// open solves the reference and resolves name in it. Missing files are fs.PathErrors.
func (r *Reference) open(ctx context.Context, op, name string) (Files, index.Entry, error) {
	s, err := r.Snapshot(ctx)
	if err != nil {
		return nil, index.Entry{}, err
	}
	files, err := r.View(ctx, s)
	if err != nil {
		return nil, index.Entry{}, err
	}
	resolved, err := index.Resolve(files, name, true)
	if err != nil {
		return nil, index.Entry{}, err
	}
	e, ok := lookup(files, resolved)
	if !ok {
		return nil, index.Entry{}, &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
	}
	return files, e, nil
}

// lookup gives an empty tree a root.
func lookup(files Files, name string) (index.Entry, bool) {
	if e, ok := files.Lookup(name); ok {
		return e, true
	}
	if name == "" {
		return index.Entry{Type: index.Dir, Mode: 0o755}, true
	}
	return index.Entry{}, false
}

// ReadFile reads a regular file or a range of it, at most 16 MiB.
func (r *Reference) ReadFile(ctx context.Context, req gwclient.ReadRequest) ([]byte, error) {
	files, e, err := r.open(ctx, "open", req.Filename)
	if err != nil {
		return nil, err
	}
	switch e.Type {
	case index.File:
	case index.Dir:
		return nil, &fs.PathError{Op: "read", Path: req.Filename, Err: syscall.EISDIR}
	default:
		return nil, &fs.PathError{Op: "open", Path: req.Filename, Err: errors.New("not a regular file")}
	}
	// One byte more than the limit may be asked for: that is how dockerui notices files that are too large.
	offset, length := int64(0), int64(math.MaxInt64)
	if rng := req.Range; rng != nil {
		if rng.Offset < 0 || rng.Length < 0 {
			return nil, fmt.Errorf("read %s: invalid range", req.Filename)
		}
		offset, length = int64(rng.Offset), int64(rng.Length)
	}
	if length > maxRead+1 {
		if e.Size-offset > maxRead {
			return nil, fmt.Errorf("read %s: larger than %d bytes", req.Filename, maxRead)
		}
		length = maxRead
	}
	f, err := files.OpenFile(ctx, e.Path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	defer f.Close()
	if offset > 0 {
		if _, err := io.CopyN(io.Discard, f, offset); err != nil && err != io.EOF {
			return nil, fmt.Errorf("read %s: %w", req.Filename, err)
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, length))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	return data, nil
}

// StatFile describes what path leads to.
func (r *Reference) StatFile(ctx context.Context, req gwclient.StatRequest) (*fstypes.Stat, error) {
	_, e, err := r.open(ctx, "stat", req.Path)
	if err != nil {
		return nil, err
	}
	return stat(e, path.Base(path.Join("/", req.Path))), nil
}

// ReadDir lists a directory, in the order of names; IncludePattern is one pattern in the style of .dockerignore.
func (r *Reference) ReadDir(ctx context.Context, req gwclient.ReadDirRequest) ([]*fstypes.Stat, error) {
	files, e, err := r.open(ctx, "open", req.Path)
	if err != nil {
		return nil, err
	}
	if e.Type != index.Dir {
		return nil, &fs.PathError{Op: "readdir", Path: req.Path, Err: syscall.ENOTDIR}
	}
	var match *patternmatcher.PatternMatcher
	if req.IncludePattern != "" {
		if match, err = patternmatcher.New([]string{req.IncludePattern}); err != nil {
			return nil, fmt.Errorf("pattern %q: %w", req.IncludePattern, err)
		}
	}
	var out []*fstypes.Stat
	for _, child := range files.ReadDir(e.Path) {
		name := child.Path[strings.LastIndexByte(child.Path, '/')+1:]
		if match != nil {
			ok, err := match.MatchesOrParentMatches(name)
			if err != nil {
				return nil, fmt.Errorf("pattern %q: %w", req.IncludePattern, err)
			}
			if !ok {
				continue
			}
		}
		out = append(out, stat(child, name))
	}
	return out, nil
}

func stat(e index.Entry, name string) *fstypes.Stat {
	mode := os.FileMode(e.Mode & 0o777)
	for bit, goBit := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if e.Mode&bit != 0 {
			mode |= goBit
		}
	}
	switch e.Type {
	case index.Dir:
		mode |= os.ModeDir
	case index.Symlink:
		mode |= os.ModeSymlink
	case index.CharDevice:
		mode |= os.ModeDevice | os.ModeCharDevice
	case index.BlockDevice:
		mode |= os.ModeDevice
	case index.Fifo:
		mode |= os.ModeNamedPipe
	}
	s := &fstypes.Stat{
		Path:     name,
		Mode:     uint32(mode),
		Uid:      e.UID,
		Gid:      e.GID,
		Size:     e.Size,
		ModTime:  e.ModTime,
		Linkname: e.Target,
		Devmajor: int64(e.Major),
		Devminor: int64(e.Minor),
	}
	if len(e.Xattrs) > 0 {
		s.Xattrs = make(map[string][]byte, len(e.Xattrs))
		for k, v := range e.Xattrs {
			s.Xattrs[k] = []byte(v)
		}
	}
	return s
}
