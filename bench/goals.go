// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"
)

// goal is a number that DESIGN.md or an issue wants.
type goal struct {
	// text says what is wanted.
	text string
	// measure says what there is instead, and whether that is enough; "" when it was not measured.
	measure func(all []*result, r *result) (is string, reached bool)
}

// fasterThan wants us to take so many times less than a peer.
func fasterThan(peer string, times float64) goal {
	text := fmt.Sprintf("%g × faster than %s", times, displayName(peer))
	if times == 1 {
		text = "not slower than " + displayName(peer)
	}
	return goal{text, func(_ []*result, r *result) (string, bool) {
		m := r.measured(peer)
		if m == nil {
			return "", false
		}
		ratio := ratioOf(m, r.Contestants[0]).medians
		return fmt.Sprintf("%.2f ×", ratio), ratio >= times
	}}
}

// withinFloor wants us to take at most so many times as long as the floor.
func withinFloor(times float64) goal {
	return goal{fmt.Sprintf("at most %g × the floor", times), func(_ []*result, r *result) (string, bool) {
		floor := r.measured(floorName)
		if floor == nil {
			return "", false
		}
		ratio := ratioOf(r.Contestants[0], floor).medians
		return fmt.Sprintf("%.2f ×", ratio), ratio <= times
	}}
}

// aboveIdeal wants us to take at most so many seconds more than the scenario's ideal.
func aboveIdeal(most float64) goal {
	return goal{fmt.Sprintf("at most %s above the ideal", seconds(most)), func(_ []*result, r *result) (string, bool) {
		over := r.Contestants[0].median() - r.scenario.ideal
		return seconds(over), over <= most
	}}
}

// callWithin wants a call to take at most so long.
func callWithin(most time.Duration) goal {
	return goal{"at most " + seconds(most.Seconds()), func(_ []*result, r *result) (string, bool) {
		is := r.Contestants[0].median()
		return seconds(is), is <= most.Seconds()
	}}
}

// stepWithin wants a step to take at most so long.
func stepWithin(most time.Duration) goal {
	return goal{fmt.Sprintf("a step in %s", seconds(most.Seconds())), func(_ []*result, r *result) (string, bool) {
		step := r.Contestants[0].median() / float64(r.scenario.steps)
		return seconds(step), step <= most.Seconds()
	}}
}

// stepLikeAlone wants a step to use at most so many times the processor time of one of chain-60.
func stepLikeAlone(times float64) goal {
	return goal{fmt.Sprintf("at most %g × the processor time of a step of chain-60", times), func(all []*result, r *result) (string, bool) {
		for _, alone := range all {
			if alone.scenario == chain60 {
				ratio := r.stepCPU() / alone.stepCPU()
				return fmt.Sprintf("%.2f ×", ratio), ratio <= times
			}
		}
		return "", false
	}}
}

func (r *result) stepCPU() float64 {
	return mean(r.Contestants[0].quantities(processorTime)) / float64(r.scenario.steps)
}

// peakMemory wants all processes together to stay below 200 MB.
var peakMemory = goal{"peak memory at most 200 MB", func(_ []*result, r *result) (string, bool) {
	const most = 200e6
	peak := float64(r.Contestants[0].PeakMemory)
	if peak == 0 {
		return "", false
	}
	return fmt.Sprintf("%.0f MB", peak/1e6), peak <= most
}}

// memoryOfBuildkit wants us to have at most such a share of BuildKit's memory.
func memoryOfBuildkit(share float64) goal {
	return goal{fmt.Sprintf("at most %g × BuildKit's memory", share), func(_ []*result, r *result) (string, bool) {
		k := r.measured("buildkit")
		if k == nil || k.PeakMemory == 0 {
			return "", false
		}
		is := float64(r.Contestants[0].PeakMemory) / float64(k.PeakMemory)
		return fmt.Sprintf("%.2f × (%.0f and %.0f MB)", is, float64(r.Contestants[0].PeakMemory)/1e6, float64(k.PeakMemory)/1e6), is <= share
	}}
}

// noLarger wants an archive that is at most 3 % larger than BuildKit's.
var noLarger = goal{"at most 3 % larger than BuildKit's", func(_ []*result, r *result) (string, bool) {
	k := r.measured("buildkit")
	if k == nil || k.Output == 0 {
		return "", false
	}
	more := 100 * (float64(r.Contestants[0].Output)/float64(k.Output) - 1)
	return fmt.Sprintf("%+.1f %%", more), more <= 3
}}

// numberWithin wants one of our other numbers to be at most so much.
func numberWithin(name, unit string, most float64) goal {
	return goal{fmt.Sprintf("%s at most %g %s", name, most, unit), func(_ []*result, r *result) (string, bool) {
		is, ok := r.Contestants[0].Numbers[name]
		if !ok {
			return "", false
		}
		return fmt.Sprintf("%.2f %s", is, unit), is <= most
	}}
}

// allGoals are those of the scenario, the one for BuildKit first.
func (s *scenario) allGoals() []goal {
	if s.goal > 0 {
		return append([]goal{fasterThan("buildkit", s.goal)}, s.goals...)
	}
	return s.goals
}

// summary is the table at the top of the page: a line for each scenario and goal.
func summary(results []*result) string {
	var w strings.Builder
	w.WriteString("\n| scenario | slipway | BuildKit | BuildKit by slipway | slipway by floor | goal | measured | reached |\n|---|---|---|---|---|---|---|---|\n")
	reached, missed := 0, 0
	for _, r := range results {
		ours := r.Contestants[0]
		cells := []string{fmt.Sprintf("[%s](#%s)", r.scenario.name, r.scenario.name), seconds(ours.median()), "", "", ""}
		if k := r.find("buildkit"); k != nil {
			cells[2] = "left out"
			if len(k.Samples) > 0 {
				cells[2], cells[3] = seconds(k.median()), fmt.Sprintf("%.2f ×", ratioOf(k, ours).medians)
			}
		}
		if floor := r.measured(floorName); floor != nil {
			cells[4] = fmt.Sprintf("%.1f ×", ratioOf(ours, floor).medians)
		}
		goals := r.scenario.allGoals()
		if len(goals) == 0 {
			fmt.Fprintf(&w, "| %s | | | |\n", strings.Join(cells, " | "))
		}
		for _, g := range goals {
			is, ok := g.measure(results, r)
			verdict := "**no**"
			switch {
			case is == "":
				is, verdict = "not measured", ""
			case ok:
				verdict = "yes"
				reached++
			default:
				missed++
			}
			fmt.Fprintf(&w, "| %s | %s | %s | %s |\n", strings.Join(cells, " | "), g.text, is, verdict)
			clear(cells)
		}
	}
	fmt.Fprintf(&w, "\n%d goals are reached, %d are not.\n", reached, missed)
	return w.String()
}

// displayName is how a peer writes its name.
func displayName(peer string) string {
	if peer == "buildkit" {
		return "BuildKit"
	}
	return peer
}
