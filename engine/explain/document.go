// SPDX-License-Identifier: Apache-2.0

// Package explain says why the steps of a build ran or did not. A Document is made from what the solver reports at the
// end of a build, with the parts that its keys were hashed from, and compared with documents of earlier builds: the first
// part that differs is the answer, so it cannot disagree with the keys. No secret is in a document.
package explain

import (
	"context"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// MediaType is that of a Document as JSON, which is attached to the build's record.
const MediaType = "application/vnd.slipway.explain.v1+json"

// Document says what has become of each step of a build.
type Document struct {
	Build string `json:"build"`
	// Project tells apart what is built from different places.
	Project string    `json:"project,omitempty"`
	Created time.Time `json:"created"`
	// Duration is in nanoseconds, like all durations here.
	Duration time.Duration `json:"duration"`
	Error    string        `json:"error,omitempty"`
	// Arguments are the names that the Dockerfile declares with ARG and not with ENV.
	Arguments []string `json:"arguments,omitempty"`
	Steps     []*Step  `json:"steps"`
}

// Step is one vertex of a build.
type Step struct {
	// Number counts the steps that people know of, from 1; 0 for those that a Dockerfile does not have.
	Number int    `json:"number,omitempty"`
	Vertex string `json:"vertex"`
	Name   string `json:"name"`
	Stage  string `json:"stage,omitempty"`
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	// Kind is the kind of LLB op: exec, file, merge, diff; for a source its scheme.
	Kind    string         `json:"kind"`
	Outcome solver.Outcome `json:"outcome"`
	// FoundBy is the kind of key that found an earlier result: recipe or content.
	FoundBy string `json:"foundBy,omitempty"`
	// By is the build that did the work, at the time Made, and Took is how long that took; for a step that was found this is
	// the time saved.
	By string `json:"by,omitempty"`
	// From is the imported cache that the result was found in first; "" for work of this machine.
	From string        `json:"from,omitempty"`
	Made *time.Time    `json:"made,omitempty"`
	Took time.Duration `json:"took,omitempty"`
	// Fresh says that the step had to run whatever the cache had.
	Fresh      bool          `json:"fresh,omitempty"`
	RecipeKey  string        `json:"recipeKey,omitempty"`
	ContentKey string        `json:"contentKey,omitempty"`
	Parts      []record.Part `json:"parts,omitempty"`
	Inputs     []Input       `json:"inputs,omitempty"`
	// Log is the blob with all output, "" when there was none.
	Log   digest.Digest `json:"log,omitempty"`
	Error string        `json:"error,omitempty"`
	// Reason says why the step ran.
	Reason *Reason `json:"reason,omitempty"`
	// Verification says whether what was found is what the step makes now; nil when nobody asked.
	Verification *Verification `json:"verification,omitempty"`
}

// Input is what identifies an input of a step in its keys.
type Input struct {
	Vertex string `json:"vertex"`
	Output int    `json:"output,omitempty"`
	// Recipe is in the recipe key unless the input enters by content only; Content is in the content key.
	Recipe  string `json:"recipe,omitempty"`
	Content string `json:"content,omitempty"`
}

// The values of Reason.Why.
const (
	// FirstTime: no earlier build that is known had such a step.
	FirstTime = "first time"
	// Told: it was told to run without the cache.
	Told = "told"
	// Changed: Differences say what.
	Changed = "changed"
	// FailedBefore: nothing has changed, but it had no result.
	FailedBefore = "failed before"
	// Gone: nothing has changed, but the result is not kept any more.
	Gone = "gone"
)

// Reason is why a step ran.
type Reason struct {
	Why string `json:"why"`
	// Build is the earlier build that had the step, at the time When, under the name Step.
	Build string     `json:"build,omitempty"`
	When  *time.Time `json:"when,omitempty"`
	Step  string     `json:"step,omitempty"`
	// Differences are in the order of the key's parts: the first one is why the key is another.
	Differences []Difference `json:"differences,omitempty"`
}

// Difference is one part of a key that differs.
type Difference struct {
	// Part is the part's name in the key.
	Part string `json:"part"`
	// What says what it is in the words of a Dockerfile: command, argument, variable, base image, files, result of a step.
	What string `json:"what"`
	Name string `json:"name,omitempty"`
	// Before and After are "" when there was or is none.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	// Files are the files that differ, when it is known what was there before.
	Files *Files `json:"files,omitempty"`
	// Step is the number of the step whose result differs, and Because why.
	Step    int          `json:"step,omitempty"`
	Because []Difference `json:"because,omitempty"`
}

// Files are the files that differ in what a step sees.
type Files struct {
	Added   int `json:"added"`
	Removed int `json:"removed"`
	Changed int `json:"changed"`
	// List has the first ones by path.
	List []FileChange `json:"list"`
}

// FileChange is one file.
type FileChange struct {
	Path string `json:"path"`
	// Change is added, removed or changed.
	Change string `json:"change"`
	// Fields are what has changed: type, mode, owner, size and so on, with values where they are short.
	Fields []Field `json:"fields,omitempty"`
}

// Field is one property of a file that has changed.
type Field struct {
	Name   string `json:"name"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// Info is what a document says of the build as a whole.
type Info struct {
	Build, Project string
	Created        time.Time
	Duration       time.Duration
	Err            error
	// Salt makes the values that are not shown comparable without being guessable.
	Salt string
	// Attrs are the frontend's, for values that are not to be shown.
	Attrs map[string]string
}

// Lookup returns the record under a key.
type Lookup func(ctx context.Context, key string) (*record.Record, bool, error)

// New makes the document of a build. lookup is asked for what was not needed: how long its work took.
func New(ctx context.Context, info Info, reports []solver.Report, lookup Lookup) *Document {
	d := &Document{Build: info.Build, Created: info.Created, Duration: info.Duration}
	r := NewRedactor(info.Salt, info.Attrs, reports)
	d.Project = r.text(info.Project) // which may be the address of a repository, with its token
	if info.Err != nil {
		d.Error = r.text(info.Err.Error())
	}
	d.Arguments = arguments(reports)
	number := 0
	for i := range reports {
		s := newStep(&reports[i], r)
		if s.File != "" && !strings.HasPrefix(s.Name, "[internal]") {
			number++
			s.Number = number
		}
		if s.Outcome == solver.Skipped && s.RecipeKey != "" {
			if rec, ok, err := lookup(ctx, s.RecipeKey); ok && err == nil {
				s.made(rec)
			}
		}
		d.Steps = append(d.Steps, s)
	}
	return d
}

func newStep(rep *solver.Report, r *Redactor) *Step {
	s := &Step{
		Vertex: rep.Vertex.Digest.String(), Name: r.text(rep.Vertex.Name), Kind: kind(rep.Vertex.Op),
		Outcome: rep.Outcome, FoundBy: rep.FoundBy, Fresh: rep.Fresh, Log: rep.Log,
		RecipeKey: string(rep.Recipe), ContentKey: string(rep.Content),
	}
	step := rep.Step()
	s.Stage, s.File, s.Line = step.Stage, step.File, step.Line
	if rep.Err != nil {
		s.Error = r.text(rep.Err.Error())
	}
	if rep.Record != nil {
		s.made(rep.Record)
	}
	if s.Verification = NewVerification(rep.Verification); s.Verification != nil {
		s.Verification.Error = r.text(s.Verification.Error)
	}
	for _, in := range rep.Vertex.Inputs {
		s.Inputs = append(s.Inputs, Input{Vertex: in.Vertex.Digest.String(), Output: in.Index})
	}
	own := rep.RecipeParts
	if len(own) == 0 {
		own = rep.ContentParts
	}
	for _, p := range own {
		if i, ok := inputNumber(p.Name); !ok {
			s.Parts = append(s.Parts, r.part(p))
		} else if i < len(s.Inputs) {
			s.Inputs[i].set(p.Value)
		}
	}
	for _, p := range rep.ContentParts {
		if i, ok := inputNumber(p.Name); ok && i < len(s.Inputs) {
			s.Inputs[i].set(p.Value)
		}
	}
	return s
}

func (s *Step) made(rec *record.Record) {
	s.By, s.From, s.Took, s.Made = rec.Build, rec.From, rec.Duration, &rec.Created
	if s.Log == "" {
		s.Log = rec.Log
	}
}

// set takes the value of an input's part of a key.
func (in *Input) set(value string) {
	if d, ok := strings.CutPrefix(value, "content "); ok {
		in.Content = d
	} else if d, ok := strings.CutPrefix(value, "recipe "); ok {
		in.Recipe = d
	}
}

func inputNumber(part string) (int, bool) {
	n, ok := strings.CutPrefix(part, "input ")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(n)
	return i, err == nil && i >= 0
}

func kind(op *pb.Op) string {
	switch o := op.GetOp().(type) {
	case *pb.Op_Source:
		scheme, _, _ := strings.Cut(o.Source.GetIdentifier(), "://")
		return scheme
	case *pb.Op_Exec:
		return "exec"
	case *pb.Op_File:
		return "file"
	case *pb.Op_Merge:
		return "merge"
	case *pb.Op_Diff:
		return "diff"
	}
	return "other"
}

var declaration = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?im)^\s*(ARG|ENV)\s+(.*)$`)
})

// arguments returns the names that the build's Dockerfiles declare with ARG only.
func arguments(reports []solver.Report) []string {
	args, envs := map[string]bool{}, map[string]bool{}
	seen := map[*pb.SourceInfo]bool{}
	for _, rep := range reports {
		for _, src := range rep.Vertex.Sources {
			if seen[src] {
				continue
			}
			seen[src] = true
			for _, m := range declaration().FindAllStringSubmatch(string(src.GetData()), -1) {
				for i, word := range strings.Fields(m[2]) {
					name, _, assigned := strings.Cut(word, "=")
					switch {
					case strings.EqualFold(m[1], "ARG"):
						args[name] = true
					case assigned || i == 0: // ENV NAME=VALUE…, or ENV NAME VALUE
						envs[name] = true
					}
				}
			}
		}
	}
	var out []string
	for name := range args {
		if !envs[name] {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// step returns the step of a vertex, nil when there is none.
func (d *Document) step(vertex string) *Step {
	for _, s := range d.Steps {
		if s.Vertex == vertex {
			return s
		}
	}
	return nil
}

// Misses returns the steps that ran or failed and that people know of.
func (d *Document) Misses() []*Step {
	var out []*Step
	for _, s := range d.Steps {
		if s.missed() {
			out = append(out, s)
		}
	}
	return out
}

func (s *Step) missed() bool {
	return s.Number > 0 && (s.Outcome == solver.Ran || s.Outcome == solver.Failed)
}
