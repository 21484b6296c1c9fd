// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io/fs"
	"maps"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// A copy is two things that must agree: which entries of the source it takes (selection), and what it makes of them
// at the destination (copier). The selection alone decides the digest that stands for the source in a key, so both
// use the same walk, and whatever a copier looks at in the source has to be in that digest.
//
// The rules are those of BuildKit, which are those of fsutil's copy package. Worth knowing:
//   - The destination is followed when it is a symlink; a name inside it never is.
//   - A directory that exists at the destination keeps its metadata when it is the destination itself, and takes
//     the source's when it is below.
//   - A directory that is only a way to what an include pattern matches is made when the first match is found.

// NotFoundError says that what an operation names is not in its input.
type NotFoundError struct{ Path string }

func (e *NotFoundError) Error() string { return fmt.Sprintf("%q: not found", e.Path) }

// Is makes it an fs.ErrNotExist.
func (e *NotFoundError) Is(target error) bool { return target == fs.ErrNotExist }

// selection is the part of a copy that concerns its source.
type selection struct {
	src            string // absolute and clean, but for a "/" or "/." at its end
	wildcard       bool
	emptyOK        bool
	follow         bool
	include        *patternmatcher.PatternMatcher
	exclude        *patternmatcher.PatternMatcher
	required       []string
	contentsOnly   bool
	unpack         bool
	excludesExcept bool // an exclude pattern begins with "!": what is in an excluded directory may be included
}

func newSelection(a *pb.FileActionCopy) (*selection, error) {
	s := &selection{
		src:          cleanPath(a.Src),
		wildcard:     a.AllowWildcard,
		emptyOK:      a.AllowEmptyWildcard,
		follow:       a.FollowSymlink,
		contentsOnly: a.DirCopyContents,
		unpack:       a.AttemptUnpackDockerCompatibility,
	}
	var err error
	if len(a.IncludePatterns) > 0 {
		if s.include, err = patternmatcher.New(a.IncludePatterns); err != nil {
			return nil, fmt.Errorf("invalid include pattern in %q: %w", a.IncludePatterns, err)
		}
		s.required = a.RequiredPaths
	}
	if len(a.ExcludePatterns) > 0 {
		if s.exclude, err = patternmatcher.New(a.ExcludePatterns); err != nil {
			return nil, fmt.Errorf("invalid exclude pattern in %q: %w", a.ExcludePatterns, err)
		}
		s.excludesExcept = s.exclude.Exclusions()
	}
	if s.wildcard {
		if _, err := path.Match(s.src, ""); err != nil {
			return nil, fmt.Errorf("invalid pattern %q: %w", a.Src, err)
		}
	}
	return s, nil
}

// match is one path that the source's pattern stands for.
type match struct {
	name string // as given or matched: its last component names the copy
	path string // where it is in the tree, symlinks followed as asked
}

// matches resolves the source path in t.
func (s *selection) matches(t index.Tree) ([]match, error) {
	names := []string{s.src}
	if prefix, pattern := splitWildcards(s.src); s.wildcard && pattern == "" {
		names[0] = path.Clean(s.src)
	} else if s.wildcard {
		base, err := resolve(t, prefix, s.follow)
		if err != nil {
			return nil, err
		}
		if e, ok := t.Lookup(base); !ok {
			return nil, &NotFoundError{s.src}
		} else if names = nil; e.Type == index.Dir {
			names = globDir(t, base, base, pattern, strings.Count(pattern, "/"), nil)
		}
		if len(names) == 0 && !s.emptyOK {
			return nil, &NotFoundError{s.src}
		}
	}
	out := make([]match, len(names))
	for i, name := range names {
		p, err := resolve(t, name, s.follow)
		if err != nil {
			return nil, err
		}
		if _, ok := t.Lookup(p); !ok {
			return nil, &NotFoundError{name}
		}
		out[i] = match{name, p}
	}
	return out, nil
}

// globDir adds what below dir matches pattern, taken from base, which has depth slashes. Only directories that are
// not symlinks are looked into.
func globDir(t index.Tree, base, dir, pattern string, depth int, out []string) []string {
	for _, e := range t.ReadDir(dir) {
		rel := e.Path
		if base != "" {
			rel = rel[len(base)+1:]
		}
		if ok, _ := path.Match(pattern, rel); ok {
			out = append(out, "/"+e.Path)
		} else if e.Type == index.Dir && strings.Count(rel, "/") < depth {
			out = globDir(t, base, e.Path, pattern, depth, out)
		}
	}
	return out
}

// visit is one entry that a copy takes, in the order it takes them: a directory before what is in it.
type visit struct {
	index.Entry
	rel string // its path below the match, "" for the match itself
	// way says that no pattern includes the entry: it is a directory on the way to one that is included.
	way bool
}

// walk calls fn for what the copy takes at one match.
func (s *selection) walk(ctx context.Context, t index.Tree, m match, fn func(visit) error) error {
	e, ok := t.Lookup(m.path)
	if !ok {
		return &NotFoundError{m.name}
	}
	w := walker{s: s, ctx: ctx, tree: t, fn: fn}
	return w.entry(visit{Entry: e}, patternmatcher.MatchInfo{}, patternmatcher.MatchInfo{})
}

type walker struct {
	s    *selection
	ctx  context.Context
	tree index.Tree
	fn   func(visit) error
	ways []visit // directories above the current entry that were not visited yet
}

func (w *walker) entry(v visit, inParent, exParent patternmatcher.MatchInfo) error {
	s := w.s
	included, excluded := true, false
	var in, ex patternmatcher.MatchInfo
	if v.rel != "" {
		var err error
		if s.include != nil {
			if included, in, err = s.include.MatchesUsingParentResults(v.rel, inParent); err != nil {
				return fmt.Errorf("match include patterns: %w", err)
			}
		}
		if s.exclude != nil {
			if excluded, ex, err = s.exclude.MatchesUsingParentResults(v.rel, exParent); err != nil {
				return fmt.Errorf("match exclude patterns: %w", err)
			}
		}
		included = included && !excluded
	}
	if included {
		for _, way := range w.ways {
			way.way = true
			if err := w.fn(way); err != nil {
				return err
			}
		}
		w.ways = w.ways[:0]
		if err := w.fn(v); err != nil {
			return err
		}
	}
	if v.Type != index.Dir || excluded && !s.excludesExcept {
		return nil
	}
	if !included {
		w.ways = append(w.ways, v)
	}
	if err := context.Cause(w.ctx); err != nil {
		return err
	}
	for _, child := range w.tree.ReadDir(v.Path) {
		c := visit{Entry: child, rel: index.Base(child.Path)}
		if v.rel != "" {
			c.rel = v.rel + "/" + c.rel
		}
		if err := w.entry(c, in, ex); err != nil {
			return err
		}
	}
	if !included && len(w.ways) > 0 {
		w.ways = w.ways[:len(w.ways)-1]
	}
	return nil
}

// checkRequired reports the first required path that nothing was taken from. seen has the paths of everything
// included, in the words of the source path.
func (s *selection) checkRequired(seen map[string]bool) error {
	for _, p := range s.required {
		if !seen[path.Join("/", p)] {
			return &NotFoundError{p}
		}
	}
	return nil
}

// sawRequired marks in seen the required paths that an entry is or is below.
func (s *selection) sawRequired(seen map[string]bool, m match, v visit) {
	if v.way {
		return
	}
	p := path.Join("/", m.name, v.rel)
	for _, r := range s.required {
		r = path.Join("/", r)
		if p == r || strings.HasPrefix(p, strings.TrimSuffix(r, "/")+"/") {
			seen[r] = true
		}
	}
}

// see writes to w all that a copy can see of t.
func (s *selection) see(ctx context.Context, t index.Tree, w *seenWriter) error {
	matches, err := s.matches(t)
	if err != nil {
		return err
	}
	required := map[string]bool{}
	for _, m := range matches {
		archive := ""
		if p, err := resolve(t, m.name, true); err == nil && s.unpack && !s.follow {
			// An archive is found behind a symlink even when the copy does not follow it.
			e, _ := t.Lookup(p)
			archive = string(e.Digest)
		}
		w.match(path.Base(m.name), archive)
		err = s.walk(ctx, t, m, func(v visit) error {
			s.sawRequired(required, m, v)
			return w.entry(v, m.path)
		})
		if err != nil {
			return err
		}
	}
	return s.checkRequired(required)
}

// owner is a user and group that a copy gives to what it makes.
type owner struct{ uid, gid uint32 }

// copier carries out one copy action.
type copier struct {
	*selection
	from layer.Files
	to   *layer.Draft

	dest       string // like selection.src
	createDest bool
	replace    bool
	owner      *owner // nil keeps the source's
	mode       *uint32
	modeSet    *mode.Set
	stamp      *int64 // nil keeps the source's
	archives   *archives

	links map[string]string // first name of a file in the source → where it was copied to
}

func newCopier(a *pb.FileActionCopy, s *selection) (*copier, error) {
	c := &copier{
		selection:  s,
		dest:       cleanPath(a.Dest),
		createDest: a.CreateDestPath,
		replace:    a.AlwaysReplaceExistingDestPaths,
		stamp:      timestamp(a.Timestamp),
	}
	switch {
	case a.ModeStr != "":
		set, err := mode.ParseWithUmask(a.ModeStr, 0)
		if err != nil {
			return nil, fmt.Errorf("invalid mode %q: %w", a.ModeStr, err)
		}
		c.modeSet = &set
	case a.Mode != -1:
		if a.Mode&^0o7777 != 0 {
			return nil, fmt.Errorf("invalid mode %o", a.Mode)
		}
		m := uint32(a.Mode)
		c.mode = &m
	}
	return c, nil
}

// run copies everything.
func (c *copier) run(ctx context.Context) error {
	if !c.createDest {
		p, err := resolve(c.to, c.dest, true)
		if err != nil {
			return err
		}
		if _, ok := c.to.Lookup(index.Parent(p)); !ok {
			return fmt.Errorf("copy to %q: %w", c.dest, &NotFoundError{"/" + index.Parent(p)})
		}
	}
	matches, err := c.matches(c.from)
	if err != nil {
		return err
	}
	required := map[string]bool{}
	for _, m := range matches {
		if c.unpack {
			done, err := c.unpackArchive(ctx, m)
			if err != nil {
				return fmt.Errorf("unpack %q: %w", m.name, err)
			}
			if done {
				continue
			}
		}
		if err := c.one(ctx, m, required); err != nil {
			return err
		}
	}
	return c.checkRequired(required)
}

// one copies what one match has.
func (c *copier) one(ctx context.Context, m match, required map[string]bool) error {
	src, _ := c.from.Lookup(m.path)
	made := c.newDir(src.ModTime)
	above := c.dest
	if dir, file := path.Split(c.dest); file != "" && file != "." {
		above = dir
	}
	p, err := resolve(c.to, above, true)
	if err != nil {
		return err
	}
	if err := mkdirAll(c.to, p, made, c.owner != nil); err != nil {
		return err
	}
	dest, err := resolve(c.to, c.dest, true)
	if err != nil {
		return err
	}
	dst, exists := c.to.Lookup(dest)
	isDir := src.Type == index.Dir
	if exists && (isDir && !c.contentsOnly || !isDir && dst.Type == index.Dir) {
		dest = relative(path.Join("/", dest, path.Base(m.name)))
	}
	if isDir && c.contentsOnly && !exists {
		err = mkdirAll(c.to, dest, made, c.owner != nil)
	} else {
		err = mkdirAll(c.to, index.Parent(dest), made, c.owner != nil)
	}
	if err != nil {
		return err
	}
	c.links = map[string]string{}
	return c.walk(ctx, c.from, m, func(v visit) error {
		c.sawRequired(required, m, v)
		target := dest
		if v.rel != "" {
			target = index.Join(dest, v.rel)
		}
		return c.place(ctx, v, target)
	})
}

// newDir is a directory that a copy needs and nobody describes. Its time, when none is asked for, is that of what
// is copied into it: the result of a copy depends on its inputs alone.
func (c *copier) newDir(modTime int64) index.Entry {
	e := index.Entry{Type: index.Dir, Mode: 0o755, ModTime: modTime, Offset: -1}
	if c.mode != nil {
		e.Mode = *c.mode & 0o777
	}
	if c.owner != nil {
		e.UID, e.GID = c.owner.uid, c.owner.gid
	}
	if c.stamp != nil {
		e.ModTime = *c.stamp
	}
	return e
}

// place puts one entry of the source at target.
func (c *copier) place(ctx context.Context, v visit, target string) error {
	old, exists := c.to.Lookup(target)
	if v.Type == index.Dir {
		if !exists || old.Type == index.Dir {
			c.placeDir(v, target, old, exists)
			return nil
		}
		if !c.replace || v.way {
			return fmt.Errorf("cannot copy to non-directory: %s", "/"+target)
		}
		c.placeDir(v, target, old, false)
		return nil
	}
	if exists && old.Type == index.Dir && (!c.replace || target == "") {
		return fmt.Errorf("cannot replace to directory %s with file", "/"+target)
	}
	e := c.describe(v.Entry, target)
	if v.Type == index.File {
		first := v.HardLink
		if first == "" {
			first = v.Path
		}
		// The source's names of one file stay names of one file, as far as they are copied together.
		if to, ok := c.links[first]; ok && v.HardLink != "" {
			e.HardLink = to
		} else {
			c.links[first] = target
		}
	}
	c.to.Put(e, opener(ctx, c.from, v.Path))
	return nil
}

func (c *copier) placeDir(v visit, target string, old index.Entry, exists bool) {
	e := c.describe(v.Entry, target)
	switch {
	case !exists:
	case v.rel != "" && !v.way:
		// An existing directory below the destination takes the source's metadata, on top of its attributes.
		e.Xattrs = maps.Clone(old.Xattrs)
		if e.Xattrs == nil {
			e.Xattrs = maps.Clone(v.Xattrs)
		} else {
			maps.Copy(e.Xattrs, v.Xattrs)
		}
	case v.rel != "":
		mode := v.Mode
		e = old
		e.Mode = mode
		e.Offset = -1
	case target == "":
		return // the root's own time means nothing
	default:
		stamp := e.ModTime
		e = old
		e.ModTime = stamp
		e.Offset = -1
	}
	c.to.Put(e, nil)
}

// describe is the entry that a copy makes of a source entry at target.
func (c *copier) describe(src index.Entry, target string) index.Entry {
	e := src
	e.Path = target
	e.HardLink = ""
	e.Opaque = false
	e.Offset = -1
	if c.owner != nil {
		e.UID, e.GID = c.owner.uid, c.owner.gid
	}
	if src.Type != index.Symlink {
		switch {
		case c.modeSet != nil:
			m := fileMode(src.Mode)
			if src.Type == index.Dir {
				m |= os.ModeDir
			}
			e.Mode = unixMode(c.modeSet.Apply(m))
		case c.mode != nil:
			e.Mode = *c.mode
		}
	}
	if c.stamp != nil {
		e.ModTime = *c.stamp
	}
	return e
}

// mkdirAll makes the directory at path, a resolved path, and those above it, like e. owned says that e's owner was
// asked for.
func mkdirAll(d *layer.Draft, p string, e index.Entry, owned bool) error {
	old, ok := d.Lookup(p)
	if ok && old.Type == index.Dir {
		return nil
	}
	if ok {
		return &fs.PathError{Op: "mkdir", Path: "/" + p, Err: syscall.ENOTDIR}
	}
	if err := mkdirAll(d, index.Parent(p), e, owned); err != nil {
		return err
	}
	e.Path = p
	inherit(d, &e, owned)
	d.Put(e, nil)
	return nil
}

// inherit does what the kernel does to a file that is made in a set-group-ID directory: it gets the directory's
// group, unless its owner was asked for, and a directory the bit as well.
func inherit(d *layer.Draft, e *index.Entry, owned bool) {
	parent, _ := d.Lookup(index.Parent(e.Path))
	if parent.Mode&0o2000 == 0 {
		return
	}
	if !owned {
		e.GID = parent.GID
	}
	if e.Type == index.Dir {
		e.Mode |= 0o2000
	}
}

// cleanPath makes a path absolute and clean but keeps a "/" or "/." at its end, which mean "the directory".
func cleanPath(p string) string {
	clean := path.Join("/", p)
	switch {
	case strings.HasSuffix(p, "/."):
		if clean != "/" {
			clean += "/"
		}
		clean += "."
	case strings.HasSuffix(p, "/") && clean != "/":
		clean += "/"
	}
	return clean
}

// relative turns an absolute clean path into an index path.
func relative(p string) string { return strings.TrimPrefix(p, "/") }

// resolve is index.Resolve for a path as LLB has them: ".." is resolved before symlinks are.
func resolve(t index.Tree, p string, followLast bool) (string, error) {
	return index.Resolve(t, relative(path.Join("/", p)), followLast)
}

// splitWildcards cuts p before its first component with a wildcard; pattern is "" when there is none.
func splitWildcards(p string) (prefix, pattern string) {
	parts := strings.Split(path.Clean(p), "/")
	for i, part := range parts {
		if hasWildcard(part) {
			return "/" + strings.Join(parts[:i], "/"), strings.Join(parts[i:], "/")
		}
	}
	return p, ""
}

func hasWildcard(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}

// timestamp is a pb timestamp as a time to set; -1 means none.
func timestamp(t int64) *int64 {
	if t == -1 {
		return nil
	}
	return &t
}

func fileMode(m uint32) os.FileMode {
	f := os.FileMode(m & 0o777)
	if m&0o4000 != 0 {
		f |= os.ModeSetuid
	}
	if m&0o2000 != 0 {
		f |= os.ModeSetgid
	}
	if m&0o1000 != 0 {
		f |= os.ModeSticky
	}
	return f
}

func unixMode(f os.FileMode) uint32 {
	m := uint32(f.Perm())
	if f&os.ModeSetuid != 0 {
		m |= 0o4000
	}
	if f&os.ModeSetgid != 0 {
		m |= 0o2000
	}
	if f&os.ModeSticky != 0 {
		m |= 0o1000
	}
	return m
}

// newHash is the hash of input digests; kind keeps different questions apart.
func newHash(kind string) hash.Hash {
	h := sha256.New()
	h.Write([]byte(kind + "\x00"))
	return h
}
