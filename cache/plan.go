// SPDX-License-Identifier: Apache-2.0

package cache

// What garbage collection decides, as pure functions from an inventory.
//
// A thing (of type unit) is what can be deleted: the result of a step, with all records that name it, or what a Source
// has. A piece is what takes room and may belong to several things: a layer or a blob. It goes with the last thing that
// names it (the packed form of a layer with the last such layer), unless an image needs it or somebody uses it; what
// nothing names at all goes in any case. So a policy deletes things, and what that frees is found by counting.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// piece is something on disk that things consist of: a layer or a blob.
type piece struct {
	layer layer.ID // "" for a blob
	blob  digest.Digest
	bytes int64
	// packed are the pieces that stay as long as this one does: the packed forms of a layer, and what a remote layer lies on,
	// without which it could not be brought here.
	packed []int
	// image says that an image needs it, used that a lease or a mount does.
	image, used bool
}

// unit is a thing: something that is deleted as a whole.
type unit struct {
	Usage
	keys   []string // of its records; none for what a Source has
	source int      // index of the Source, when it has no keys
	stacks [][]int  // pieces of each output, lowest layer first
	blobs  []int    // other pieces: its log, a download
	bytes  int64    // of what a Source has
	broken bool     // some of its layers are gone: it can never be used again
	// failed says that it is a failed step, which has no keys; expired that nobody wants to look at that any more.
	failed, expired bool
}

// pieces returns all that u names, each once.
func (u *unit) pieces() []int {
	all := slices.Clone(u.blobs)
	for _, stack := range u.stacks {
		all = append(all, stack...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// inventory is everything in a store that plans look at.
type inventory struct {
	pieces []piece
	units  []unit
	images []unit // which no plan deletes: what only they have is counted for them
	// rest is what no thing and no image has.
	rest Usage
}

// Deletion is one thing that a plan deletes.
type Deletion struct {
	Usage
	// Reason says why: which rule was not kept.
	Reason string
	// Freed is what goes with it, in bytes: what nothing else names.
	Freed int64
}

// plan is what a collection deletes: things in the order of the rules, then all pieces that nothing names any more.
type plan struct {
	deletions []Deletion
	units     []int // the things of deletions, in inventory.units
	layers    []layer.ID
	blobs     []digest.Digest
	// bytes is the size of layers, blobs and what Sources give back.
	bytes int64
	// left is what counts against limits and stays.
	left int64
	// kept says that a piece which nothing names stays because it is in use.
	kept bool
}

// collector is the state while a plan is made.
type collector struct {
	inv   *inventory
	names []int // for each piece, how many things that stay name it
	gone  []bool
	total int64 // of what counts against limits: all things that stay, without what images share
	freed int64
	plan  plan
}

// makePlan says what policies make of inv at the time now, on a disk with free bytes left. Without policies it is what
// nothing names.
func makePlan(inv *inventory, policies []Policy, now time.Time, free int64) (plan, error) {
	c := &collector{inv: inv, names: make([]int, len(inv.pieces)), gone: make([]bool, len(inv.units))}
	for i := range inv.units {
		for _, p := range inv.units[i].pieces() {
			c.names[p]++
		}
		c.total += inv.units[i].bytes
	}
	for _, p := range inv.pieces {
		for _, i := range p.packed {
			c.names[i]++
		}
	}
	var orphans []int
	for i, p := range inv.pieces {
		if c.names[i] == 0 {
			orphans = append(orphans, i)
		} else if !p.image {
			c.total += p.bytes
		}
	}
	for _, i := range orphans {
		c.freed += c.let(i)
	}
	var broken []int
	for i := range inv.units {
		if inv.units[i].broken && !inv.units[i].InUse {
			broken = append(broken, i)
		}
	}
	for _, i := range c.ordered(broken) {
		c.delete(i, "its layers are gone")
	}
	for i := range inv.units {
		if u := &inv.units[i]; u.expired && !u.InUse && !c.gone[i] {
			c.delete(i, "the files of a failed step are kept for "+FailedStepsFor.String())
		}
	}
	for i, policy := range policies {
		if err := c.apply(policy, now, free, fmt.Sprintf("rule %d", i+1)); err != nil {
			return plan{}, err
		}
	}
	return c.finish(), nil
}

// apply carries out one policy.
func (c *collector) apply(p Policy, now time.Time, free int64, rule string) error {
	match, err := parseFilters(p.Filters)
	if err != nil {
		return err
	}
	enough := func() bool { return p.limited() && c.total <= p.keepBytes(c.total, free+c.freed) }
	if enough() {
		return nil
	}
	cutOff := now.Add(-p.KeepDuration)
	var candidates []int
	for i := range c.inv.units {
		u := &c.inv.units[i]
		switch {
		case c.gone[i], u.InUse:
		case !p.All && (u.Type == TypeInternal || u.Type == TypeFrontend || u.Shared):
		case p.KeepDuration != 0 && u.LastUsed.After(cutOff):
		case !match(u.Usage):
		default:
			candidates = append(candidates, i)
		}
	}
	for _, i := range c.ordered(candidates) {
		if enough() {
			return nil
		}
		c.delete(i, rule+": "+p.reason(c.total, free+c.freed))
	}
	return nil
}

// ordered sorts things in the order in which they go.
func (c *collector) ordered(things []int) []int {
	slices.SortFunc(things, func(a, b int) int { return before(&c.inv.units[a], &c.inv.units[b]) })
	return things
}

// before is that order: least recently used first, of equal ones first what lies on the other.
func before(a, b *unit) int {
	return cmp.Or(
		a.LastUsed.Compare(b.LastUsed),
		cmp.Compare(a.UsageCount, b.UsageCount),
		-cmp.Compare(a.depth(), b.depth()),
		strings.Compare(a.ID, b.ID),
	)
}

// depth is the length of the longest stack of layers.
func (u *unit) depth() int {
	depth := 0
	for _, stack := range u.stacks {
		depth = max(depth, len(stack))
	}
	return depth
}

// reason says in words why p deletes something.
func (p Policy) reason(total, free int64) string {
	size := func(n int64) string { return units.HumanSize(float64(n)) }
	var why string
	switch {
	case p.MaxUsedSpace != 0 && total > p.MaxUsedSpace:
		why = fmt.Sprintf("the cache takes %s of at most %s", size(total), size(p.MaxUsedSpace))
	case p.MinFreeSpace != 0 && free < p.MinFreeSpace:
		why = fmt.Sprintf("%s of the disk are free, not %s", size(free), size(p.MinFreeSpace))
	case p.ReservedSpace != 0:
		why = fmt.Sprintf("the cache takes %s, of which %s are reserved", size(total), size(p.ReservedSpace))
	default:
		why = "asked for"
	}
	if p.KeepDuration != 0 {
		why += fmt.Sprintf(", not used for %v", p.KeepDuration)
	}
	return why
}

// delete takes a thing out.
func (c *collector) delete(i int, reason string) {
	u := &c.inv.units[i]
	c.gone[i] = true
	d := Deletion{Usage: u.Usage, Reason: reason, Freed: u.bytes}
	for _, p := range u.pieces() {
		d.Freed += c.unname(p)
	}
	c.total -= u.bytes
	c.freed += d.Freed
	c.plan.bytes += u.bytes
	c.plan.deletions = append(c.plan.deletions, d)
	c.plan.units = append(c.plan.units, i)
}

// unname takes one name away from a piece and returns what that frees.
func (c *collector) unname(i int) int64 {
	c.names[i]--
	p := &c.inv.pieces[i]
	if c.names[i] > 0 || p.image {
		return 0
	}
	c.total -= p.bytes
	return c.let(i)
}

// let returns what is freed by a piece that nothing names, and takes its name from its packed forms if it goes.
func (c *collector) let(i int) int64 {
	if !c.goes(i) {
		return 0
	}
	p := &c.inv.pieces[i]
	freed := p.bytes
	for _, j := range p.packed {
		freed += c.unname(j)
	}
	return freed
}

// goes says whether a piece is deleted.
func (c *collector) goes(i int) bool {
	p := &c.inv.pieces[i]
	return c.names[i] == 0 && !p.image && !p.used
}

// finish adds the pieces that nothing names.
func (c *collector) finish() plan {
	for i := range c.inv.pieces {
		p := &c.inv.pieces[i]
		switch {
		case !c.goes(i):
			c.plan.kept = c.plan.kept || c.names[i] == 0 && !p.image
		case p.layer != "":
			c.plan.layers = append(c.plan.layers, p.layer)
			c.plan.bytes += p.bytes
		default:
			c.plan.blobs = append(c.plan.blobs, p.blob)
			c.plan.bytes += p.bytes
		}
	}
	slices.Sort(c.plan.layers)
	slices.Sort(c.plan.blobs)
	c.plan.left = c.total
	return c.plan
}
