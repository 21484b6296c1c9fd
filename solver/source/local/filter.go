// SPDX-License-Identifier: Apache-2.0

package local

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/tonistiigi/fsutil"

	"github.com/seed-68981b69/slipway/solver"
)

// patterns are what a request leaves of a directory, by the rules of fsutil's filter, which are those of every
// client that sends a context: a path is taken that an include pattern matches, it or a directory above it, and no
// exclude pattern. A directory that is not taken shows all the same when something in it is.
type patterns struct {
	include, exclude []string
}

// patternsOf reads a request. FollowPaths become include patterns: the paths themselves and what symlinks on them
// lead to, as the directory is now.
func patternsOf(dir string, req solver.LocalRequest) (patterns, error) {
	p := patterns{include: slices.Clone(req.IncludePatterns), exclude: req.ExcludePatterns}
	if req.FollowPaths == nil {
		return p, nil
	}
	fs, err := fsutil.NewFS(dir)
	if err != nil {
		return p, err
	}
	targets, err := fsutil.FollowLinks(contextFS{fs}, req.FollowPaths)
	if err != nil {
		return p, err
	}
	if targets != nil {
		p.include = withoutNested(append(p.include, targets...))
	}
	return p, nil
}

// withoutNested leaves out what lies below the path before it, and everything when the root is there.
func withoutNested(paths []string) []string {
	out := make([]string, 0, len(paths))
	last := ""
	for _, p := range paths {
		if p == "." {
			return nil
		}
		if !strings.HasPrefix(p, last+"/") {
			out = append(out, p)
			last = p
		}
	}
	return out
}

// key names what the patterns leave: equal keys leave the same of the same directory.
func (p patterns) key() viewKey {
	h := sha256.New()
	for _, l := range [][]string{p.include, p.exclude} {
		fmt.Fprintf(h, "%d\n", len(l))
		for _, s := range l {
			fmt.Fprintf(h, "%d %s\n", len(s), s)
		}
	}
	return viewKey(h.Sum(nil))
}

// filter answers for patterns. It is used by one goroutine; a verdict may be handed on to another's.
type filter struct {
	include, exclude *patternmatcher.PatternMatcher
	// inside and except are the prefixes below which alone an include pattern or an exception to an exclude pattern
	// can match; nil when a wildcard makes that impossible to say.
	inside, except []string
}

// verdict is what the patterns say about a directory, as far as what is in it needs to know.
type verdict struct {
	include, exclude patternmatcher.MatchInfo
}

func (p patterns) filter() (*filter, error) {
	f := &filter{}
	var err error
	if len(p.include) > 0 {
		if f.include, err = patternmatcher.New(p.include); err != nil {
			return nil, fmt.Errorf("include patterns %q: %w", p.include, err)
		}
		f.inside = prefixes(f.include, false)
	}
	if len(p.exclude) > 0 {
		if f.exclude, err = patternmatcher.New(p.exclude); err != nil {
			return nil, fmt.Errorf("exclude patterns %q: %w", p.exclude, err)
		}
		f.except = prefixes(f.exclude, true)
	}
	return f, nil
}

// prefixes returns the patterns that are (or are not) exceptions, as plain paths that end with a slash; nil when one
// of them is no plain path.
func prefixes(m *patternmatcher.PatternMatcher, exceptions bool) []string {
	out := []string{}
	for _, p := range m.Patterns() {
		if p.Exclusion() != exceptions {
			continue
		}
		s := strings.TrimSuffix(strings.TrimSuffix(p.String(), "/**"), "/*")
		if strings.ContainsAny(s, `*[]?^\`) {
			return nil
		}
		out = append(out, s+"/")
	}
	return out
}

// match says whether the patterns take path, and, of a directory, whether nothing in it can be taken.
func (f *filter) match(path string, isDir bool, above verdict) (taken, pruned bool, v verdict, err error) {
	taken = true
	if f.include != nil {
		var in bool
		if in, v.include, err = f.include.MatchesUsingParentResults(path, above.include); err != nil {
			return false, false, v, fmt.Errorf("match include patterns: %w", err)
		}
		if !in {
			taken = false
			if isDir && f.inside != nil && !leadsTo(path, f.inside) {
				return false, true, v, nil
			}
		}
	}
	if f.exclude != nil {
		var out bool
		if out, v.exclude, err = f.exclude.MatchesUsingParentResults(path, above.exclude); err != nil {
			return false, false, v, fmt.Errorf("match exclude patterns: %w", err)
		}
		if out {
			taken = false
			pruned = isDir && f.except != nil && !leadsTo(path, f.except)
		}
	}
	return taken, pruned, v, nil
}

func leadsTo(dir string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool {
		return len(p) > len(dir) && p[len(dir)] == '/' && p[:len(dir)] == dir
	})
}
