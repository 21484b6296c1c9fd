// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/layer"
)

// now is the time of all plans; ago counts days.
var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func ago(days int) time.Time { return now.AddDate(0, 0, -days) }

// world makes inventories by name.
type world struct {
	inventory
	byName map[string]int
}

func newWorld() *world { return &world{byName: map[string]int{}} }

// piece is a layer or, if its name begins with "blob", a blob. Marks: "image", "used".
func (w *world) piece(name string, bytes int64, marks ...string) *world {
	p := piece{bytes: bytes, image: slices.Contains(marks, "image"), used: slices.Contains(marks, "used")}
	if strings.HasPrefix(name, "blob") {
		p.blob = digest.Digest(name)
	} else {
		p.layer = layer.ID(name)
	}
	w.byName[name] = len(w.pieces)
	w.pieces = append(w.pieces, p)
	return w
}

func (w *world) pack(layer, blob string) *world {
	p := &w.pieces[w.byName[layer]]
	p.packed = append(p.packed, w.byName[blob])
	return w
}

// result is a thing of that name over a stack ("a b c"), last used so many days ago.
func (w *world) result(name, stack string, days int, change ...func(*unit)) *world {
	u := unit{Usage: Usage{ID: name, Type: TypeRegular, LastUsed: ago(days)}, keys: []string{name}, stacks: [][]int{nil}}
	for _, p := range strings.Fields(stack) {
		if strings.HasPrefix(p, "blob") {
			u.blobs = append(u.blobs, w.byName[p])
		} else {
			u.stacks[0] = append(u.stacks[0], w.byName[p])
		}
	}
	for _, f := range change {
		f(&u)
	}
	w.units = append(w.units, u)
	return w
}

// mount is a cache mount.
func (w *world) mount(name string, bytes int64, days int, change ...func(*unit)) *world {
	u := unit{Usage: Usage{ID: name, Type: TypeCacheMount, Mutable: true, LastUsed: ago(days)}, bytes: bytes}
	for _, f := range change {
		f(&u)
	}
	w.units = append(w.units, u)
	return w
}

func inUse(u *unit)    { u.InUse = true }
func shared(u *unit)   { u.Shared = true }
func internal(u *unit) { u.Type = TypeInternal }
func broken(u *unit)   { u.broken = true }

// outcome is what a plan does, by name.
func outcome(p plan) string {
	var b strings.Builder
	for _, d := range p.deletions {
		fmt.Fprintf(&b, "%s(%d) ", d.ID, d.Freed)
	}
	b.WriteString("|")
	for _, id := range p.layers {
		b.WriteString(" " + string(id))
	}
	for _, d := range p.blobs {
		b.WriteString(" " + string(d))
	}
	fmt.Fprintf(&b, " | %d, left %d", p.bytes, p.left)
	return b.String()
}

func TestPlan(t *testing.T) {
	all := Policy{All: true}
	day := 24 * time.Hour
	// Three steps over a base that an image has too, and an unrelated step.
	chain := func() *world {
		return newWorld().piece("base", 100, "image").piece("a", 10).piece("b", 20).piece("c", 40).
			result("from", "base", 1, shared).result("ra", "base a", 1).result("rb", "base a b", 1).result("rc", "c", 5)
	}
	for _, c := range []struct {
		name     string
		w        *world
		policies []Policy
		free     int64
		want     string
	}{
		{"empty store", newWorld(), []Policy{all}, 0, "| | 0, left 0"},
		{
			"no policy: what nothing names",
			newWorld().piece("b", 10).piece("a", 10).piece("blob", 1).piece("kept", 5).piece("blob kept", 6).result("r", "kept blob", 1).result("s", "", 1),
			nil, 0, "| a b blob kept | 26, left 6",
		},
		{"no policy: in use and images' stay", newWorld().piece("a", 10, "used").piece("b", 10, "image").piece("blob", 1, "used"), nil, 0, "| | 0, left 0"},
		{
			"a packed form goes with the last layer that it is of",
			newWorld().piece("a", 10).piece("b", 10).piece("c", 10).piece("blob ab", 3).piece("blob c", 4).
				pack("a", "blob ab").pack("b", "blob ab").pack("c", "blob c").result("r", "b", 1),
			nil, 0, "| a c blob c | 24, left 13",
		},
		{
			"a packed form of a layer in use stays",
			newWorld().piece("a", 10, "used").piece("blob", 3).pack("a", "blob"), nil, 0, "| | 0, left 3",
		},
		{
			"what names a layer that is gone goes",
			newWorld().piece("a", 10).result("r", "a", 1, broken).result("s", "a", 1, broken, inUse), nil, 0, "r(0) | | 0, left 10",
		},
		{"all", chain(), []Policy{all}, 0, "rc(40) rb(20) ra(10) from(0) | a b c | 70, left 0"},
		{"without all, what images share stays", chain(), []Policy{{}}, 0, "rc(40) rb(20) ra(10) | a b c | 70, left 0"},
		{
			"without all, internal things stay",
			newWorld().piece("a", 10).piece("b", 10).result("r", "a", 1, internal).result("s", "b", 1),
			[]Policy{{}},
			0, "s(10) | b | 10, left 10",
		},
		{"a layer stays as long as one result has it", chain(), []Policy{{Filters: []string{"id==ra"}}}, 0, "ra(0) | | 0, left 70"},
		{"filters are alternatives", chain(), []Policy{{Filters: []string{"id==rb", "id==rc"}}}, 0, "rc(40) rb(20) | b c | 60, left 10"},
		{"keep what was used lately", chain(), []Policy{{KeepDuration: 2 * day}}, 0, "rc(40) | c | 40, left 30"},
		{"in use", newWorld().piece("a", 1).result("r", "a", 100, inUse), []Policy{all}, 0, "| | 0, left 1"},
		{"a layer in use outlives its result", newWorld().piece("a", 1, "used").result("r", "a", 1), []Policy{all}, 0, "r(0) | | 0, left 0"},
		{"below the cap", chain(), []Policy{{MaxUsedSpace: 70}}, 0, "| | 0, left 70"},
		{"above the cap: oldest first, and no more than needed", chain(), []Policy{{MaxUsedSpace: 69}}, 0, "rc(40) | c | 40, left 30"},
		{"then what lies on top", chain(), []Policy{{MaxUsedSpace: 15}}, 0, "rc(40) rb(20) | b c | 60, left 10"},
		{"never below the reserve", chain(), []Policy{{MaxUsedSpace: 5, ReservedSpace: 30}}, 0, "rc(40) | c | 40, left 30"},
		{"a reserve alone", chain(), []Policy{{ReservedSpace: 30}}, 0, "rc(40) | c | 40, left 30"},
		{"enough is free", chain(), []Policy{{MinFreeSpace: 50}}, 50, "| | 0, left 70"},
		{"too little is free", chain(), []Policy{{MinFreeSpace: 50}}, 30, "rc(40) | c | 40, left 30"},
		{"what nothing names counts as free already", chain().piece("z", 20), []Policy{{MinFreeSpace: 50}}, 30, "| z | 20, left 70"},
		{"the reserve is before what is free", chain(), []Policy{{MinFreeSpace: 1000, ReservedSpace: 69}}, 0, "rc(40) | c | 40, left 30"},
		{
			"cache mounts by type and age",
			newWorld().mount("old", 600, 3).mount("new", 600, 1).mount("busy", 600, 9, inUse).piece("a", 600).result("r", "a", 9),
			[]Policy{{Filters: []string{"type==exec.cachemount"}, KeepDuration: 2 * day, MaxUsedSpace: 512}},
			0, "old(600) | | 600, left 1800",
		},
		{
			"rules in order",
			chain().mount("m", 30, 9),
			[]Policy{{Filters: []string{"type==exec.cachemount"}, MaxUsedSpace: 50}, {MaxUsedSpace: 65, KeepDuration: 60 * day}, {MaxUsedSpace: 65}},
			0,
			"m(30) rc(40) | c | 70, left 30",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := makePlan(&c.w.inventory, c.policies, now, c.free)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, outcome(p)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			for _, d := range p.deletions {
				if d.Reason == "" {
					t.Errorf("%s goes without a reason", d.ID)
				}
			}
		})
	}
	if _, err := makePlan(&inventory{}, []Policy{{Filters: []string{"type=="}}}, now, 0); err == nil {
		t.Error("a filter that makes no sense is taken")
	}
}

// TestPlanProperties compares plans for random stores with what they may never do.
func TestPlanProperties(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		w := randomWorld(r)
		policy := randomPolicy(r)
		free := r.Int64N(200)
		p, err := makePlan(&w.inventory, []Policy{policy}, now, free)
		if err != nil {
			t.Fatal(err)
		}
		if problem := checkPlan(w, policy, free, p); problem != "" {
			t.Fatalf("seed %d: %s\npolicy %+v, %d free\n%s", seed, problem, policy, free, outcome(p))
		}
		// The order in which things were found says nothing.
		perm := r.Perm(len(w.units))
		other := &inventory{pieces: w.pieces}
		for _, i := range perm {
			other.units = append(other.units, w.units[i])
		}
		if q, _ := makePlan(other, []Policy{policy}, now, free); outcome(q) != outcome(p) {
			t.Fatalf("seed %d: another order, another plan:\n%s\n%s", seed, outcome(p), outcome(q))
		}
	}
}

func randomWorld(r *rand.Rand) *world {
	w := newWorld()
	for i := range r.IntN(12) {
		var marks []string
		for _, m := range []string{"image", "used"} {
			if r.IntN(6) == 0 {
				marks = append(marks, m)
			}
		}
		w.piece(fmt.Sprint("l", i), r.Int64N(50), marks...)
	}
	layers := len(w.pieces)
	for i := range r.IntN(5) {
		w.piece(fmt.Sprint("blob", i), r.Int64N(50))
		for l := range layers {
			if r.IntN(6) == 0 {
				w.pack(fmt.Sprint("l", l), fmt.Sprint("blob", i))
				w.pieces[layers+i].image = w.pieces[layers+i].image || w.pieces[l].image
			}
		}
	}
	for i := range r.IntN(15) {
		var stack []string
		for range r.IntN(4) {
			if len(w.pieces) > 0 {
				p := w.pieces[r.IntN(len(w.pieces))]
				stack = append(stack, string(p.layer)+string(p.blob))
			}
		}
		w.result(fmt.Sprintf("r%02d", i), strings.Join(stack, " "), r.IntN(100), func(u *unit) {
			u.InUse, u.Shared, u.broken = r.IntN(8) == 0, r.IntN(8) == 0, r.IntN(20) == 0
			u.UsageCount = r.IntN(3)
		})
	}
	for i := range r.IntN(4) {
		w.mount(fmt.Sprint("m", i), r.Int64N(100), r.IntN(100), func(u *unit) { u.InUse = r.IntN(5) == 0 })
	}
	return w
}

func randomPolicy(r *rand.Rand) Policy {
	some := func(n int64) int64 {
		if r.IntN(2) == 0 {
			return 0
		}
		return r.Int64N(n)
	}
	p := Policy{
		All: r.IntN(2) == 0, KeepDuration: time.Duration(some(100)) * 24 * time.Hour,
		ReservedSpace: some(200), MaxUsedSpace: some(400), MinFreeSpace: some(400),
	}
	if r.IntN(4) == 0 {
		p.Filters = []string{"type==exec.cachemount"}
	}
	return p
}

// checkPlan says what is wrong with p, "" if nothing is.
func checkPlan(w *world, policy Policy, free int64, p plan) string {
	deleted := map[int]bool{}
	for _, i := range p.units {
		if w.units[i].InUse {
			return w.units[i].ID + " is in use and deleted"
		}
		deleted[i] = true
	}
	needed := make([]bool, len(w.pieces))
	for i := range w.units {
		for _, j := range w.units[i].pieces() {
			needed[j] = needed[j] || !deleted[i]
		}
	}
	for i, piece := range w.pieces {
		needed[i] = needed[i] || piece.image || piece.used
	}
	for i, piece := range w.pieces {
		if piece.layer != "" && needed[i] {
			for _, j := range piece.packed {
				needed[j] = true
			}
		}
	}
	var bytes, left int64
	names := map[int]bool{}
	for i := range w.units {
		if !deleted[i] {
			left += w.units[i].bytes
			for _, j := range w.units[i].pieces() {
				names[j] = true
			}
		} else {
			bytes += w.units[i].bytes
		}
	}
	for i, piece := range w.pieces {
		gone := slices.Contains(p.layers, piece.layer) && piece.layer != "" || slices.Contains(p.blobs, piece.blob) && piece.blob != ""
		switch {
		case gone && needed[i]:
			return fmt.Sprintf("%s%s is needed and deleted", piece.layer, piece.blob)
		case !gone && !needed[i]:
			return fmt.Sprintf("%s%s is not needed and stays", piece.layer, piece.blob)
		case gone:
			bytes += piece.bytes
		case names[i] && !piece.image:
			left += piece.bytes
		}
	}
	if bytes != p.bytes {
		return fmt.Sprintf("%d bytes are said to go, %d do", p.bytes, bytes)
	}
	if p.left < left { // packed forms of what stays count as well
		return fmt.Sprintf("%d bytes are said to stay, at least %d do", p.left, left)
	}
	var freed int64
	for i, d := range p.deletions {
		if i > 0 && p.deletions[i-1].Reason != "its layers are gone" && d.LastUsed.Before(p.deletions[i-1].LastUsed) {
			return "the older one goes later"
		}
		freed += d.Freed
	}
	if freed > bytes {
		return fmt.Sprintf("things free %d of %d bytes", freed, bytes)
	}
	// The cap holds, unless nothing is left that might go.
	if !policy.limited() || p.left <= policy.keepBytes(p.left, free+bytes) {
		return ""
	}
	match, _ := parseFilters(policy.Filters)
	for i, u := range w.units {
		may := !u.InUse && (policy.All || !u.Shared) && match(u.Usage) &&
			(policy.KeepDuration == 0 || !u.LastUsed.After(now.Add(-policy.KeepDuration)))
		if may && !deleted[i] {
			return fmt.Sprintf("the cap does not hold (%d left) and %s stays", p.left, u.ID)
		}
	}
	return ""
}

// TestDefaultPolicies has BuildKit's numbers for two disks.
func TestDefaultPolicies(t *testing.T) {
	small, large := DefaultPolicies(Disk{Total: 50 << 30}), DefaultPolicies(Disk{Total: 2000 << 30})
	if got, want := small[3], (Policy{All: true, ReservedSpace: 6e9, MaxUsedSpace: 41e9, MinFreeSpace: 11e9}); !cmp.Equal(got, want) {
		t.Errorf("50 GiB: %+v", got)
	}
	if got, want := large[2], (Policy{ReservedSpace: 10e9, MaxUsedSpace: 100e9, MinFreeSpace: 401e9}); !cmp.Equal(got, want) {
		t.Errorf("2000 GiB: %+v", got)
	}
	if p := large[0]; p.MaxUsedSpace != 512e6 || p.KeepDuration != 48*time.Hour || len(p.Filters) != 3 {
		t.Errorf("first rule: %+v", p)
	}
}
