// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// The values of Info.Driver.
const (
	DriverOverlay = "overlay"
	DriverCopy    = "copy"
)

// Info says how a Store mounts snapshots.
type Info struct {
	// Driver is DriverOverlay or DriverCopy.
	Driver string
	// Reason says why it is not DriverOverlay; "" when it is.
	Reason string
}

// Info finds out, once, how snapshots can be mounted here.
func (s *Store) Info() Info { return s.probe() }

// probeOnce returns the function that probes until there is an answer, and gives that ever after.
func (s *Store) probeOnce() func() Info {
	var mu sync.Mutex
	var known *Info
	return func() Info {
		mu.Lock()
		defer mu.Unlock()
		if known != nil {
			return *known
		}
		info, err := s.probeOverlay()
		if err != nil { // a full disk, say: whoever mounts something is told
			return Info{Driver: DriverOverlay}
		}
		known = &info
		return info
	}
}

// probeOverlay mounts a tiny overlay with an upper directory where those of steps will be, and replaces a file and a directory in
// it: what a step leaves must be readable as a layer. The error says that there is no answer.
func (s *Store) probeOverlay() (Info, error) {
	dir, err := s.layers.NewUpper(context.Background())
	if err != nil {
		return Info{}, err
	}
	defer s.fs.RemoveAll(dir)
	at := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	for _, d := range []string{at("lower"), at("merged"), at("lower", "d")} {
		if err := s.fs.Mkdir(d, 0o755); err != nil {
			return Info{}, err
		}
	}
	if err := fsys.WriteFile(s.fs, at("lower", "f"), nil, 0o644, false); err != nil {
		return Info{}, err
	}
	if err := tryOverlay(at); err != nil {
		slog.Warn("snapshots are mounted as copies, which takes time and room", "reason", err)
		return Info{Driver: DriverCopy, Reason: err.Error()}, nil
	}
	return Info{Driver: DriverOverlay}, nil
}

func tryOverlay(at func(...string) string) error {
	o := overlay{lowers: []string{at("lower")}, upper: at("upper"), work: at("work")}
	if err := o.mount(at("merged")); err != nil {
		return err
	}
	defer unix.Unmount(at("merged"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err := os.Remove(at("merged", "f")); err != nil {
		return fmt.Errorf("remove a file in an overlay: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(at("upper", "f"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		return fmt.Errorf("overlay leaves no whiteout of a file that is removed (%w)", err)
	}
	if err := os.Remove(at("merged", "d")); err != nil {
		return fmt.Errorf("remove a directory in an overlay: %w", err)
	}
	if err := os.Mkdir(at("merged", "d"), 0o755); err != nil {
		return fmt.Errorf("replace a directory in an overlay: %w", err)
	}
	var value [1]byte
	if _, err := unix.Lgetxattr(at("upper", "d"), layer.OpaqueXattr(), value[:]); err != nil || value[0] != 'y' {
		return fmt.Errorf("overlay leaves no mark on a directory that is replaced (%w)", err)
	}
	return nil
}
