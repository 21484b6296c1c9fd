// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/seed-68981b69/slipway/cache"
)

// Duration is a time as the file has it: a string ("48h") or a whole number of seconds.
type Duration struct{ time.Duration }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	s := strings.Trim(string(text), `"`)
	if s == "" {
		return nil
	}
	if v, err := time.ParseDuration(s); err == nil {
		d.Duration = v
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return fmt.Errorf("invalid duration %q: want for example \"48h\", or a number of seconds", s)
	}
	d.Duration = time.Duration(n) * time.Second
	return nil
}

// DiskSpace is a size as the file has it: a number of bytes, a string with a unit ("512MB", which counts in powers of
// 1024, as BuildKit does), or a part of the disk ("10%").
type DiskSpace struct{ Bytes, Percent int64 }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *DiskSpace) UnmarshalText(text []byte) error {
	s := strings.Trim(string(text), `"`)
	if s == "" {
		return nil
	}
	if n, ok := strings.CutSuffix(s, "%"); ok {
		p, err := strconv.ParseInt(n, 10, 64)
		if err != nil || p < 0 || p > 100 {
			return fmt.Errorf("invalid disk space %q: want 0%% to 100%%", s)
		}
		d.Percent = p
		return nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 {
		return fmt.Errorf("invalid disk space %q: want for example \"20GB\", \"10%%\" or a number of bytes", s)
	}
	d.Bytes = n
	return nil
}

func (d DiskSpace) in(disk cache.Disk) int64 {
	if d.Bytes != 0 || d.Percent == 0 {
		return d.Bytes
	}
	return disk.Percent(d.Percent)
}

// Policies are the rules of garbage collection for a disk, nil for the engine's own. As in BuildKit, limits without rules
// take the place of those in the default rules.
func (o *OCI) Policies(disk cache.Disk) []cache.Policy {
	if len(o.GCPolicies) > 0 {
		list := make([]cache.Policy, 0, len(o.GCPolicies))
		for _, p := range o.GCPolicies {
			reserved := p.ReservedSpace
			if reserved == (DiskSpace{}) {
				reserved = p.KeepBytes
			}
			list = append(list, cache.Policy{
				All: p.All, Filters: p.Filters, KeepDuration: p.KeepDuration.Duration,
				ReservedSpace: reserved.in(disk), MaxUsedSpace: p.MaxUsedSpace.in(disk), MinFreeSpace: p.MinFreeSpace.in(disk),
			})
		}
		return list
	}
	none := DiskSpace{}
	reserved := o.ReservedSpace
	if reserved == none && o.MaxUsedSpace == none && o.MinFreeSpace == none {
		if reserved = o.GCKeepStorage; reserved == none {
			return nil
		}
	}
	return cache.DefaultPoliciesWithin(cache.Policy{
		ReservedSpace: reserved.in(disk), MaxUsedSpace: o.MaxUsedSpace.in(disk), MinFreeSpace: o.MinFreeSpace.in(disk),
	})
}

// KeepStorage sets the limits from the flag of that name: "Reserved[,Free[,Maximum]]", in megabytes.
func (o *OCI) KeepStorage(text string) error {
	var sizes [3]DiskSpace
	parts := strings.Split(text, ",")
	if len(parts) > len(sizes) {
		return fmt.Errorf("%q: want RESERVED[,FREE[,MAXIMUM]] in MB", text)
	}
	for i, p := range parts {
		n, err := strconv.ParseInt(p, 10, 64)
		if err != nil || n < 0 {
			return fmt.Errorf("%q: want RESERVED[,FREE[,MAXIMUM]] in MB", text)
		}
		sizes[i].Bytes = n * 1e6
	}
	o.ReservedSpace, o.MinFreeSpace, o.MaxUsedSpace = sizes[0], sizes[1], sizes[2]
	return nil
}

// levelTrace is below slog's own.
const levelTrace = slog.LevelDebug - 4

// LogLevel is the least important level that is logged, nil when the file does not say.
func (c *Config) LogLevel() (slog.Leveler, error) {
	switch {
	case c.Log.Level != "":
		return ParseLevel(c.Log.Level)
	case c.Trace:
		return levelTrace, nil
	case c.Debug:
		return slog.LevelDebug, nil
	}
	return nil, nil
}

// ParseLevel reads the name of a level as BuildKit has them.
func ParseLevel(name string) (slog.Leveler, error) {
	switch strings.ToLower(name) {
	case "trace":
		return levelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error", "fatal", "panic":
		return slog.LevelError, nil
	}
	return nil, fmt.Errorf("%q is none of trace, debug, info, warn, error", name)
}
