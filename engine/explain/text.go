// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/seed-68981b69/slipway/solver"
)

// Text writes d for people: every step that a Dockerfile has, or those that choose picks. now is the time to which others are
// relative.
func (d *Document) Text(w io.Writer, now time.Time, choose func(*Step) bool) error {
	t := &text{w: w, now: now, d: d}
	t.head()
	for _, s := range d.Steps {
		if s.Number > 0 && choose(s) {
			t.step(s)
		}
	}
	return t.err
}

type text struct {
	w   io.Writer
	now time.Time
	d   *Document
	err error
}

func (t *text) line(indent int, format string, args ...any) {
	if t.err == nil {
		_, t.err = fmt.Fprintf(t.w, "%s%s\n", strings.Repeat("  ", indent), oneLine(fmt.Sprintf(format, args...)))
	}
}

// oneLine keeps a heredoc from breaking the layout.
func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "\\n") }

func (t *text) head() {
	n := map[solver.Outcome]int{}
	var saved time.Duration
	for _, s := range t.d.Steps {
		if s.Number == 0 {
			continue
		}
		n[s.Outcome]++
		if (s.Outcome == solver.Found || s.Outcome == solver.Skipped) && s.Verification == nil {
			saved += s.Took
		}
	}
	var counts []string
	add := func(n int, what string) {
		if n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, what))
		}
	}
	add(n[solver.Ran], "ran")
	add(n[solver.Failed], "failed")
	add(n[solver.Canceled], "canceled")
	add(n[solver.Found]+n[solver.Skipped], "found in the cache")
	t.line(0, "build %s, %s ago, took %s: %s", t.d.Build, ago(t.now, t.d.Created), took(t.d.Duration), strings.Join(counts, ", "))
	if saved >= time.Millisecond {
		t.line(0, "the cache saved %s of work", took(saved))
	}
	if t.d.Error != "" {
		t.line(0, "error: %s", t.d.Error)
	}
}

func (t *text) step(s *Step) {
	t.line(0, "")
	place := fmt.Sprintf("%s:%d", s.File, s.Line)
	t.line(0, "#%d %s  (%s)", s.Number, s.Name, place)
	switch s.Outcome {
	case solver.Found:
		what := "found by its " + s.FoundBy + " key"
		if s.FoundBy == "content" {
			what += ": what it reads is the same as before"
		}
		t.line(1, "%s%s", what, t.origin(s))
		t.verification(s.Verification)
	case solver.Skipped:
		t.line(1, "not needed: what reads it was found%s", t.origin(s))
	case solver.Canceled:
		t.line(1, "canceled")
	case solver.Failed:
		t.line(1, "failed: %s", s.Error)
		t.reason(s)
	case solver.Ran:
		if s.By != "" && s.By != t.d.Build {
			t.line(1, "ran, %s, in build %s, which wanted it at the same time", took(s.Took), s.By)
		} else {
			t.line(1, "ran, %s", took(s.Took))
		}
		t.reason(s)
	}
}

func (t *text) verification(v *Verification) {
	switch {
	case v == nil:
	case v.Same:
		t.line(1, "made again to verify: the same")
	case v.Error != "":
		t.line(1, "made again to verify: cannot be made any more: %s", v.Error)
	default:
		t.line(1, "made again to verify: it differs")
		t.files(2, Difference{Files: v.Files})
	}
}

// origin says where a result comes from.
func (t *text) origin(s *Step) string {
	if s.Made == nil {
		return ""
	}
	from := "an earlier build"
	if s.By != "" {
		from = "build " + s.By
	}
	if s.From != "" {
		from += " of another machine, in cache " + s.From
	}
	what := "saved"
	if s.Verification != nil {
		what = "took"
	}
	return fmt.Sprintf(" (made by %s, %s ago; %s %s)", from, ago(t.now, *s.Made), what, took(s.Took))
}

func (t *text) reason(s *Step) {
	r := s.Reason
	if r == nil {
		return
	}
	since := "since build " + r.Build
	if r.When != nil {
		since += ", " + ago(t.now, *r.When) + " ago"
	}
	switch r.Why {
	case FirstTime:
		t.line(1, "because no earlier build had such a step")
	case Told:
		t.line(1, "because it was told to run without the cache")
	case FailedBefore:
		t.line(1, "because it had no result: nothing has changed %s, but it did not get to its end there", since)
	case Gone:
		t.line(1, "because its result is not kept any more: nothing has changed %s", since)
	case Changed:
		t.line(1, "because of what has changed %s:", since)
		for _, d := range r.Differences {
			t.difference(2, d)
		}
	}
}

// maxShown is how many files of a difference are shown.
const maxShown = 20

func (t *text) difference(indent int, d Difference) {
	switch {
	case d.What == "files" || d.Files != nil && d.Files.Added+d.Files.Removed+d.Files.Changed > 0:
		t.files(indent, d)
	case d.What == "result of a step":
		t.line(indent, "another result of %s", stepName(d))
	case d.What == ".dockerignore":
		if d.After != "" {
			t.line(indent, ".dockerignore has gained: %s", d.After)
		}
		if d.Before != "" {
			t.line(indent, ".dockerignore has lost: %s", d.Before)
		}
		return
	default:
		what := d.What
		if d.Name != "" {
			what += " " + d.Name
		}
		switch {
		case d.Before == "":
			t.line(indent, "%s is new: %s", what, d.After)
		case d.After == "":
			t.line(indent, "%s is gone; it was %s", what, d.Before)
		default:
			t.line(indent, "%s: %s -> %s", what, d.Before, d.After)
		}
	}
	for _, b := range d.Because {
		t.difference(indent+1, b)
	}
}

func stepName(d Difference) string {
	if d.Step > 0 {
		return fmt.Sprintf("#%d %s", d.Step, d.Name)
	}
	return d.Name
}

func (t *text) files(indent int, d Difference) {
	from := ""
	if d.What == "result of a step" {
		from = " from " + stepName(d)
	}
	if d.Files == nil {
		t.line(indent, "files%s (which ones is not known any more)", from)
		return
	}
	if d.Files.Added+d.Files.Removed+d.Files.Changed == 0 {
		t.line(indent, "files%s: the same ones, in another order of actions", from)
		return
	}
	if from != "" {
		t.line(indent, "files%s:", from)
		indent++
	}
	for _, line := range d.Files.Lines() {
		t.line(indent, "%s", line)
	}
}

// Lines says of each file what has changed, and how many there are beside those that are named.
func (f *Files) Lines() []string {
	var out []string
	for _, file := range f.List[:min(len(f.List), maxShown)] {
		out = append(out, fmt.Sprintf("file %s: %s", file.Path, describe(file)))
	}
	if rest := f.Added + f.Removed + f.Changed - len(out); rest > 0 {
		out = append(out, fmt.Sprintf("and %d more: %d added, %d removed, %d changed in all", rest, f.Added, f.Removed, f.Changed))
	}
	return out
}

func describe(f FileChange) string {
	if f.Change != "changed" {
		return f.Change
	}
	fields := make([]string, len(f.Fields))
	for i, field := range f.Fields {
		fields[i] = field.Name
		if field.Before != "" || field.After != "" {
			fields[i] += " " + field.Before + " -> " + field.After
		}
	}
	return strings.Join(fields, ", ")
}

func ago(now, then time.Time) string { return strings.ToLower(units.HumanDuration(now.Sub(then))) }

func took(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}
