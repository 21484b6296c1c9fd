// SPDX-License-Identifier: Apache-2.0

// Command torture kills processes that use a store, at random points, and looks at what they leave.
//
//	go run ./cache/cachetest/torture -runs 200 -root /tmp/torture [-slipway bin/slipway -builds 100]
//
// Two kinds of runs. In the first, a child of this program does with the store what an engine does: it commits trees of
// mounted steps, writes layers, packs them, unpacks images with their blobs, names and removes them, puts records, syncs,
// and prunes, several at once, and says what it has finished. Every third of these runs ends in a power cut: files
// that were never synced lose their bytes or their names, and the boot ID changes. In the second, the slipway program
// itself builds (with containers), pulls and removes images, pushes and prunes.
//
// After each kill the store is opened. It is a violation when it does not open; when a record or image that was
// reported finished is lost; when a record names layers whose files are not exactly those that its step makes; when anything that
// Check finds is damaged, or nothing names it after a sweep; when temporary files, mounts, processes or cgroups are left.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"time"
)

func main() {
	if os.Getenv(workerEnv) != "" {
		work()
	}
	runs := flag.Int("runs", 200, "kills of a process that uses the store")
	builds := flag.Int("builds", 0, "kills of slipway itself (needs -slipway)")
	slipway := flag.String("slipway", "", "the slipway `program`")
	root := flag.String("root", "", "an empty or missing `directory` for the stores")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the random numbers")
	verbose := flag.Bool("v", false, "say what each run did")
	flag.Parse()
	if *root == "" || flag.NArg() > 0 || *builds > 0 && *slipway == "" {
		flag.Usage()
		os.Exit(2)
	}
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the store tells of every leftover it takes away
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	t := &torture{rnd: rand.New(rand.NewPCG(*seed, 1)), verbose: *verbose, begun: time.Now()}
	fmt.Printf("seed %d\n", *seed)
	err := t.storeRuns(ctx, filepath.Join(*root, "store"), *runs)
	if err == nil && *builds > 0 {
		err = t.buildRuns(ctx, filepath.Join(*root, "engine"), *slipway, *builds)
	}
	t.report()
	if err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
		os.Exit(1)
	}
	if len(t.violations) > 0 {
		os.Exit(1)
	}
}

// torture counts what happens.
type torture struct {
	rnd     *rand.Rand
	verbose bool
	begun   time.Time

	runs, kills, powerCuts, survivors int
	// acknowledged are results that were reported finished; checked are those that were there and right after a kill, each counted at every
	// kill.
	acknowledged, checked, dropped int
	// inTheMiddle says how often a child was killed with an operation begun and not finished.
	inTheMiddle map[string]int
	violations  []string
}

// violate notes that the store has broken a promise.
func (t *torture) violate(format string, v ...any) {
	s := fmt.Sprintf("run %d: ", t.runs) + fmt.Sprintf(format, v...)
	t.violations = append(t.violations, s)
	fmt.Println("VIOLATION", s)
}

func (t *torture) logf(format string, v ...any) {
	if t.verbose {
		fmt.Printf("run %d: "+format+"\n", append([]any{t.runs}, v...)...)
	}
}

func (t *torture) report() {
	fmt.Printf("%d runs, %d kills (%d with a power cut), %d survivors (ended before the kill), %d violations, %s\n",
		t.runs, t.kills, t.powerCuts, t.survivors, len(t.violations), time.Since(t.begun).Round(time.Second))
	fmt.Printf("%d results acknowledged; %d times one was found right after a kill; %d that were not synced were dropped after power cuts\n",
		t.acknowledged, t.checked, t.dropped)
	fmt.Printf("killed in the middle of: %v\n", t.inTheMiddle)
}

func (t *torture) killedIn(op string) {
	if t.inTheMiddle == nil {
		t.inTheMiddle = map[string]int{}
	}
	t.inTheMiddle[op]++
}
