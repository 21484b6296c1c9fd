// SPDX-License-Identifier: Apache-2.0

// Package local is the source of a client's directories: the build context above all. When the engine may read the
// directory itself nothing is copied: the directory is walked, files are hashed, and what comes out is a layer that
// exists as an index only and opens the client's files when their bytes are needed. A file that changes between
// being hashed and being used fails the build.
package local

import (
	"context"
	"encoding/json"
	"fmt"
	iofs "io/fs"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Scheme is the scheme of the identifiers: local://NAME.
const Scheme = "local"

// Deps is what the source works with.
type Deps struct {
	Layers *layer.Store
	// Contexts remembers what earlier builds have read; nil remembers as long as the sources of one New are used.
	Contexts *Contexts
}

// New returns the function that makes sources of vertices. The sources share what they remember about files.
func New(deps Deps) func(*solver.Vertex) (solver.Source, error) {
	if deps.Contexts == nil {
		deps.Contexts, _ = OpenContexts("", nil) // which cannot fail without a directory
	}
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		name, ok := strings.CutPrefix(op.GetIdentifier(), Scheme+"://")
		if !ok || name == "" {
			return nil, fmt.Errorf("local source %q has no name", op.GetIdentifier())
		}
		s := &source{deps: deps, req: solver.LocalRequest{Name: name}}
		for key, value := range op.Attrs {
			if err := s.attr(key, value); err != nil {
				return nil, fmt.Errorf("source %s: attribute %s: %w", op.Identifier, key, err)
			}
		}
		return s, nil
	}
}

type source struct {
	deps Deps
	req  solver.LocalRequest
}

func (s *source) attr(key, value string) error {
	list := func(to *[]string) error { return json.Unmarshal([]byte(value), to) }
	switch key {
	case pb.AttrIncludePatterns:
		return list(&s.req.IncludePatterns)
	case pb.AttrExcludePatterns:
		return list(&s.req.ExcludePatterns)
	case pb.AttrFollowPaths:
		return list(&s.req.FollowPaths)
	case pb.AttrSharedKeyHint:
		s.req.SharedKey = value
	case pb.AttrLocalUniqueID:
		// Its only effect is another digest of the vertex.
	case pb.AttrLocalSessionID:
		// A build has one session here. "PREFIX:ID" renames the directory, as in BuildKit.
		if prefix, _, ok := strings.Cut(value, ":"); ok {
			s.req.Name = prefix + "-" + s.req.Name
		}
	case pb.AttrLocalDiffer:
		// How a transfer finds out what the engine has already. Everything is compared by content here, which is
		// right for both.
		if value != "" && value != pb.AttrLocalDifferMetadata && value != pb.AttrLocalDifferNone {
			return fmt.Errorf("not supported yet: %s", value)
		}
	case pb.AttrMetadataTransfer:
		only, err := strconv.ParseBool(value)
		if err != nil {
			return err
		}
		if only {
			return fmt.Errorf("not supported yet: %s", value)
		}
	case pb.AttrMetadataTransferExclude:
		var exceptions []string
		if err := list(&exceptions); err != nil {
			return err
		}
		if len(exceptions) > 0 {
			return fmt.Errorf("not supported yet: %s", value)
		}
	default:
		return fmt.Errorf("not supported yet: %s", value)
	}
	return nil
}

// Parts names the directory and what is asked of it.
func (s *source) Parts() []record.Part {
	parts := []record.Part{{Name: "op", Value: "local directory"}, {Name: "name", Value: s.req.Name}}
	for _, l := range []struct {
		name   string
		values []string
	}{{"include", s.req.IncludePatterns}, {"exclude", s.req.ExcludePatterns}, {"follow", s.req.FollowPaths}} {
		for i, v := range l.values {
			parts = append(parts, record.Part{Name: fmt.Sprintf("%s[%d]", l.name, i), Value: v})
		}
	}
	return parts
}

// Pin says that only the content tells what a directory is.
func (s *source) Pin(context.Context, *solver.Env) (solver.Pin, error) {
	return solver.Pin{Parts: s.Parts(), ByContent: true}, nil
}

// InputDigest is never asked: a source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("a local directory has no inputs")
}

// Run reads the directory and returns a snapshot of one held layer, or of none when it is empty.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	if env.Session == nil {
		return nil, fmt.Errorf("directory %q: the build has no client that could give it", s.req.Name)
	}
	dir, err := env.Session.Local(ctx, s.req)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	snap, err := s.read(ctx, env, dir)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.req.Name, err)
	}
	return []snapshot.Snapshot{snap}, nil
}

func (s *source) read(ctx context.Context, env *solver.Env, dir solver.LocalDir) (snapshot.Snapshot, error) {
	root, err := openRoot(dir.Path)
	if err != nil {
		return nil, err
	}
	var filter patterns
	if !dir.Filtered {
		if filter, err = patternsOf(dir.Path, s.req); err != nil {
			return nil, err
		}
	}
	// A directory that was transferred is there for this build only.
	known := &remembered{}
	var views []*view
	key := filter.key()
	if !dir.Filtered {
		known, views = s.deps.Contexts.of(dir.Path, key)
	}
	last := &view{key: key}
	var others []*tree
	for _, v := range views {
		if v.key == key {
			last = v
		} else {
			others = append(others, v.tree)
		}
	}

	status := "transferring " + s.req.Name + ":"
	work := &scan{root: root, patterns: filter, now: s.deps.Contexts.now, progress: func(n int64) { env.Progress.Status(status, n, 0, false) }}
	t, changed, err := work.run(ctx, last.tree, others)
	if err != nil {
		return nil, err
	}
	now := &view{key: key, tree: t, index: last.index, layer: last.layer, bytes: last.bytes}
	if changed || now.index == nil {
		now.layer = ""
		if now.index, now.bytes, err = t.index(); err != nil {
			return nil, err
		}
	}
	env.Progress.Status(status, now.bytes, 0, true)
	if now.index.Len() > 1 {
		// Also when it is held already: the directory at this path may be another one now.
		if now.layer, err = s.deps.Layers.HoldIndex(now.layer, now.index, root.opener(t)); err != nil {
			return nil, err
		}
	}
	if !dir.Filtered {
		s.deps.Contexts.put(known, now)
	}
	if now.layer == "" {
		return nil, nil
	}
	return snapshot.Snapshot{now.layer}, nil
}

// contextFS leaves out what a context does not have: sockets, which fsutil's stat takes for files, and devices.
type contextFS struct{ fsutil.FS }

func (c contextFS) Walk(ctx context.Context, dir string, fn iofs.WalkDirFunc) error {
	return c.FS.Walk(ctx, dir, func(path string, d iofs.DirEntry, err error) error {
		if err == nil && d.Type()&(iofs.ModeSocket|iofs.ModeDevice) != 0 {
			return nil
		}
		return fn(path, d, err)
	})
}
