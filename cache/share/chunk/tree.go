// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// TreeOptions say what of a directory is exported.
type TreeOptions struct {
	// MaxSize is how many bytes of files are exported at most; 0 is no limit. What was used least recently is left out: the later
	// of a file's access and modification times counts. Linux keeps access times to the day (relatime), if it does at all.
	MaxSize int64
	// Since, which may be nil, is asked when everything was read: a file changed at or after the time it returns is left out. It returns
	// false if nobody can have written to the directory while it was read.
	Since func() (t time.Time, ok bool)
}

// clockTick is how far behind the clock the kernel's file times may be.
const clockTick = 20 * time.Millisecond

// AddTree exports the content of a directory. A file that changes while it is read is left out: what others cache in files must stand the
// loss of one, but not a torn one. dir itself must not be a symlink.
func (w *Writer) AddTree(ctx context.Context, dir string, opts TreeOptions) (Ref, Stats, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return Ref{}, Stats{}, fmt.Errorf("export a tree: open %s: %w", dir, err)
	}
	defer unix.Close(root)
	ref, stats, err := w.addTree(ctx, root, opts)
	if err != nil {
		return Ref{}, stats, fmt.Errorf("export tree %s: %w", dir, err)
	}
	return ref, stats, nil
}

func (w *Writer) addTree(ctx context.Context, root int, opts TreeOptions) (Ref, Stats, error) {
	s, err := scan(ctx, root)
	if err != nil {
		return Ref{}, Stats{}, err
	}
	dropped := dropUnused(s.entries, opts.MaxSize)
	m := &manifest{Kind: kindTree, Small: smallFile}
	stats, err := w.store(ctx, m, func(c *cutter) error { return readFiles(ctx, root, s.entries, c, m) })
	if err != nil {
		return Ref{}, stats, err
	}
	if opts.Since != nil {
		if t, ok := opts.Since(); ok {
			dropSince(s.entries, t.Add(-clockTick))
		}
	}
	stats.Dropped, stats.Left = dropped, s.left
	m.Entries = finishEntries(s.entries, m, &stats)
	stats.Changed -= dropped
	ref, err := w.finish(ctx, m, &stats)
	return ref, stats, err
}

// dropUnused marks the files that were used least recently as gone, until the rest have at most limit bytes, and returns how many.
func dropUnused(entries []scanned, limit int64) (dropped int) {
	if limit <= 0 {
		return 0
	}
	var files []int
	for i := range entries {
		if entries[i].Type == typeFile {
			files = append(files, i)
		}
	}
	// The latest first; of those of one hour the small ones, of which more can stay.
	slices.SortFunc(files, func(a, b int) int {
		x, y := &entries[a], &entries[b]
		return cmp.Or(cmp.Compare(y.Used, x.Used), cmp.Compare(x.Size, y.Size), cmp.Compare(a, b))
	})
	var total int64
	for _, i := range files {
		if total += entries[i].Size; total > limit {
			total -= entries[i].Size
			entries[i].gone = true
			dropped++
		}
	}
	return dropped
}

// dropSince marks as gone what has changed since t.
func dropSince(entries []scanned, t time.Time) {
	for i := range entries {
		if e := &entries[i]; e.Type == typeFile && e.state.ctime.Nano() >= t.UnixNano() {
			e.gone = true
		}
	}
}

// readFiles gives the contents of the files to c, the small ones first, and notes where in the stream they are.
func readFiles(ctx context.Context, root int, entries []scanned, c *cutter, m *manifest) error {
	for _, large := range []bool{false, true} {
		for i := range entries {
			e := &entries[i]
			if e.Type != typeFile || e.gone || e.Size >= m.Small != large {
				continue
			}
			if err := context.Cause(ctx); err != nil {
				return err
			}
			e.offset = c.all
			if err := readFile(root, e, c); err != nil {
				return fmt.Errorf("read %q: %w", e.Path, err)
			}
			if large {
				if err := c.flush(); err != nil {
					return err
				}
			}
		}
		if err := c.flush(); err != nil {
			return err
		}
		if !large {
			m.SmallBytes = c.all
		}
	}
	return nil
}

// readFile gives the bytes of one file to c, unless it is not the one any more that was scanned.
func readFile(root int, e *scanned, c *cutter) error {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOATIME,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	fd, err := unix.Openat2(root, e.Path, &how)
	if errors.Is(err, unix.EPERM) { // another's file, and no privilege: its access time will change
		how.Flags &^= unix.O_NOATIME
		fd, err = unix.Openat2(root, e.Path, &how)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		e.gone = true
		return nil
	} else if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), e.Path)
	defer f.Close()
	same := func() (bool, error) {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		return err == nil && stateOf(&st) == e.state, err
	}
	if ok, err := same(); err != nil || !ok {
		e.gone = true
		return err
	}
	if e.Xattrs, err = readXattrs(fd); err != nil {
		return err
	}
	n, err := c.take(f, e.Size)
	if err != nil {
		return err
	}
	ok, err := same()
	if err != nil {
		return err
	}
	e.gone = !ok || n != e.Size
	return nil
}

// finishEntries returns the entries that are left, with what lies between their bytes.
func finishEntries(all []scanned, m *manifest, stats *Stats) []entry {
	var out []entry
	number := make([]int, len(all))
	small, large := int64(0), m.SmallBytes
	for i := range all {
		e := &all[i]
		number[i] = -1
		switch {
		case e.gone:
			stats.Changed++
			continue
		case e.Type == typeHardLink:
			if e.Link = number[e.Link]; e.Link < 0 {
				continue
			}
		case e.Type == typeFile:
			at := &large
			if e.Size < m.Small {
				at = &small
			}
			e.Skip = e.offset - *at
			*at = e.offset + e.Size
			stats.Files++
		}
		number[i] = len(out)
		out = append(out, e.entry)
	}
	return out
}
