// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// result is one scenario, measured.
type result struct {
	scenario        *scenario
	load, loadAfter string
	planted         string        // name of the contestant with the planted slowdown; "" when there is none
	Took            time.Duration `json:"took_ns"` // all of the scenario, with its preparations
	Contestants     []*measured   `json:"contestants"`
}

func (r *result) find(name string) *measured {
	for _, m := range r.Contestants {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// measured is one that was, nil when it is not there or left out.
func (r *result) measured(name string) *measured {
	if m := r.find(name); m != nil && len(m.Samples) > 0 {
		return m
	}
	return nil
}

// median is that of the times, in seconds.
func (m *measured) median() float64 { return median(m.quantities(wall)) }

// quantities sorts what f says of the samples.
func (m *measured) quantities(f func(sample) float64) []float64 {
	var out []float64
	for _, s := range m.Samples {
		out = append(out, f(s))
	}
	slices.Sort(out)
	return out
}

func wall(s sample) float64          { return s.Wall.Seconds() }
func processorTime(s sample) float64 { return s.CPU.Seconds() }

// median of sorted numbers.
func median(sorted []float64) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func mean(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum / float64(max(len(values), 1))
}

// ratio says how many times longer m takes than base: the ratio of the medians, and the least and the largest ratio of a round, in
// which both saw the same machine. Without a common round least and most are 0.
type ratio struct{ medians, least, most float64 }

func ratioOf(m, base *measured) ratio {
	r := ratio{medians: median(m.quantities(wall)) / median(base.quantities(wall))}
	for _, s := range m.Samples {
		for _, t := range base.Samples {
			if s.Round != t.Round {
				continue
			}
			one := s.Wall.Seconds() / t.Wall.Seconds()
			if r.least == 0 || one < r.least {
				r.least = one
			}
			r.most = max(r.most, one)
		}
	}
	return r
}

func (r ratio) String() string {
	if r.most == 0 {
		return fmt.Sprintf("%.2f", r.medians)
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", r.medians, r.least, r.most)
}

// table is the scenario's part of the page, in Markdown.
func (r *result) table() string {
	var w strings.Builder
	s := r.scenario
	fmt.Fprintf(&w, "\n## %s\n\n%s\n", s.name, s.about)
	ours, floor := r.Contestants[0], r.find(floorName)
	if floor != nil {
		fmt.Fprintf(&w, "Floor: %s.\n", s.floorAbout)
	}
	w.WriteString("\n| | min | median | max |")
	if s.steps > 0 {
		w.WriteString(" median a step |")
	}
	w.WriteString(" × floor | × slipway (rounds) | CPU s | peak MB | written MB | wire MB |\n|---|---|---|---|")
	if s.steps > 0 {
		w.WriteString("---|")
	}
	w.WriteString("---|---|---|---|---|---|\n")
	for _, m := range r.Contestants {
		if m.LeftOut != "" {
			continue
		}
		times := m.quantities(wall)
		fmt.Fprintf(&w, "| %s | %s | %s | %s |", m.Name, seconds(times[0]), seconds(median(times)), seconds(times[len(times)-1]))
		if s.steps > 0 {
			fmt.Fprintf(&w, " %s |", seconds(median(times)/float64(s.steps)))
		}
		over := ""
		if floor != nil {
			over = fmt.Sprintf("%.1f", median(times)/median(floor.quantities(wall)))
		}
		peak := "" // the floor works in the bench's own process
		if m.PeakMemory > 0 {
			peak = fmt.Sprintf("%.0f", float64(m.PeakMemory)/1e6)
		}
		wire := "" // most scenarios need no network
		if n := mean(m.quantities(func(s sample) float64 { return float64(s.Wire) / 1e6 })); n > 0 {
			wire = fmt.Sprintf("%.2f", n)
		}
		fmt.Fprintf(&w, " %s | %s | %.3f | %s | %.1f | %s |\n", over, ratioOf(m, ours),
			mean(m.quantities(processorTime)), peak,
			mean(m.quantities(func(s sample) float64 { return float64(s.Written) / 1e6 })), wire)
	}
	fmt.Fprintf(&w, "\n%d runs each, in turn; load average %s before, %s after. All of it took %s.", len(ours.Samples), r.load, r.loadAfter, r.Took.Round(time.Second))
	for _, m := range r.Contestants {
		switch {
		case m.LeftOut != "":
			fmt.Fprintf(&w, " %s is left out: %s.", m.Name, strings.TrimSuffix(m.LeftOut, "."))
		case m.ours: // always as often as was asked for
		case len(m.Samples) == 1 && m.Samples[0].Round < 0:
			fmt.Fprintf(&w, " %s has one run, its warm-up: it is slow here.", m.Name)
		case len(m.Samples) < len(ours.Samples):
			fmt.Fprintf(&w, " %s: %d, it is slow here.", m.Name, len(m.Samples))
		}
	}
	for _, m := range r.Contestants {
		if m.Note != "" {
			fmt.Fprintf(&w, " %s: %s", m.Name, m.Note)
		}
	}
	if s.ideal > 0 {
		fmt.Fprintf(&w, " Ideal: %s; slipway is %.0f %% above it.", seconds(s.ideal), (ours.median()/s.ideal-1)*100)
	}
	sizes := " Sizes:"
	for _, m := range r.Contestants {
		if m.Output > 0 {
			fmt.Fprintf(&w, "%s %s %.1f MB", sizes, m.Name, float64(m.Output)/1e6)
			sizes = ","
		}
	}
	if sizes == "," {
		w.WriteString(".")
	}
	if p := r.find(r.planted); p != nil {
		fmt.Fprintf(&w, " The planted slowdown shows as %s a step (fastest runs).", seconds(r.seenPlant(p)))
	}
	fmt.Fprintf(&w, "\n\nWhere the time goes: %s", whereTimeGoes[s.name])
	w.WriteString("\n")
	return w.String()
}

// seenPlant is how much longer a step took with the planted slowdown, in seconds, by the fastest runs: whatever else runs on the machine
// only ever adds.
func (r *result) seenPlant(p *measured) float64 {
	return (p.quantities(wall)[0] - r.Contestants[0].quantities(wall)[0]) / float64(r.scenario.steps)
}

// seconds prints a time with three digits that count.
func seconds(s float64) string {
	switch {
	case s < 0.1:
		return fmt.Sprintf("%.1f ms", s*1e3)
	case s < 1:
		return fmt.Sprintf("%.0f ms", s*1e3)
	}
	return fmt.Sprintf("%.2f s", s)
}

// page is all that was measured.
type page struct {
	bench   *bench
	began   time.Time
	results []*result
	curves  []*drawn
	skipped []string // scenarios that cannot be measured on this machine, and why
	failed  []string // scenarios that slipway or the floor failed, and how
}

func newPage(b *bench) *page { return &page{bench: b, began: time.Now()} }

func (p *page) add(r *result) { p.results = append(p.results, r) }

// write makes RESULTS.md, or CURVES.md when there are only curves, and a file with every run.
func (p *page) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var w strings.Builder
	name, title := "results", "Bench"
	if len(p.bench.scenarios) == 0 {
		name, title = "curves", "Curves"
	}
	fmt.Fprintf(&w, "# %s\n\nMade by `go run ./bench` on %s in %s. README.md says what is fair and what the columns mean.", title, p.began.UTC().Format("2006-01-02"), time.Since(p.began).Round(time.Second))
	if name == "results" && len(p.curves) == 0 {
		w.WriteString(" Time and memory against size are in [CURVES.md](CURVES.md).")
	}
	fmt.Fprintf(&w, "\n\nMachine: %s. %s Seed %d.", machine(p.bench.top), p.bench.diskSays, p.bench.seed)
	for _, peer := range p.bench.peers {
		fmt.Fprintf(&w, " %s: %s.", peer.name(), peer.version())
	}
	w.WriteString("\n")
	if len(p.results) > 0 {
		w.WriteString(summary(p.results))
	}
	for _, why := range p.failed {
		fmt.Fprintf(&w, "\n**Failed**: %s.\n", why)
	}
	for _, why := range p.skipped {
		fmt.Fprintf(&w, "\nLeft out here: %s.\n", why)
	}
	data := map[string]*result{}
	for _, r := range p.results {
		w.WriteString(r.table())
		data[r.scenario.name] = r
	}
	lines := map[string]*drawn{}
	for _, d := range p.curves {
		w.WriteString(d.table())
		lines[d.curve.name] = d
		if err := os.WriteFile(filepath.Join(dir, d.plotName()), []byte(d.svg()), 0o644); err != nil {
			return err
		}
	}
	raw, err := json.MarshalIndent(struct {
		Scenarios map[string]*result `json:"scenarios,omitempty"`
		Curves    map[string]*drawn  `json:"curves,omitempty"`
	}{data, lines}, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, strings.ToUpper(name)+".md"), []byte(w.String()), 0o644),
		os.WriteFile(filepath.Join(dir, name+".json"), append(raw, '\n'), 0o644),
	)
}

// machine describes this one.
func machine(dir string) string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	cpu := "unknown processor"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	var fs unix.Statfs_t
	_ = unix.Statfs(dir, &fs)
	kind := fmt.Sprintf("file system %#x", fs.Type)
	if fs.Type == unix.EXT4_SUPER_MAGIC {
		kind = "ext4"
	}
	var info unix.Sysinfo_t
	_ = unix.Sysinfo(&info)
	return fmt.Sprintf("%d × %s, %d GB, %s, Linux %s, %s", runtime.NumCPU(), cpu,
		uint64(info.Totalram)*uint64(info.Unit)/1e9, kind, unix.ByteSliceToString(u.Release[:]), runtime.Version())
}

// verdict is an error when something failed, or when a planted slowdown was not seen: then nothing that the bench says of steps can be
// believed.
func (p *page) verdict() error {
	if len(p.failed) > 0 {
		return fmt.Errorf("failed: %s", strings.Join(p.failed, "; "))
	}
	for _, r := range p.results {
		m := r.find(r.planted)
		if m == nil {
			continue
		}
		if seen, want := r.seenPlant(m), p.bench.plant.Seconds(); seen < want*0.7 {
			return fmt.Errorf("%s: of the %s that were planted in each step %s were seen: the machine is too loaded (see the load average), or the bench is wrong",
				r.scenario.name, p.bench.plant, seconds(seen))
		}
	}
	return nil
}
