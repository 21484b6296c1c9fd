// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func samples(walls ...time.Duration) *measured {
	m := &measured{}
	for i, w := range walls {
		m.Samples = append(m.Samples, sample{Round: i, Wall: w})
	}
	return m
}

func TestRatios(t *testing.T) {
	ours, theirs := samples(1e9, 3e9, 2e9), samples(4e9, 3e9, 10e9)
	r := ratioOf(theirs, ours)
	if r.medians != 2 || r.least != 1 || r.most != 5 {
		t.Errorf("got %+v, want medians 4/2, least 3/3, most 10/2", r)
	}
	for _, tc := range []struct {
		in   []float64
		want float64
	}{{[]float64{1}, 1}, {[]float64{1, 3}, 2}, {[]float64{1, 2, 9}, 2}, {nil, 0}} {
		if got := median(tc.in); got != tc.want {
			t.Errorf("median(%v) = %v, want %v", tc.in, got, tc.want)
		}
	}
}

// A slowdown that is planted and not seen is an error; the fastest runs count.
func TestPlantedSlowdownMustBeSeen(t *testing.T) {
	s := &scenario{name: "s", steps: 10}
	plant := func(name string, walls ...time.Duration) *measured {
		m := samples(walls...)
		m.Name = name
		return m
	}
	p := &page{bench: &bench{options: options{plant: 10 * time.Millisecond}}}
	for _, tc := range []struct {
		slow time.Duration
		ok   bool
	}{{1100 * time.Millisecond, true}, {1050 * time.Millisecond, false}} {
		p.results = []*result{{scenario: s, planted: "slow", Contestants: []*measured{
			plant("slipway", 5*time.Second, time.Second), plant("slow", tc.slow, time.Second+tc.slow),
		}}}
		if err := p.verdict(); (err == nil) != tc.ok {
			t.Errorf("slow by %s: %v", tc.slow, err)
		}
	}
}

func TestParseStat(t *testing.T) {
	s, ok := parseStat([]byte("12 (a) b) S 7 12 12 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 1 1 1"))
	if !ok || s.parent != 7 || s.cpu != 1270*time.Millisecond {
		t.Errorf("got %+v %v", s, ok)
	}
	if _, ok := parseStat([]byte("12 (a")); ok {
		t.Error("half a line is accepted")
	}
}

// The processor time of a child of a child is counted, after both have ended too.
func TestUsageCountsDescendants(t *testing.T) {
	before := usageOf([]int{os.Getpid()})
	cmd := exec.Command("sh", "-c", "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'; true")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	used := usageOf([]int{os.Getpid()}).cpu - before.cpu
	want := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if d := used - want; math.Abs(float64(d)) > float64(100*time.Millisecond) || want < 20*time.Millisecond {
		t.Errorf("counted %s, the system says %s", used, want)
	}
}

func TestInputIsMadeFromTheSeed(t *testing.T) {
	read := func(seed uint64) string {
		b := &bench{options: options{seed: seed}, work: t.TempDir()}
		buf := make([]byte, 32)
		_, _ = b.random("x").Read(buf)
		return string(buf)
	}
	if one, again := read(1), read(1); one != again || one == read(2) {
		t.Error("a seed does not determine the bytes")
	}
}

// TestBench runs the bench itself, with runc, which starts quickly, and a program in place of slipway.
func TestBench(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("SKIPPED: needs runc (apt-get install runc)")
	}
	if _, err := busybox(); err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	dir := t.TempDir()
	// Slipway itself takes long to build; that it prints its help is enough here.
	bin := filepath.Join(dir, "slipway")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\necho help\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	if err := run(t.Context(), []string{"-slipway", bin, "-scenario", "cli-start", "-peers", "runc", "-runs", "2", "-dir", dir, "-out", out}); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(out, "RESULTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"## cli-start", "| slipway |", "| runc |", "| floor |", "2 runs each"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page has no %q:\n%s", want, page)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "slipway-bench-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := run(t.Context(), []string{"-slipway", bin, "-scenario", "nonsense"}); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("an unknown scenario: %v", err)
	}
	if !slices.Contains(names(), "chain-60") {
		t.Error("no chain-60")
	}
}

// TestWhereTimeGoes: the page says of each scenario where its time goes.
func TestWhereTimeGoes(t *testing.T) {
	for _, name := range names() {
		if whereTimeGoes[name] == "" {
			t.Errorf("scenario %s: nothing says where its time goes", name)
		}
	}
	for name := range whereTimeGoes {
		if !slices.Contains(names(), name) {
			t.Errorf("%s is no scenario", name)
		}
	}
}
