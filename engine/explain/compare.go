// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"slices"
	"strings"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// maxDepth bounds how far a difference is followed down to its origin.
const maxDepth = 64

// Explain fills in the reasons of d's steps that ran. earlier are the documents of earlier builds, newest first; files
// opens what ops saw of their inputs.
func (d *Document) Explain(earlier []*Document, files Opener) {
	for _, s := range d.Misses() {
		s.Reason = d.reason(s, earlier, files)
	}
}

func (d *Document) reason(s *Step, earlier []*Document, files Opener) *Reason {
	if s.Fresh {
		return &Reason{Why: Told}
	}
	before, old := d.nearest(s, earlier)
	if old == nil {
		return &Reason{Why: FirstTime}
	}
	r := &Reason{Build: before.Build, When: &before.Created, Step: old.Name}
	c := &comparison{now: d, before: before, earlier: earlier, files: files}
	r.Differences = c.steps(s, old, 0)
	switch {
	case len(r.Differences) > 0:
		r.Why = Changed
	case old.Outcome == solver.Failed || old.Outcome == solver.Canceled:
		r.Why = FailedBefore
	default:
		r.Why = Gone
	}
	return r
}

// nearest returns the newest earlier step that s is compared with: at the same place doing something alike. Builds of the
// same project come first.
func (d *Document) nearest(s *Step, earlier []*Document) (*Document, *Step) {
	for _, same := range []bool{true, false} {
		var best *Step
		var in *Document
		bestScore := 0
		for _, e := range earlier {
			if (e.Project == d.Project) != same {
				continue
			}
			if old, score := e.like(s); score > bestScore {
				best, in, bestScore = old, e, score
			}
			if bestScore >= 2 {
				break
			}
		}
		if best != nil {
			return in, best
		}
	}
	return nil, nil
}

// like finds the step of d that is most like s, which is one of another build. The score is 0 when there is none.
func (d *Document) like(s *Step) (*Step, int) {
	var best *Step
	bestScore, bestDistance := 0, 0
	for _, o := range d.Steps {
		score, distance := likeness(s, o)
		if score > bestScore || score == bestScore && score > 0 && distance < bestDistance {
			best, bestScore, bestDistance = o, score, distance
		}
	}
	return best, bestScore
}

// likeness is 0 for steps that have nothing to do with each other.
func likeness(s, o *Step) (score, distance int) {
	if s.Kind != o.Kind || s.Stage != o.Stage || s.File != o.File || (s.Number == 0) != (o.Number == 0) {
		return 0, 0
	}
	name, oldName := instruction(s.Name), instruction(o.Name)
	sameLine := s.Line == o.Line
	distance = max(s.Line-o.Line, o.Line-s.Line)
	switch {
	case s.Number == 0 && name != oldName:
		return 0, 0
	case name == oldName && sameLine:
		return 4, 0
	case name == oldName:
		return 3, distance
	case word(name) != word(oldName):
		return 0, 0
	case sameLine:
		return 2, 0
	}
	return 1, distance
}

// instruction is a step's name without "[stage 2/5] ".
func instruction(name string) string {
	if strings.HasPrefix(name, "[") {
		if _, rest, ok := strings.Cut(name, "] "); ok && !strings.HasPrefix(name, "[internal]") {
			return rest
		}
	}
	return name
}

func word(s string) string {
	w, _, _ := strings.Cut(s, " ")
	return w
}

// comparison compares steps of two builds.
type comparison struct {
	now, before *Document
	earlier     []*Document
	files       Opener
	origins     map[[2]*Step]bool // have been told
}

// origin says why the results of two steps differ, once for each pair of steps: a graph has more paths than steps.
func (c *comparison) origin(s, old *Step, depth int) []Difference {
	pair := [2]*Step{s, old}
	if c.origins[pair] {
		return nil
	}
	if c.origins == nil {
		c.origins = map[[2]*Step]bool{}
	}
	c.origins[pair] = true
	return c.steps(s, old, depth)
}

// steps returns the parts in which the keys of two steps differ, in their order.
func (c *comparison) steps(s, old *Step, depth int) []Difference {
	out := c.parts(s, old)
	for i := range max(len(s.Inputs), len(old.Inputs)) {
		part := fmt.Sprintf("input %d", i)
		switch {
		case i >= len(old.Inputs):
			out = append(out, Difference{Part: part, What: "input", After: c.name(c.now, s.Inputs[i])})
		case i >= len(s.Inputs):
			out = append(out, Difference{Part: part, What: "input", Before: c.name(c.before, old.Inputs[i])})
		default:
			if diff, differs := c.input(s, old, i, depth); differs {
				diff.Part = part
				out = append(out, diff)
			}
		}
	}
	return out
}

func (c *comparison) name(d *Document, in Input) string {
	if s := d.step(in.Vertex); s != nil {
		return s.Name
	}
	return in.Vertex
}

// input compares what two steps read as their i-th input, by content where that is known of both.
func (c *comparison) input(s, old *Step, i, depth int) (Difference, bool) {
	now, was := s.Inputs[i], old.Inputs[i]
	if was.Content == "" && was.Recipe != "" {
		was.Content = c.contentOf(old, i)
	}
	switch {
	case now.Content != "" && was.Content != "":
		if now.Content == was.Content {
			return Difference{}, false
		}
	case now.Recipe == was.Recipe:
		return Difference{}, false
	}
	diff := Difference{What: "result of a step"}
	if now.Content != "" && was.Content != "" {
		diff.Files = compareFiles(c.files, was.Content, now.Content)
	}
	from, before := c.now.step(now.Vertex), c.before.step(was.Vertex)
	if from == nil || before == nil {
		return diff, true
	}
	diff.Step, diff.Name = from.Number, from.Name
	// A step that ran has a reason of its own.
	if !from.missed() && depth < maxDepth && from.Kind == before.Kind {
		diff.Because = c.origin(from, before, depth+1)
	}
	switch from.Kind {
	case "docker-image":
		diff.What, diff.Name = "base image", instruction(from.Name)
		diff.Name = strings.TrimPrefix(diff.Name, "FROM ")
		diff.Before, diff.After = partValue(before.Parts, "manifest"), partValue(from.Parts, "manifest")
		diff.Because = nil
	case "local":
		diff.What = "files"
		diff.Because = slices.DeleteFunc(diff.Because, func(b Difference) bool { return b.What != ".dockerignore" })
	}
	return diff, true
}

// contentOf returns what the step saw of its i-th input when it last ran: a step that was found by its recipe did not
// look.
func (c *comparison) contentOf(old *Step, i int) string {
	for _, d := range c.earlier {
		for _, s := range d.Steps {
			if s.RecipeKey == old.RecipeKey && s.RecipeKey != "" && i < len(s.Inputs) && s.Inputs[i].Content != "" {
				return s.Inputs[i].Content
			}
		}
	}
	return ""
}

func partValue(parts []record.Part, name string) string {
	for _, p := range parts {
		if p.Name == name {
			return p.Value
		}
	}
	return ""
}

// parts compares what steps do themselves. Parts that form a list ("exclude[3]") are one.
func (c *comparison) parts(s, old *Step) []Difference {
	var out []Difference
	now, was := grouped(s.Parts), grouped(old.Parts)
	for _, g := range now {
		o := find(was, g.name)
		if o != nil && slices.Equal(o.values, g.values) {
			continue
		}
		var before []string
		if o != nil {
			before = o.values
		}
		out = append(out, c.difference(s, g.name, before, g.values))
	}
	for _, g := range was {
		if find(now, g.name) == nil {
			out = append(out, c.difference(s, g.name, g.values, nil))
		}
	}
	return out
}

type group struct {
	name   string
	values []string
}

func find(groups []group, name string) *group {
	if i := slices.IndexFunc(groups, func(g group) bool { return g.name == name }); i >= 0 {
		return &groups[i]
	}
	return nil
}

// grouped puts "arg[0]", "arg[1]" together as "arg".
func grouped(parts []record.Part) []group {
	var out []group
	for _, p := range parts {
		name := p.Name
		if i := strings.LastIndexByte(name, '['); i > 0 && strings.HasSuffix(name, "]") {
			name = name[:i]
		}
		if g := find(out, name); g != nil {
			g.values = append(g.values, p.Value)
			continue
		}
		out = append(out, group{name, []string{p.Value}})
	}
	return out
}

// difference puts a part into the words of a Dockerfile.
func (c *comparison) difference(s *Step, part string, before, after []string) Difference {
	d := Difference{Part: part, What: part, Before: strings.Join(before, " "), After: strings.Join(after, " ")}
	kind, name, _ := strings.Cut(part, " ")
	_, action, inAction := strings.Cut(part, "].")
	switch {
	case part == "arg":
		d.What = "command"
		d.Before, d.After = command(before), command(after)
	case kind == "env":
		d.What, d.Name = "variable", name
		if slices.Contains(c.now.Arguments, name) || !slices.Contains(c.now.Arguments, name) && after == nil && slices.Contains(c.before.Arguments, name) {
			d.What = "argument"
		}
	case part == "manifest":
		d.What = "base image"
		d.Name = strings.TrimPrefix(instruction(s.Name), "FROM ")
	case s.Kind == "local" && part == "exclude":
		d.What = ".dockerignore"
		d.Before, d.After = strings.Join(without(before, after), ", "), strings.Join(without(after, before), ", ")
		if d.Before == "" && d.After == "" {
			d.Before, d.After = strings.Join(before, ", "), strings.Join(after, ", ") // another order
		}
	case kind == "mount", kind == "secret", kind == "header":
		d.What, d.Name = kind, strings.TrimPrefix(name, "env ")
	case s.Kind == "file" && inAction:
		d.What = action
		switch action {
		case "src":
			d.What = "source path"
		case "dest", "path":
			d.What = "destination path"
		}
	}
	return d
}

// command is a command line without the shell around it.
func command(args []string) string {
	if len(args) == 3 && args[1] == "-c" {
		return args[2]
	}
	return strings.Join(args, " ")
}

func without(list, other []string) []string {
	var out []string
	for _, v := range list {
		if !slices.Contains(other, v) && !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out
}
