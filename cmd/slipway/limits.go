// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/docker/go-units"

	"github.com/seed-68981b69/slipway/engine"
)

// memorySize is a flag: a number of bytes, written like 512m or 2g.
type memorySize int64

// Set implements pflag.Value.
func (m *memorySize) Set(text string) error {
	n, err := units.RAMInBytes(text)
	if err != nil || n <= 0 {
		return fmt.Errorf("want a size like 512m or 2g")
	}
	*m = memorySize(n)
	return nil
}

// String implements pflag.Value.
func (m *memorySize) String() string {
	if *m == 0 {
		return ""
	}
	return units.BytesSize(float64(*m))
}

// Type implements pflag.Value.
func (m *memorySize) Type() string { return "size" }

// settleLimits takes what the command line does not say about jobs, memory and authorities from the environment, and checks it.
func (a *app) settleLimits() error {
	if text := os.Getenv("SLIPWAY_JOBS"); text != "" && a.jobs == 0 {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return fmt.Errorf("SLIPWAY_JOBS=%s: want a number from 1", text)
		}
		a.jobs = n
	}
	if a.jobs < 0 {
		return fmt.Errorf("--jobs %d: want a number from 1", a.jobs)
	}
	if text := os.Getenv("SLIPWAY_MAX_MEMORY"); text != "" && a.maxMemory == 0 {
		if err := a.maxMemory.Set(text); err != nil {
			return fmt.Errorf("SLIPWAY_MAX_MEMORY=%s: %w", text, err)
		}
	}
	if text := os.Getenv("SLIPWAY_EXTRA_CA"); text != "" && len(a.extraCA) == 0 {
		a.extraCA = filepath.SplitList(text)
		for _, name := range a.extraCA {
			if !filepath.IsAbs(name) { // an engine in the background has another working directory
				return fmt.Errorf("SLIPWAY_EXTRA_CA=%s: want absolute paths", text)
			}
		}
	}
	return nil
}

// limit takes --jobs, --max-memory and --extra-ca, where they are given, over what a configuration file says.
func (a *app) limit(options *engine.Options) {
	if a.jobs != 0 {
		options.Jobs = a.jobs
	}
	if a.maxMemory != 0 {
		options.MaxMemory = int64(a.maxMemory)
	}
	if len(a.extraCA) > 0 {
		options.ExtraCA = a.extraCA
	}
}
