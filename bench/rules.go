// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"time"
)

// The rules that keep the bench short. README.md states them.
const (
	// warmUpRound is the number of the round that comes before those that are counted, which begin with 0.
	warmUpRound = -1
	// longWarmUp is how long a run of the warm-up takes that is counted, as the first one: what it warms up is little beside that.
	longWarmUp = 2 * time.Second
	// longRun is how long a run takes in which memory can be looked at now and then without doing harm. Who is faster has one more
	// run for that.
	longRun = 2 * time.Second

	// longFloorRuns is how often a floor is measured that takes longer than longRun: it is work without anybody's cleverness, which varies little.
	longFloorRuns = 3

	watchRarely, watchOften = 200 * time.Millisecond, 3 * time.Millisecond

	// peerPatience is how long a peer may take to get ready, warm-up included, and for each run after that.
	peerPatience     = 6 * time.Second
	buildkitPatience = 100 * time.Second
)

// errImpatient is why a peer is left out that takes too long.
var errImpatient = errors.New("it takes longer to get ready, or for one run, than")

// patienceOf is how long a peer may take; nothing limits us.
func patienceOf(name string, ours bool, ofScenario time.Duration) time.Duration {
	switch {
	case ours:
		return 0
	case name == "buildkit" && ofScenario > 0:
		return ofScenario
	case name == "buildkit":
		return buildkitPatience
	}
	return peerPatience
}

// sample is one measured run.
type sample struct {
	// Round is the number of the round; it is less than 0 for a warm-up that counts.
	Round int           `json:"round"`
	Wall  time.Duration `json:"wall_ns"`
	// CPU is the processor time of all processes: those that the run started, and what daemons used until they settled.
	CPU time.Duration `json:"cpu_ns"`
	// Written is what they sent to disks, in bytes.
	Written int64 `json:"written_bytes"`
	// Wire is what went to and from the registries of the bench, in bytes.
	Wire int64 `json:"wire_bytes,omitempty"`
}

// measured is what is known of a contestant in the end.
type measured struct {
	Name    string   `json:"name"`
	Version string   `json:"version"`
	Samples []sample `json:"samples"`
	// Slow says that the runs took longer than -slow together, so that there are fewer samples.
	Slow bool `json:"slow,omitempty"`
	// LeftOut is why there are no samples of a peer; "" when there are.
	LeftOut string `json:"left_out,omitempty"`
	// PeakMemory is the largest sum of the memory of all processes (PSS: shared pages count once), in bytes. Who takes longer than longRun is
	// looked at now and then in every run that counts, others in one more run that is not timed.
	PeakMemory int64 `json:"peak_memory_bytes"`
	// Output is the size of the file that was made, in bytes; 0 when there is none.
	Output int64 `json:"output_bytes,omitempty"`
	// Note is what else was counted, a sentence.
	Note string `json:"note,omitempty"`
	// Numbers are what else was counted, for goals.
	Numbers map[string]float64 `json:"numbers,omitempty"`

	ours           bool // slipway or the floor: however slow
	slow, patience time.Duration
	readying       time.Duration // how long getting ready has taken so far
	spent, last    time.Duration // the runs that count together, and the last run
}

// wants says whether somebody has a turn in a round, of so many. The one after the last is for the memory.
func (m *measured) wants(round, runs int) bool {
	switch {
	case m.LeftOut != "":
		return false
	case round == warmUpRound:
		return true
	case round < runs:
		if m.Name == floorName && m.last > longRun {
			runs = min(runs, longFloorRuns)
		}
		return !m.Slow && len(m.Samples) < runs
	}
	return m.PeakMemory == 0 && m.Name != floorName
}

// watches is how often memory is looked at in a turn; 0 is not at all.
func (m *measured) watches(round, runs int) time.Duration {
	switch {
	case m.Name == floorName: // it works in the bench's own process
		return 0
	case round == runs:
		return watchOften
	case round == warmUpRound || m.last > longRun:
		return watchRarely
	}
	return 0
}

// add notes a run.
func (m *measured) add(s sample, peak int64, round, runs int) {
	m.last = s.Wall
	counts := round >= 0 && round < runs || round == warmUpRound && s.Wall > longWarmUp
	if counts {
		m.Samples = append(m.Samples, s)
		m.spent += s.Wall
		m.Slow = !m.ours && m.spent > m.slow
	}
	if round == runs || counts && s.Wall > longRun {
		m.PeakMemory = max(m.PeakMemory, peak)
	}
}

// reason is the last line of an error with a program's output, shortened.
func reason(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	const most = 200
	last := strings.TrimSpace(lines[len(lines)-1])
	if errors.Is(err, errImpatient) {
		_, after, _ := strings.Cut(err.Error(), errImpatient.Error())
		last = errImpatient.Error() + after
	}
	if r := []rune(last); len(r) > most {
		last = string(r[:most]) + "…"
	}
	return last
}
