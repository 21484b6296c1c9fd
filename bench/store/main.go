// SPDX-License-Identifier: Apache-2.0

// Command store measures the store (package cache and what it is made of), each figure beside its floor: the least
// work that any program would have to do for the same result, done by plain code in the same run. Own work and floor take
// turns, so that both see the same machine. It prints a table in Markdown.
//
//	go run ./bench/store -out FILE [-dir DIR] [-runs 5] [-only copy,mount]
//
// It needs root, for mounts, and about 8 GB below -dir. All inputs are made from -seed. What a run leaves is moved
// away by rename and deleted at the very end: a mass delete would slow down whatever is measured after it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench store:", err)
		os.Exit(1)
	}
}

// group measures rows that share their inputs. prepare is called once, round as often as asked; what they make lies
// in the bench's directory.
type group struct {
	name    string
	heavy   bool // takes seconds a round: fewer rounds
	prepare func(context.Context, *bench) error
	round   func(context.Context, *bench) error
	// finish ends what prepare has begun; nil is nothing.
	finish func(*bench) error
}

func run(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("store", flag.ContinueOnError)
	out := flags.String("out", "", "write the table to this `file` as well as to standard output")
	dir := flags.String("dir", os.TempDir(), "make the scratch directory in this `directory`")
	runs := flags.Int("runs", 5, "how often each row is measured; heavy ones at most 3 times")
	only := flags.String("only", "", "measure only the groups with these comma-separated `names`")
	seed := flags.Uint64("seed", 1, "seed of the inputs")
	profile := flags.String("profile", "", "write a CPU profile of our own work in the timed parts to this `file`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it needs root, for mounts")
	}
	slog.SetLogLoggerLevel(slog.LevelWarn)
	b := &bench{seed: *seed, samples: map[string]*samples{}, profile: *profile}
	if b.dir, err = os.MkdirTemp(*dir, "slipway-bench-store-"); err != nil {
		return err
	}
	defer func() {
		fmt.Fprintln(os.Stderr, "cleaning", b.dir)
		err = errors.Join(err, b.stopProfile(), os.RemoveAll(b.dir))
	}()
	if err := os.Mkdir(b.path("old"), 0o700); err != nil {
		return err
	}
	loadBefore := loadAverage()
	for _, g := range groups {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), g.name) {
			continue
		}
		rounds := *runs
		if g.heavy {
			rounds = min(rounds, 3)
		}
		if err := b.measure(ctx, g, rounds); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
	}
	to := []io.Writer{os.Stdout}
	if *out != "" {
		f, err := os.Create(*out)
		if err != nil {
			return err
		}
		defer f.Close()
		to = append(to, f)
	}
	return b.print(io.MultiWriter(to...), loadBefore)
}

func (b *bench) measure(ctx context.Context, g group, rounds int) (err error) {
	fmt.Fprintf(os.Stderr, "%s: preparing\n", g.name)
	if g.prepare != nil {
		if err := g.prepare(ctx, b); err != nil {
			return err
		}
	}
	if g.finish != nil {
		defer func() { err = errors.Join(err, g.finish(b)) }()
	}
	for i := range rounds {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", g.name, i+1, rounds)
		// Neither side pays for the other's garbage or dirty pages.
		runtime.GC()
		if err := b.syncDisk(); err != nil {
			return err
		}
		if err := g.round(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// print writes the table.
func (b *bench) print(w io.Writer, loadBefore string) error {
	fmt.Fprintf(w, "# The store's figures beside their floors\n\n")
	fmt.Fprintf(w, "%s, %d processors, %s, seed %d, load average %s before and %s after.\n\n",
		time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU(), runtime.Version(), b.seed, loadBefore, loadAverage())
	fmt.Fprintf(w, "| what | ours min / median / max | floor median | ratio | CPU time, ours / floor | goal | met | the floor's work |\n|---|---|---|---|---|---|---|---|\n")
	for _, r := range rows {
		s := b.samples[r.key]
		if s == nil {
			continue
		}
		if s.skipped != "" {
			fmt.Fprintf(w, "| %s | not measured: %s | | | | %s | | %s |\n", r.what, s.skipped, r.goal, r.floor)
			continue
		}
		for _, list := range [][]time.Duration{s.ours, s.floor, s.oursCPU, s.floorCPU} {
			slices.Sort(list)
		}
		ours := median(s.ours)
		floor, ratio := "–", "–"
		if len(s.floor) > 0 {
			floor = show(median(s.floor))
			ratio = fmt.Sprintf("%.2f", float64(ours)/float64(median(s.floor)))
		}
		cpu := "–"
		if ours, floor := median(s.oursCPU), median(s.floorCPU); ours >= 50*time.Millisecond && floor > 0 { // the kernel counts in ticks
			cpu = fmt.Sprintf("%s / %s = %.2f", show(ours), show(floor), float64(ours)/float64(floor))
		}
		met := "–"
		if r.met != nil {
			met = "**no**"
			if r.met(ours, median(s.floor)) {
				met = "yes"
			}
		}
		fmt.Fprintf(w, "| %s | %s / %s / %s | %s | %s | %s | %s | %s | %s |\n", r.what,
			show(s.ours[0]), show(ours), show(s.ours[len(s.ours)-1]), floor, ratio, cpu, r.goal, met, r.floor)
	}
	fmt.Fprintf(w, "\nPage cache warm, as after a checkout. Both sides end with the data synced to disk where the floor's work says so; where it does not, neither side syncs.\n")
	return nil
}

// show writes a duration with three digits.
func show(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	case d >= time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	default:
		return fmt.Sprintf("%.3g µs", float64(d)/1e3)
	}
}

func median(sorted []time.Duration) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[len(sorted)/2]
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:2], " ")
}

func (b *bench) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir}, parts...)...)
}
