// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// play lets a contestant take the turns that it wants, each of the same length, and says in which rounds those were.
func play(m *measured, wall time.Duration, runs int) (rounds []int) {
	for n := warmUpRound; n <= runs; n++ {
		if m.wants(n, runs) {
			rounds = append(rounds, n)
			peak := int64(0)
			if m.watches(n, runs) > 0 {
				peak = 7
			}
			m.add(sample{Round: n, Wall: wall}, peak, n, runs)
		}
	}
	return rounds
}

// TestWhoIsMeasuredHowOften: the rules of README.md.
func TestWhoIsMeasuredHowOften(t *testing.T) {
	const runs = 5
	for _, tc := range []struct {
		what    string
		who     measured
		wall    time.Duration
		rounds  []int
		samples int
		slow    bool
	}{
		{"quick, and once more for the memory", measured{slow: 20 * time.Second}, 100 * time.Millisecond, []int{-1, 0, 1, 2, 3, 4, 5}, 5, false},
		{"no memory of the floor", measured{Name: floorName, ours: true}, 100 * time.Millisecond, []int{-1, 0, 1, 2, 3, 4}, 5, false},
		{"long enough to look at the memory in the runs", measured{ours: true}, 3 * time.Second, []int{-1, 0, 1, 2, 3}, 5, false},
		{"a long floor", measured{Name: floorName, ours: true}, 3 * time.Second, []int{-1, 0, 1}, 3, false},
		{"a long warm-up counts", measured{ours: true}, 6 * time.Second, []int{-1, 0, 1, 2, 3}, 5, false},
		{"a peer that is slow has fewer", measured{slow: 20 * time.Second}, 11 * time.Second, []int{-1, 0}, 2, true},
		{"and if it is very slow only its warm-up", measured{slow: 20 * time.Second}, time.Minute, []int{-1}, 1, true},
		{"slipway and the floor always have all", measured{ours: true, slow: 20 * time.Second}, time.Minute, []int{-1, 0, 1, 2, 3}, 5, false},
		{"who is left out has none", measured{LeftOut: "broken"}, time.Second, nil, 0, false},
	} {
		m := tc.who
		got := play(&m, tc.wall, runs)
		if !slices.Equal(got, tc.rounds) || len(m.Samples) != tc.samples || m.Slow != tc.slow {
			t.Errorf("%s: turns in rounds %v with %d samples, slow %v; want %v, %d, %v", tc.what, got, len(m.Samples), m.Slow, tc.rounds, tc.samples, tc.slow)
		}
		if measuredIt := m.LeftOut == "" && m.Name != floorName; (m.PeakMemory > 0) != measuredIt {
			t.Errorf("%s: peak memory %d", tc.what, m.PeakMemory)
		}
	}
}

func TestReasonIsTheLastLine(t *testing.T) {
	if got := reason(errors.New("buildah bud: exit status 125\nSTEP 1\nError: chdir merged: no such file\n")); got != "Error: chdir merged: no such file" {
		t.Errorf("got %q", got)
	}
	if got := reason(fmt.Errorf("buildah, round -1: %w", fmt.Errorf("%w 8s", errImpatient))); got != errImpatient.Error()+" 8s" {
		t.Errorf("got %q", got)
	}
	if got := reason(errors.New(strings.Repeat("é", 1000))); len([]rune(got)) != 201 {
		t.Errorf("%d letters", len([]rune(got)))
	}
}

// fakePeer is a peer whose runs do what a test wants.
type fakePeer struct{ label string }

func (f *fakePeer) name() string              { return f.label }
func (f *fakePeer) find(context.Context) bool { return true }
func (f *fakePeer) version() string           { return "1" }
func (f *fakePeer) help() *exec.Cmd           { return exec.Command("true") }

// fakeBench has slipway and two peers, in a directory.
func fakeBench(t *testing.T) *bench {
	top := t.TempDir()
	return &bench{
		options: options{runs: 2, slow: time.Minute}, top: top, work: top,
		peers: []peer{&slipway{label: "slipway"}, &fakePeer{"good"}, &fakePeer{"bad"}},
	}
}

// TestAPeerThatFailsIsLeftOut, of the rest of its group as well; the others are measured.
func TestAPeerThatFailsIsLeftOut(t *testing.T) {
	for _, when := range []string{"ready", "run", "late"} {
		t.Run(when, func(t *testing.T) {
			b := fakeBench(t)
			turns, ended := map[string]int{}, 0
			s := &scenario{name: "one", group: "g", contestant: func(_ context.Context, _ *bench, p peer) (*contestant, error) {
				bad := p.name() == "bad"
				if bad && when == "ready" {
					return nil, errors.New("no such thing")
				}
				return &contestant{
					name: p.name(), daemons: func() []int { return nil },
					run: func(context.Context, *calls) error {
						turns[p.name()]++
						if bad && (when == "run" || turns["bad"] == 3) {
							return errors.New("output\nno such thing")
						}
						return nil
					},
					close: func() error { ended++; return nil },
				}, nil
			}}
			r, err := b.measure(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if bad := r.find("bad"); !strings.Contains(bad.LeftOut, "no such thing") || len(bad.Samples) > 0 || r.measured("bad") != nil {
				t.Errorf("the bad one: %+v", bad)
			}
			if len(r.find("good").Samples) != 2 || len(r.find("slipway").Samples) != 2 {
				t.Error("the others were not measured")
			}
			if table := r.table(); !strings.Contains(table, "bad is left out: ") || !strings.Contains(table, "no such thing.") || strings.Contains(table, "| bad |") {
				t.Errorf("the page:\n%s", table)
			}
			if want := 3; when != "ready" && ended != want {
				t.Errorf("%d contestants were closed, want %d", ended, want)
			}
			before := turns["bad"]
			second := *s
			second.name = "two"
			if r, err = b.measure(t.Context(), &second); err != nil {
				t.Fatal(err)
			}
			if r.find("bad").LeftOut == "" || turns["bad"] != before || len(r.find("good").Samples) != 2 {
				t.Error("the bad one had a turn in the second scenario of the group")
			}
			if err := b.leave(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAPeerIsNotWaitedForLong: its program and what that has started are ended.
func TestAPeerIsNotWaitedForLong(t *testing.T) {
	b := fakeBench(t)
	m := &measured{Name: "bad", patience: 50 * time.Millisecond}
	turns := &turns{bench: b, result: &result{scenario: &scenario{}}}
	turns.enter(&contestant{name: "bad", daemons: func() []int { return nil }, run: func(_ context.Context, c *calls) error {
		return c.do(exec.Command("sh", "-c", "sleep 1000 & sleep 1000"))
	}}, m)
	if err := turns.turn(t.Context(), 0, warmUpRound, 1); err != nil {
		t.Fatal(err)
	}
	if m.LeftOut != errImpatient.Error()+" 50ms" {
		t.Errorf("left out: %q", m.LeftOut)
	}
}

// TestSlipwaysFailureIsTold, and the floor's.
func TestSlipwaysFailureIsTold(t *testing.T) {
	broken := errors.New("broken")
	run := func(err error) func(context.Context, *bench, peer) (*contestant, error) {
		return func(_ context.Context, _ *bench, p peer) (*contestant, error) {
			if p.name() != "slipway" {
				return nil, nil
			}
			return &contestant{name: p.name(), daemons: func() []int { return nil }, run: func(context.Context, *calls) error { return err }}, nil
		}
	}
	b := fakeBench(t)
	if _, err := b.measure(t.Context(), &scenario{name: "ours", contestant: run(broken)}); !errors.Is(err, broken) {
		t.Errorf("slipway fails: %v", err)
	}
	floor := func(context.Context, *bench) error { return broken }
	if _, err := b.measure(t.Context(), &scenario{name: "floor", floor: floor, contestant: run(nil)}); !errors.Is(err, broken) {
		t.Errorf("the floor fails: %v", err)
	}
	if _, err := b.measure(t.Context(), &scenario{name: "good", contestant: run(nil)}); err != nil {
		t.Errorf("the next scenario: %v", err)
	}
	p := &page{bench: b, failed: []string{"x: broken"}}
	if err := p.verdict(); err == nil || !strings.Contains(err.Error(), "x: broken") {
		t.Errorf("the verdict: %v", err)
	}
}

// TestGroupsFollowEachOther: what a group shares is there for all of it.
func TestGroupsFollowEachOther(t *testing.T) {
	var seen []string
	for i, s := range scenarios {
		if s.group == "" || i > 0 && scenarios[i-1].group == s.group {
			continue
		}
		if slices.Contains(seen, s.group) {
			t.Errorf("group %s is interrupted before %s", s.group, s.name)
		}
		seen = append(seen, s.group)
	}
}

// TestGoals: what is measured stands beside what is wanted.
func TestGoals(t *testing.T) {
	of := func(name string, wall time.Duration, peak, output int64) *measured {
		m := samples(wall)
		m.Name, m.PeakMemory, m.Output = name, peak, output
		m.Samples[0].CPU = wall
		return m
	}
	alone := &result{scenario: chain60, Contestants: []*measured{of("slipway", 6*time.Second, 0, 0)}}
	r := &result{scenario: &scenario{name: "x", steps: 10, ideal: 1.5, goal: 4}, Contestants: []*measured{
		of("slipway", 2*time.Second, 150e6, 102), of("buildkit", 8*time.Second, 400e6, 100), of(floorName, time.Second, 0, 0),
	}}
	r.Contestants[0].Numbers = map[string]float64{"bytes": 3}
	all := []*result{alone, r}
	for _, tc := range []struct {
		goal goal
		is   string
		ok   bool
	}{
		{fasterThan("buildkit", 4), "4.00 ×", true},
		{fasterThan("buildkit", 4.1), "4.00 ×", false},
		{fasterThan("podman", 4), "", false},
		{withinFloor(2), "2.00 ×", true},
		{withinFloor(1.9), "2.00 ×", false},
		{aboveIdeal(0.5), "500 ms", true},
		{aboveIdeal(0.4), "500 ms", false},
		{stepWithin(200 * time.Millisecond), "200 ms", true},
		{stepWithin(199 * time.Millisecond), "200 ms", false},
		{stepLikeAlone(2), "2.00 ×", true},
		{stepLikeAlone(1.9), "2.00 ×", false},
		{peakMemory, "150 MB", true},
		{memoryOfBuildkit(0.5), "0.38 × (150 and 400 MB)", true},
		{memoryOfBuildkit(0.3), "0.38 × (150 and 400 MB)", false},
		{noLarger, "+2.0 %", true},
		{numberWithin("bytes", "MB", 3), "3.00 MB", true},
		{numberWithin("bytes", "MB", 2), "3.00 MB", false},
		{numberWithin("others", "MB", 2), "", false},
	} {
		if is, ok := tc.goal.measure(all, r); is != tc.is || ok != tc.ok {
			t.Errorf("%s: %q, %v; want %q, %v", tc.goal.text, is, ok, tc.is, tc.ok)
		}
	}
	if text := summary(all); !strings.Contains(text, "| 2.00 s | 8.00 s | 4.00 × | 2.0 × | 4 × faster than BuildKit | 4.00 × | yes |") || !strings.Contains(text, "1 goals are reached, 1 are not") {
		t.Errorf("the summary:\n%s", text)
	}
}

// TestDisk: a fresh file system comes and goes, also with something mounted in it.
func TestDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	b := &bench{options: options{ownDisk: true}, top: t.TempDir()}
	inputs, err := b.firstPlace(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := inputs.close(); err != nil {
			t.Error(err)
		}
	})
	if !b.ownDisk {
		t.Skip("SKIPPED: no file systems in files can be had here")
	}
	if err := b.enter(t.Context(), "one", ""); err != nil {
		t.Fatal(err)
	}
	thing := filepath.Join(b.dir, "thing")
	if err := os.WriteFile(thing, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.moveAway(thing); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(b.dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "none", sub).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := b.enter(t.Context(), "two", ""); err != nil { // the first one goes
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(b.dir); len(left) != 1 || left[0].Name() != "lost+found" {
		t.Errorf("the second place is not empty: %v", left)
	}
	if err := b.leave(); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(b.top, "*")); len(left) != 2 { // the inputs and their file
		t.Errorf("left behind: %v", left)
	}
}

// TestOrphansAreEnded: what a program that was ended has left in a session of its own.
func TestOrphansAreEnded(t *testing.T) {
	if err := adopt(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(out), &pid); err != nil {
		t.Fatal(err)
	}
	if _, ok := processes()[pid]; !ok {
		t.Fatal("there is no orphan")
	}
	endOrphans()
	if _, ok := processes()[pid]; ok {
		t.Error("the orphan lives")
	}
}
