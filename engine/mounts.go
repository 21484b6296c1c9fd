// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// mountsUnder lists the mount points below dir, the innermost first.
func mountsUnder(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("look for mounts under %s: %w", dir, err)
	}
	var points []string
	for _, m := range infos {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			points = append(points, m.Mountpoint)
		}
	}
	slices.Reverse(points) // the kernel lists them in the order in which they were made
	return points, nil
}

// detachMounts takes away what is still mounted below the state directory and was not when the engine was opened. There is nothing when
// everything has gone well; but who deletes the directory afterwards must not delete through a mount that was forgotten.
func (e *Engine) detachMounts() error {
	points, err := mountsUnder(e.root)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range points {
		if i := slices.Index(e.foreign, p); i >= 0 {
			continue
		}
		e.log.Warn("a mount was left and is taken away", "at", p)
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}
