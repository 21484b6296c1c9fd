// SPDX-License-Identifier: Apache-2.0

// Command bench measures slipway side by side with what users would pick instead, in one run on one machine. See
// README.md in this folder for what is fair and what the columns mean.
//
//	go run ./bench -scenario NAME -peers LIST -runs N -out DIR
//
// Every scenario is a file, scenario_NAME.go, that says what it measures. Input is made from -seed. Slipway, its peers and the floor
// (the same physical work with nothing around it) take turns, so that all see the same machine. It needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/seed-68981b69/slipway/engine/buildkitapi/buildctltest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	scenarios []string
	curves    []string
	peers     []string
	profiles  []string
	against   string
	runs      int
	out, dir  string
	seed      uint64
	slipway   string
	plant     time.Duration
	settle    time.Duration
	slow      time.Duration
	build     bool
	mixedMB   int64
	keep      bool
	ownDisk   bool
}

func parseFlags(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	scenarioNames := f.String("scenario", "all", "measure these comma-separated `names`, or all: "+strings.Join(names(), ", "))
	peerList := f.String("peers", "found", "compare with these comma-separated `names`, or with all that are found: "+strings.Join(peerNames(), ", "))
	curveList := f.String("curve", "none", "draw these comma-separated `curves`, all or none: "+strings.Join(curveNames(), ", "))
	profileList := f.String("profile", "", "take these comma-separated `profiles` of slipway's daemon in each scenario, into the directory of -out: cpu, trace, block, heap")
	f.StringVar(&o.against, "against", "", "measure another slipway `program` beside ours, as a peer")
	f.IntVar(&o.runs, "runs", 5, "how often each is measured, after one warm-up")
	f.StringVar(&o.out, "out", "", "write RESULTS.md and results.json into this `directory`")
	f.StringVar(&o.dir, "dir", os.TempDir(), "make the scratch directory in this `directory`; it must not be on overlayfs")
	f.Uint64Var(&o.seed, "seed", 1, "seed of the inputs")
	f.StringVar(&o.slipway, "slipway", "bin/slipway", "the `program` to measure")
	f.DurationVar(&o.plant, "plant", 0, "measure slipway a second time with steps that take this much `longer`, in scenarios that have steps: the bench must see it")
	f.DurationVar(&o.settle, "settle", 100*time.Millisecond, "how long to wait after each call: what daemons do in that `time` counts as processor time")
	f.DurationVar(&o.slow, "slow", 10*time.Second, "a peer is not measured any more when its runs took longer than this `time` together")
	f.BoolVar(&o.ownDisk, "own-disk", true, "measure on fresh ext4 file systems in files below -dir; where those cannot be had, and with false, in directories")
	f.BoolVar(&o.build, "build-peers", false, "build buildctl and buildkitd of the version in go.mod when they are not on PATH")
	f.Int64Var(&o.mixedMB, "mixed-mb", 1000, "size of the content of the export and push scenarios in `MB`")
	f.BoolVar(&o.keep, "keep", false, "leave the scratch directory")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("argument %q: there are only flags", f.Arg(0))
	}
	if o.runs < 1 {
		return o, fmt.Errorf("-runs %d: at least 1", o.runs)
	}
	var err error
	if o.scenarios, err = pick("-scenario", *scenarioNames, names()); err != nil {
		return o, err
	}
	if o.curves, err = pick("-curve", *curveList, curveNames()); err != nil {
		return o, err
	}
	if o.profiles, err = pick("-profile", *profileList, profileNames); err != nil {
		return o, err
	}
	if len(o.profiles) > 0 && o.out == "" {
		return o, errors.New("-profile: needs -out, where the profiles go")
	}
	switch *peerList {
	case "found":
		o.peers = []string{"found"}
	case "", "none":
	default:
		o.peers = strings.Split(*peerList, ",")
		for _, n := range o.peers {
			if !slices.Contains(peerNames(), n) {
				return o, fmt.Errorf("-peers %s: not one of %s", n, strings.Join(peerNames(), ", "))
			}
		}
	}
	return o, nil
}

// pick is the comma-separated list of a flag: "all", "none" or "", or some of the known names.
func pick(flag, list string, known []string) ([]string, error) {
	switch list {
	case "all":
		return known, nil
	case "none", "":
		return nil, nil
	}
	picked := strings.Split(list, ",")
	for _, n := range picked {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("%s %s: not one of %s", flag, n, strings.Join(known, ", "))
		}
	}
	return picked, nil
}

func run(ctx context.Context, args []string) (err error) {
	o, err := parseFlags(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: all that is compared runs containers")
	}
	if o.slipway, err = filepath.Abs(o.slipway); err != nil {
		return err
	}
	if _, err := os.Stat(o.slipway); err != nil {
		return fmt.Errorf("-slipway: %w ('make build' makes it)", err)
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil { // peers are told paths below it, and addresses of sockets need it
		return err
	}
	if o.against != "" {
		if o.against, err = filepath.Abs(o.against); err != nil {
			return err
		}
	}
	if o.build {
		if err := buildPeers(); err != nil {
			return err
		}
	}
	b := &bench{options: o}
	if err := adopt(); err != nil {
		return fmt.Errorf("become the parent of what peers leave behind: %w", err)
	}
	b.adopts = true
	if b.top, err = os.MkdirTemp(o.dir, "slipway-bench-"); err != nil {
		return err
	}
	inputs, err := b.firstPlace(ctx)
	if err != nil {
		return errors.Join(err, removeAll(b.top))
	}
	if !o.keep {
		defer func() { err = errors.Join(err, b.leave(), inputs.close(), removeAll(b.top)) }()
	}
	if err := b.findPeers(ctx); err != nil {
		return err
	}
	page := newPage(b)
	for _, name := range o.scenarios {
		s := find(name)
		fmt.Fprintf(os.Stderr, "bench: %s\n", name)
		result, err := b.measure(ctx, s)
		var cannot *cannotError
		if errors.As(err, &cannot) {
			fmt.Fprintf(os.Stderr, "bench: %s is LEFT OUT: %s\n", name, cannot.why)
			page.skipped = append(page.skipped, fmt.Sprintf("%s: %s", name, cannot.why))
			continue
		}
		switch {
		case err != nil && ctx.Err() != nil:
			return fmt.Errorf("%s: %w", name, err)
		case err != nil:
			fmt.Fprintf(os.Stderr, "bench: %s FAILED: %v\n", name, err)
			page.failed = append(page.failed, fmt.Sprintf("%s: %s", name, strings.ReplaceAll(reason(err), b.top, "…")))
		default:
			page.add(result)
			fmt.Print(result.table())
		}
		if o.out != "" { // as far as it has come
			if err := page.write(o.out); err != nil {
				return err
			}
		}
	}
	for _, name := range o.curves {
		d, err := b.draw(ctx, curves[slices.Index(curveNames(), name)])
		switch {
		case err != nil && ctx.Err() != nil:
			return fmt.Errorf("curve %s: %w", name, err)
		case err != nil:
			fmt.Fprintf(os.Stderr, "bench: curve %s FAILED: %v\n", name, err)
			page.failed = append(page.failed, fmt.Sprintf("curve %s: %s", name, strings.ReplaceAll(reason(err), b.top, "…")))
		default:
			page.curves = append(page.curves, d)
			fmt.Print(d.table())
		}
	}
	if o.out != "" {
		if err := page.write(o.out); err != nil {
			return err
		}
	}
	return page.verdict()
}

// buildPeers makes BuildKit's programs and puts them at the end of PATH.
func buildPeers() error {
	for _, build := range []func() (string, error){buildctltest.Buildctl, buildctltest.Buildkitd} {
		path, err := build()
		if err != nil {
			return err
		}
		if err := os.Setenv("PATH", os.Getenv("PATH")+string(os.PathListSeparator)+filepath.Dir(path)); err != nil {
			return err
		}
	}
	return nil
}
