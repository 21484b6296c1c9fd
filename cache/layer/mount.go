// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
)

// StoreInfo says how the store mounts layers that are tars.
type StoreInfo struct {
	// EROFS says that they are mounted as they are. Otherwise they are extracted first.
	EROFS bool
	// Reason says why not; "" when EROFS is set.
	Reason string
	// unsure says that the question must be asked again: the probe could not be written.
	unsure bool
}

// errUnsure is why tryEROFS has no answer.
var errUnsure = errors.New("a small file could not be written")

// Info finds out, once, whether tar layers can be mounted here.
func (s *Store) Info() StoreInfo { return s.probe() }

// probeOnce returns the function that probes until there is an answer, and gives that ever after.
func (s *Store) probeOnce() func() StoreInfo {
	var mu sync.Mutex
	var known *StoreInfo
	return func() StoreInfo {
		mu.Lock()
		defer mu.Unlock()
		if known != nil {
			return *known
		}
		info := s.probeEROFS()
		if info.unsure {
			s.log.Warn("layer store: cannot find out whether EROFS can be mounted", "err", info.Reason)
		} else {
			known = &info
		}
		return info
	}
}

// probeEROFS mounts a tiny layer, detached, and reads its one file.
func (s *Store) probeEROFS() StoreInfo {
	if s.opt.NoEROFS {
		return StoreInfo{Reason: "switched off"}
	}
	if UserXattrs() {
		return StoreInfo{Reason: "the kernel mounts EROFS for root of the host only"}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return StoreInfo{Reason: err.Error()}
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		// EROFS over it and overlayfs over that would be one more than the kernel stacks.
		return StoreInfo{Reason: "the store's directory is on overlayfs"}
	}
	if err := s.tryEROFS(); err != nil {
		return StoreInfo{Reason: err.Error(), unsure: errors.Is(err, errUnsure)}
	}
	return StoreInfo{EROFS: true}
}

func (s *Store) tryEROFS() error {
	tmp, err := s.newTmp()
	if err != nil {
		return fmt.Errorf("%w: %w", errUnsure, err)
	}
	defer s.fs.RemoveAll(tmp)
	content := []byte("slipway\n")
	tarLike := make([]byte, 4096)
	copy(tarLike[erofsBlock:], content)
	img, err := encodeEROFS(index.New([]index.Entry{
		{Path: "probe", Type: index.File, Mode: 0o444, Size: int64(len(content)), Offset: erofsBlock},
	}), int64(len(tarLike)))
	if err != nil {
		return err
	}
	tarPath, imgPath := filepath.Join(tmp, tarFile), filepath.Join(tmp, erofsFile)
	if err := errors.Join(s.writeFile(tarPath, tarLike, false), s.writeFile(imgPath, img, false)); err != nil {
		return fmt.Errorf("%w: %w", errUnsure, err)
	}
	mnt, err := openEROFS(imgPath, tarPath)
	if err != nil {
		return err
	}
	defer unix.Close(mnt)
	fd, err := unix.Openat(mnt, "probe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	f := os.NewFile(uintptr(fd), "probe")
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	if !bytes.Equal(got, content) {
		return errors.New("erofs: a mounted file reads wrong")
	}
	return nil
}

// openEROFS returns a descriptor of a new, detached mount of an image and its tar.
func openEROFS(imgPath, tarPath string) (mnt int, err error) {
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("erofs: %w", err)
	}
	defer unix.Close(fs)
	for _, set := range []func() error{
		func() error { return unix.FsconfigSetString(fs, "source", imgPath) },
		func() error { return unix.FsconfigSetString(fs, "device", tarPath) },
		func() error { return unix.FsconfigSetFlag(fs, "ro") },
		func() error { return unix.FsconfigCreate(fs) },
	} {
		if err := set(); err != nil {
			return -1, fmt.Errorf("mount erofs: %w%s", err, kernelSays(fs))
		}
	}
	mnt, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("mount erofs: %w%s", err, kernelSays(fs))
	}
	return mnt, nil
}

// kernelSays returns the messages waiting in a file system context, to be put behind an error.
func kernelSays(fs int) string {
	var out strings.Builder
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(fs, buf)
		if n <= 0 || err != nil {
			return out.String()
		}
		out.WriteString("; ")
		out.WriteString(strings.TrimSpace(strings.TrimPrefix(string(buf[:n]), "e ")))
	}
}

// Mount returns a directory that shows the layer as overlayfs wants its lower layers: whiteouts are character
// devices 0:0, opaque directories have the xattr. It must not be written to. A layer mounted before is shared. The
// directory is good until Unmount. A held layer is written to disk first, a remote one fetched; a tree that was just committed is there at once.
func (s *Store) Mount(ctx context.Context, id ID) (dir string, err error) {
	s.mu.Lock()
	dir, closed := s.mounts[id], s.closed
	s.mu.Unlock()
	if closed {
		return "", fmt.Errorf("mount layer %s: the store is closed", id)
	}
	if dir != "" {
		return dir, nil
	}
	if dir, err := s.mountUnfinished(id); dir != "" || err != nil {
		return dir, err
	}
	if err := s.Ensure(ctx, id); err != nil {
		return "", err
	}
	if _, err := s.here(ctx, id); err != nil {
		return "", fmt.Errorf("mount: %w", err)
	}
	defer s.locks.lock(id)()
	m, err := s.meta(id)
	if err == nil && m.Remote {
		err = fmt.Errorf("layer %s: %w: it was deleted a moment ago", id, ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("mount: %w", err)
	}
	if m.Tree {
		s.useTree(id)
		return s.path(id, treeDir), nil
	}
	s.mu.Lock()
	dir = s.mounts[id]
	s.mu.Unlock()
	if dir != "" {
		return dir, nil
	}
	if s.probe().EROFS {
		dir, err = s.mountEROFS(ctx, m)
		var no *errNoEROFS
		if !errors.As(err, &no) {
			if err != nil {
				return "", fmt.Errorf("mount layer %s: %w", id, err)
			}
			return dir, nil
		}
		s.log.Info("layer store: extracting a layer", "layer", id, "reason", no.reason)
	}
	dir, err = s.extracted(ctx, m)
	if err != nil {
		return "", fmt.Errorf("mount layer %s: %w", id, err)
	}
	return dir, nil
}

func (s *Store) mountEROFS(ctx context.Context, m *meta) (string, error) {
	img, tar := s.path(m.ID, erofsFile), s.path(m.ID, tarFile)
	if _, err := os.Lstat(img); errors.Is(err, os.ErrNotExist) {
		x, err := s.Index(ctx, m.ID)
		if err != nil {
			return "", err
		}
		b, err := encodeEROFS(x, m.TarSize)
		if err != nil {
			return "", err
		}
		tmp := s.tmpName()
		if err := s.writeFile(tmp, b, true); err != nil {
			return "", err
		}
		if err := s.fs.Rename(tmp, img); err != nil {
			return "", err
		}
	}
	mnt, err := openEROFS(img, tar)
	if err != nil {
		return "", err
	}
	defer unix.Close(mnt)
	dir := filepath.Join(s.dir, "mnt", string(m.ID))
	if err := s.fs.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return "", errors.New("the store is closed")
	}
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("attach mount: %w", err)
	}
	s.mounts[m.ID] = dir
	return dir, nil
}

// extracted returns the directory that a tar has been extracted to, making it when it is not there.
func (s *Store) extracted(ctx context.Context, m *meta) (string, error) {
	dir := s.path(m.ID, extractedDir)
	if _, err := os.Lstat(dir); err == nil {
		return dir, nil
	}
	x, err := s.Index(ctx, m.ID)
	if err != nil {
		return "", err
	}
	f, err := os.Open(s.path(m.ID, tarFile))
	if err != nil {
		return "", err
	}
	defer f.Close()
	tmp, err := s.newTmp()
	if err != nil {
		return "", err
	}
	err = extract(ctx, s.fs, tmp, x, func(e index.Entry) (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, e.Offset, e.Size)), nil
	})
	var size int64
	if err == nil {
		size = treeUsage(tmp)
		s.add(size)
		// The rename must not be on disk before the files are.
		err = s.Sync(ctx)
	}
	if err == nil {
		err = s.fs.Rename(tmp, dir)
	}
	if err != nil {
		s.removeAll(tmp)
		return "", err
	}
	s.noteExtracted(m.ID, size)
	return dir, nil
}

// noteExtracted writes into a layer's info what its extracted directory occupies. Failing that, another process will not know.
func (s *Store) noteExtracted(id ID, size int64) {
	s.mu.Lock()
	old := s.metas[id]
	s.mu.Unlock()
	if old == nil || old.Extracted == size {
		return
	}
	m := *old
	m.Extracted = size
	if err := s.replaceInfo(&m); err != nil {
		s.log.Warn("layer store: write the info of a layer", "layer", id, "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.metas[id] == old {
		s.metas[id] = &m
	}
}

// unmount takes a mount away at once; the kernel finishes when its last user is gone.
func unmount(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// unmountLeftovers takes away the mounts that a killed process has left below the store's directory.
func (s *Store) unmountLeftovers() error {
	dir, err := filepath.EvalSymlinks(s.dir)
	if err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil // no /proc: then nobody has mounted anything for us here either
	}
	points := mountPointsBelow(string(b), dir)
	slices.Reverse(points)
	for _, point := range points {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s, left by an earlier run: %w", point, err)
		}
		s.log.Info("layer store: took away a mount of an earlier run", "path", point)
	}
	return nil
}

// mountPointsBelow returns the mount points below dir, in the order they were mounted.
func mountPointsBelow(mountinfo, dir string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		if point := unescapeOctal(fields[4]); strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	return points
}

// unescapeOctal undoes the kernel's \040 for blanks and the like.
func unescapeOctal(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
